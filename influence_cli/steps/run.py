"""A training run as replay sees it: states, and what each step took. Where it comes from is another file's matter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from influence_cli.steps.rule import Rule, Slots


@dataclass(frozen=True)
class State:
    """What a run is between two steps.

    Attributes:
        parameters: θ [p], those that are trained, end to end.
        slots: of the optimiser, [p] each.
        buffers: the model's numbers that are no parameters, such as running averages, end to end [q].
    """

    parameters: Tensor
    slots: Slots
    buffers: Tensor


@dataclass(frozen=True)
class Taken:
    """What one step took.

    Attributes:
        rows: int64 [b], of the training examples; an example may be there twice.
        inputs: [b, …] as the network saw them, augmentation included.
        targets: int64 [b].
        rule: the optimiser's step.
    """

    rows: np.ndarray
    inputs: Tensor
    targets: Tensor
    rule: Rule


class Run(Protocol):
    """A training run whose steps can be taken again.

    Attributes:
        examples: n, the training examples that rows count.
        steps: T.
    """

    @property
    def examples(self) -> int:
        """Give n."""

    @property
    def steps(self) -> int:
        """Give T."""

    @property
    def kept(self) -> Sequence[int]:
        """Give the numbers of steps before which the state is kept, rising; 0 and T are among them."""

    def state(self, step: int) -> State:
        """Give a kept state: that before ``step``, and for T the last one."""

    def taken(self, step: int) -> Taken:
        """Give what a step took."""

    def randomness(self, step: int) -> AbstractContextManager[None]:
        """Put the global generators as they were when the step ran its network; they are put back at the end."""
