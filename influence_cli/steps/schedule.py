"""The rate of each step of a training, by the schedules of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

# torch's OneCycleLR: the share of the steps that rise, and what the first and the last rate are divided by.
RISING, FIRST, LAST = 0.3, 25.0, 1e4
# Shares of the steps after which the schedule ``step`` divides the rate by ten (He et al. 2016, section 4.2).
DROPS = (0.5, 0.75)


@dataclass(frozen=True)
class Schedule:
    """The rates of a training.

    Attributes:
        name: ``constant``, ``cosine``, ``step`` or ``one-cycle``.
        lr: the largest rate.
        total: steps, T.
        rising: steps in which the rate rises linearly to ``lr``; ``one-cycle`` has its own.
    """

    name: str
    lr: float
    total: int
    rising: int = 0

    def rate(self, step: int) -> float:
        """Give η of a step."""
        if self.name == "one-cycle":
            return self.lr * _one_cycle(step, self.total)
        rising = min(self.total, self.rising)
        if step < rising:
            return self.lr * (step + 1) / rising
        share = (step - rising) / max(1, self.total - rising)
        if self.name == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * share))
        if self.name == "step":
            return float(self.lr * 0.1 ** sum(step >= drop * self.total for drop in DROPS))
        return self.lr

    def time(self) -> float:
        """Give η·K: the sum of the rates of all steps."""
        return math.fsum(self.rate(step) for step in range(self.total))


def _one_cycle(step: int, total: int) -> float:
    """Give the rate of torch's OneCycleLR as a share of the largest."""
    top = max(1.0, RISING * total - 1)
    if step <= top:
        low, share = 1 / FIRST, step / top
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * share))
    share = (step - top) / max(1.0, total - 1 - top)
    low = 1 / (FIRST * LAST)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))
