"""Layers and parameters that are read at the functions inside a module, against a for-loop of autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from influence_cli.passes.layers import forward
from tests.support.example_gradients import Chain, Headed, checked, covered, loss, shifted


class NormAct(nn.BatchNorm2d):
    """A batch norm with the activation behind it, in place, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1)
        return functional.relu_(x)


class GroupAct(nn.GroupNorm):
    """A group norm with the activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of images, as timm's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does: by the size of the image, more at the end than at the start."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[2:]), self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            needed = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            pads += [needed // 2, needed - needed // 2]
        return functional.conv2d(
            functional.pad(x, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups
        )


class Wider(nn.Conv1d):
    """A convolution with more padding than its module says, given as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, self.weight, self.bias, padding=2)


INSIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm and relu": (lambda: NormAct(3), (3, 4, 5)),
    "group norm and silu": (lambda: GroupAct(2, 4), (4, 3, 5)),
    "layer norm of channels": (lambda: ChannelNorm(4), (4, 3, 5)),
    "conv same": (lambda: Same(2, 4, 3, stride=2), (2, 5, 6)),
    "conv same, dilated, in groups": (lambda: Same(2, 4, (3, 2), dilation=(1, 2), groups=2), (2, 5, 4)),
    "conv with other padding": (lambda: Wider(2, 3, 3), (2, 6)),
}


@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind another"])
@pytest.mark.parametrize("case", INSIDE)
def test_a_subclass_is_read_at_the_function_that_takes_its_weight(case: str, behind: bool) -> None:
    build, shape = INSIDE[case]
    inputs = torch.randn(6, *shape)
    layer = build()
    network = checked(
        Headed(layer if isinstance(layer, nn.Conv1d | nn.Conv2d) else shifted(layer), inputs, behind=behind), inputs
    )
    assert network.rest == ()
    assert [layer.name for layer in network.layers if layer.inside] == ["layer"]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("case", ["batch norm and relu", "conv same"])
def test_it_may_be_tracked_in_part(case: str, frozen: str) -> None:
    build, shape = INSIDE[case]
    inputs = torch.randn(6, *shape)
    model = Headed(build(), inputs, behind=True)
    model.layer.get_parameter(frozen).requires_grad_(False)
    assert checked(model, inputs).rest == ()


class Tokens(nn.Module):
    """Patches, a class token, positions, a scaled branch: a vision transformer without attention."""

    def __init__(self, scale: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.patches = nn.Linear(4, 6)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 4, 6))
        self.inner, self.gamma, self.head = nn.Linear(6, 6), nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 5)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], dim=1) + self.positions
        h = h + self.scale(self.inner(torch.tanh(h)), self.gamma)
        return self.head(torch.tanh(h)[:, 0] + torch.tanh(h).mean(dim=1))


SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, gamma: x * gamma,
    "product from the left": lambda x, gamma: gamma * x,
    "in place": lambda x, gamma: (2 * x).mul_(gamma),
    "reshaped": lambda x, gamma: x.transpose(1, 2).mul(gamma.reshape(1, -1, 1)).transpose(1, 2),
    "sum": lambda x, gamma: x + gamma.view(1, 6),
    "difference": lambda x, gamma: gamma - x,
    "subtracted in place": lambda x, gamma: (2 * x).sub_(gamma),
    "twice": lambda x, gamma: x * gamma + gamma,
    "with itself": lambda x, gamma: torch.mul(x, gamma) * gamma,
}


@pytest.mark.parametrize("scale", SCALES)
def test_a_parameter_that_is_added_multiplied_or_repeated_is_a_term(scale: str) -> None:
    network = checked(Tokens(SCALES[scale]), torch.randn(6, 3, 4))
    assert network.rest == ()
    assert {layer.weight for layer in network.layers if layer.kind == "term"} == {"token", "positions", "gamma"}


