"""Products of the GGN with many vectors, by the layer pass, against a dense reference and against reverse mode."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from influence_cli.model.network import Network, restrict, track
from influence_cli.passes import curvature_products
from influence_cli.passes.coverage import make_network
from influence_cli.passes.curvature_products import curvature_product

loss = partial(nn.functional.cross_entropy, reduction="none")
CLASSES = 3


class Shared(nn.Module):
    """One linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, groups=1)
        self.norm = nn.BatchNorm2d(6)
        self.mixed = nn.Conv2d(6, 6, 2, groups=3, bias=False)
        self.twice, self.head = nn.Linear(54, 54), nn.Linear(54, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.norm(self.conv(x)).tanh()).flatten(1)
        return self.head(self.twice(self.twice(x).tanh()).tanh())


class Branched(nn.Module):
    """Outputs that do not all depend on every layer, one of which they reach by one call or by two."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.rest = nn.Linear(100, 6), nn.Linear(6, 1), nn.Linear(6, 2)
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1)).tanh()
        once = self.twice(x).tanh()
        return torch.cat([self.first(once), self.rest(self.twice(once).tanh())], dim=1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, CLASSES, bias=False))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 6), nn.Tanh(), nn.Linear(6, 3))


def make(model: nn.Module, names: tuple[str, ...] = ()) -> tuple[Network, Tensor, Tensor]:
    """Give a network in float64 that tracks the parameters named (all by default), inputs and targets."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 1, 10, 10, dtype=torch.float64), torch.randint(0, CLASSES, (9,))
    network = track(model.double().eval(), loss, ("*",), "w")
    return make_network(restrict(network, names) if names else network, x), x, y


def dense(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """Σ JᵀSJ [p, p], a row of J by autograd at a time, S written down for softmax."""
    wanted = list(network.parameters().values())
    total = torch.zeros(network.size, network.size, dtype=torch.float64)
    for own in x:
        outputs = network.model(own[None])[0]
        rows = [torch.autograd.grad(o, wanted, retain_graph=True) for o in outputs]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p = outputs.detach().softmax(dim=0)
        total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total


CASES = [
    (Shared, ()),
    (Branched, ()),
    (perceptron, ()),
    (convolutional, ()),
    (convolutional, ("0.bias", "3.bias")),
    (convolutional, ("3.weight", "5.weight", "5.bias")),
    (convolutional, ("0.weight",)),
]


@pytest.mark.parametrize(("build", "names"), CASES)
@pytest.mark.parametrize("step", [4, 9])
def test_the_layer_pass_equals_a_dense_ggn(build: type, names: tuple[str, ...], step: int) -> None:
    torch.manual_seed(1)
    network, x, y = make(build(), names)
    v = torch.randn(5, network.size, dtype=torch.float64)
    found = sum(
        curvature_products._layer_pass_product(network, a, b, v)
        for a, b in zip(x.split(step), y.split(step), strict=True)
    )
    expected = v @ dense(network, x, y)
    assert float((torch.as_tensor(found) - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize(("build", "names"), CASES)
def test_both_ways_agree(build: type, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = make(build(), names)
    v = torch.randn(6, network.size, dtype=torch.float64)
    found = []
    for step in (0, 4):
        monkeypatch.setattr(curvature_products, "_layer_pass_examples", lambda *_, step=step: step)
        found.append(curvature_product(network, x, y, v, "ggn"))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-12


def test_many_vectors_go_through_the_layer_pass_and_one_does_not() -> None:
    network, x, _ = make(convolutional())
    assert curvature_products._layer_pass_examples(network, x, 1) == 0
    assert curvature_products._layer_pass_examples(network, x, 100) == len(x)
    # Of a perceptron whose outputs are many, J takes more than passes through it.
    network, x, _ = make(nn.Sequential(nn.Flatten(), nn.Linear(100, 50)))
    assert curvature_products._layer_pass_examples(network, x, 20) == 0
    assert curvature_products._layer_pass_examples(network, x, 200) == len(x)


def test_what_the_layer_pass_does_not_cover_goes_by_reverse_mode() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = convolutional(), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale.exp()

    network, x, y = make(Scaled())
    assert network.rest == ("scale",)
    assert curvature_products._layer_pass_examples(network, x, 1000) == 0
    v = torch.randn(30, network.size, dtype=torch.float64)
    expected = v @ dense(network, x, y)
    assert float((curvature_product(network, x, y, v, "ggn") - expected).norm() / expected.norm()) < 1e-12
