"""The exact curvature against autograd's own Hessian, and its products against the matrix."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from influence_cli.curvature.explicit import curvature_matrix, eigenbasis
from influence_cli.curvature.operator import hold, mean_product
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, output_layer, restrict, track
from influence_cli.passes.curvature_products import curvature_product

loss = partial(nn.functional.cross_entropy, reduction="none")


@pytest.fixture
def small() -> tuple[Network, list[Batch]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 16, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(20, 1, 6, 6), torch.randint(0, 3, (20,))
    network = track(model.eval(), loss, ("*",), "w")
    return network, [Batch(x[:12], y[:12], np.arange(12)), Batch(x[12:], y[12:], np.arange(12, 20))]


def reference_hessian(network: Network, batches: list[Batch]) -> torch.Tensor:
    """torch.func.hessian of the mean loss, in float64."""
    x = torch.cat([batch.inputs for batch in batches]).double()
    y = torch.cat([batch.targets for batch in batches])
    model = network.model.double()
    names, shapes = network.names, [p.shape for p in network.parameters().values()]
    theta = torch.cat([p.detach().flatten() for p in network.parameters().values()])

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(functional_call(model, parameters, (x,)), y).mean()

    result = hessian(mean_loss)(theta)
    model.float()
    return result


def test_hessian_equals_torch_func(small: tuple[Network, list[Batch]]) -> None:
    network, batches = small
    expected = reference_hessian(network, batches)
    got = curvature_matrix(network, batches, "hessian")
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_hessian_does_not_depend_on_the_order_of_layers() -> None:
    """Each row is computed from its own parameter on; here the last layer is listed first, and one is not used."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 3), nn.Linear(2, 2), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.last(self.first(x).tanh())
            return outputs

    torch.manual_seed(0)
    network = track(Reversed().eval(), loss, ("*",), "w")
    batches = [Batch(torch.randn(20, 6), torch.randint(0, 3, (20,)), np.arange(20))]
    expected = reference_hessian(network, batches)
    got = curvature_matrix(network, batches, "hessian")
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_ggn_equals_a_dense_reference(small: tuple[Network, list[Batch]]) -> None:
    """JᵀSJ built row by row with autograd.grad, S written down for softmax."""
    network, batches = small
    total = torch.zeros(network.size, network.size, dtype=torch.float64)
    wanted = list(network.parameters().values())
    for batch in batches:
        for x in batch.inputs:
            outputs = network.model(x[None])[0]
            rows = [
                torch.cat([g.flatten() for g in torch.autograd.grad(o, wanted, retain_graph=True)]) for o in outputs
            ]
            jacobian, p = torch.stack(rows).double(), outputs.softmax(dim=0).detach().double()
            total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / 20
    got = curvature_matrix(network, batches, "ggn")
    assert float((got - total).norm() / total.norm()) < 1e-5


def test_output_layer_path_equals_the_general_one(small: tuple[Network, list[Batch]]) -> None:
    network, batches = small
    head = restrict(network, ("5.weight", "5.bias"))
    layer = output_layer(head, batches[0].inputs)
    assert layer is not None
    fast = curvature_matrix(head, batches, "ggn", layer)
    for matrix in ("ggn", "hessian"):
        general = curvature_matrix(head, batches, matrix)
        assert float((fast - general).norm() / general.norm()) < 1e-5
    no_bias = restrict(network, ("5.weight",))
    assert torch.allclose(
        curvature_matrix(no_bias, batches, "ggn", layer), curvature_matrix(no_bias, batches, "ggn"), atol=1e-6
    )


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_products_equal_the_matrix(small: tuple[Network, list[Batch]], matrix: str) -> None:
    network, batches = small
    dense = curvature_matrix(network, batches, matrix)
    v = torch.randn(4, network.size)
    summed = sum(curvature_product(network, b.inputs, b.targets, v, matrix) for b in batches)
    assert torch.allclose(torch.as_tensor(summed) / 20, v @ dense.float(), atol=1e-5)
    operator = mean_product(network, hold(batches, torch.device("cpu"), 7), matrix, 0.25)
    assert torch.allclose(operator(v), v @ dense.float() + 0.25 * v, atol=1e-5)


def test_eigenbasis_is_orthonormal_and_falls(small: tuple[Network, list[Batch]]) -> None:
    network, batches = small
    matrix = curvature_matrix(network, batches, "ggn")
    basis, spectrum = eigenbasis(matrix)
    assert torch.allclose(basis.T @ basis, torch.eye(network.size, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(basis @ torch.diag(spectrum) @ basis.T, matrix, atol=1e-10)
    assert bool((spectrum.diff() <= 1e-12).all())
