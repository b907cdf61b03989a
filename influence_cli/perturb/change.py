"""What a change of a training image does to the loss of a test example, however it was estimated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence_cli.influence.example_facts import TestFacts


@dataclass(frozen=True)
class Perturbed:
    """What a change of a training image does to the loss of one test example, in that loss's unit.

    Attributes:
        test: the test example.
        influence: of the unchanged training image.
        slope: [C, H, W], the estimated rise of the loss per unit of each input value.
        delta: δ, of the same shape, or None.
        estimated: slope · δ.
        replaced: influence(x) − influence(x + δ): to first order in 1/n, but not in δ; None by a replay.
        actual: the rise of the loss by retraining; None if that was not requested.
    """

    test: TestFacts
    influence: float
    slope: np.ndarray
    delta: np.ndarray | None = None
    estimated: float | None = None
    replaced: float | None = None
    actual: float | None = None
