"""Which test examples a page of many shows, what hurts most of them, and which labels look wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_cli.config.schema import LossConfig
from influence_cli.influence import example_facts
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.scores import strongest
from influence_cli.influence.test_selection import Selected
from influence_cli.pages.doubts import label_doubts
from influence_cli.pages.overview import Collected, confusions, most_hurting, spread_over_classes
from influence_cli.ranking.rank import RankedGroup

PLAIN = LossConfig(factory="cross_entropy")


def selected(labels: list[int]) -> list[Selected]:
    return [Selected(100 + place, None, label) for place, label in enumerate(labels)]


def test_a_few_are_all_shown() -> None:
    assert spread_over_classes(selected([0] * 20)) is None


def test_ten_are_spread_over_the_labels() -> None:
    # 30 of label 0, then 3 of label 1 and 2 of label 2.
    chosen = spread_over_classes(selected([0] * 30 + [1] * 3 + [2] * 2))
    assert chosen == {100, 101, 102, 103, 104, 130, 131, 132, 133, 134}
    # The first one of each of 25 labels comes before the second of any.
    assert spread_over_classes(selected([number % 25 for number in range(50)])) == set(range(100, 110))


def test_files_are_chosen_too() -> None:
    files = [Selected(None, Path(f"{number}.png"), None) for number in range(30)]
    assert spread_over_classes(files) == {f"{number}.png" for number in range(10)}


def facts_of_test(index: int, label: int, predicted: int) -> example_facts.TestFacts:
    return example_facts.TestFacts(index, None, label, predicted, label, 1.0, 0.9, 0.3)


def test_counts_are_over_all_groups_and_galleries_over_the_chosen() -> None:
    values = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    tests = [facts_of_test(number, number % 2, 2) for number in range(6)]
    collected = Collected(3, 40, {1, 4})
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        collected.held.begin(tests[part])
        collected.held.add(slice(0, 40), values[part])
        collected.take(RankedGroup(tests[part], [strongest(row, 15) for row in values[part]]))
    worst = np.argsort(values, axis=1, kind="stable")[:, :10]
    counts = np.bincount(worst.ravel(), minlength=40)
    assert np.array_equal(collected.hurts, counts)
    assert [counts[row] for row in most_hurting(collected)] == sorted(counts[counts > 0], reverse=True)[:20]
    assert [test.index for test in collected.group.tests] == [1, 4]
    assert np.array_equal(collected.held.values[:2], values[[1, 4]])
    assert len(collected.everyone) == 6
    assert confusions(collected.everyone, ["a", "b", "c"]) == [("a", "c", 3), ("b", "c", 3)]


def training(predicted: list[int], losses: list[float]) -> TrainingFacts:
    n = len(predicted)
    return TrainingFacts(
        np.arange(n),
        np.zeros(n, dtype=np.int64),
        np.empty((0, 3), dtype=np.float32),
        np.array(losses, dtype=np.float32),
        np.ones(n, dtype=bool),
        np.array(predicted),
    )


@pytest.mark.parametrize(
    ("predicted", "losses", "loss", "wrong", "words"),
    [
        # Nine of ten labels are predicted; the tenth has a probability of e⁻³.
        ([0] * 9 + [1], [0.1] * 9 + [3.0], PLAIN, [9], "predicts 90.0% of the training labels"),
        # A probability of e⁻¹ is no clear case; of another loss the number says nothing.
        ([0] * 9 + [1], [0.1] * 9 + [1.0], PLAIN, [], "less than 10%"),
        ([0] * 9 + [1], [0.1] * 9 + [1.0], LossConfig(factory="hinge"), [9], "another class. A doubt"),
        # A model that has learned little, and one that has memorised everything, mark nothing.
        ([0] * 7 + [1] * 3, [3.0] * 10, PLAIN, [], "predicts only 70% of them"),
        ([0] * 10, [9.0] * 10, PLAIN, [], "predicts all of them, wrong ones included"),
    ],
)
def test_labels_look_wrong_only_to_a_model_that_can_tell(
    predicted: list[int], losses: list[float], loss: LossConfig, wrong: list[int], words: str
) -> None:
    doubts = label_doubts(training(predicted, losses), loss)
    assert np.flatnonzero(doubts.wrong).tolist() == wrong
    assert words in doubts.why
    assert doubts.weighed == (sum(predicted) in (1,))
