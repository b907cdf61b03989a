"""The progress of a curvature fit, so that it can be saved and resumed (precompute/fit_file.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Progress:
    """The progress of a fit: plain tensors by name, and where to resume.

    Attributes:
        stage: what is being done.
        done: batches (or layers) of the stage that are finished.
        examples: training examples of the stage that went in.
        arrays: accumulators and results.
    """

    stage: str
    done: int = 0
    examples: int = 0
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def advance(self, stage: str) -> None:
        """Go to the next stage."""
        self.stage, self.done, self.examples = stage, 0, 0

    def add(self, name: str, value: Tensor) -> None:
        """Add to an accumulator, in float64 (float32 on devices without)."""
        total = self.arrays.get(name)
        if total is None:
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            self.arrays[name] = value.to(dtype)
        else:
            total.add_(value.to(total.device))
