"""Networks of the benchmark of selection: the file that its influence.yaml names."""

from __future__ import annotations

from label_noise_project import Images, resnet8
from torch import nn

from influence_cli.demo.project_model import build, train
from influence_cli.replay.proxy import build as proxy

__all__ = ["Images", "build", "resnet8", "smooth", "smooth_colour", "train"]


def smooth() -> nn.Module:
    """Make the demo's CNN with GELU and average pooling in place of ReLU and max-pooling."""
    replaced = {nn.ReLU: nn.GELU, nn.MaxPool2d: lambda: nn.AvgPool2d(2)}
    return nn.Sequential(*(replaced.get(type(layer), lambda layer=layer: layer)() for layer in build()))


def smooth_colour() -> nn.Module:
    """Make the proxy for CIFAR-10, as a network of its own."""
    return proxy(3, 32, 10)
