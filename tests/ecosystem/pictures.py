"""Real pictures of three classes, few and small: those of Fashion-MNIST that come with the demo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.demo.project import read_images

CLASSES = ("Bag", "Sneaker", "Trouser")
FASHION = (8, 7, 1)  # those classes there
TRAIN, VAL = 16, 4  # of each class


@cache
def pictures(part: str) -> tuple[tuple[Image.Image, int], ...]:
    """Give the pictures of ``train`` or ``val`` with their labels, a class after the other."""
    images, labels = read_images()
    begin, count = (0, TRAIN) if part == "train" else (TRAIN, VAL)
    chosen = [
        (images[position], label)
        for label, number in enumerate(FASHION)
        for position in np.flatnonzero(labels == number)[begin : begin + count]
    ]
    if part == "train":  # two of them in the wrong class, for `mislabels`
        chosen[0], chosen[-1] = (chosen[-1][0], 0), (chosen[0][0], 2)
    return tuple((Image.fromarray(image).convert("RGB"), label) for image, label in chosen)


def write_folders(folder: Path) -> None:
    """Write ``train/CLASS/NNN.png`` and ``val/CLASS/NNN.png``."""
    for part in ("train", "val"):
        for number, (image, label) in enumerate(pictures(part)):
            path = folder / part / CLASSES[label] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def written(part: str) -> Iterator[tuple[str, str]]:
    """Give the path and the class of each of the files that `write_folders` writes."""
    for number, (_, label) in enumerate(pictures(part)):
        yield f"{part}/{CLASSES[label]}/{number:03d}.png", CLASSES[label]


def batch(part: str, size: int = 32) -> tuple[Tensor, Tensor]:
    """Give all pictures of a part as one batch in [−1, 1], and their labels."""
    pairs = pictures(part)
    pixels = np.stack([np.asarray(image.resize((size, size))) for image, _ in pairs])
    inputs = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return inputs, torch.tensor([label for _, label in pairs])
