"""A run with another image in the place of one of its training images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from influence_cli.replay.run import Run, State, Taken


@dataclass(frozen=True)
class WithImage:
    """A run whose steps take another image; it is a ``Run`` for going forwards: its first state is the run's.

    Attributes:
        run: as it was.
        row: of the training image.
        image: what its steps take in its place [...], in the shape of an input.
    """

    run: Run
    row: int
    image: Tensor

    @property
    def examples(self) -> int:
        """Give n."""
        return self.run.examples

    @property
    def steps(self) -> int:
        """Give T."""
        return self.run.steps

    @property
    def kept(self) -> Sequence[int]:
        """Give the start alone: no later state is known."""
        return (0,)

    def state(self, step: int) -> State:
        """Give the first state."""
        if step != 0:
            raise ValueError("a run with another image has only its first state")
        return self.run.state(0)

    def taken(self, step: int) -> Taken:
        """Give what a step takes."""
        taken = self.run.taken(step)
        changed = torch.from_numpy(taken.rows == self.row)
        if not changed.any():
            return taken
        inputs = taken.inputs.clone()
        inputs[changed.to(inputs.device)] = self.image.to(inputs)
        return replace(taken, inputs=inputs)

    def randomness(self, step: int) -> AbstractContextManager[None]:
        """Put the global generators as they were when the step ran its network."""
        return self.run.randomness(step)
