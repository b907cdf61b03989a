"""Networks and data set of the cases of label noise: the file that their influence.yaml names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.demo.project_model import build as demo


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images and labels of an .npz, normalised."""

    def __init__(self, file: str) -> None:
        with np.load(Path(file)) as data:
            self.x, self.targets = normalised(data["x"]), data["y"].tolist()
        self.classes = [str(number) for number in range(10)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


class ImageNetImages(Images):
    """The same, normalised by ImageNet's mean and deviation: what the foreign ResNet-20 was trained on."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        own = self.x * 0.25 + 0.47
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.x = (own - mean[:, None, None]) / deviation[:, None, None]


def normalised(images: np.ndarray) -> Tensor:
    """Give float32 [n, 1, 28, 28] or [n, 3, 32, 32], about centred, of about unit variance."""
    x = torch.from_numpy(images).float() / 255
    return (x[:, None] - 0.286) / 0.353 if x.ndim == 3 else ((x - 0.47) / 0.25).permute(0, 3, 1, 2).contiguous()


def cnn(hidden: int = 32) -> nn.Module:
    """Make the demo's CNN; 512 hidden units are enough to memorise 6,000 wrong labels."""
    model = demo()
    if hidden != 32:
        model[7], model[9] = nn.Linear(32 * 7 * 7, hidden), nn.Linear(hidden, 10)
    return model


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016), the first with a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return (out + self.shortcut(x)).relu()


def resnet8() -> nn.Module:
    """Make ResNet-8 for 32×32 colour images: one block a stage, 16, 32 and 64 channels, 78,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Sum(nn.Module):
    """A shortcut around some layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Fifth(nn.Module):
    """A fifth of everything: logits that start small."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * x


def convolved(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """Make a convolution, its norm and ReLU."""
    layers = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


def resnet9() -> nn.Module:
    """Make the ResNet-9 of TRAK's and kronfluence's CIFAR-10 examples, 2.3 million parameters."""
    return nn.Sequential(
        convolved(3, 64),
        convolved(64, 128, 5, 2, 2),
        Sum(convolved(128, 128), convolved(128, 128)),
        convolved(128, 256),
        nn.MaxPool2d(2),
        Sum(convolved(256, 256), convolved(256, 256)),
        convolved(256, 128, padding=0),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10, bias=False),
        Fifth(),
    )


def resnet9_wide() -> nn.Module:
    """Make the ResNet-9 of DAWNBench, 6.6 million parameters."""
    return nn.Sequential(
        convolved(3, 64),
        convolved(64, 128),
        nn.MaxPool2d(2),
        Sum(convolved(128, 128), convolved(128, 128)),
        convolved(128, 256),
        nn.MaxPool2d(2),
        convolved(256, 512),
        nn.MaxPool2d(2),
        Sum(convolved(512, 512), convolved(512, 512)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10, bias=False),
        Fifth(),
    )


def build(net: str) -> nn.Module:
    """Make ``cnn``, ``wide`` (the same with 512 hidden units), ``resnet8``, ``resnet9`` or ``resnet9_wide``."""
    if net in ("cnn", "wide"):
        return cnn(512 if net == "wide" else 32)
    return {"resnet8": resnet8, "resnet9": resnet9, "resnet9_wide": resnet9_wide}[net]()
