"""What is kept of each layer, its size, and models of every shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from influence_cli.data.batches import Batch
from influence_cli.errors import InfluenceError
from influence_cli.evidence.activations import ALL, LAYER, PENULTIMATE, activations, pooled

CPU = torch.device("cpu")


def batches(inputs: Tensor, size: int = 4) -> list[Batch]:
    return [
        Batch(part, torch.arange(len(part)) % 3, np.arange(start, start + len(part)))
        for start, part in zip(range(0, len(inputs), size), inputs.split(size), strict=True)
    ]


def test_every_layer_is_there_once_and_in_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3)
    )
    inputs = torch.randn(10, 1, 8, 8)
    found = activations(model, batches(inputs), CPU)
    assert list(found.layers) == ["0", "4", "5", "outputs"]
    assert found.features.shape == (10, 64 + 36 + 8 + 3)
    torch.testing.assert_close(found.features[:, found.layers["0"]], inputs.flatten(1))
    torch.testing.assert_close(found.features[:, found.layers["4"]], model[:4](inputs))
    torch.testing.assert_close(found.features[:, found.layers["5"]], model[:5](inputs))
    torch.testing.assert_close(found.outputs, model(inputs))
    assert found.indices.tolist() == list(range(10))
    assert found.targets.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 0, 1]
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_map_is_pooled_on_a_grid() -> None:
    x = torch.randn(2, 8, 16, 16)
    assert pooled(nn.Conv2d(8, 1, 1), x, 128).shape == (2, 128)
    torch.testing.assert_close(pooled(nn.Conv2d(8, 1, 1), x, 128).view(2, 8, 4, 4), nn.functional.avg_pool2d(x, 4))
    assert pooled(nn.Conv2d(8, 1, 1), x, 8 * 256).shape == (2, 8 * 256)
    assert pooled(nn.Conv2d(8, 1, 1), x, 4).shape == (2, 4)


def test_other_shapes_are_pooled_too() -> None:
    assert pooled(nn.Conv1d(4, 1, 1), torch.randn(2, 4, 100), 40).shape == (2, 40)
    assert pooled(nn.Conv3d(2, 1, 1), torch.randn(2, 2, 9, 9, 9), 54).shape == (2, 54)
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(pooled(nn.Linear(6, 1), tokens, 100), tokens.mean(dim=1))
    assert pooled(nn.Linear(6, 1), torch.randn(2, 3, 5, 6), 100).shape == (2, 6)
    flat = torch.randn(2, 100)
    torch.testing.assert_close(pooled(nn.Linear(100, 1), flat, 50), flat.view(2, 50, 2).mean(dim=2))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_deep_networks_stay_within_the_bound(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=3).eval()
    found = activations(model, batches(torch.randn(4, 3, 64, 64)), CPU)
    assert found.features.shape[1] <= ALL + 3
    widths = [place.stop - place.start for place in found.layers.values()]
    assert max(widths[:-2]) <= LAYER
    assert widths[-2] <= PENULTIMATE
    assert bool(found.features.isfinite().all())


def test_a_model_without_such_layers_has_its_outputs_alone() -> None:
    found = activations(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), batches(torch.randn(4, 4)), CPU)
    assert list(found.layers) == ["outputs"]
    assert found.hidden.shape == (4, 0)


def test_less_is_kept_where_less_fits() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, 3))
    found = activations(model, batches(torch.randn(6, 1, 8, 8)), CPU, most=100)
    assert found.hidden.shape[1] <= 100
    assert list(found.layers) == ["0", "2", "3", "outputs"]


def test_equal_inputs_have_equal_hashes() -> None:
    inputs = torch.randn(6, 4)
    inputs[4] = inputs[1]
    hashes = activations(nn.Sequential(nn.Linear(4, 3)), batches(inputs), CPU).hashes
    assert hashes[4] == hashes[1]
    assert len(set(hashes.tolist())) == 5


def test_an_output_that_is_not_finite_is_named() -> None:
    inputs = torch.randn(8, 4)
    inputs[5, 2] = torch.inf
    with pytest.raises(InfluenceError, match="example 5 are NaN or infinite"):
        activations(nn.Sequential(nn.Linear(4, 3)), batches(inputs), CPU)


def test_no_example_is_an_error() -> None:
    with pytest.raises(InfluenceError, match="no example"):
        activations(nn.Sequential(nn.Linear(4, 3)), [], CPU)
