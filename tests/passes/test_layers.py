"""Example gradients against a for-loop of autograd, on the layers that people use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network, evaluate, output_layer, restrict, track
from influence_cli.model.outputs import output_curvature
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients, jacobians

loss = partial(nn.functional.cross_entropy, reduction="none")


class Everything(nn.Module):
    """Conv, grouped conv, BatchNorm, LayerNorm, attention, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, stride=2)
        self.layer_norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        h = self.layer_norm(torch.relu(self.grouped(h)).flatten(2).transpose(1, 2))
        h = h + self.attention(h, h, h)[0]
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(h.mean(dim=1))))))


class Words(nn.Module):
    """An embedding, and a transformer layer above it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(dim=1))


class Branching(nn.Module):
    """Control flow on data, example by example: neither the layer pass nor vmap can go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(row) if row.sum().item() > 0 else self.b(row) for row in x])


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)


def looped(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The reference: one backward an example."""
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        loss(model(x[None]), y[None])[0].backward()
        rows.append(
            torch.cat(
                [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
            )
        )
    return torch.stack(rows)


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 10, 10), torch.randint(0, 5, (count,))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bool]] = {
    "convolutions, norms, attention": (Everything, lambda: torch.randn(12, 1, 10, 10), True),
    "embedding, transformer": (Words, lambda: torch.randint(0, 20, (12, 7)), True),
    "control flow": (Branching, lambda: torch.randn(12, 6), False),
    "recurrent": (Recurrent, lambda: torch.randn(12, 3, 6), False),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_a_loop_of_autograd(case: str) -> None:
    build, make_inputs, vectorised = CASES[case]
    model, inputs = build().eval(), make_inputs()
    if isinstance(model, Everything):  # running statistics away from 0 and 1
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    targets = torch.randint(0, 5, (12,))
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    assert network.vectorised is vectorised or case == "recurrent"
    got, losses, outputs = example_gradients(network, inputs, targets)
    expected = looped(model, inputs, targets)
    assert float((got - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    with torch.no_grad():
        alone = torch.cat([model(x[None]) for x in inputs])
    assert torch.allclose(outputs, alone, atol=1e-5)
    assert torch.allclose(losses, loss(alone, targets), atol=1e-5)


def test_an_obstacle_is_named() -> None:
    inputs = torch.randn(4, 6)
    network = make_network(track(Branching().eval(), loss, ("*",), "layers"), inputs)
    assert not network.vectorised
    assert "item" in network.obstacle


@pytest.mark.parametrize("build", [Everything, Recurrent])
def test_jacobian_times_slope_is_the_gradient(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    inputs = torch.randn(4, 1, 10, 10) if build is Everything else torch.randn(4, 3, 6)
    targets = torch.randint(0, 5, (4,))
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    jacobian, _, _ = jacobians(network, inputs, targets)
    grads, _, outputs = example_gradients(network, inputs, targets)
    slope = outputs.softmax(dim=1) - nn.functional.one_hot(targets, 5)
    assert torch.allclose(torch.einsum("bc,bcp->bp", slope, jacobian), grads, atol=1e-5)


def test_output_curvature_of_cross_entropy() -> None:
    outputs, targets = torch.randn(6, 5), torch.randint(0, 5, (6,))
    p = outputs.softmax(dim=1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(output_curvature(loss, outputs, targets), expected, atol=1e-6)


def test_track_takes_globs_and_what_is_below() -> None:
    model = Everything()
    assert track(model, loss, ("head",), "w").names == ("head.weight", "head.bias")
    assert len(track(model, loss, ("att*",), "w").names) == 4
    assert track(model, loss, ("*",), "w").left_out == ()
    model.conv.weight.requires_grad_(False)
    assert track(model, loss, ("*",), "w").left_out == ("conv.weight",)
    assert track(model, loss, ("head",), "w").size == 45


def test_track_refuses_what_matches_nothing() -> None:
    with pytest.raises(InfluenceError) as error:
        track(Everything(), loss, ("haed",), "influence.yaml:7")
    assert error.value.message.startswith("influence.yaml:7: no layer matches 'haed'")
    assert "did you mean 'head'?" in error.value.hint
    frozen = Everything().requires_grad_(False)
    with pytest.raises(InfluenceError, match="no trained parameter"):
        track(frozen, loss, ("*",), "w")


def test_output_layer_is_found_only_where_it_is_the_output() -> None:
    model = Everything().eval()
    inputs, _ = images(2)
    everything = track(model, loss, ("*",), "w")
    assert output_layer(everything, inputs) is None
    assert output_layer(restrict(everything, ("head.weight", "head.bias")), inputs) is model.head
    assert output_layer(restrict(everything, ("twice.weight",)), inputs) is None


def test_evaluate_runs_forward_only() -> None:
    model = Everything().eval()
    inputs, targets = images(3)
    losses, outputs = evaluate(Network(model, loss, ("head.weight",), (), 40), inputs, targets)
    assert losses.shape == (3,)
    assert not outputs.requires_grad
