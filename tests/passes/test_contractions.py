"""Every rule of the layer pass against a for-loop of autograd in float64, and that the rule is really used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.curvature.blocks import Block, keep
from influence_cli.curvature.coordinates import Blocks, coordinates, weighted_squares
from influence_cli.model.network import Layer, Network, loss_slopes, track
from influence_cli.passes import contractions
from influence_cli.passes.contractions import cheapest, inner
from influence_cli.passes.gradient_products import layer_matrices, products, squared_norms
from influence_cli.passes.gradients import example_gradients, make_network
from influence_cli.passes.layers import Call, forward

loss = partial(nn.functional.cross_entropy, reduction="none")
CLOSE = 1e-5
CPU = torch.device("cpu")


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


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def shifted(layer: nn.Module) -> nn.Module:
    """Move a norm's weights and running statistics away from 0 and 1."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.5, 2)
    return layer


LINEAR: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear of tokens": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear of a grid": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear of tokens without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "linear of one token": (lambda: nn.Linear(6, 4), (1, 6)),
}
CONVOLUTIONS: dict[str, Case] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 11)),
    "conv1d of one position": (lambda: nn.Conv1d(4, 6, 5), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (4, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5)),
    "conv2d of one position": (lambda: nn.Conv2d(3, 4, 4, groups=1), (3, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    "conv2d 1×1": (lambda: nn.Conv2d(4, 3, 1), (4, 5, 4)),
    "conv2d 1×1 grouped": (lambda: nn.Conv2d(4, 6, 1, groups=2), (4, 5, 4)),
    "conv2d 1×1 with stride": (lambda: nn.Conv2d(4, 3, 1, stride=2), (4, 5, 4)),
    "conv2d 1×1 with padding": (lambda: nn.Conv2d(4, 3, 1, padding=1), (4, 3, 4)),
    "conv2d 1×3": (lambda: nn.Conv2d(2, 3, (1, 3)), (2, 4, 6)),
    "conv2d 3×2 with stride": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1)), (2, 4, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 4, 5)),
    "conv2d same, dilated": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)), (2, 6, 5)),
    "conv2d same, circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 2, 1), stride=(2, 1, 1), padding=(1, 0, 1), groups=2), (2, 5, 4, 3)),
    "conv3d dilated": (lambda: nn.Conv3d(2, 3, 2, dilation=(2, 1, 2), bias=False), (2, 5, 4, 5)),
    "conv3d 1×1×1": (lambda: nn.Conv3d(2, 3, 1), (2, 3, 2, 4)),
    "conv3d same": (lambda: nn.Conv3d(2, 3, 3, padding="same"), (2, 3, 4, 3)),
}
for _mode in ("zeros", "reflect", "replicate", "circular"):
    CONVOLUTIONS |= {
        f"conv1d {_mode}": (partial(nn.Conv1d, 2, 3, 3, padding=2, padding_mode=_mode), (2, 6)),
        f"conv2d {_mode}": (
            partial(nn.Conv2d, 2, 4, 3, padding=(1, 2), stride=2, groups=2, padding_mode=_mode),
            (2, 4, 6),
        ),
        f"conv3d {_mode}": (partial(nn.Conv3d, 2, 3, 2, padding=(1, 0, 2), padding_mode=_mode), (2, 3, 3, 4)),
    }
NORMS: dict[str, Case] = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch norm 1d of a sequence": (lambda: nn.BatchNorm1d(4), (4, 7)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3, eps=0.1), (3, 4, 5)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (2, 3, 2, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm of tokens": (lambda: nn.LayerNorm(6, eps=0.1), (2, 3, 6)),
    "layer norm over three axes": (lambda: nn.LayerNorm((2, 3, 6)), (2, 3, 6)),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "group norm without positions": (lambda: nn.GroupNorm(2, 6, eps=0.1), (6,)),
    "RMS norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "RMS norm over two axes": (lambda: nn.RMSNorm((3, 6), eps=0.1), (2, 3, 6)),
}
RULES = LINEAR | CONVOLUTIONS | NORMS


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


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


# --- the rules


