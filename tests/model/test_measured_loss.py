"""What a loss is, is measured: its convexity, not its name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from influence_cli.model.losses import hinge, smooth_hinge
from influence_cli.model.measured_loss import class_weights, measure_loss

C = 4
W = torch.tensor([0.5, 1.0, 2.0, 4.0] * 10)
F = nn.functional


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    logs = -F.cross_entropy(outputs, targets, reduction="none")
    return -((1 - logs.exp()) ** 2) * logs


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=W[: outputs.shape[1]], reduction="none")


def in_float64(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=W[: outputs.shape[1]].to(outputs.dtype), reduction="none")


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - F.one_hot(targets, outputs.shape[1])).square().sum(dim=1)


def ramp(outputs: Tensor, targets: Tensor) -> Tensor:
    """No second derivative tells that it is not convex: it is linear piece by piece."""
    return hinge(outputs, targets).clamp_max(2.0)


def brier(outputs: Tensor, targets: Tensor) -> Tensor:
    return squared(outputs.softmax(dim=1), targets)


class Renamed(nn.CrossEntropyLoss):
    """A cross-entropy by its class, a focal loss by what it computes."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return focal(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "convex", "smooth"),
    [
        (weighted, True, False),  # its weights are float32, as Newton steps are not
        (in_float64, True, True),
        (squared, True, True),
        (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"), True, True),
        (hinge, True, False),
        (smooth_hinge, True, False),
        (nn.MultiMarginLoss(reduction="none"), False, False),  # torch has no second derivative of it
        (focal, False, False),
        (Renamed(reduction="none"), False, False),
        (brier, False, False),
        (ramp, False, False),
    ],
)
@pytest.mark.parametrize("classes", [C, 2, 40])
def test_convexity_is_that_of_the_function(loss: nn.Module, convex: bool, smooth: bool, classes: int) -> None:
    outputs, targets = torch.randn(8, classes, generator=torch.Generator().manual_seed(3)), torch.arange(8) % classes
    shape = measure_loss(loss, outputs, targets)
    assert (shape.convex, shape.smooth) == (convex, smooth)


def test_class_weights_are_found_in_a_function() -> None:
    found = class_weights(weighted, C, torch.zeros(1))
    assert found is not None
    assert torch.allclose(found, W[:C].double(), rtol=1e-5)
    zero = class_weights(nn.CrossEntropyLoss(torch.tensor([1.0, 0.0, 1.0, 1.0]), reduction="none"), C, torch.zeros(1))
    assert zero is not None
    assert zero.tolist() == pytest.approx([1, 0, 1, 1])


@pytest.mark.parametrize("loss", [focal, squared, lambda o, y: 3 * F.cross_entropy(o, y, reduction="none")])
def test_other_losses_have_no_class_weights(loss: nn.Module) -> None:
    """A factor for all classes is no weight: the mean of such a loss divides by n."""
    assert class_weights(loss, C, torch.zeros(1)) is None


def test_a_loss_that_fails_on_some_label_is_not_known_to_be_convex() -> None:
    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        if bool((targets == 3).any()):
            raise ValueError("no class 3")
        return F.cross_entropy(outputs, targets, reduction="none")

    assert not measure_loss(fails, torch.zeros(2, C), torch.zeros(2, dtype=torch.int64)).convex
