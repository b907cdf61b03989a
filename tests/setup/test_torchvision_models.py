"""recognise: a state dict of torchvision, by names and shapes alone."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from influence_cli.setup.torchvision_models import _WithoutWeights, crops, recognise


def state_of(name: str, **args: object) -> dict[str, Tensor]:
    with _WithoutWeights():
        return dict(torchvision.models.get_model(name, weights=None, **args).state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vgg11_bn",
        "regnet_x_16gf",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "vit_b_32",
        "swin_t",
    ],
)
def test_a_model_is_recognised_with_its_number_of_classes(name: str) -> None:
    model, nearest = recognise(state_of(name, num_classes=7))
    assert nearest == ""
    assert model is not None
    assert (model.name, model.args, model.outputs, model.prefix) == (name, {"num_classes": 7}, 7, "")


def test_the_size_of_a_vit_is_read_from_its_positions() -> None:
    model, _ = recognise(state_of("vit_b_32", num_classes=3, image_size=128))
    assert model is not None
    assert model.args == {"num_classes": 3, "image_size": 128}


def test_wrappers_counters_and_other_parts_of_the_training_do_not_matter() -> None:
    state = {f"net.backbone.{key}": value for key, value in state_of("resnet18", num_classes=3).items()}
    state["net.backbone.total_ops"] = state["n_averaged"] = torch.zeros(1)
    state["criterion.weight"] = torch.ones(3)
    model, _ = recognise(state)
    assert model is not None
    assert (model.name, model.prefix, model.head) == ("resnet18", "net.backbone.", "net.backbone.fc.weight")


def test_what_nearly_fits_is_named_with_the_difference() -> None:
    state = state_of("mobilenet_v3_small", num_classes=3)
    state["features.0.0.weight"] = torch.empty(16, 1, 3, 3, device="meta")
    model, nearest = recognise(state)
    assert model is None
    assert nearest == (
        "nearly torchvision's mobilenet_v3_small, but features.0.0.weight is [16, 1, 3, 3] instead of [16, 3, 3, 3]"
    )
    head = state_of("mobilenet_v3_small", num_classes=3)
    head["classifier.3.1.weight"], head["classifier.3.1.bias"] = (
        head.pop("classifier.3.weight"),
        head.pop("classifier.3.bias"),
    )
    model, nearest = recognise(head)
    assert model is None
    assert "it has no classifier.3.weight, classifier.3.bias" in nearest
    assert "it has classifier.3.1.weight, classifier.3.1.bias besides" in nearest


def test_another_network_is_nothing_of_torchvision() -> None:
    other = {"classifier.1.weight": torch.empty(3, 4), "features.1.conv.0.0.weight": torch.empty(8, 3, 3, 3)}
    assert recognise(other) == (None, "")
    assert recognise({"0.weight": torch.empty(3, 4)}) == (None, "")


def test_the_crops_of_the_library_are_told() -> None:
    assert crops("resnet50") == ((256, 224), (232, 224))
    assert crops("inception_v3") == ((342, 299),)
