"""Small models around one layer, and their example gradients against a for-loop of autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradient_products import squared_norms
from influence_cli.passes.gradients import example_gradients

loss = partial(nn.functional.cross_entropy, reduction="none")
CLOSE = 1e-5


class Headed(nn.Module):
    """A layer with or without one before it, then tanh and a linear head with 5 outputs."""

    def __init__(self, layer: nn.Module, example: Tensor, *, behind: bool) -> None:
        super().__init__()
        self.before = nn.Linear(example.shape[-1], example.shape[-1]) if behind else None
        self.layer = layer
        with torch.no_grad():
            width = self.features(example).shape[1]
        self.head = nn.Linear(width, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x if self.before is None else torch.tanh(self.before(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Chain(nn.Module):
    """Three linear layers, called as ``run`` says."""

    def __init__(self, run: Callable[[Chain, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def shifted(layer: nn.Module) -> nn.Module:
    """Move a norm's weights and running statistics away from 0 and 1."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.5, 2)
    return layer


def looped(model: nn.Module, names: Sequence[str], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The reference: one backward an example, in float64."""
    model = copy.deepcopy(model).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        loss(model(x[None].clone()), y[None])[0].backward()
        for name in names:
            parameter = model.get_parameter(name)
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows[name].append(grad.flatten())
    return {name: torch.stack(own) for name, own in rows.items()}


def checked(model: nn.Module, inputs: Tensor) -> Network:
    """Decide on two examples, then compare the gradients of all of them with the loop's, parameter by parameter."""
    model.eval()
    targets = torch.randint(0, 5, (len(inputs),))
    before = inputs.clone()
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    got, losses, outputs = example_gradients(network, inputs, targets)
    assert torch.equal(inputs, before)
    assert not inputs.requires_grad
    expected = looped(model, network.names, inputs, targets)
    whole = float(torch.cat(list(expected.values()), dim=1).norm())
    for name, truth in expected.items():
        error = float((got[:, network.slots[name]] - truth).norm())
        assert error <= CLOSE * (float(truth.norm()) + 0.01 * whole), f"{name}: {error:.1e} of {float(truth.norm())}"
    squares = torch.cat(list(expected.values()), dim=1).double().square().sum(dim=1)
    found = squared_norms(network, inputs, targets)[0].double()
    assert float((found - squares).norm()) <= 20 * CLOSE * float(squares.norm())
    with torch.no_grad():
        assert torch.equal(outputs, network.model(inputs.clone()))
    assert torch.equal(losses, loss(outputs, targets))
    assert set(network.rest) | {name for layer in network.layers for name in layer.names} | set(network.unused) == set(
        network.names
    )
    return network


def covered(network: Network) -> set[str]:
    """Name the parameters that the layer pass covers."""
    return {name for layer in network.layers for name in layer.names}
