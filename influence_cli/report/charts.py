"""Charts: curves, histograms, bars and scatter plots, each with its axes, series and notes.

Two renderers draw them: the template of a page, which takes the points of an SVG from here, and plot.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OTHERS = "others"


@dataclass(frozen=True)
class Chart:
    """Curves over shares, such as the share of wrong labels found by the share of examples checked.

    Attributes:
        heading: of the chart.
        x: what the horizontal axis counts, from 0 to the largest x of all curves.
        y: what the vertical axis counts, from 0 to 1.
        curves: per name, (x, y) pairs with rising x; the first is drawn strongest, the fifth and later look the same.
        ticks: the labels of the five marks of the horizontal axis, if x is not a share.
    """

    heading: str
    x: str
    y: str
    curves: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    ticks: tuple[str, ...] = ()

    @property
    def span(self) -> float:
        """Give the largest x."""
        return max((x for _, points in self.curves for x, _ in points), default=1.0) or 1.0

    def path(self, points: tuple[tuple[float, float], ...]) -> str:
        """Place a curve in a box 400 wide and 200 high, y upwards: the points of an SVG polyline."""
        return " ".join(f"{400 * x / self.span:.1f},{200 * (1 - y):.1f}" for x, y in points)


@dataclass(frozen=True)
class Layer:
    """Some of the values of a histogram, drawn over the layers before.

    Attributes:
        name: of these values.
        tone: ``plain``, ``marked``, ``helpful`` or ``harmful``.
        counts: of each line, the counts of all bins.
    """

    name: str
    tone: str
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Histogram:
    """How often each score occurs: one row of bars per label, over one common axis.

    Attributes:
        heading: of the chart.
        x: what the axis counts.
        low: where the first bin begins.
        high: where the last bin ends.
        lines: per label, the counts of all bins and the median.
        notes: per line, the text beside it; a page has none, because it shows the count and the median.
        layers: for a plot, the parts of its bars; a page has one bar for all.
    """

    heading: str
    x: str
    low: float
    high: float
    lines: tuple[tuple[str, tuple[int, ...], float], ...]
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()

    def bars(self, counts: tuple[int, ...]) -> list[tuple[float, float, float]]:
        """Place the bars of a row in a box 400 wide and 16 high: x, height and width of each bar that is not empty.

        Heights are log(1 + count), relative to the largest of all rows: one wrong label is visible next to thousands of
        right ones.
        """
        most = np.log1p(max(max(counted) for _, counted, _ in self.lines)) or 1.0
        width = 400 / len(counts)
        return [
            (number * width, float(max(1.0, 16 * np.log1p(count) / most)), width)
            for number, count in enumerate(counts)
            if count
        ]


@dataclass(frozen=True)
class ClassBars:
    """How much of an influence comes from each class: helpful to the right, harmful to the left.

    Attributes:
        heading: of the chart.
        note: what the numbers are.
        lines: per class, the sum of the harmful (≤ 0) and of the helpful (≥ 0) influence.
    """

    heading: str
    note: str
    lines: tuple[tuple[str, float, float], ...]

    def width(self, value: float) -> float:
        """Give the length of a bar, at most 150."""
        most = max((max(-low, high) for _, low, high in self.lines), default=0.0)
        return 150 * abs(value) / most if most else 0.0


@dataclass(frozen=True)
class Scatter:
    """Points of two numbers each. Mark and colour tell the kinds apart.

    Attributes:
        heading: of the chart.
        note: what it shows, in words.
        x: what the horizontal axis measures.
        y: what the vertical axis measures.
        across: the range of the horizontal axis.
        up: the range of the vertical axis; it contains 0.
        kinds: per name, (x, y) pairs; the first is drawn as dots, the second as crosses over them.
        equal: for a plot, the name of the line on which both are equal.
    """

    heading: str
    note: str
    x: str
    y: str
    across: tuple[float, float]
    up: tuple[float, float]
    kinds: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    equal: str = ""

    def right(self, x: float) -> float:
        """Place an x in a box 400 wide."""
        low, high = self.across
        return 400 * (x - low) / (high - low)

    def down(self, y: float) -> float:
        """Place a y in a box 240 high, y upwards."""
        low, high = self.up
        return 240 * (high - y) / (high - low)

    def path(self, number: int) -> str:
        """Draw all points of a kind as one SVG path: one element per point would be too many."""
        cross = "l4-4m-4 0l4 4"
        return "".join(
            f"M{self.right(x) - 2 * number:.1f} {self.down(y) + 2 * number:.1f}{cross if number else 'h0'}"
            for x, y in self.kinds[number][1]
        )

    def ticks(self, axis: str) -> list[tuple[float, str]]:
        """Give round numbers along ``across`` or ``up``: their place in the box, and their text."""
        low, high = self.across if axis == "across" else self.up
        place = self.right if axis == "across" else self.down
        return [(place(value), f"{value:g}") for value in round_numbers(low, high)]


def round_numbers(low: float, high: float, most: int = 8) -> list[float]:
    """Give at most ``most`` multiples of 1, 2 or 5 times a power of ten within a range.

    Args:
        low: start of the range, finite.
        high: end of the range, > low.
        most: ≥ 2.
    """
    power = 10.0 ** np.floor(np.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most - 1)
    # An end that is itself a multiple must be included in spite of rounding; 3 × 0.1 becomes 0.3 only through text.
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def recovery_chart(heading: str, recovered: Mapping[str, Sequence[float]], checked: Sequence[float]) -> Chart:
    """Describe which share of the wrong labels is found by looking at which share of all, and what random order finds.

    Args:
        heading: of the chart.
        recovered: curves by name over the shares, the one to be drawn strongest first.
        checked: shares of all that are looked at, rising.
    """
    curves = [(name, tuple(zip(checked, shares, strict=True))) for name, shares in recovered.items()]
    curves.append(("random", tuple((share, share) for share in checked)))
    return Chart(heading, "share of examples checked", "share of wrong labels found", tuple(curves))


def scatter(
    heading: str,
    note: str,
    axes: tuple[str, str],
    x: np.ndarray,
    y: np.ndarray,
    kinds: Sequence[tuple[str, np.ndarray]],
    across: tuple[float, float],
    *,
    drawn: int = 2000,
) -> Scatter:
    """Place points. Of more than ``drawn`` points it takes that many, evenly over the order of y, both ends included.

    Args:
        heading: of the chart.
        note: what it shows, in words.
        axes: what x and y are.
        x: [n], finite.
        y: [n], finite.
        kinds: names, and which points (bool [n]).
        across: the range of x.
        drawn: maximum number of points of all kinds together.
    """
    points = []
    for name, chosen in kinds:
        order = np.flatnonzero(chosen)[np.argsort(y[chosen], kind="stable")]
        count = min(len(order), max(2, drawn * len(order) // max(len(y), drawn)))
        order = order[np.linspace(0, len(order) - 1, count).round().astype(np.int64)] if count else order
        points.append((name, tuple(zip(x[order].tolist(), y[order].tolist(), strict=True))))
    low, high = min(0.0, float(y.min(initial=0.0))), max(0.0, float(y.max(initial=0.0)))
    if not high > low:
        low, high = -1.0, 1.0
    margin = 0.04 * (high - low)
    return Scatter(heading, note, *axes, _opened(across), (low - margin, high + margin), tuple(points))


def histogram(
    heading: str,
    x: str,
    values: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    span: tuple[float, float],
    *,
    bins: int = 40,
    shown: int = 20,
) -> Histogram:
    """Count values per label. If there are more labels than shown, the rest share one row.

    Args:
        heading: of the chart.
        x: what the values are.
        values: [n], finite.
        labels: int [n], numbers of classes.
        classes: names by number.
        span: the range of the bins; values outside count in the first or last bin.
        bins: how many.
        shown: labels that get their own row, those with the largest sum of |values| first.
    """
    low, high = span
    if not high > low:
        low, high = low - 0.5, low + 0.5
    bin_of = np.clip((bins * (values - low) / (high - low)).astype(np.int64), 0, bins - 1)
    counts = np.zeros((len(classes), bins), dtype=np.int64)
    np.add.at(counts, (labels, bin_of), 1)
    weight = np.bincount(labels, np.abs(values), minlength=len(classes))
    kept = _largest(weight, shown)
    groups = [(classes[number], np.array([number])) for number in kept]
    rest = np.setdiff1d(np.arange(len(classes)), kept)
    groups.append((f"{len(rest):,} {OTHERS}", rest))
    lines = [
        (name, tuple(counts[members].sum(axis=0).tolist()), float(np.median(values[np.isin(labels, members)])))
        for name, members in groups
        if counts[members].any()
    ]
    return Histogram(heading, x, low, high, tuple(lines))


def class_bars(
    heading: str, note: str, values: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, shown: int = 8
) -> ClassBars:
    """Sum the helpful and the harmful influence per class, the largest |sums| first.

    Args:
        heading: of the chart.
        note: what the numbers are.
        values: influence [n], finite.
        labels: int [n], numbers of classes.
        classes: names by number.
        shown: classes that get their own bar.
    """
    high = np.bincount(labels, np.maximum(values, 0), minlength=len(classes))
    low = np.bincount(labels, np.minimum(values, 0), minlength=len(classes))
    kept = _largest(high - low, shown)
    lines = [
        (classes[number], float(low[number]), float(high[number])) for number in kept if high[number] > low[number]
    ]
    rest = np.setdiff1d(np.arange(len(classes)), kept)
    if (high[rest] > low[rest]).any():
        lines.append((f"{len(rest):,} {OTHERS}", float(low[rest].sum()), float(high[rest].sum())))
    return ClassBars(heading, note, tuple(lines))


def _opened(span: tuple[float, float]) -> tuple[float, float]:
    """Leave room at both ends of a range, so that no mark is cut. A range of width 0 gets a width."""
    low, high = span
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def _largest(weight: np.ndarray, count: int) -> np.ndarray:
    """Find the positions of the largest weights. Ties are ordered by position."""
    return np.argsort(-weight, kind="stable")[:count]
