"""The project of bench/labels_size.py: images of many classes, made as they are read, and a network in closed form.

An image is the pattern of its class and two rows of noise, one of 997 and one of 1,009. One label in twenty is wrong.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

PIXELS, WIDTH, LAYERS = 64, 512, 5
WRONG, NOISE, SURE = 0.05, 0.6, 0.04


@cache
def tables(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the patterns [C, 64] and the rows of noise."""
    generator = torch.Generator().manual_seed(0)
    patterns, first, second = (torch.randn(rows, PIXELS, generator=generator) for rows in (classes, 997, 1_009))
    return patterns, NOISE * first, NOISE * second


class Images(Dataset):
    """Images [1, 8, 8] whose true class is their position modulo C."""

    def __init__(self, n: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(1)
        true = torch.arange(n) % classes
        other = (true + torch.randint(1, classes, (n,), generator=generator)) % classes
        self.classes = [f"class{number:04}" for number in range(classes)]
        self.targets = torch.where(torch.rand(n, generator=generator) < WRONG, other, true).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        patterns, first, second = tables(len(self.classes))
        image = patterns[i % len(patterns)] + first[i % len(first)] + second[i % len(second)]
        return image.view(1, 8, 8), self.targets[i]


def train(n: int, classes: int) -> Images:
    """Give the training set."""
    return Images(n, classes)


def build(classes: int) -> nn.Module:
    """Give a network of random layers, whose last one compares with the patterns of the classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (PIXELS, *[WIDTH] * (LAYERS - 1)):
        layers += [nn.Linear(before, WIDTH), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
    body = nn.Sequential(*layers)
    head = nn.Linear(WIDTH, classes)
    patterns, first, second = tables(classes)
    with torch.no_grad():
        noisy = [body(patterns + first[at : at + 1] + second[at : at + 1]) for at in range(20)]
        means = torch.stack(noisy).mean(dim=0)
        spread = (torch.cat(noisy) - means.repeat(20, 1)).std(dim=0).clamp_min(1e-3)
        head.weight.copy_((means - means.mean(dim=0)) / spread.square() * SURE)
        head.bias.copy_(-(head.weight * (means + means.mean(dim=0))).sum(dim=1) / 2)
    return nn.Sequential(body, head)
