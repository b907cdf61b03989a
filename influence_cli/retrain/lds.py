"""`influence verify --lds`: train from scratch on random halves, and rank their losses by influence.

The linear datamodeling score (Park et al. 2023, "TRAK"): a half leaves out many examples, so their effect is larger
than the randomness of a training.

With several checkpoints, every number of them is scored by the same retrainings, so the gain of each is a paired
difference: the first 1, 2, … of independent models, and the last ones of a run, which ends in the explained model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from influence_cli.config.schema import Config
from influence_cli.influence.ensemble import alone, last_checkpoints, times_of
from influence_cli.influence.example_facts import TestFacts, training_facts
from influence_cli.influence.run_facts import ScoreRecord
from influence_cli.influence.test_selection import Selected
from influence_cli.metrics import bootstrap_lds, lds
from influence_cli.model.task import Task
from influence_cli.precompute.decide import decide
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankOptions, rank_into_sinks, rank_training
from influence_cli.replay.prepare import REPLAY, prepare_scores
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import (
    CHOSEN,
    HALVES,
    MEANING,
    ON_HALVES,
    check_whole,
    half,
    job_of,
)
from influence_cli.runtime import distributed
from influence_cli.runtime.jobs import Arrays, Job, do_all, open_folder, turn
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal, or_silent


@dataclass(frozen=True)
class Datamodeling:
    """Linear datamodeling scores of several methods.

    Attributes:
        methods: their names.
        tests: int64 [m], positions of the test examples.
        predicted: [methods, checkpoints, m, subsets], the summed influence of what each subset leaves out, by 1, 2, …
            checkpoints.
        actual: [repeats, m, subsets], the loss after training on each.
        scores: [methods, checkpoints, m], Spearman's correlation over the subsets, of the loss averaged over repeats.
        draws: [1,000, methods, checkpoints], mean scores of bootstrap samples of subsets and tests.
        training_seconds: what all trainings took.
        records: what is known of the run of each method, by its name.
    """

    methods: tuple[str, ...]
    tests: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    scores: np.ndarray
    draws: np.ndarray
    training_seconds: float
    records: dict[str, ScoreRecord]

    def mean(self, method: int, at: int = -1) -> tuple[float, float, float]:
        """Give a method's score and its 95% interval, by the checkpoints up to ``at``."""
        return _interval(float(self.scores[method, at].mean()), self.draws[:, method, at])

    def difference(self, method: int, at: int = -1) -> tuple[float, float, float]:
        """Give a method's score minus the first method's, and its 95% interval, from the same draws."""
        mean = float((self.scores[method, at] - self.scores[0, at]).mean())
        return _interval(mean, self.draws[:, method, at] - self.draws[:, 0, at])

    def gain(self, method: int, at: int) -> tuple[float, float, float]:
        """Give the gain of a method's score by checkpoint ``at`` > 0, and its 95% interval, from the same draws."""
        mean = float((self.scores[method, at] - self.scores[method, at - 1]).mean())
        return _interval(mean, self.draws[:, method, at] - self.draws[:, method, at - 1])

    def agreement(self) -> float | None:
        """Give the score of one half of the repeats on the other: how repeatable the losses themselves are."""
        if len(self.actual) < 2:
            return None
        return float(lds(self.actual[::2].mean(axis=0), self.actual[1::2].mean(axis=0)).mean())


