"""Whether evidence names the labels more often than guesses do."""

from __future__ import annotations

import math

import numpy as np
import torch

# A readout is better than guessing if so many correct labels, or more, come by chance this seldom.
SIGNIFICANCE = 0.001


def beats_guessing(right: int, labels: np.ndarray) -> bool:
    """Say whether evidence that has not seen the labels names them more often than guesses do.

    The guess is the largest class. The test is the exact binomial one, one-sided, at ``SIGNIFICANCE``.

    Args:
        right: labels that the evidence names.
        labels: int64 [n].
    """
    n, share = len(labels), largest_share(labels)
    if share >= 1:
        return False
    hits = torch.arange(right, n + 1, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(hits + 1) - torch.lgamma(n - hits + 1)
    )
    return float((ways + hits * math.log(share) + (n - hits) * math.log1p(-share)).exp().sum()) < SIGNIFICANCE


def largest_share(labels: np.ndarray) -> float:
    """Give the share of the largest class: how often a guess of it is right."""
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))
