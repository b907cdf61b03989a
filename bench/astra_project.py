"""Networks, images and training function of bench/astra.py: the file that its influence.yaml names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from label_noise import read
from label_noise_project import resnet9


@dataclass(frozen=True)
class Row:
    """A row of ASTRA's appendix F.

    Attributes:
        data: ``fashion-mnist`` or ``cifar10``.
        images: training images, drawn once.
        rate: η of SGD with momentum 0.9; the peak of a cyclic one.
        batch: images per step.
        epochs: passes over them.
        cyclic: whether the rate rises over the first fifth of the steps and then falls to 0; else it is constant.
        damping: λ, which they set to 1/(η·K) of the training and did not tune.
    """

    data: str
    images: int
    rate: float
    batch: int
    epochs: int
    cyclic: bool
    damping: float


MOMENTUM, L2, RISE = 0.9, 1e-3, 0.2
ROWS = {
    "fashion-mnist": Row("fashion-mnist", 6_144, 0.03, 64, 20, cyclic=False, damping=0.0052),
    "cifar10": Row("cifar10", 3_072, 0.4, 512, 25, cyclic=True, damping=0.014),
}


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The training images of a row, or its test images: as many as asked for, drawn once."""

    def __init__(self, row: str, part: str, count: int) -> None:
        images, labels = read(ROWS[row].data, part)
        chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
        images, labels = images[chosen], labels[chosen]
        x = torch.from_numpy(images).float() / 255
        grey = x.ndim == 3
        self.x = ((x - 0.286) / 0.353)[:, None] if grey else ((x - 0.47) / 0.25).permute(0, 3, 1, 2).contiguous()
        self.targets = labels.tolist()
        self.classes = [str(number) for number in range(10)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


def build(row: str) -> nn.Module:
    """Make the network of a row: an MLP 512-256-128, or ResNet-9."""
    if row == "cifar10":
        return resnet9()
    widths = (28 * 28, 512, 256, 128)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def train(
    model: nn.Module,
    data: Sequence[tuple[Tensor, int]],
    *,
    l2: float,
    seed: int,
    row: str,
    epochs: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> nn.Module:
    """Train as a row says, by SGD with momentum and weight decay, without augmentation."""
    if l2 != L2:
        raise ValueError(f"the weight decay is {L2:g}, not {l2:g}")
    given, device = ROWS[row], next(model.parameters()).device
    x = torch.stack([image for image, _ in data]).to(device)
    y = torch.tensor([label for _, label in data], device=device)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // given.batch)
    optimizer = torch.optim.SGD(model.parameters(), given.rate, MOMENTUM, weight_decay=l2)
    done = 0
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(given.batch):
            if given.cyclic:
                at = (done + 1) / steps
                optimizer.param_groups[0]["lr"] = given.rate * min(at / RISE, (1 - at) / (1 - RISE))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            done += 1
            progress(done, steps)
    return model.eval()
