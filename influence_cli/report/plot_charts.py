"""What a plot shows of the numbers of a run: the charts that plot.py draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from influence_cli.report.charts import OTHERS, Histogram, Layer, Scatter

# An even number, so that the middle is an edge.
BINS = 40


def suspicion(
    scores: np.ndarray, labels: np.ndarray, classes: Sequence[str], flagged: np.ndarray, signal: str, shown: int
) -> Histogram:
    """Describe how suspicious the labels are, and which of them are probably wrong; the most flagged labels first.

    Args:
        scores: [n] in [0, 1], higher is more suspicious.
        labels: int [n], the given ones.
        classes: names by number.
        flagged: positions of the labels that are probably wrong.
        signal: what the scores are of.
        shown: labels with a line of their own, where there are more than one beside these.
    """
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[flagged] = True
    present = np.unique(labels)
    counts = {int(label): int((wrong & (labels == label)).sum()) for label in present}
    means = {int(label): float(scores[labels == label].mean()) for label in present}
    order = sorted(counts, key=lambda label: (-counts[label], -means[label], label))
    layers = [("all examples", "plain", np.ones(len(scores), dtype=bool))]
    if wrong.any():
        layers.append(("probably wrong", "marked", wrong))
    return _layered(
        f"{int(wrong.sum()):,} of {len(scores):,} labels are probably wrong"
        if wrong.any()
        else f"How suspicious {len(scores):,} labels are",
        f"score ({signal}), higher is more suspicious",
        (0.0, 1.0),
        scores,
        _by_label(labels, order, classes, shown),
        lambda members: f"{int((wrong & members).sum()):,} of {int(members.sum()):,} flagged",
        layers,
    )


def helpful_and_harmful(
    influence: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str, unit: str, shown: int
) -> Histogram:
    """Describe the influence of all training examples on one test example; the labels of the largest |sums| first.

    Args:
        influence: [n], > 0 helpful; NaN for examples that take no part.
        labels: int [n], of the training examples.
        classes: names by number.
        title: which test example.
        unit: of the influence, such as ``nats``; empty for none.
        shown: labels with a line of their own, where there are more than one beside these.
    """
    known = np.isfinite(influence)
    values, labels = influence[known], labels[known]
    weights = np.bincount(labels, np.abs(values), minlength=len(classes))
    order = sorted(map(int, np.unique(labels)), key=lambda label: (-weights[label], label))
    # Zero is an edge: no bar is of both effects.
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    return _layered(
        title,
        f"influence of all {len(values):,} training examples" + (f", {unit}" if unit else ""),
        (-largest, largest),
        values,
        _by_label(labels, order, classes, shown),
        lambda members: f"sum {values[members].sum():+.2g}",
        [
            ("helpful: removing it raises the loss", "helpful", values > 0),
            ("harmful: removing it lowers the loss", "harmful", values < 0),
        ],
    )


def _by_label(
    labels: np.ndarray, order: Sequence[int], classes: Sequence[str], shown: int
) -> list[tuple[str, np.ndarray]]:
    """Split examples by label, the first labels of the order on their own and the rest together."""
    first = order if len(order) <= shown + 1 else order[:shown]
    groups = [(classes[label], np.asarray(labels == label)) for label in first]
    if len(order) > len(first):
        groups.append((f"{len(order) - len(first)} {OTHERS}", ~np.isin(labels, first)))
    return groups


def _layered(
    heading: str,
    x: str,
    span: tuple[float, float],
    values: np.ndarray,
    groups: Sequence[tuple[str, np.ndarray]],
    note: Callable[[np.ndarray], str],
    layers: Sequence[tuple[str, str, np.ndarray]],
) -> Histogram:
    """Count values by group and by layer, each given as which values are of it."""
    edges = np.linspace(*span, BINS + 1)

    def counted(chosen: np.ndarray) -> tuple[int, ...]:
        return tuple(np.histogram(values[chosen], edges)[0].tolist())

    return Histogram(
        heading,
        x,
        *span,
        tuple((name, counted(members), float(np.median(values[members]))) for name, members in groups),
        tuple(note(members) for _, members in groups),
        tuple(
            Layer(name, tone, tuple(counted(members & chosen) for _, members in groups))
            for name, tone, chosen in layers
        ),
    )


def estimated_and_actual(estimated: np.ndarray, actual: np.ndarray, r: float, slope: float) -> Scatter:
    """Describe estimated against actual effects of leaving examples out.

    Args:
        estimated: [k], influence in nats.
        actual: [k], the rise of the loss by retraining.
        r: their linear correlation.
        slope: of actual on estimated.
    """
    both = np.concatenate([estimated, actual, [0.0]])
    low, high = float(both.min()), float(both.max())
    room = 0.06 * (high - low) or 1.0
    ends = (low - room, high + room)
    return Scatter(
        f"{len(estimated):,} training examples left out",
        f"r = {r:.4g}\nslope = {slope:.4g}",
        "estimated by influence, nats",
        "actual by retraining, nats",
        ends,
        ends,
        (("effects", tuple(zip(estimated.tolist(), actual.tolist(), strict=True))),),
        equal="actual = estimated",
    )
