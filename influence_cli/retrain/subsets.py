"""`influence select`: which training images the test set does not need, and the result of training without them.

The usefulness of a training example is its mean influence on the test examples: the rise of their mean loss if it is
removed. The least useful are left out first; below zero, removing helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from influence_cli.data.split import take
from influence_cli.errors import InfluenceError
from influence_cli.model.task import Task
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import (
    CHOSEN,
    KEPT,
    MEANING,
    check_whole,
)
from influence_cli.runtime.jobs import Arrays, Job, do_all, open_folder
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal, or_silent

# Ways to choose the examples to leave out; ``all`` leaves nothing out.
BY = ("influence", "loss", "random")
EVERYTHING = "all"


@dataclass(frozen=True)
class Kept:
    """Test accuracy after training on the examples that one way to choose keeps.

    Attributes:
        by: the way.
        examples: how many are kept.
        accuracies: float64 [repeats], one per training; the same seeds for every way.
        losses: float64 [repeats], the mean loss of the test examples, in its units.
    """

    by: str
    examples: int
    accuracies: np.ndarray
    losses: np.ndarray


def kept_rows(least_useful_first: np.ndarray, keep: float) -> np.ndarray:
    """Leave out the first 1 − keep of an order of all n rows.

    Returns:
        The other rows, rising; their number is keep · n, rounded to the nearest.

    Raises:
        InfluenceError: none would be kept, or none left out.
    """
    n = len(least_useful_first)
    count = round(keep * n)
    if not 0 < count < n:
        raise InfluenceError(
            f"--keep {keep:g} of {n:,} training examples keeps {'none' if count == 0 else 'all'}",
            "give a share that leaves some in and some out, such as --keep 0.8",
        )
    return np.sort(least_useful_first[n - count :])


def order_by(by: str, usefulness: np.ndarray, losses: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Order the training examples, first the ones to leave out; every class loses the same share; ties by position.

    Otherwise one class would lose most: the mean test gradient depends on classes, and the effects of many removals
    from one class do not add up like those of single ones.

    Args:
        by: ``influence``: the least useful; ``loss``: the largest loss; ``random``.
        usefulness: mean influence on the test examples [n].
        losses: of the training examples [n].
        labels: int64 [n].
        seed: of ``random``.
    """
    draws = np.random.default_rng(seed).random(len(losses))
    value = {"influence": usefulness, "loss": -losses, "random": draws}[by]
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        share[members[np.argsort(value[members], kind="stable")]] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((value, share))


def split_tests(task: Task, seed: int) -> tuple[Task, Task]:
    """Divide the test set at random into halves: one to choose by, one to measure on.

    Accuracy on the examples used for the choice would be too optimistic.

    Raises:
        InfluenceError: fewer than two test examples.
    """
    test = task.labelled_tests()
    if len(test) < 2:
        raise InfluenceError("--retrain needs at least two test examples: one to choose by, one to measure on")
    order = np.random.default_rng(seed_of(seed, CHOSEN)).permutation(len(test))
    halves = [np.sort(test.indices[part]) for part in np.array_split(order, 2)]
    first, second = (replace(task, test=take(test, part)) for part in halves)
    return first, second


def retrain_kept(
    retraining: Retraining,
    task: Task,
    orders: Callable[[str, int], np.ndarray],
    keep: float,
    repeats: int,
    terminal: Terminal | None = None,
) -> list[Kept]:
    """Train from scratch on all examples and on those that each way to choose keeps, and measure test accuracy.

    Args:
        retraining: how it is trained again.
        task: its test examples are used for measuring.
        orders: the order of the training rows, by way and repeat.
        keep: share to keep.
        repeats: trainings of each, with different seeds.
        terminal: progress.

    Raises:
        InfluenceError: no training function, one that fails, or a training set of which only a part is listed.
    """
    terminal = or_silent(terminal)
    check_whole(task)
    again = retraining.again(task)
    kept = {
        (by, repeat): np.arange(len(task.train)) if by == EVERYTHING else kept_rows(orders(by, repeat), keep)
        for by in (EVERYTHING, *BY)
        for repeat in range(repeats)
    }
    digest = xxhash.xxh3_64_hexdigest(np.concatenate(list(kept.values())).tobytes())
    folder = retraining.folder / f"kept-{digest[:8]}"
    open_folder(folder, retraining.made_of(task), MEANING)
    jobs = {Job(f"{by}_{repeat}", number): (by, repeat) for number, (by, repeat) in enumerate(kept, start=1)}

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        by, repeat = jobs[job]
        seed, rows = seed_of(retraining.seed, KEPT, repeat), kept[by, repeat]
        what = f"what {by} keeps, repeat {repeat} (seed {seed}, {len(rows):,} examples)"
        return again.outcomes(
            retraining.fresh_model(seed, task.device), rows, task.objective.trainer_l2(), seed, what, progress
        )

    results = dict(
        zip(kept, do_all(folder, list(jobs), run_one, terminal, "retraining on the kept examples"), strict=True)
    )
    return [
        Kept(
            by,
            len(kept[by, 0]),
            np.array([results[by, repeat]["right"].mean() for repeat in range(repeats)]),
            np.array([results[by, repeat]["losses"].mean() for repeat in range(repeats)]),
        )
        for by in (EVERYTHING, *BY)
    ]


def compare_kept(kept: Sequence[Kept]) -> str:
    """Say in one sentence how leaving out by influence compares with the other ways."""
    means = {each.by: 100 * float(each.accuracies.mean()) for each in kept}
    losses = {each.by: float(each.losses.mean()) for each in kept}
    best = max(BY, key=lambda by: means[by])
    rest = ", ".join(f"{by} {means[by]:.1f}% (loss {losses[by]:.3f})" for by in (EVERYTHING, *BY))
    lead = "influence chooses best here" if best == "influence" else f"{best} chooses better than influence here"
    return f"{lead}: test accuracy {rest}"
