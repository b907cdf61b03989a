"""`influence verify --loo`: retrain without an example, and compare the change of a test loss with its influence.

The smallest change puts a deep network on another path, so this is mostly noise for deep networks: retrain/lds.py has
the measure for them (Bae et al. 2022, "If influence functions are the answer").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.data.split import rows_of
from influence_cli.errors import InfluenceError, counted
from influence_cli.influence.example_facts import TestFacts, TrainingFacts, training_facts
from influence_cli.influence.run_facts import ScoreRecord
from influence_cli.influence.test_selection import Selected
from influence_cli.metrics import intercept, pearson, slope
from influence_cli.model.fingerprint import weights_hash
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankOptions, rank_into_sinks, rank_training
from influence_cli.ranking.sinks import KeptInfluence
from influence_cli.retrain.newton import losses_under, without_each
from influence_cli.retrain.output_layer import AtMinimum, NewtonRecord, at_minimum, by_newton, check_trainable, one_task
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import (
    CHOSEN,
    MEANING,
    WITHOUT,
    job_of,
)
from influence_cli.runtime import distributed
from influence_cli.runtime.jobs import Arrays, Job, do_all, open_folder
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal, or_silent


@dataclass(frozen=True)
class LeftOut:
    """What leaving training examples out does to the loss of one test example.

    Attributes:
        test: the test example.
        rows: int64 [k], rows of the training examples among those in use; most influential first.
        influential: how many of them were chosen for their influence; the rest at random.
        estimated: influence [k].
        actual: the rise of the loss by retraining [k].
    """

    test: TestFacts
    rows: np.ndarray
    influential: int
    estimated: np.ndarray
    actual: np.ndarray

    def fit(self, part: slice = slice(None)) -> tuple[float, float, float]:
        """Give the correlation r, and the slope and intercept of actual on estimated."""
        x, y = self.estimated[part], self.actual[part]
        return pearson(x, y), slope(x, y), intercept(x, y)


@dataclass(frozen=True)
class LeaveOneOut:
    """What leaving training examples out does, and what is known of the run.

    Attributes:
        left_out: one per test example, in order.
        scores: of the run that gave influence.
        newton: of the minimum that Newton steps started from; None where the training function left examples out.
    """

    left_out: list[LeftOut]
    scores: ScoreRecord
    newton: NewtonRecord | None


def leave_one_out(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    *,
    retraining: Retraining,
    count: int,
    repeats: int = 1,
    facts: TrainingFacts | None = None,
    terminal: Terminal | None = None,
) -> LeaveOneOut:
    """Compare influence with retraining without each of some training examples.

    Half of them are the most influential on the test example, half are drawn from the rest. An output layer under a
    convex loss is retrained by Newton steps in float64, from its minimum (but see ``by_newton``). Everything else is
    retrained by the training function, from the checkpoint, with l2·D/(D without it), D what the mean divides by
    (n, if nothing weights it), so that the objective is that of all examples minus one. The change is relative to a
    training with the same seed that leaves nothing out.

    Args:
        stores: what was prepared, for one checkpoint.
        selected: which test examples.
        retraining: how it is trained again.
        count: K, training examples per test example.
        repeats: trainings of each by the training function, averaged.
        facts: of the training examples; read if not given.
        terminal: progress and results.

    Raises:
        InfluenceError: K is larger than the training set, several checkpoints, or a training that fails.
    """
    terminal = or_silent(terminal)
    task = one_task([prepared.task for prepared in stores], "--loo")
    prepared, n = stores[0], len(task.train)
    if not 1 <= count < n:
        hint = f"give a number from 1 to {n - 1}" if n > 1 else "two are needed to train without one of them"
        raise InfluenceError(f"--loo {count}: there {'is' if n == 1 else 'are'} {counted(n, 'training example')}", hint)
    newton = by_newton(prepared, retraining)
    if not newton:
        check_trainable(retraining, selected)
    facts = training_facts(stores) if facts is None else facts
    held = KeptInfluence(len(selected), n)
    tests, scores = rank_into_sinks(
        rank_training(stores, selected, facts=facts, count=1, terminal=terminal, options=RankOptions(sinks=[held]))
    )
    choices = [_choose(values, count, seed_of(retraining.seed, CHOSEN, t)) for t, values in enumerate(held.values)]
    rows = np.unique(np.concatenate(choices))
    record = None
    if newton:
        minimum = at_minimum(prepared, selected, tests, terminal)
        changes, record = _newton_changes(minimum, rows, terminal), minimum.newton
    else:
        titles = [f"without {task.train.title(int(task.train.indices[row]))}" for row in rows]
        omissions = [
            Omission(f"without_{row:07d}", int(row), np.array([row]), title)
            for row, title in zip(rows, titles, strict=True)
        ]
        changes = trained_changes(
            retraining, task, tests, omissions, repeats, terminal, "retraining without one example"
        )
    influential = (count + 1) // 2
    left_out = [
        LeftOut(test, chosen, influential, values[chosen].astype(np.float64), change[np.searchsorted(rows, chosen)])
        for test, chosen, values, change in zip(tests, choices, held.values, changes.T, strict=True)
    ]
    return LeaveOneOut(left_out, scores, record)


def _choose(influence: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose rows: half the most influential, strongest first, half at random from the others."""
    read = np.flatnonzero(np.isfinite(influence))
    most = read[np.argsort(-np.abs(influence[read]), kind="stable")][: (count + 1) // 2]
    rest = np.setdiff1d(read, most)
    random = np.random.default_rng(seed).choice(rest, min(len(rest), count - len(most)), replace=False)
    return np.concatenate([most, np.sort(random)])


def _newton_changes(minimum: AtMinimum, rows: np.ndarray, terminal: Terminal) -> np.ndarray:
    """Give the rise of each test loss without each row, by Newton steps: [rows, tests]."""
    problem, w = minimum.problem, minimum.w
    share = rows[distributed.share(len(rows))]
    change = w.new_zeros(0, len(minimum.tests.targets))
    if len(share):
        with terminal.progress(len(share), "retraining without one example") as advance:
            ws = without_each(problem, w, torch.from_numpy(share).to(w.device), advance)
        change = losses_under(problem, ws, minimum.tests) - losses_under(problem, w[None], minimum.tests)
    return np.concatenate(distributed.gathered(change.cpu().numpy()))


@dataclass(frozen=True)
class Omission:
    """A retraining that leaves something out.

    Attributes:
        name: of its file.
        number: of its claim, < 2³².
        rows: int64, the left-out rows of those in use; empty for none.
        title: for messages, such as ``without training example 17``.
    """

    name: str
    number: int
    rows: np.ndarray
    title: str


def trained_changes(
    retraining: Retraining,
    task: Task,
    tests: Sequence[TestFacts],
    omissions: Sequence[Omission],
    repeats: int,
    terminal: Terminal,
    what: str,
) -> np.ndarray:
    """Give the rise of each test loss with each omission, by the training function.

    It continues from the checkpoint, with l2·D/(D without them), D what the trainer's mean divides by (n, if nothing
    weights it), so that the objective is that of all examples minus some.
    The change is relative to a training with the same seed that leaves nothing out.

    Args:
        retraining: how it is trained again.
        task: the checkpoint.
        tests: positions of the test set.
        omissions: what to leave out.
        repeats: trainings of each, averaged.
        terminal: progress.
        what: the bar's title.

    Returns:
        [omissions, tests].
    """
    again = retraining.again(task)
    folder = retraining.folder / "without"
    weights = {"weights": weights_hash(task.model)}
    open_folder(folder, lambda recorded: retraining.made_of(task, recorded) | weights, MEANING)
    n = len(task.train)
    nothing = Omission("without_none", n, np.empty(0, np.int64), "with all examples")
    jobs = {
        job_of(one.name, repeat, one.number): (repeat, one)
        for repeat in range(repeats)
        for one in (nothing, *omissions)
    }

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        repeat, one = jobs[job]
        kept = np.delete(np.arange(n), one.rows)
        seed = seed_of(retraining.seed, WITHOUT, repeat)
        model = retraining.trained_model(task).train()
        title = f"the training {one.title} (seed {seed})"
        return again.outcomes(
            model, kept, task.objective.trainer_l2(task.objective.without(one.rows, n)), seed, title, progress
        )

    results = do_all(folder, list(jobs), run_one, terminal, what)
    order = rows_of(task.test_split().indices, np.array([test.index for test in tests], dtype=np.int64))
    losses = np.array([arrays["losses"][order] for arrays in results]).reshape(repeats, 1 + len(omissions), len(tests))
    change: np.ndarray = (losses[:, 1:] - losses[:, :1]).mean(axis=0)
    return change
