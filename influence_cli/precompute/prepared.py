"""A curvature with its complete store: what every command that scores works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from influence_cli.config.schema import Config
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.coordinates import Basis, coordinates
from influence_cli.curvature.spectrum import Spectrum
from influence_cli.errors import near_path
from influence_cli.model.task import Task


@dataclass(frozen=True)
class Prepared:
    """A curvature and, unless it is used on the fly, a complete store.

    Attributes:
        task: one checkpoint and its data.
        choice: the curvature in use.
        path: the store.
        basis: of the coordinates, on the task's device; None for raw gradients.
        spectrum: Λ of the coordinates; None without a basis.
        on_the_fly: no rows are stored: every coordinate is available, and scores come from a layer pass.
        batch: examples that go through the layer pass at once.
        gradient_norm: ‖∇R + l2·θ̂‖ over the tracked parameters (with a basis per layer: its kept coordinates): 0 at a
            minimum; None on the fly.
        seconds: what this call spent on curvature and gradients.
    """

    task: Task
    choice: Choice
    path: Path
    basis: Basis
    spectrum: Spectrum | None
    on_the_fly: bool
    batch: int
    gradient_norm: float | None
    seconds: float

    def coordinates(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the coordinates [b, k] of some examples' gradients, their losses [b] and outputs [b, C]."""
        return coordinates(self.choice.network, self.basis, inputs, targets)

    @property
    def width(self) -> int:
        """Count the numbers in a row."""
        return self.choice.network.size if self.basis is None else self.basis.width


def store_path(config: Config, number: int) -> Path:
    """Name the store of a checkpoint: the configured name, with the checkpoint's number if there are several."""
    path = near_path(config.gradients.store)
    if len(config.model.checkpoint) == 1:
        return path
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
