"""`influence verify --top`: train without a test example's strongest helpful images, and without random ones.

The rise of the loss says what influence finds, whatever the scores look like: where it finds nothing, that of random
images is as large. Brittleness tests (Ilyas et al. 2022, "Datamodels", section 4) count flipped predictions instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influence_cli.data.split import Split, rows_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TestFacts, training_facts
from influence_cli.influence.measure import LOSS
from influence_cli.influence.run_facts import ScoreRecord
from influence_cli.influence.test_selection import Selected, at_position
from influence_cli.metrics import bootstrap_both_ways
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankOptions, rank_into_sinks, rank_training
from influence_cli.ranking.sinks import KeptInfluence
from influence_cli.retrain.from_start import FromStart
from influence_cli.retrain.training import CHOSEN, DROPPED, measured, needed, some_rows
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal, or_silent


@dataclass(frozen=True)
class StrongestLeftOut:
    """What training without the strongest helpful images does to each test example.

    A rise is that of the loss, or of the margin with the sign changed.

    Attributes:
        tests: the test examples.
        rows: int64 [m, k], rows of the images left out for each, the strongest first.
        estimated: [m], their summed influence: the rise that it predicts.
        actual: [repeats, m], the rise after training without them.
        random: [repeats, m], the rise after training without as many random ones: the mean over m draws, each of
            which is measured on all test examples.
        measure: ``loss`` or ``margin``.
        scores: what is known of the run that gave influence.
        seconds: what all trainings took.
    """

    tests: list[TestFacts]
    rows: np.ndarray
    estimated: np.ndarray
    actual: np.ndarray
    random: np.ndarray
    measure: str
    scores: ScoreRecord
    seconds: float

    def means(self) -> dict[str, tuple[float, float, float]]:
        """Give the mean actual and random rise and their difference, each with its 95% interval.

        The bootstrap draws test examples and repeats, the same for all three.
        """
        values = np.array([self.actual, self.random, self.actual - self.random])
        low, high = np.quantile(bootstrap_both_ways(values), (0.025, 0.975), axis=0)
        rows = zip(values.mean(axis=(1, 2)).tolist(), low.tolist(), high.tolist(), strict=True)
        return dict(zip(("actual", "random", "difference"), rows, strict=True))


def drawn_over_classes(split: Split, count: int, seed: int) -> list[Selected]:
    """Draw labelled test examples of as many classes as possible, in the order of the set; all if there are fewer."""
    labels = split.labels[split.indices]
    generator = np.random.default_rng(seed_of(seed, CHOSEN))
    turn, order = np.empty(len(labels), dtype=np.int64), generator.permutation(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    # The first of every class come before the second ones; the classes in random order.
    first = np.lexsort((generator.random(len(labels)), turn))[:count]
    return [at_position(split, int(index)) for index in np.sort(split.indices[first])]


def check_positions(selected: Sequence[Selected], split: Split) -> None:
    """Refuse test examples that are not measured after a training: image files, and other labels than the set's."""
    if any(item.file is not None for item in selected):
        raise InfluenceError(
            "--top measures test examples of the config, not image files", "give indices of the test set"
        )
    for item in selected:
        if item.index is not None and item.label != int(split.labels[item.index]):
            raise InfluenceError(f"--top measures the label of the test set, but {split.title(item.index)} has another")


def without_strongest(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    *,
    runs: FromStart,
    count: int,
    repeats: int = 1,
    measure: str = LOSS,
    terminal: Terminal | None = None,
) -> StrongestLeftOut:
    """Train without the ``count`` images of largest influence on each test example, and without random ones.

    Every training has the seed and the start of one with all images, to which the rise is relative: both arms are
    paired. By a training function the objective is that of all examples minus some.

    Args:
        stores: what was prepared for each checkpoint.
        selected: which test examples, by position.
        runs: trains from the start.
        count: k, images left out.
        repeats: trainings of each, from other seeds.
        measure: ``loss`` or ``margin``.
        terminal: progress.

    Raises:
        InfluenceError: fewer than k images help a test example, k is not below n, or a training fails.
    """
    terminal = or_silent(terminal)
    task, facts = runs.task, training_facts(stores)
    n, held = len(task.train), KeptInfluence(len(selected), len(task.train))
    options = RankOptions(sinks=[held], measure=measure)
    tests, scores = rank_into_sinks(
        rank_training(stores, selected, facts=facts, count=1, terminal=terminal, options=options)
    )
    rows = np.array([_strongest(values, count, test) for values, test in zip(held.values, tests, strict=True)])
    estimated = np.take_along_axis(held.values.astype(np.float64), rows, axis=1).sum(axis=1)
    seed = seed_of(runs.retraining.seed, DROPPED, count)
    random = [some_rows(seed, number, n, count) for number in range(len(tests))]
    terminal.say(
        f"trainings from the start: {repeats} with all images, {repeats * len(tests)} without the {count:,} strongest "
        f"of a test example, {repeats * len(random)} without {count:,} random ones"
    )
    results = runs.outcomes(
        [*rows, *random], repeats, needs=needed(measure), terminal=terminal, what="retraining without some images"
    )
    order = rows_of(task.test_split().indices, np.array([test.index for test in tests], dtype=np.int64))
    values = np.array([[measured(arrays, measure)[order] for arrays in of_repeat] for of_repeat in results])
    rises = values[:, 1:] - values[:, :1]
    number = np.arange(len(tests))
    return StrongestLeftOut(
        tests,
        rows,
        estimated,
        rises[:, number, number],
        rises[:, len(tests) :].mean(axis=1),
        measure,
        scores,
        float(sum(arrays["seconds"] for of_repeat in results for arrays in of_repeat)),
    )


def _strongest(influence: np.ndarray, count: int, test: TestFacts) -> np.ndarray:
    """Give the rows of the largest influence, the largest first; ties by position."""
    known = np.where(np.isfinite(influence), influence, -np.inf)
    helpful = int((known > 0).sum())
    if helpful < count:
        raise InfluenceError(
            f"--top {count}: only {helpful:,} training images help {test.title()}", "leave out fewer: a smaller --top"
        )
    return np.argsort(-known, kind="stable")[:count]
