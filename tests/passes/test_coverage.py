"""Models whose examples go different ways: gradients are autograd's, or the layer is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from influence_cli.passes.layers import UnevenError
from tests.support.routed import Routed


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Headed(Routed):
    """A mixture of experts with a layer that all examples pass."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def examples(count: int) -> tuple[Tensor, Tensor]:
    """Make examples sorted by class, as class folders are."""
    targets = torch.arange(count) * 3 // count
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(count, 4, generator=generator) + 1.5 * nn.functional.one_hot(targets, 4).float(), targets


def by_autograd(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        parts = torch.autograd.grad(
            loss(model(x[None]), y[None])[0], list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_experts_that_see_some_of_the_examples(order: str) -> None:
    inputs, targets = examples(60)
    if order == "shuffled":
        chosen = torch.randperm(60, generator=torch.Generator().manual_seed(2))
        inputs, targets = inputs[chosen], targets[chosen]
    model = Headed().eval()
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    assert network.unused == ()
    assert [layer.name for layer in network.layers] == ["head"]
    grads = example_gradients(network, inputs, targets)[0]
    torch.testing.assert_close(grads, by_autograd(model, inputs, targets), rtol=1e-4, atol=1e-6)


def test_a_sample_that_misses_an_expert_and_a_batch_that_does_not() -> None:
    inputs, targets = examples(60)
    network = make_network(track(Headed().eval(), loss, ("*",), "layers"), inputs[:20])
    assert {"experts.1.weight", "experts.2.bias"} <= set(network.unused)
    with pytest.raises(UnevenError, match=r"layer experts\.0 saw 10 rows for 20 examples"):
        example_gradients(network, inputs[10:30], targets[10:30])
    network = make_network(network, inputs[:20], ("experts.0.weight", "experts.0.bias"))
    with pytest.raises(UnevenError, match=r"no example of the probe used experts\.1\.weight") as caught:
        example_gradients(network, inputs[10:30], targets[10:30])
    assert set(caught.value.names) == {"experts.1.weight", "experts.1.bias"}


class Early(nn.Module):
    """A layer that only examples with a small first input go through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        on = (x[:, 0] < 5).nonzero()[:, 0]
        return self.second(x.index_put((on,), self.first(x[on])))


def test_a_layer_that_a_later_example_does_not_pass_is_named() -> None:
    inputs, targets = examples(30)
    network = make_network(track(Early().eval(), loss, ("*",), "layers"), inputs)
    assert [layer.rows for layer in network.layers] == [1, 1]
    inputs[7, 0] = 9.0
    with pytest.raises(UnevenError, match="layer first saw 29 rows for 30 examples") as caught:
        example_gradients(network, inputs, targets)
    assert caught.value.names == ("first.weight", "first.bias")


def test_what_the_layer_pass_is_not_to_take_is_left_to_autograd() -> None:
    inputs, targets = examples(30)
    model = Early().eval()
    network = make_network(track(model, loss, ("*",), "layers"), inputs, ("first.weight", "first.bias"))
    assert [layer.name for layer in network.layers] == ["second"]
    inputs[7, 0] = 9.0
    grads = example_gradients(network, inputs, targets)[0]
    torch.testing.assert_close(grads, by_autograd(model, inputs, targets), rtol=1e-4, atol=1e-6)


def doubled(module: nn.Linear, x: Tensor) -> Tensor:
    """Double the weight for examples whose last input is large: only the rule of the module does not see it."""
    weight = torch.where(x[:, -1:, None] > 1, 2.0, 1.0) * module.weight
    return torch.einsum("boi,bi->bo", weight, x) + module.bias


class Scaled(nn.Linear):
    forward: Callable[[Tensor], Tensor] = doubled  # type: ignore[assignment]


@pytest.mark.parametrize("large", [0, 29])
def test_a_rule_that_holds_for_most_examples_is_dropped_where_the_compared_ones_show_it(large: int) -> None:
    inputs, targets = examples(30)
    inputs[large, -1] = 4.0
    model = nn.Sequential(Scaled(4, 3)).eval()
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    grads = example_gradients(network, inputs, targets)[0]
    torch.testing.assert_close(grads, by_autograd(model, inputs, targets), rtol=1e-4, atol=1e-6)
