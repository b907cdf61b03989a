"""Rates of a training, and their sum."""

from __future__ import annotations

import pytest

from influence_cli.steps.schedule import Schedule


def test_the_sum_of_the_rates_is_that_of_every_step() -> None:
    assert Schedule("constant", 0.1, 50).time() == pytest.approx(5.0)
    # A cosine averages a half, but for the ends: Σ ½(1 + cos(πt/T)) over t = 0 … T − 1 is (T + 1)/2.
    assert Schedule("cosine", 0.2, 30).time() == pytest.approx(0.2 * 31 / 2)
    assert Schedule("step", 1.0, 40).time() == pytest.approx(20 + 10 * 0.1 + 10 * 0.01)
    assert Schedule("constant", 1.0, 10, rising=4).time() == pytest.approx(0.25 + 0.5 + 0.75 + 7)
