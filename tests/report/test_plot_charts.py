"""plot_charts: lines in the order of what matters, layers that are parts of them, and notes beside."""

from __future__ import annotations

import numpy as np

from influence_cli.report.plot_charts import BINS, estimated_and_actual, helpful_and_harmful, suspicion

CLASSES = ("ant", "bee", "cat", "dog")


def test_the_most_flagged_labels_come_first_and_the_rest_share_a_line() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2, 3])
    scores = np.array([0.1, 0.9, 0.2, 0.8, 0.95, 0.1, 0.0])
    chart = suspicion(scores, labels, CLASSES, np.array([1, 3, 4]), "loss", shown=2)
    assert [name for name, _, _ in chart.lines] == ["cat", "bee", "2 others"]
    assert chart.notes == ("2 of 3 flagged", "1 of 2 flagged", "0 of 2 flagged")
    assert [(layer.name, layer.tone) for layer in chart.layers] == [
        ("all examples", "plain"),
        ("probably wrong", "marked"),
    ]
    assert [[sum(counts) for counts in layer.counts] for layer in chart.layers] == [[3, 2, 2], [2, 1, 0]]
    assert chart.heading == "3 of 7 labels are probably wrong"


def test_no_bar_is_of_both_effects_and_what_takes_no_part_is_not_counted() -> None:
    values = np.array([1.0, -1.0, np.nan, 0.5, -1e-9])
    chart = helpful_and_harmful(values, np.array([0, 0, 1, 1, 1]), CLASSES, "title", "nats", shown=12)
    assert (chart.low, chart.high, chart.x) == (-1.0, 1.0, "influence of all 4 training examples, nats")
    helpful, harmful = chart.layers
    for a, b in zip(helpful.counts, harmful.counts, strict=True):
        assert len(a) == BINS
        assert not any(a[: BINS // 2])
        assert not any(b[BINS // 2 :])


def test_the_axes_of_effects_are_the_same_and_hold_zero() -> None:
    chart = estimated_and_actual(np.array([1.0, 2.0]), np.array([1.5, 3.0]), 1.0, 1.5)
    assert chart.across == chart.up
    assert chart.across[0] < 0 < 3 < chart.across[1]
    assert chart.note == "r = 1\nslope = 1.5"
