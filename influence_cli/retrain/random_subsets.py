"""The trainings of `influence verify --lds`: on random halves, on larger random subsets, or in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from influence_cli.errors import InfluenceError, counted
from influence_cli.influence.measure import LOSS
from influence_cli.model.task import Task
from influence_cli.retrain.from_start import FromStart, from_start
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import (
    DROPPED,
    HALVES,
    MEANING,
    ON_HALVES,
    Again,
    check_whole,
    example_outcomes,
    half,
    job_of,
    measured,
    needed,
    some_rows,
)
from influence_cli.runtime.jobs import Arrays, Job, do_all, open_folder
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal


@dataclass(frozen=True)
class LdsPlan:
    """What is trained and measured for a linear datamodeling score.

    Attributes:
        subsets: M, random subsets of the training examples.
        repeats: R, trainings on each, from scratch; 1 in the same run.
        tests: N, test examples, drawn once.
        left_out: how many examples each subset leaves out; None for half of them.
        measure: of a test example: its ``loss``, or its ``margin`` with the sign changed.
        same_run: every training has the seed, the order and the start of the run itself, and what counts is the change
            from that run. Otherwise every one has a seed of its own.
    """

    subsets: int = 100
    repeats: int = 2
    tests: int = 300
    left_out: int | None = None
    measure: str = LOSS
    same_run: bool = False


# How far a loss may be from that of the checkpoint, in nats, where the same run is trained again.
SAME = 0.01
# As Park et al. have it, with fewer subsets.
PARK = LdsPlan()


@dataclass(frozen=True)
class Measured:
    """What the trainings gave.

    Attributes:
        values: float64 [repeats, subsets, m], the measure of all test examples after each.
        base: float64 [m], after the run itself; None where that was not trained again.
        seconds: what all trainings took.
    """

    values: np.ndarray
    base: np.ndarray | None
    seconds: float


@dataclass(frozen=True)
class SubsetTrainings:
    """Trainings that are ready to be done.

    Attributes:
        folder: of the results, open.
        kept: the rows of each subset, rising.
        train: does what is missing.
    """

    folder: Path
    kept: list[np.ndarray]
    train: Callable[[Terminal], Measured]


def subset_trainings(retraining: Retraining, task: Task, plan: LdsPlan) -> SubsetTrainings:
    """Draw the subsets, and refuse what cannot be trained.

    Raises:
        InfluenceError: nothing in the config trains (for the same run: step by step), a part of the training set, a
            folder of another run, or subsets that leave out none or all.
    """
    check_whole(task)
    n = len(task.train)
    count = n - n // 2 if plan.left_out is None else plan.left_out
    if not 0 < count < n:
        raise InfluenceError(
            f"--drop leaves out {count:,} of {counted(n, 'training example')}",
            "give a share that leaves some in and some out",
        )
    if plan.same_run:
        runs = from_start(retraining, task)
        seed = seed_of(retraining.seed, DROPPED, count)
        dropped = [some_rows(seed, subset, n, count) for subset in range(plan.subsets)]
        kept = [np.delete(np.arange(n), rows) for rows in dropped]
        return SubsetTrainings(runs.folder, kept, partial(_train_in_same_run, runs, dropped, plan))
    again = retraining.again(task)
    is_half = count == n - n // 2
    folder = retraining.folder / ("halves" if is_half else f"without-{count}")
    open_folder(folder, partial(retraining.made_of, task), MEANING)
    seed = seed_of(retraining.seed, HALVES) if is_half else seed_of(retraining.seed, DROPPED, count)
    kept = [
        half(seed, subset, n) if is_half else some_rows(seed, subset, n, n - count) for subset in range(plan.subsets)
    ]
    return SubsetTrainings(folder, kept, partial(_train_on, retraining, again, folder, kept, plan))


def _train_on(
    retraining: Retraining, again: Again, folder: Path, kept: list[np.ndarray], plan: LdsPlan, terminal: Terminal
) -> Measured:
    """Train on each subset, from other seeds each time."""
    task, n = again.task, len(again.task.train)
    keys = [(repeat, subset) for repeat in range(plan.repeats) for subset in range(plan.subsets)]
    what, name = ("halves", "half") if folder.name == "halves" else ("subsets", "subset")
    jobs = {job_of(f"{name}_{subset:05d}", repeat, subset): (repeat, subset) for repeat, subset in keys}

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        repeat, subset = jobs[job]
        seed = seed_of(retraining.seed, ON_HALVES, subset, repeat)
        title = f"subset {subset}, repeat {repeat} (seed {seed}, {len(kept[subset]):,} examples)"
        return again.outcomes(
            retraining.fresh_model(seed, task.device), kept[subset], task.objective.trainer_l2(), seed, title, progress
        )

    terminal.say(
        f"{plan.subsets:,} random {what} of {n:,} training examples; trainings per {name}: {plan.repeats}"
        + ("" if name == "half" else f"; each leaves out {n - len(kept[0]):,}")
    )
    results = do_all(folder, list(jobs), run_one, terminal, f"retraining on {what}", needs=needed(plan.measure))
    values = np.array([measured(arrays, plan.measure) for arrays in results])
    return Measured(values.reshape(plan.repeats, plan.subsets, -1), None, _seconds(results))


def _train_in_same_run(runs: FromStart, dropped: list[np.ndarray], plan: LdsPlan, terminal: Terminal) -> Measured:
    """Run the training again without each set of examples, all else as it was."""
    count, n = len(dropped[0]), len(runs.task.train)
    terminal.say(
        f"the same run {plan.subsets:,} times, each without {count:,} random training examples of {n:,} "
        f"({count / n:.1%}), and once with all"
    )
    (results,) = runs.outcomes(
        dropped, 1, needs=needed(plan.measure), terminal=terminal, what="the same run without some examples"
    )
    base, *values = [measured(arrays, plan.measure) for arrays in results]
    _compare_with_checkpoint(runs, base, plan.measure, terminal)
    return Measured(np.array(values)[None], base, _seconds(results))


def _compare_with_checkpoint(runs: FromStart, base: np.ndarray, measure: str, terminal: Terminal) -> None:
    """Warn where the run with all examples does not end in the checkpoint, whose influence is compared with it."""
    task = runs.task
    if not task.explained:
        return
    own = measured(example_outcomes(task, task.model, runs.tests, task.test_split(), "the checkpoint"), measure)
    largest = float(np.abs(own - base).max())
    if largest > SAME:
        terminal.warn(
            f"the run does not end in the checkpoint: the {measure} of a test example differs by up to {largest:.3g}; "
            "influence train --overwrite makes the checkpoint of this recipe"
        )


def _seconds(results: list[Arrays]) -> float:
    return float(sum(arrays["seconds"] for arrays in results))
