"""What a page draws: counts and sums against plain ones, and everything inside its box."""

from __future__ import annotations

import numpy as np
import pytest

from influence_cli.report.charts import ClassBars, class_bars, histogram

CLASSES = ("ant", "bee", "cat")


def test_histogram_counts_by_label() -> None:
    values, labels = np.array([0.0, 0.1, 0.55, 1.0, 0.9]), np.array([0, 0, 0, 1, 1])
    found = histogram("H", "score", values, labels, CLASSES, (0.0, 1.0), bins=2)
    # The label with the largest values first; one without any example has no line.
    assert found.lines == (("bee", (0, 2), 0.95), ("ant", (2, 1), 0.1))


def test_what_lies_outside_counts_in_the_first_or_last_bin() -> None:
    found = histogram("H", "x", np.array([-5.0, 5.0]), np.array([0, 0]), CLASSES, (-1.0, 1.0), bins=4)
    assert found.lines[0][1] == (1, 0, 0, 1)


def test_values_that_are_all_the_same_have_a_bin() -> None:
    found = histogram("H", "x", np.zeros(3), np.zeros(3, dtype=int), CLASSES, (0.0, 0.0), bins=3)
    assert (found.low, found.high, found.lines[0][1]) == (-0.5, 0.5, (0, 3, 0))


def test_labels_past_the_first_few_make_one_line() -> None:
    values, labels = np.array([0.5, 0.9, 0.1, 0.2]), np.array([0, 1, 2, 2])
    found = histogram("H", "x", values, labels, CLASSES, (0.0, 1.0), bins=10, shown=1)
    assert [(name, sum(counts)) for name, counts, _ in found.lines] == [("bee", 1), ("2 others", 3)]
    assert found.lines[1][2] == 0.2


@pytest.mark.parametrize("seed", range(5))
def test_bars_stay_in_their_box_and_lose_no_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    values, labels = random.normal(size=1000) ** 3, random.integers(0, 3, 1000)
    found = histogram("H", "x", values, labels, CLASSES, (float(values.min()), float(values.max())))
    assert sum(sum(counts) for _, counts, _ in found.lines) == 1000
    for _, counts, _ in found.lines:
        bars = found.bars(counts)
        assert len(bars) == np.count_nonzero(counts)
        assert all(x >= 0 and x + width <= 400.001 and 1 <= height <= 16.001 for x, height, width in bars)
    tallest = max(height for _, counts, _ in found.lines for _, height, _ in found.bars(counts))
    assert tallest == pytest.approx(16)


def test_class_bars_sum_both_signs() -> None:
    values, labels = np.array([1.0, -2.0, 0.5, 0.0, -0.25]), np.array([0, 0, 1, 2, 1])
    found = class_bars("B", "", values, labels, CLASSES)
    assert found.lines == (("ant", -2.0, 1.0), ("bee", -0.25, 0.5))
    assert (found.width(-2.0), found.width(1.0)) == (150, 75)


def test_classes_past_the_first_few_make_one_bar() -> None:
    found = class_bars("B", "", np.array([3.0, -1.0, 2.0]), np.arange(3), CLASSES, shown=1)
    assert found.lines == (("ant", 0.0, 3.0), ("2 others", -1.0, 2.0))


def test_no_influence_has_no_bar() -> None:
    assert class_bars("B", "", np.zeros(3), np.arange(3), CLASSES).lines == ()
    assert ClassBars("B", "", ()).width(1.0) == 0.0
