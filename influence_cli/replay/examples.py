"""The training examples as a run reads them: by row, in memory where they fit, and augmented."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import ALONE, Loading, fits_memory, readable_batches
from influence_cli.data.split import Split
from influence_cli.replay.recipe import AUGMENT, Recipe
from influence_cli.runtime.seeds import seeded


@dataclass(frozen=True)
class Examples:
    """The examples of a split, by their rows among those in use.

    Attributes:
        split: where they come from.
        dtype: of the inputs.
        device: where they go.
        loading: loader processes.
    """

    split: Split
    dtype: torch.dtype
    device: torch.device
    loading: Loading = ALONE

    @cached_property
    def labels(self) -> Tensor:
        """Give the labels int64 [n]."""
        return torch.from_numpy(self.split.labels[self.split.indices])

    @cached_property
    def held(self) -> Tensor | None:
        """Give all inputs [n, …], or None where they do not fit the memory."""
        if not fits_memory(self.split, self.dtype):
            return None
        batches = readable_batches(self.split, self.split.indices, 256, self.loading, skip=False)
        return torch.cat([batch.inputs.to(self.dtype) for batch in batches])

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Give the inputs [b, …] and labels [b] of some rows, on the device."""
        where = torch.from_numpy(rows)
        if self.held is not None:
            inputs = self.held[where]
        else:
            (batch,) = readable_batches(self.split, self.split.indices[rows], len(rows), skip=False)
            inputs = batch.inputs.to(self.dtype)
        return inputs.to(self.device), self.labels[where].to(self.device)


def augmented(inputs: Tensor, rows: np.ndarray, recipe: Recipe, epoch: int) -> Tensor:
    """Change every input of a batch at random; what comes out depends on recipe, epoch and example alone."""
    if recipe.augment is None:
        return inputs
    changed = []
    for row, each in zip(rows.tolist(), inputs, strict=True):
        with seeded(recipe.seed(AUGMENT, epoch, row)):
            changed.append(recipe.augment(each))
    return torch.stack(changed)
