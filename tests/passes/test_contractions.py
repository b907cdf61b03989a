"""What is contracted from a layer pass: in which order, and how much at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.curvature.blocks import Block, keep
from influence_cli.curvature.coordinates import Blocks, coordinates, weighted_squares
from influence_cli.model.network import Layer, Network, loss_slopes, track
from influence_cli.passes import contractions
from influence_cli.passes.contractions import cheapest, inner
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradient_products import layer_matrices, products
from influence_cli.passes.gradients import example_gradients
from influence_cli.passes.layers import Call, forward
from tests.support.example_gradients import CLOSE, Chain, Headed, checked, looped, loss

CPU = torch.device("cpu")


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
    assert {layer.name for layer in network.layers} == {"conv", "tokens", "twice", "norm", "plain", "", "head"}
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


def test_a_block_of_single_parameters_may_name_a_layer_that_has_a_rule_by_now(
    mixed: tuple[Network, Tensor, Tensor],
) -> None:
    network, inputs, targets = mixed
    names = ("tokens.weight", "tokens.bias")
    block = Block("tokens", "diagonal", names, torch.ones(25), None, None, None, 25, 1.0)
    (kept,) = keep([block], None, CPU)
    rows = example_gradients(network, inputs, targets)[0]
    expected = torch.cat([rows[:, network.slots[name]] for name in names], dim=1)
    assert torch.equal(coordinates(network, Blocks((kept,)), inputs, targets)[0], expected)


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