@pytest.mark.parametrize(
    "scale",
    [
        lambda x, gamma: x * gamma.exp(),
        lambda x, gamma: x * gamma + gamma.exp(),
        lambda x, gamma: x * gamma[torch.tensor([1, 0, 2, 3, 4, 5])],
        lambda x, gamma: torch.add(x, gamma, alpha=2),
        lambda x, gamma: x + torch.outer(gamma, gamma).sum(dim=0),
        lambda x, gamma: x * (gamma * gamma),
        lambda x, gamma: x * gamma.expand(2, 6).sum(dim=0),
    ],
    ids=["of a function", "partly", "of chosen numbers", "with a factor", "of a product", "squared", "repeated twice"],
)
def test_a_parameter_that_is_used_in_another_way_goes_through_the_fallback(
    scale: Callable[[Tensor, Tensor], Tensor],
) -> None:
    network = checked(Tokens(scale), torch.randn(6, 3, 4))
    assert network.rest == ("gamma",)
    assert network.vectorised


def test_windows_of_each_example_in_the_place_of_examples() -> None:
    """Attention within windows, as in Swin: the layers read examples × windows; a bias of the pairs has no rule."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm, self.mix = nn.Linear(4, 12), shifted(nn.LayerNorm(4)), nn.Linear(4, 4)
            self.table, self.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4))
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x.reshape(-1, 3, 4))).chunk(3, dim=-1)
            away = torch.arange(3)[:, None] - torch.arange(3) + 2
            attention = (q @ k.transpose(1, 2) + self.table[away]).softmax(dim=-1)
            h = torch.tanh(self.mix(attention @ v) + self.shift).view(len(x), -1, 4)
            return self.head(h.mean(dim=1))

    network = checked(Windowed(), torch.randn(6, 9, 4))
    assert network.rest == ("table",)
    assert {"qkv.weight", "norm.weight", "mix.bias", "shift"} <= covered(network)


def test_windows_before_examples_go_through_the_fallback() -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        windows = torch.tanh(m.a(x.transpose(0, 1).reshape(-1, 6)))
        return m.head(windows.view(3, len(x), 6).sum(dim=0))

    network = checked(Chain(run), torch.randn(6, 3, 6))
    assert set(network.rest) == {"a.weight", "a.bias"}


def test_a_part_without_gradients_is_not_read() -> None:
    def scale(x: Tensor, gamma: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = x * gamma
        return fixed + x * gamma

    assert checked(Tokens(scale), torch.randn(6, 3, 4)).rest == ()


def test_a_parametrised_weight_is_not_taken_for_another_tensor() -> None:
    class Passed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x.squeeze(-1), self.weight, self.bias)

    model = Headed(nn.utils.parametrizations.weight_norm(Passed(6, 4)), torch.randn(1, 6, 1), behind=False)
    network = checked(model, torch.randn(6, 6, 1))
    assert set(network.rest) == {f"layer.parametrizations.weight.original{part}" for part in (0, 1)}


def test_a_pass_in_bfloat16_reads_the_same_places() -> None:
    inputs, targets = torch.randn(6, 3, 4), torch.arange(6) % 5
    network = make_network(track(Tokens(SCALES["in place"]).eval(), loss, ("*",), "layers"), inputs)
    exact = example_gradients(network, inputs, targets)[0]
    rough = example_gradients(replace(network, precision="bf16"), inputs, targets)[0]
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.05


def test_a_model_that_does_not_run_while_functions_are_watched() -> None:
    def scale(x: Tensor, gamma: Tensor) -> Tensor:
        if torch.overrides._get_current_function_mode_stack():
            raise TypeError("watched")
        return x * gamma

    network = checked(Tokens(scale), torch.randn(6, 3, 4))
    assert set(network.rest) == {"token", "positions", "gamma"}
    assert covered(network) == {
        f"{name}.{part}" for name in ("patches", "inner", "head") for part in ("weight", "bias")
    }


def test_nothing_is_watched_after_a_pass() -> None:
    inputs = torch.randn(6, 3, 4)
    network = make_network(track(Tokens(SCALES["product"]).eval(), loss, ("*",), "layers"), inputs)
    tape = forward(network, inputs)
    count = len(tape.calls)
    with torch.enable_grad():
        network.model(inputs)
    assert len(tape.calls) == count
    assert torch.overrides._get_current_function_mode_stack() == []
