"""Example gradients however layers are called, against a for-loop of autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from tests.support.example_gradients import Chain, Headed, checked, covered, loss, shifted

# --- how layers are called


def test_a_layer_called_more_than_once() -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        h = torch.tanh(m.b(torch.tanh(m.b(torch.tanh(m.a(x))))))
        # Once more, with several positions, and once for nothing.
        m.b(h)
        tokens = torch.stack([h, 2 * h, x], dim=1)
        return m.head(h + torch.tanh(m.b(tokens)).sum(dim=1))

    network = checked(Chain(run), torch.randn(6, 6))
    assert network.rest == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda h: functional.relu(h, inplace=True),
        lambda h: nn.LeakyReLU(0.3, inplace=True)(h),
        lambda h: h.mul_(3).tanh_(),
        lambda h: h[:, 1:3].zero_(),
        lambda h: h.sub_(h.mean(dim=1, keepdim=True)),
    ],
    ids=["relu", "leaky relu", "twice", "slice", "with itself"],
)
def test_what_follows_a_layer_may_change_its_output_in_place(change: Callable[[Tensor], Tensor]) -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        h = m.a(x)
        change(h)
        h = m.b(h)
        change(h)
        return m.head(h)

    network = checked(Chain(run), torch.randn(6, 6))
    assert network.rest == ()
    assert [layer.name for layer in network.layers] == ["a", "b", "head"]


def test_inplace_activations_of_modules_and_of_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(inplace=True),
        shifted(nn.BatchNorm2d(4)),
        nn.SiLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Hardswish(inplace=True),
        nn.Flatten(),
        nn.Dropout(inplace=True),
        nn.Linear(4 * 16, 5),
    )
    network = checked(model, torch.randn(6, 1, 6, 6))
    assert network.rest == ()


def test_a_residual_sum_in_place() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 3, 3), shifted(nn.BatchNorm2d(3))
            self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), shifted(nn.BatchNorm2d(3))
            self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.norm(self.conv(x)))
            out = self.norm2(self.conv2(h))
            out += h
            return self.head(self.relu(out).mean(dim=(2, 3)))

    network = checked(Residual(), torch.randn(6, 1, 6, 6))
    assert network.rest == ()


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: (m.b(m.a(x)), m.head(m.a(x)))[1],
        lambda m, x: m.head(m.a(x) + 0 * m.b(x).detach()),
        lambda m, x: m.head(torch.tanh(m.a(x))),
    ],
    ids=["its output is dropped", "its output is detached", "it is never called"],
)
def test_a_layer_that_no_output_depends_on(run: Callable[[Chain, Tensor], Tensor]) -> None:
    network = checked(Chain(run), torch.randn(6, 6))
    assert network.unused == ("b.weight", "b.bias")
    assert network.rest == ()
    assert covered(network) >= {"a.weight", "a.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("layer_before", [False, True])
def test_a_part_that_the_model_runs_without_gradients(layer_before: bool) -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(m.a(x))
        return m.head(torch.tanh(m.b(h) + (m.a(x) if layer_before else 0)))

    network = checked(Chain(run), torch.randn(6, 6))
    assert network.rest == ()
    assert network.unused == (() if layer_before else ("a.weight", "a.bias"))
    assert covered(network) >= {"b.weight", "b.bias", "head.weight", "head.bias"}


def test_one_module_under_two_names() -> None:
    model = Chain(lambda m, x: m.head(torch.tanh(m.again(torch.tanh(m.a(x))))))
    model.again = model.a
    network = checked(model, torch.randn(6, 6))
    assert network.rest == ()
    assert network.unused == ("b.weight", "b.bias")
    assert covered(network) >= {"a.weight", "a.bias", "head.weight", "head.bias"}


# --- what has no rule, and is still right


def test_tied_weights() -> None:
    model = Chain(lambda m, x: m.head(torch.tanh(m.b(torch.tanh(m.a(x))))))
    model.b.weight = model.a.weight
    network = checked(model, torch.randn(6, 6))
    assert "a.weight" in network.rest
    assert not {"a.weight", "b.weight"} & covered(network)
    assert {"head.weight", "head.bias"} <= covered(network)


def test_an_embedding_tied_to_the_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.between, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.between(self.words(x))).mean(dim=1))

    network = checked(Tied(), torch.randint(0, 5, (6, 7)))
    assert "words.weight" in network.rest
    assert {"between.weight", "between.bias"} <= covered(network)


class Centred(nn.Linear):
    """A linear layer that centres its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight - self.weight.mean(), self.bias)


class Scaled(nn.LayerNorm):
    """A layer norm that adds its input to what comes out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * self.weight


class Channels(nn.LayerNorm):
    """A layer norm over the channels of images, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Passing(nn.Linear):
    """A linear layer that gives back what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Viewing(nn.Linear):
    """A linear layer that gives back a view of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


