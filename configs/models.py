"""The models that the configs here name, and the training of the smallest: python configs/models.py data."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn


def softmax_regression() -> nn.Module:
    """Make softmax regression on 28×28 grey images: 7,850 parameters, a convex objective."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class _Block(nn.Module):
    """Two 3×3 convolutions; where the shape changes, the shortcut drops pixels and adds channels of zeros."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - before

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added // 2))
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + shortcut).relu()


class _ResNet20(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Block(16, 16, 1), _Block(16, 16, 1), _Block(16, 16, 1))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1), _Block(32, 32, 1))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1), _Block(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    """Make the ResNet-20 for 32×32 images of He et al. 2016, section 4.2, shortcuts of option A: 269,722 parameters.

    Its names are those of github.com/akamaster/pytorch_resnet_cifar10, whose checkpoints fit.
    """
    return _ResNet20(num_classes)


def minimise_cross_entropy(
    model: nn.Module, x: Tensor, y: Tensor, l2: float, *, steps: int = 300, largest_slope: float = 1e-7
) -> float:
    """Minimise mean cross-entropy + l2/2·‖θ‖² over a model's parameters by L-BFGS; in float64 for a true minimum.

    Args:
        model: a convex one, on the inputs' type.
        x: inputs [n, …].
        y: labels [n].
        l2: of all parameters.
        steps: at most.
        largest_slope: of a parameter, at which it ends.

    Returns:
        The norm of the gradient at the end.
    """
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        tolerance_grad=largest_slope,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        loss = nn.functional.cross_entropy(model(x), y) + l2 / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm())


def train_softmax_regression(root: str, l2: float = 0.01) -> nn.Module:
    """Train softmax regression on MNIST to its minimum."""
    from torchvision.datasets import MNIST

    data = MNIST(root, download=True)
    model = softmax_regression().double()
    minimise_cross_entropy(model, data.data.double() / 255, data.targets, l2)
    return model.float()


if __name__ == "__main__":
    folder = Path(__file__).parent
    torch.save(train_softmax_regression(sys.argv[1]).state_dict(), folder / "mnist_softmax.pt")
