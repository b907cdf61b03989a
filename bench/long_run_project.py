"""Synthetic images and a small network of bench/long_run.py: the file that its influence.yaml names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

SIDE, CLASSES, WRONG = 16, 10, 0.02


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images made when they are read, always the same: the pattern of a class, and noise; some labels are wrong."""

    def __init__(self, count: int, seed: int, wrong: float = 0.0) -> None:
        self.patterns = np.random.default_rng(0).standard_normal((CLASSES, 1, SIDE, SIDE)).astype(np.float32)
        generator = np.random.default_rng(seed)
        self.truth = generator.integers(0, CLASSES, count)
        shift = generator.integers(1, CLASSES, count) * (generator.random(count) < wrong)
        self.targets = ((self.truth + shift) % CLASSES).tolist()
        self.classes = [str(number) for number in range(CLASSES)]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = np.random.default_rng((self.seed, index)).standard_normal((1, SIDE, SIDE), dtype=np.float32)
        return torch.from_numpy(self.patterns[self.truth[index]] + 3 * noise), self.targets[index]


def build() -> nn.Module:
    """Give a network of 15,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 48),
        nn.ReLU(),
        nn.Linear(48, CLASSES),
    )