@pytest.mark.parametrize(
    ("build", "shape", "rest"),
    [
        (lambda: Centred(6, 4), (6,), {"weight", "bias"}),
        (lambda: Centred(6, 4, bias=False), (3, 6), {"weight"}),
        (lambda: Scaled(6), (3, 6), {"weight", "bias"}),
        (lambda: Channels(4), (4, 3, 5), set()),
        (lambda: Channels(4), (4, 4, 4), set()),
        (lambda: Passing(6, 6), (6,), set()),
        (lambda: Viewing(6, 6), (6,), set()),
    ],
    ids=["linear", "linear of tokens", "layer norm", "channels", "channels of a square", "nothing", "a view"],
)
@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind another"])
def test_a_subclass_with_another_forward(
    build: Callable[[], nn.Module], shape: tuple[int, ...], rest: set[str], behind: bool
) -> None:
    inputs = torch.randn(6, *shape)
    network = checked(Headed(shifted(build()), inputs, behind=behind), inputs)
    assert set(network.rest) == {f"layer.{name}" for name in rest}
    assert {"head.weight", "head.bias"} <= covered(network)


def test_a_subclass_with_the_same_forward_keeps_its_rule() -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    assert checked(Headed(Mine(6, 4), torch.randn(1, 6), behind=True), torch.randn(6, 6)).rest == ()


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 4), lambda: nn.Conv1d(6, 4, 1)], ids=["linear", "conv"])
def test_weight_norm(layer: Callable[[], nn.Module]) -> None:
    built = layer()
    inputs = torch.randn(6, 6, 3) if isinstance(built, nn.Conv1d) else torch.randn(6, 6)
    model = Headed(nn.utils.parametrizations.weight_norm(built), inputs, behind=True)
    network = checked(model, inputs)
    assert set(network.rest) == {f"layer.parametrizations.weight.original{part}" for part in (0, 1)}
    assert "layer.bias" in covered(network)


def test_attention() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.before(x)
            h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
            return self.head(h.mean(dim=1))

    network = checked(Attentive(), torch.randn(6, 3, 6))
    assert network.vectorised
    assert {name.rpartition(".")[0] for name in network.rest} == {"attention", "attention.out_proj"}
    assert covered(network) == {f"{name}.{part}" for name in ("before", "norm", "head") for part in ("weight", "bias")}


@pytest.mark.parametrize("first", [True, False])
def test_an_input_that_is_written_over_after_it_was_read(first: bool) -> None:
    """Autograd allows it where the weight is not trained; the pass would read what is written there."""

    def run(m: Chain, x: Tensor) -> Tensor:
        h = x.clone() if first else m.a(x)
        layer = m.a if first else m.b
        out = torch.tanh(layer(h))
        h.mul_(2)
        return m.head(out + h)

    model = Chain(run)
    model.a.weight.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    network = checked(model, torch.randn(6, 6))
    assert network.layers == ()
    assert set(network.rest) == set(network.names) - set(network.unused)


def test_a_later_batch_that_is_written_over_is_an_error_not_a_wrong_number() -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        h = m.a(x)
        out = torch.tanh(m.b(h))
        if len(x) > 2:
            h.mul_(2)
        return m.head(out + h)

    model = Chain(run).eval()
    model.b.weight.requires_grad_(False)
    inputs, targets = torch.randn(6, 6), torch.zeros(6, dtype=torch.int64)
    network = make_network(track(model, loss, ("*",), "layers"), inputs[:2])
    with pytest.raises(RuntimeError, match="changed in place"):
        example_gradients(network, inputs, targets)


def test_a_keyword_argument() -> None:
    network = checked(Chain(lambda m, x: m.head(input=torch.tanh(m.b(m.a(x))))), torch.randn(6, 6))
    assert network.rest == ()
    assert [layer.name for layer in network.layers if layer.inside] == ["head"]


def test_positions_in_the_place_of_examples() -> None:
    """A layer that reads examples × positions in one axis, and one that reads something else than examples."""

    def run(m: Chain, x: Tensor) -> Tensor:
        flat = torch.tanh(m.a(x.reshape(-1, 6))).view(len(x), -1, 6)
        shared = torch.tanh(m.b(torch.linspace(0, 1, 12).view(2, 6).to(x)))
        return m.head(flat.mean(dim=1) * shared.mean(dim=0))

    network = checked(Chain(run), torch.randn(6, 3, 6))
    assert set(network.rest) == {"b.weight", "b.bias"}
    assert {"a.weight", "a.bias"} <= covered(network)


# --- what a pass leaves behind


def hooks(model: nn.Module) -> dict[str, int]:
    return {
        f"{name}.{kind}": len(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    }


@pytest.mark.parametrize("fails", [False, True])
def test_flags_hooks_and_gradients_are_as_before(fails: bool) -> None:
    wanted = True

    def run(m: Chain, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        if not wanted:
            raise ZeroDivisionError
        return m.head(torch.tanh(m.b(h)))

    model = Chain(run).eval()
    model.b.weight.requires_grad_(False)
    handle = model.a.register_forward_hook(lambda _module, _inputs, _output: None)
    inputs, targets = torch.randn(6, 6), torch.zeros(6, dtype=torch.int64)
    flags, counts = {name: p.requires_grad for name, p in model.named_parameters()}, hooks(model)
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    if fails:
        wanted = False
        with pytest.raises(ZeroDivisionError):
            example_gradients(network, inputs, targets)
        with pytest.raises(ZeroDivisionError):
            make_network(network, inputs)
    else:
        example_gradients(network, inputs, targets)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert hooks(model) == counts
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    handle.remove()
