"""What a page draws from numbers: curves, histograms and bars by class, as points of an SVG; the template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OTHERS = "others"


@dataclass(frozen=True)
class Chart:
    """Curves over shares: what a ranking finds of something, by how much of it is looked at.

    Attributes:
        heading: of the chart.
        x: what the axis to the right counts, from 0 to the largest x of all curves.
        y: what the axis up counts, from 0 to 1.
        curves: by name, (x, y) pairs with rising x; the first is drawn strongest, the fifth and later look like it.
        ticks: what stands at the five marks of the axis to the right, where x is no share.
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
class Histogram:
    """How often each score occurs, a line of bars a label over one common axis.

    Attributes:
        heading: of the chart.
        x: what the axis counts.
        low: where the first bin begins.
        high: where the last one ends.
        lines: by label, the counts of all bins and the median.
    """

    heading: str
    x: str
    low: float
    high: float
    lines: tuple[tuple[str, tuple[int, ...], float], ...]

    def bars(self, counts: tuple[int, ...]) -> list[tuple[float, float, float]]:
        """Place the bars of a line in a box 400 wide and 16 high: x, height, width of each that is not empty.

        Heights are log(1 + count), against the largest of all lines: one wrong label shows beside thousands of right
        ones.
        """
        most = np.log1p(max(max(own) for _, own, _ in self.lines)) or 1.0
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
        lines: by class, the sum of the harmful (≤ 0) and of the helpful (≥ 0) influence.
    """

    heading: str
    note: str
    lines: tuple[tuple[str, float, float], ...]

    def width(self, value: float) -> float:
        """Give the length of a bar, of 150 at most."""
        most = max((max(-low, high) for _, low, high in self.lines), default=0.0)
        return 150 * abs(value) / most if most else 0.0


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
    """Count values by label; where there are more labels than shown, the rest make one line.

    Args:
        heading: of the chart.
        x: what the values are.
        values: [n], finite.
        labels: int [n], numbers of classes.
        classes: names by number.
        span: from where to where the bins go; what lies outside counts in the first or last.
        bins: how many.
        shown: labels with a line of their own, those with the largest sum of |values| first.
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
        (name, tuple(counts[own].sum(axis=0).tolist()), float(np.median(values[np.isin(labels, own)])))
        for name, own in groups
        if counts[own].any()
    ]
    return Histogram(heading, x, low, high, tuple(lines))


def class_bars(
    heading: str, note: str, values: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, shown: int = 8
) -> ClassBars:
    """Sum the helpful and the harmful influence by class, the largest |sums| first.

    Args:
        heading: of the chart.
        note: what the numbers are.
        values: influence [n], finite.
        labels: int [n], numbers of classes.
        classes: names by number.
        shown: classes with a bar of their own.
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


def _largest(weight: np.ndarray, count: int) -> np.ndarray:
    """Find the numbers of the largest weights; ties go by number."""
    return np.argsort(-weight, kind="stable")[:count]
