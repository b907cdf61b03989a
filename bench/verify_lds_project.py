"""Model, images and training function of bench/verify_lds.py: the file that its influence.yaml names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import lds_retrain

RECIPE = lds_retrain.RECIPES["cnn"]


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The 10,000 training images that were drawn, 10% of their labels flipped, or the first 1,000 test images."""

    def __init__(self, part: str) -> None:
        if part == "train":
            choice = lds_retrain.choose(lds_retrain.DATA, seed=0)
            self.x = lds_retrain.read_inputs(lds_retrain.DATA, "train", choice.train_indices)
            self.targets = choice.given.tolist()
        else:
            self.x = lds_retrain.read_inputs(lds_retrain.DATA, "t10k", slice(0, 1_000))
            self.targets = lds_retrain.read(lds_retrain.DATA, "t10k", "labels")[:1_000].tolist()
        self.classes = [str(number) for number in range(lds_retrain.CLASSES)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


def build() -> nn.Module:
    """Make the demo's CNN."""
    return RECIPE.build()


def train(
    model: nn.Module,
    data: Sequence[tuple[Tensor, int]],
    *,
    l2: float,
    seed: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> nn.Module:
    """Train as the checkpoints were trained, on other images."""
    if l2 != RECIPE.l2:
        raise ValueError(f"the recipe's l2 is {RECIPE.l2:g}, not {l2:g}")
    x, y = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    return lds_retrain.minimise(model, RECIPE, x, y, seed, progress)
