"""Slices on which a model is worse, and the exact test against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest

from influence_cli.inspection.properties import Properties
from influence_cli.inspection.slices import at_least, find_slices


@pytest.mark.parametrize(
    ("hits", "drawn", "marked", "total"), [(3, 10, 5, 40), (0, 4, 2, 9), (7, 9, 8, 12), (2, 2, 2, 2)]
)
def test_the_tail_is_that_of_the_hypergeometric_distribution(hits: int, drawn: int, marked: int, total: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert at_least(hits, drawn, marked, total) == pytest.approx(stats.hypergeom.sf(hits - 1, total, marked, drawn))


def test_the_slice_that_fails_is_named_and_no_other() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 400)
    brightness = generator.uniform(0, 1, 800)
    predicted = labels.copy()
    predicted[generator.choice(800, 40, replace=False)] ^= 1
    dark = (labels == 1) & (brightness < np.quantile(brightness[labels == 1], 0.25))
    predicted[dark] = np.where(generator.uniform(size=int(dark.sum())) < 0.6, 0, 1)
    numbers = {"brightness": brightness, "sharpness": generator.normal(size=800)}
    slices = find_slices(Properties(numbers, {}, np.array([])), labels, predicted)
    assert (slices[0].label, slices[0].text) == (1, "brightness: lowest quarter")
    assert {one.text for one in slices} <= {"brightness: lowest quarter", ""}
    assert slices[0].chance < 1e-6


def test_errors_at_random_are_no_slice() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 5, 1000)
    predicted = np.where(generator.uniform(size=1000) < 0.2, (labels + 1) % 5, labels)
    assert find_slices(Properties({"size": generator.normal(size=1000)}, {}, np.array([])), labels, predicted) == ()
