"""`influence verify --lds`: train without random examples, and predict the losses by influence.

The linear datamodeling score (Park et al. 2023, "TRAK"): a half leaves out many examples, so their effect is larger
than the randomness of a training. In the same run (Engstrom et al. 2025, "MAGIC") nothing is random but which examples
are missing, so a hundredth of them is enough, and the change of a loss has a size to compare with.

With several checkpoints, every number of them is scored by the same retrainings, so the gain of each is a paired
difference: the first 1, 2, … of independent models, and the last ones of a run, which ends in the explained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from influence_cli.config.schema import Config
from influence_cli.influence.ensemble import alone, last_checkpoints, times_of
from influence_cli.influence.example_facts import TestFacts, training_facts
from influence_cli.influence.measure import check_measure
from influence_cli.influence.run_facts import ScoreRecord
from influence_cli.influence.test_selection import Selected
from influence_cli.metrics import bootstrap_change_fits, bootstrap_lds, change_fits, lds
from influence_cli.model.task import Task
from influence_cli.precompute.decide import decide
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankOptions, rank_into_sinks, rank_training
from influence_cli.replay.prepare import REPLAY, prepare_scores
from influence_cli.retrain.random_subsets import PARK, LdsPlan, subset_trainings
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import CHOSEN
from influence_cli.runtime import distributed
from influence_cli.runtime.jobs import turn
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
        actual: [repeats, m, subsets], the measure of each test example after training on each; in the same run, its
            change from that of the run itself.
        scores: [methods, checkpoints, m], Spearman's correlation over the subsets, of the loss averaged over repeats.
        draws: [1,000, methods, checkpoints], mean scores of bootstrap samples of subsets and tests.
        training_seconds: what all trainings took.
        records: what is known of the run of each method, by its name.
        plan: what was trained and measured.
        left_out: how many examples each subset leaves out.
        fits: in the same run: [2, methods, checkpoints, m], Pearson's correlation over the subsets, and the slope of
            actual on predicted through the origin; otherwise None.
        fit_draws: [1,000, 2, methods, checkpoints], their means of the same bootstrap samples; None likewise.
    """

    methods: tuple[str, ...]
    tests: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    scores: np.ndarray
    draws: np.ndarray
    training_seconds: float
    records: dict[str, ScoreRecord]
    plan: LdsPlan = PARK
    left_out: int = 0
    fits: np.ndarray | None = None
    fit_draws: np.ndarray | None = None

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

    def fit(self, method: int, at: int = -1) -> list[tuple[float, float, float]]:
        """Give Pearson's correlation and the slope of a method in the same run, and their 95% intervals; else none."""
        if self.fits is None or self.fit_draws is None:
            return []
        means = self.fits[:, method, at].mean(axis=1)
        return [_interval(float(mean), self.fit_draws[:, k, method, at]) for k, mean in enumerate(means)]

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
    plan: LdsPlan = PARK,
    on_the_fly: bool = False,
    terminal: Terminal | None = None,
) -> Datamodeling:
    """Score methods by how well they rank the losses of trainings without random examples.

    Park et al. 2023, section 2: for test example t, Spearman's correlation over subsets S between Σ_{i∉S}
    influence[t, i] and the mean loss of t over trainings on S. The score of a method is the mean over test examples.
    In the same run the sizes are compared as well.

    Args:
        methods: a config each, by name; they differ in what estimates influence, not in model or data. Their stores
            are prepared here, when the folder of the retrainings is known to fit.
        tasks: the checkpoints.
        retraining: of the run: its training function, its seed, and the retrainings beside its store.
        plan: what is trained and measured.
        on_the_fly: store no gradients.
        terminal: progress.

    Raises:
        InfluenceError: nothing in the config trains, a training that fails, a store that cannot be made, too few
            examples, or a loss without a margin.
    """
    terminal = or_silent(terminal)
    task = tasks[0]
    check_measure(task, plan.measure)
    trainings = subset_trainings(retraining, task, plan)
    split, folder = task.labelled_tests(), trainings.folder
    if plan.tests > len(split):
        terminal.say(f"using all {len(split):,} test examples: there are fewer than {plan.tests:,}")
    for config in methods.values():  # report what cannot be estimated before anything is trained
        if config.curvature.method != REPLAY:
            decide(config, task, Terminal(quiet=True))
    # One of several commands makes the stores while the others start training; a job's processes make them together.
    stores: dict[str, list[Prepared]] = {}
    with turn(folder, wait=False) if distributed.is_first() else nullcontext(enter_result=False) as mine:
        if distributed.from_first(lambda: mine):
            stores = _prepare(methods, tasks, on_the_fly=on_the_fly, terminal=terminal)
    after = trainings.train(terminal)
    generator = np.random.default_rng(seed_of(retraining.seed, CHOSEN))
    chosen = np.sort(generator.choice(len(split), min(plan.tests, len(split)), replace=False))
    actual = after.values[:, :, chosen].swapaxes(1, 2)
    if after.base is not None:
        actual = actual - after.base[chosen, None]
    positions = split.indices[chosen]
    selected = [Selected(int(index), None, int(split.labels[index])) for index in positions]
    if not stores:
        with turn(folder, wait=True) if distributed.is_first() else nullcontext():
            distributed.barrier()
            stores = _prepare(methods, tasks, on_the_fly=on_the_fly, terminal=terminal)
    removed = left_out(trainings.kept, len(task.train))
    sums = [_predictions(stores[name], selected, removed, plan.measure, terminal, name) for name in methods]
    predicted = np.array([values for values, _ in sums])
    mean, (methods_, counts) = actual.mean(axis=0), predicted.shape[:2]
    flat = list(predicted.reshape(methods_ * counts, *mean.shape))
    scores = Datamodeling(
        tuple(methods),
        positions,
        predicted,
        actual,
        np.array([lds(values, mean) for values in flat]).reshape(methods_, counts, -1),
        bootstrap_lds(flat, mean).reshape(-1, methods_, counts),
        after.seconds,
        {name: record for name, (_, record) in zip(methods, sums, strict=True)},
        plan,
        len(task.train) - len(trainings.kept[0]),
    )
    if after.base is None:
        return scores
    fits = np.stack([change_fits(values, mean) for values in flat], axis=1)
    return replace(
        scores,
        fits=fits.reshape(2, methods_, counts, -1),
        fit_draws=bootstrap_change_fits(flat, mean).reshape(-1, 2, methods_, counts),
    )


def left_out(kept: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Say which of n training examples each subset leaves out: [subsets, n], 1 or 0."""
    removed = np.ones((len(kept), n))
    for subset, rows in enumerate(kept):
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
    measure: str,
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
        values, record = _sums(used, selected, removed, measure, terminal)
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
    measure: str,
    terminal: Terminal,
) -> tuple[np.ndarray, ScoreRecord]:
    """Sum influence over what each subset leaves out, from a stream: [tests, subsets]."""
    sums, facts = _Removed(removed), training_facts(stores)
    options = RankOptions(sinks=[sums], measure=measure)
    _, record = rank_into_sinks(
        rank_training(stores, selected, facts=facts, count=1, terminal=terminal, options=options)
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
