"""Evidence is better than guessing by an exact test."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np

from influence_cli.evidence.guessing import SIGNIFICANCE, beats_guessing


def test_better_than_guessing_is_an_exact_binomial_test() -> None:
    for sizes in ([8, 8, 8], [20, 10], [1] * 40):
        labels = np.repeat(np.arange(len(sizes)), sizes)
        n = len(labels)
        share = Fraction(int(np.bincount(labels).max()), n)
        tails = [
            sum(comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(right, n + 1)) for right in range(n + 1)
        ]
        for right, tail in enumerate(tails):
            assert beats_guessing(right, labels) == (tail < SIGNIFICANCE)
    assert not beats_guessing(5, np.zeros(5, dtype=np.int64))
