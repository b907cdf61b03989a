"""Networks and images of bench/devices.py: the file that its influence.yaml names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_cli.demo.project import TRAIN, read_images
from influence_cli.demo.project_model import build as cnn


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The first of the demo's training or test images, grey 28 × 28 or padded to colour 32 × 32."""

    def __init__(self, count: int, train: bool, colour: bool) -> None:
        images, labels = read_images()
        part = slice(0, count) if train else slice(TRAIN, TRAIN + count)
        x = torch.from_numpy(images[part].copy())[:, None].float() / 255
        self.x = (x - 0.286) / 0.353
        if colour:
            self.x = nn.functional.pad(self.x, (2, 2, 2, 2)).repeat(1, 3, 1, 1)
        self.targets = labels[part].tolist()
        self.classes = [str(number) for number in range(10)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


class Attention(nn.Module):
    """One block of a vision transformer: patches, a class token, attention, a perceptron."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.places
        own = self.first(tokens)
        tokens = tokens + self.attention(own, own, own, need_weights=False)[0]
        return self.head((tokens + self.perceptron(self.second(tokens)))[:, 0])


class Recurrent(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(28, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x[:, 0])[0][:, -1])


def build(name: str) -> nn.Module:
    """Make ``cnn``, ``resnet18``, ``attention`` or ``recurrent``."""
    if name == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=10)
    return {"cnn": cnn, "attention": Attention, "recurrent": Recurrent}[name]()
