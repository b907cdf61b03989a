"""What a page draws: counts and sums against plain ones, and everything inside its box."""

from __future__ import annotations

import re

import numpy as np
import pytest

from influence_cli.report.charts import ClassBars, Scatter, class_bars, histogram, round_numbers, scatter

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


def places(found: Scatter, number: int) -> np.ndarray:
    """Read the ends of a kind's marks back from its SVG path."""
    starts = re.findall(r"M(-?[\d.]+) (-?[\d.]+)", found.path(number))
    # A cross begins at its lower left.
    corners = np.array(starts, dtype=np.float64).reshape(-1, 2)
    return corners + np.array([2 * number, -2 * number])


@pytest.mark.parametrize("seed", range(5))
def test_points_stand_where_their_numbers_say_and_in_the_box(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y, own = random.uniform(5, 90, 300), random.normal(size=300) ** 3, random.random(300) < 0.3
    found = scatter("S", "", ("x", "y"), x, y, [("a", own), ("b", ~own)], (float(x.min()), float(x.max())))
    assert [len(points) for _, points in found.kinds] == [own.sum(), (~own).sum()]
    for number, mask in enumerate((own, ~own)):
        drawn, order = places(found, number), np.argsort(y[mask], kind="stable")
        assert drawn[:, 0] == pytest.approx([found.right(value) for value in x[mask][order]], abs=0.06)
        assert drawn[:, 1] == pytest.approx([found.down(value) for value in y[mask][order]], abs=0.06)
        assert (drawn >= 2).all()
        assert (drawn <= [398, 238]).all()
    # Both axes rise to the right and upwards, and the zero line is between the ends.
    assert found.right(80) > found.right(10)
    assert found.down(1) < found.down(0) < found.down(-1)
    for axis, size in (("across", 400), ("up", 240)):
        ticks = found.ticks(axis)
        assert 2 <= len(ticks) <= 8
        assert all(0 <= at <= size for at, _ in ticks)


def test_of_too_many_points_the_ends_are_drawn() -> None:
    random = np.random.default_rng(0)
    x, y = random.random(5000), random.normal(size=5000)
    own = np.arange(5000) < 4999
    found = scatter("S", "", ("x", "y"), x, y, [("a", own), ("b", ~own)], (0.0, 1.0), drawn=100)
    a, b = (np.array([value for _, value in points]) for _, points in found.kinds)
    assert (len(a), len(b)) == (99, 1)
    assert (a.min(), a.max()) == (y[own].min(), y[own].max())
    assert float(np.median(a)) == pytest.approx(float(np.median(y)), abs=0.1)


def test_no_influence_at_one_distance_is_drawn_too() -> None:
    mask = np.array([True, False])
    found = scatter("S", "", ("x", "y"), np.array([3.0, 3.0]), np.zeros(2), [("a", mask), ("b", ~mask)], (3.0, 3.0))
    assert (found.right(3.0), found.down(0.0)) == pytest.approx((200, 120))
    empty = scatter("S", "", ("x", "y"), np.zeros(2), np.zeros(2), [("a", mask & ~mask), ("b", ~mask)], (0.0, 1.0))
    assert (empty.path(0), len(empty.kinds[1][1])) == ("", 1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (18.3, 61.0, [20, 30, 40, 50, 60]),
        (-2.1e-3, 4.2e-3, [-0.002, -0.001, 0, 0.001, 0.002, 0.003, 0.004]),
        (-1e-41, 3e-41, [-1e-41, 0, 1e-41, 2e-41, 3e-41]),
        (-7e5, 1e6, [-5e5, 0, 5e5, 1e6]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert round_numbers(low, high) == pytest.approx(expected, rel=1e-9, abs=0)