@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind another"])
@pytest.mark.parametrize("case", RULES)
def test_a_rule_gives_the_gradients_of_autograd(case: str, behind: bool) -> None:
    build, shape = RULES[case]
    inputs = torch.randn(6, *shape)
    layer = shifted(build()) if case in NORMS else build()
    network = checked(Headed(layer, inputs, behind=behind), inputs)
    assert network.rest == ()
    assert covered(network) == set(network.names)
    assert network.layers[-2].name == "layer"


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "case", ["linear", "linear of tokens", "conv1d", "conv2d", "conv3d circular", "batch norm 2d", "layer norm"]
)
def test_a_layer_may_be_tracked_in_part(case: str, frozen: str) -> None:
    build, shape = RULES[case]
    inputs = torch.randn(6, *shape)
    model = Headed(build(), inputs, behind=True)
    model.layer.get_parameter(frozen).requires_grad_(False)
    network = checked(model, inputs)
    assert f"layer.{frozen}" in network.left_out
    assert network.rest == ()
    assert covered(network) == set(network.names)


class Words(nn.Module):
    """An embedding of a few words an example."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(dim=1))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}], ids=str)
def test_an_embedding_counts_repeated_words_and_leaves_out_padding(options: dict[str, int]) -> None:
    words = torch.randint(0, 9, (8, 7))
    words[:, :2] = torch.tensor([0, 8])
    network = checked(Words(**options), words)
    assert covered(network) == {"words.weight", "head.weight", "head.bias"}
    rows = example_gradients(network, words, torch.zeros(8, dtype=torch.int64))[0][:, network.slots["words.weight"]]
    if options:
        padding = options["padding_idx"] % 9
        assert not rows.view(8, 9, 4)[:, padding].any()


def test_an_embedding_whose_gradient_depends_on_the_batch_has_no_rule() -> None:
    assert "words.weight" in checked(Words(scale_grad_by_freq=True), torch.randint(0, 9, (8, 7))).rest


def test_an_embedding_inside_a_model_reads_integers() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.codes, self.head = nn.Linear(6, 6), nn.Embedding(3, 4), nn.Linear(30, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.before(x)
            codes = (h > 0).long() + (h > 1).long()
            return self.head(torch.cat([self.codes(codes).flatten(1), h], dim=1))

    network = checked(Quantised(), torch.randn(6, 6))
    assert network.rest == ()


# --- how layers are called


class Chain(nn.Module):
    """Three linear layers, called as ``run`` says."""

    def __init__(self, run: Callable[[Chain, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


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
        (lambda: Channels(4), (4, 3, 5), {"weight", "bias"}),
        (lambda: Channels(4), (4, 4, 4), {"weight", "bias"}),
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
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    with pytest.raises(RuntimeError, match="changed in place"):
        example_gradients(network, inputs, targets)


def test_a_keyword_argument() -> None:
    network = checked(Chain(lambda m, x: m.head(input=torch.tanh(m.b(m.a(x))))), torch.randn(6, 6))
    assert set(network.rest) == {"head.weight", "head.bias"}
    assert covered(network) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_positions_in_the_place_of_examples() -> None:
    """A layer that reads examples × positions in one axis, and one that reads something else than examples."""

    def run(m: Chain, x: Tensor) -> Tensor:
        flat = torch.tanh(m.a(x.reshape(-1, 6))).view(len(x), -1, 6)
        shared = torch.tanh(m.b(torch.linspace(0, 1, 12).view(2, 6).to(x)))
        return m.head(flat.mean(dim=1) * shared.mean(dim=0))

    network = checked(Chain(run), torch.randn(6, 3, 6))
    assert set(network.rest) == {"a.weight", "a.bias", "b.weight", "b.bias"}


@pytest.mark.parametrize("case", ["linear of tokens", "conv2d", "layer norm", "batch norm 2d"])
def test_float64(case: str) -> None:
    build, shape = RULES[case]
    inputs = torch.randn(6, *shape, dtype=torch.float64)
    model = Headed(build(), inputs.float(), behind=True).double().eval()
    targets = torch.randint(0, 5, (6,))
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    got = example_gradients(network, inputs, targets)[0]
    expected = torch.cat(list(looped(model, network.names, inputs, targets).values()), dim=1)
    assert network.rest == ()
    assert got.dtype == torch.float64
    assert float((got - expected).norm() / expected.norm()) <= 1e-13


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


# --- in which order, and how much at a time


class Mixed(nn.Module):
    """Layers with and without positions, in groups, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.tokens = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.plain = nn.Linear(5, 6, bias=False)
        self.shift = nn.Parameter(torch.randn(6) * 0.1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(torch.tanh(self.conv(x)).flatten(2).transpose(1, 2))
        h = self.norm(torch.tanh(self.twice(torch.tanh(self.twice(h.mean(dim=1))))))
        return self.head(torch.tanh(self.plain(h) + self.shift))


@pytest.fixture
def mixed() -> tuple[Network, Tensor, Tensor]:
    inputs, targets = torch.randn(7, 2, 5, 5), torch.randint(0, 5, (7,))
    return make_network(track(Mixed().eval(), loss, ("*",), "layers"), inputs), inputs, targets


def turned(network: Network, cut: float) -> list[Block]:
    """A random orthonormal basis of each layer; of a matrix layer a share ``cut`` of its columns."""
    blocks = []

    def columns(groups: int, width: int, kept: int) -> Tensor:
        return torch.linalg.qr(torch.randn(groups, width, width))[0][:, :, :kept].contiguous()

    for layer in network.layers:
        r, s = (max(1, int(cut * width)) for width in (layer.outputs, layer.width))
        if layer.is_matrix:
            q_out, q_in = columns(layer.groups, layer.outputs, r), columns(layer.groups, layer.width, s)
            values, size = torch.rand(layer.groups, r, s), layer.groups * layer.outputs * layer.width
            blocks.append(Block(layer.name, "kronecker", layer.names, values, q_out, q_in, None, size, 1.0))
    for names in (("norm.weight", "norm.bias"), ("shift",)):
        width = sum(network.model.get_parameter(name).numel() for name in names)
        vectors = columns(1, width, width)[0]
        blocks.append(Block(names[0], "dense", names, torch.rand(width), None, None, vectors, width, 1.0))
    return blocks


def dense(network: Network, block: Block, rows: Tensor) -> Tensor:
    """Coordinates of whole gradients [b, p] by the definition, Q_GᵀGQ_A, in float64."""
    parts = [rows[:, network.slots[name]].double() for name in block.names]
    if block.kind == "dense":
        return torch.cat(parts, dim=1) @ block.vectors.double()
    layer = next(layer for layer in network.layers if layer.name == block.name)
    shape = (len(rows), layer.groups, layer.outputs)
    matrix = torch.cat([part.reshape(*shape, -1) for part in parts], dim=3)
    q_out, q_in = (side.double() for side in block.sides())
    return torch.einsum("gor,bgok,gks->bgrs", q_out, matrix, q_in).flatten(1)


def results(network: Network, blocks: list[Block], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Everything that is contracted from a layer pass."""
    whole = Blocks(tuple(keep(blocks, None, CPU)))
    count = sum(block.count for block in blocks)
    some = torch.arange(0, count, 3).numpy()
    part = Blocks(tuple(keep(blocks, some, CPU)))
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, network.size, generator=generator)
    tape = forward(network, inputs)
    calls = tape.backward(loss_slopes(network, tape.outputs, targets)[1])
    found = {
        "coordinates": coordinates(network, whole, inputs, targets)[0],
        "kept coordinates": coordinates(network, part, inputs, targets)[0],
        "squares": weighted_squares(network, whole, [block.values for block in blocks], inputs, targets)[0],
        "products": products(network, vectors, inputs, targets)[0],
        "gradients": example_gradients(network, inputs, targets)[0],
    }
    for layer, own in zip(network.layers, calls, strict=True):
        if layer.is_matrix:
            found[f"inner {layer.name}"] = inner(network, layer, own, layer_matrices(network, layer.name, vectors))
            into, out, _ = contractions.covariances(network, layer, own, 1000)
            found |= {f"into {layer.name}": into, f"out {layer.name}": out}
            for side, width in (("a", layer.width), ("d", layer.outputs)):
                sketch = torch.randn(width, 3, generator=generator)
                found[f"sketch {side} {layer.name}"] = contractions.sketched(network, layer, own, side, sketch)
                found[f"sketched {side} {layer.name}"] = (into if side == "a" else out) @ sketch
            found[f"norms {layer.name}"] = contractions.gradient_squares(network, layer, own)
    return found


def test_contractions_are_what_they_say(mixed: tuple[Network, Tensor, Tensor]) -> None:
    network, inputs, targets = mixed
    assert {layer.name for layer in network.layers} == {"conv", "tokens", "twice", "norm", "plain", "head"}
    blocks = turned(network, 0.7)
    found = results(network, blocks, inputs, targets)
    truth = looped(network.model, network.names, inputs, targets)
    rows = torch.cat([truth[name] for name in network.names], dim=1)
    expected = torch.cat([dense(network, block, rows) for block in blocks], dim=1)
    weights = torch.cat([block.values.flatten() for block in blocks]).double()
    vectors = torch.randn(3, network.size, generator=torch.Generator().manual_seed(1)).double()
    for name, value in {
        "coordinates": expected,
        "kept coordinates": expected[:, ::3],
        "squares": expected.square() @ weights,
        "products": rows @ vectors.T,
        "gradients": rows,
    }.items():
        assert float((found[name] - value).norm() / value.norm()) <= CLOSE, name
    for layer in network.layers:
        if layer.is_matrix:
            own = sum(rows[:, network.slots[name]] @ vectors[:, network.slots[name]].T for name in layer.names)
            assert float((found[f"inner {layer.name}"] - own).norm() / own.norm()) <= CLOSE, layer.name
            norms = sum(float(rows[:, network.slots[name]].square().sum()) for name in layer.names)
            assert float(found[f"norms {layer.name}"]) == pytest.approx(norms, rel=CLOSE)
            for side in "ad":
                ours, theirs = (found[f"{word} {side} {layer.name}"] for word in ("sketch", "sketched"))
                assert float((ours - theirs).norm() / theirs.norm()) <= CLOSE, layer.name


def test_covariances_are_sums_of_outer_products_over_positions_and_calls(mixed: tuple[Network, Tensor, Tensor]) -> None:
    network, inputs, targets = mixed
    tape = forward(network, inputs)
    calls = tape.backward(loss_slopes(network, tape.outputs, targets)[1])
    for layer, own in zip(network.layers, calls, strict=True):
        if not layer.is_matrix:
            continue
        into, out, summed = contractions.covariances(network, layer, own, 1000)
        assert summed == 7 * {"conv": 9, "tokens": 9, "twice": 2}.get(layer.name, 1)
        expected = (
            torch.zeros(layer.groups, layer.width, layer.width),
            torch.zeros(layer.groups, layer.outputs, layer.outputs),
        )
        for call in own:
            a, d = call.a, call.delta
            if layer.kind == "conv":
                a, d = functional.unfold(a, 3).transpose(1, 2), d.flatten(2).transpose(1, 2)
            for group in range(layer.groups):
                for side, total, width in ((a, expected[0], layer.inputs), (d, expected[1], layer.outputs)):
                    flat = side.reshape(-1, side.shape[-1])[:, group * width : (group + 1) * width]
                    if side is a and layer.bias:
                        flat = torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
                    total[group] += flat.T @ flat
        for ours, theirs in zip((into, out), expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) <= CLOSE, layer.name
        assert contractions.covariances(network, layer, own, 0)[:2] == (None, None)


@pytest.mark.parametrize("cut", [0.4, 1.0])
def test_every_order_gives_the_same_numbers(
    mixed: tuple[Network, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, cut: float
) -> None:
    network, inputs, targets = mixed
    blocks = turned(network, cut)
    chosen = results(network, blocks, inputs, targets)
    for order in ("sides", "output", "gradient"):
        asked = []
        monkeypatch.setattr(
            contractions, "cheapest", lambda *shapes, order=order, asked=asked: asked.append(shapes) or order
        )
        forced = results(network, blocks, inputs, targets)
        # Of each matrix layer with positions or calls: T, (O, r), (K', s).
        width = {layer.name: (layer.outputs, layer.width) for layer in network.layers}
        cut_to = {block.name: block.values.shape[1:] for block in blocks if block.kind == "kronecker"}
        for name, tokens in (("conv", 9), ("tokens", 9), ("twice", 2)):
            (o, k), (r, s) = width[name], cut_to[name]
            assert (tokens, (o, r), (k, s)) in [(t, tuple(out), tuple(into)) for t, out, into in asked], name
        for name, value in chosen.items():
            assert float((forced[name] - value).norm() / value.norm()) <= 1e-6, f"{order}: {name}"


@pytest.mark.parametrize("order", ["", "sides", "output", "gradient"])
@pytest.mark.parametrize("workspace", [1, 200, 500])
def test_small_workspaces_give_the_same_numbers(
    mixed: tuple[Network, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, workspace: int, order: str
) -> None:
    network, inputs, targets = mixed
    blocks = turned(network, 1.0)
    whole = results(network, blocks, inputs, targets)
    parts, sizes = contractions._parts, []

    def counted(calls: Sequence[Call], numbers: int) -> Iterator[tuple[int, list[Call]]]:
        for start, part in parts(calls, numbers):
            sizes.append(len(part[0].a))
            yield start, part

    monkeypatch.setattr(contractions, "WORKSPACE", workspace)
    monkeypatch.setattr(contractions, "_parts", counted)
    if order:
        monkeypatch.setattr(contractions, "cheapest", lambda *_: order)
    for name, value in results(network, blocks, inputs, targets).items():
        assert float((value - whole[name]).norm() / whole[name].norm()) <= 1e-6, name
    assert min(sizes) < len(inputs)
    if workspace == 1:
        assert set(sizes) == {1}


@pytest.mark.parametrize(
    ("tokens", "out", "into", "expected"),
    [
        # T(Or + K's + rs) by the sides, T(Or + rK') + rK's by the output, TOK' + OK's + Ors by the gradient.
        (1, (1, 1), (1, 1), "sides"),  # 3, 3 and 3
        (2, (1, 1), (1, 1), "gradient"),  # 6, 5 and 4
        (1, (4, 4), (5, 5), "sides"),  # 61, 136 and 200
        (2, (2, 2), (3, 3), "sides"),  # 38, 38 and 42
        (3, (2, 2), (3, 3), "output"),  # 57, 48 and 48
        (4, (2, 2), (3, 3), "gradient"),  # 76, 58 and 54
        (10, (8, 1), (9, 1), "output"),  # 180, 179 and 800
        (49, (512, 16), (512, 16), "sides"),  # 0.82, 0.93 and 17.2 million
        (196, (64, 64), (577, 577), "output"),  # 73.3, 29.3 and 30.9 million
        (1000, (64, 64), (10, 10), "gradient"),  # 4.84, 4.74 and 0.69 million
    ],
)
def test_the_cheapest_order_is_found_by_counting(
    tokens: int, out: tuple[int, int], into: tuple[int, int], expected: str
) -> None:
    assert cheapest(tokens, out, into) == expected


def test_a_layer_without_a_slope_is_refused() -> None:
    layer = Layer("a", "linear", "a.weight", "a.bias", 1, 6, 6)
    network = track(Chain(lambda m, x: m.head(m.a(x))).eval(), loss, ("*",), "layers")
    tape = forward(replace(network, layers=(layer,)), torch.randn(3, 6))
    with pytest.raises(ValueError, match="no slope"):
        contractions.sides(layer, network.model.get_submodule("a"), tape.calls)
    with pytest.raises(ValueError, match="not called"):
        contractions.sketched(network, layer, [], "a", torch.randn(7, 2))


def test_one_forward_serves_several_backward_passes(mixed: tuple[Network, Tensor, Tensor]) -> None:
    network, inputs, targets = mixed
    tape = forward(network, inputs)
    slopes = loss_slopes(network, tape.outputs, targets)[1]

    def deltas(calls: list[list[Call]]) -> list[Tensor | None]:
        return [call.delta for own in calls for call in own]

    first = deltas(tape.backward(slopes, again=True))
    second = deltas(tape.backward(2 * slopes, again=True))
    third = deltas(tape.backward(slopes))
    assert all(torch.allclose(2 * a, b, rtol=1e-5, atol=1e-7) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, c) for a, c in zip(first, third, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_columns_that_are_zero_throughout_are_left_out_of_products(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 3×3 kernel on images of one pixel reads padding but for its centre."""
    model = Headed(nn.Conv2d(8, 4, 3, padding=1, bias=bias), torch.zeros(2, 8, 1, 1), behind=False)
    inputs, targets = torch.randn(6, 8, 1, 1), torch.arange(6) % 5
    network = checked(model, inputs)
    number = next(n for n, layer in enumerate(network.layers) if layer.kind == "conv")
    layer = network.layers[number]
    q_out, q_in = torch.randn(1, layer.outputs, 3), torch.randn(1, layer.width, 7)
    vectors = torch.randn(3, 1, layer.outputs, layer.width)

    def found() -> list[Tensor]:
        tape = forward(network, inputs)
        calls = tape.backward(loss_slopes(network, tape.outputs, targets)[1])[number]
        into, out, _ = contractions.covariances(network, layer, calls, 1_000)
        assert into is not None
        assert out is not None
        products = inner(network, layer, calls, vectors)
        return [into, out, products, *contractions.rotated(network, layer, calls, q_out, q_in)]

    plain, seen = found(), []
    live = contractions._live
    monkeypatch.setattr(contractions, "WIDE", 8)
    monkeypatch.setattr(contractions, "_live", lambda flat: seen.append(live(flat)) or seen[-1])
    for left, right in zip(found(), plain, strict=True):
        torch.testing.assert_close(left, right)
    assert any(columns is not None and len(columns) == 8 for columns in seen)
