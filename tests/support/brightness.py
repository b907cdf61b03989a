"""Data whose classes are three brightnesses, and a model that tells them apart under one normalisation alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LEVELS = {"ants": 0.5, "bees": 0.7, "cats": 0.9}
MODEL = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=3):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))
"""


def write_images(root: Path, count: int = 4, size: int = 12, names: tuple[str, ...] = tuple(LEVELS)) -> Path:
    """Write an image folder of ``count`` images a class, grey up to some noise."""
    generator = np.random.default_rng(0)
    for name, level in zip(names, LEVELS.values(), strict=True):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = 255 * level + generator.normal(0, 8, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


def state(mean: float = 0.5, std: float = 0.5, order: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    """Give weights of ``Net``: the nearest of the three brightnesses, seen through a normalisation.

    Args:
        mean: of the normalisation, for every channel.
        std: likewise.
        order: the level that each output stands for.
    """
    levels = torch.tensor([(list(LEVELS.values())[level] - mean) / std for level in order])
    weight, bias = 200 * levels[:, None].repeat(1, 3) / 3, -100 * levels.square()
    return {"fc.weight": weight, "fc.bias": bias}


def project(folder: Path, **options: object) -> Path:
    """Write data/train, data/val, net.py and model.pt into a folder."""
    write_images(folder / "data" / "train")
    write_images(folder / "data" / "val", count=2)
    (folder / "net.py").write_text(MODEL)
    torch.save({"state_dict": state(), **options}, folder / "model.pt")
    return folder