def _interval(value: float, draws: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return value, float(low), float(high)


def datamodeling_score(
    methods: Mapping[str, Config],
    tasks: Sequence[Task],
    *,
    retraining: Retraining,
    subsets: int = 100,
    repeats: int = 2,
    tests: int = 300,
    on_the_fly: bool = False,
    terminal: Terminal | None = None,
) -> Datamodeling:
    """Score methods by how well they rank the losses of trainings on random halves.

    Park et al. 2023, section 2: for test example t, Spearman's correlation over subsets S between Σ_{i∉S}
    influence[t, i] and the mean loss of t over trainings on S. The score of a method is the mean over test examples.

    Args:
        methods: a config each, by name; they differ in what estimates influence, not in model or data. Their stores
            are prepared here, when the folder of the retrainings is known to fit.
        tasks: the checkpoints.
        retraining: of the run: its training function, its seed, and the retrainings beside its store.
        subsets: M, random halves of the training examples.
        repeats: R, trainings on each, from scratch.
        tests: N, test examples, drawn once.
        on_the_fly: store no gradients.
        terminal: progress.

    Raises:
        InfluenceError: no training function, one that fails, a store that cannot be made, too few examples.
    """
    terminal = or_silent(terminal)
    task = tasks[0]
    check_whole(task)
    split, n = task.labelled_tests(), len(task.train)
    if tests > len(split):
        terminal.say(f"using all {len(split):,} test examples: there are fewer than {tests:,}")
    again = retraining.again(task)
    for config in methods.values():  # report what cannot be estimated before anything is trained
        if config.curvature.method != REPLAY:
            decide(config, task, Terminal(quiet=True))
    folder = retraining.folder / "halves"
    open_folder(folder, retraining.made_of(task), MEANING)
    # One of several commands makes the stores while the others start training; a job's processes make them together.
    stores: dict[str, list[Prepared]] = {}
    with turn(folder, wait=False) if distributed.is_first() else nullcontext(enter_result=False) as mine:
        if distributed.from_first(lambda: mine):
            stores = _prepare(methods, tasks, on_the_fly=on_the_fly, terminal=terminal)
    halves = [half(seed_of(retraining.seed, HALVES), subset, n) for subset in range(subsets)]
    keys = [(repeat, subset) for repeat in range(repeats) for subset in range(subsets)]
    jobs = {job_of(f"half_{subset:05d}", repeat, subset): (repeat, subset) for repeat, subset in keys}

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        repeat, subset = jobs[job]
        seed = seed_of(retraining.seed, ON_HALVES, subset, repeat)
        what = f"subset {subset}, repeat {repeat} (seed {seed}, {n // 2:,} examples)"
        return again.outcomes(
            retraining.fresh_model(seed, task.device), halves[subset], task.objective.trainer_l2(), seed, what, progress
        )

    terminal.say(f"{subsets:,} random halves of {n:,} training examples; trainings per half: {repeats}")
    results = do_all(folder, list(jobs), run_one, terminal, "retraining on halves")
    generator = np.random.default_rng(seed_of(retraining.seed, CHOSEN))
    chosen = np.sort(generator.choice(len(split), min(tests, len(split)), replace=False))
    actual = np.array([arrays["losses"][chosen] for arrays in results])
    actual = actual.reshape(repeats, subsets, len(chosen)).swapaxes(1, 2)
    removed = left_out(halves, n)
    positions = split.indices[chosen]
    selected = [Selected(int(index), None, int(split.labels[index])) for index in positions]
    if not stores:
        with turn(folder, wait=True) if distributed.is_first() else nullcontext():
            distributed.barrier()
            stores = _prepare(methods, tasks, on_the_fly=on_the_fly, terminal=terminal)
    predictions = [_predictions(stores[name], selected, removed, terminal, name) for name in methods]
    predicted = np.array([sums for sums, _ in predictions])
    mean, (methods_, counts) = actual.mean(axis=0), predicted.shape[:2]
    flat = list(predicted.reshape(methods_ * counts, *mean.shape))
    return Datamodeling(
        tuple(methods),
        positions,
        predicted,
        actual,
        np.array([lds(values, mean) for values in flat]).reshape(methods_, counts, -1),
        bootstrap_lds(flat, mean).reshape(-1, methods_, counts),
        float(sum(arrays["seconds"] for arrays in results)),
        {name: record for name, (_, record) in zip(methods, predictions, strict=True)},
    )


def left_out(halves: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Say which of n training examples each half leaves out: [subsets, n], 1 or 0."""
    removed = np.ones((len(halves), n))
    for subset, rows in enumerate(halves):
        removed[subset, rows] = 0
    return removed


def _prepare(
    methods: Mapping[str, Config], tasks: Sequence[Task], *, on_the_fly: bool, terminal: Terminal
) -> dict[str, list[Prepared]]:
    return {name: prepare_scores(config, tasks, terminal, on_the_fly=on_the_fly) for name, config in methods.items()}


def _predictions(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    removed: np.ndarray,
    terminal: Terminal,
    name: str,
) -> tuple[np.ndarray, ScoreRecord]:
    """Sum a method's influence over what each subset leaves out, by 1, 2, … checkpoints: [checkpoints, tests, subsets].

    Scores that add up over checkpoints (independent models, TracIn) take one scan of each store. For SOURCE another
    checkpoint changes the part of the others, so it takes one scan of each store in use per number of checkpoints.
    """
    count, records = len(stores), list[ScoreRecord]()

    def sums(used: Sequence[Prepared], what: str) -> np.ndarray:
        terminal.say(f"{name}: influence on {len(selected):,} test examples{what}")
        values, record = _sums(used, selected, removed, terminal)
        records.append(record)
        return values

    ensemble = stores[0].settings.ensemble
    if ensemble == "source":
        predictions = [
            sums(last_checkpoints(stores, last), f", by the last {last} checkpoints") for last in range(1, count + 1)
        ]
        return np.array(predictions), records[-1]
    parts = []
    for number, prepared in enumerate(stores):
        single = replace(prepared, task=replace(prepared.task, explained=True))
        parts.append(sums([alone(single)], f", checkpoint {number + 1} of {count}" if count > 1 else ""))
    record = replace(records[-1], stores=tuple(each.stores[0] for each in records))
    if ensemble == "tracin":
        times = [times_of(last_checkpoints(stores, last)) for last in range(1, count + 1)]
        return np.array([np.tensordot(weights, parts[count - len(weights) :], axes=1) for weights in times]), record
    return np.cumsum(parts, axis=0) / np.arange(1, count + 1)[:, None, None], record


def _sums(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    removed: np.ndarray,
    terminal: Terminal,
) -> tuple[np.ndarray, ScoreRecord]:
    """Sum influence over what each subset leaves out, from a stream: [tests, subsets]."""
    sums, facts = _Removed(removed), training_facts(stores)
    _, record = rank_into_sinks(
        rank_training(stores, selected, facts=facts, count=1, terminal=terminal, options=RankOptions(sinks=[sums]))
    )
    return np.concatenate(sums.parts), record


class _Removed:
    """Takes the numbers of ``rank_training`` and keeps their sums over what each subset leaves out.

    Attributes:
        parts: [tests, subsets] of each group of test examples.
    """

    def __init__(self, removed: np.ndarray) -> None:
        self._removed = removed
        self.parts: list[np.ndarray] = []

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Take the next test examples."""
        self.parts.append(np.zeros((len(tests), len(self._removed))))

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take their influence [m, b] on a range of training examples."""
        self.parts[-1] += values @ self._removed[:, where].T
