"""The wanted quantities of a layer, contracted from its input a and output slope δ in the cheapest order.

A matrix layer's example gradient is G = Σ_τ δ_τ a_τᵀ, [g, O, K'], with a one behind a where the layer has a bias; T
positions τ: pixels of a convolution (a is then a patch), tokens of a sequence. To compute from G (coordinates
Q_GᵀGQ_A, products ⟨S, G⟩, squares), either form G first or rotate a and δ first. ``cheapest`` decides per layer by
counting multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from influence_cli.model.network import Layer, Network
from influence_cli.passes.layers import Call
from influence_cli.passes.sides import normalised, over_examples, over_positions, sides, wide

# From this many columns on, looking for all-zero columns saves time.
WIDE = 512
# Numbers in the workspace of one contraction: 2²², 16 MB in float32. More does not fit the caches and the allocator.
# A GPU has neither limit and works best with few large products: 2²⁷ there, 512 MB.
WORKSPACE, GPU_WORKSPACE = 2**22, 2**27


def gradient(network: Network, layer: Layer, calls: Sequence[Call]) -> Tensor:
    """Form the example gradients of a matrix layer, summed over positions and calls: [b, g, O, K']."""
    a, d = sides(layer, network.model.get_submodule(layer.name), calls)
    return _gradient(layer, a, d)


def _gradient(layer: Layer, a: Tensor, d: Tensor) -> Tensor:
    grads = _outer(d, a)
    return torch.cat([grads, d.sum(dim=2)[..., None]], dim=3) if layer.bias else grads


def flat_gradient(network: Network, layer: Layer, calls: Sequence[Call], out: dict[str, Tensor]) -> None:
    """Write a layer's example gradients to flat views [b, numel] that hold zeros, by the name of the parameter."""
    module = network.model.get_submodule(layer.name)
    if layer.is_matrix:
        numbers = _side_numbers(layer, calls) + layer.groups * layer.outputs * layer.width
        for start, part in _parts(calls, numbers):
            a, d = sides(layer, module, part)
            rows = slice(start, start + len(d))
            if layer.weight:
                shape = (len(d), layer.groups, layer.outputs, layer.inputs)
                if d.shape[2] == 1:
                    torch.mul(d.transpose(2, 3), a, out=out[layer.weight][rows].view(shape))
                else:
                    out[layer.weight][rows].view(shape).copy_(_outer(d, a))
            if layer.bias:
                out[layer.bias][rows] = d.sum(dim=2).flatten(1)
        return
    for call in calls:
        if call.delta is None:
            continue
        delta = wide(call.delta)
        if layer.kind == "embedding":
            if layer.weight:
                _add_embedding(module, call.a, delta, out[layer.weight])
            continue
        if layer.kind == "term":
            out[layer.weight] += over_examples(delta * wide(call.a), call.how, len(out[layer.weight]))
            continue
        scaled = delta * normalised(module, wide(call.a))
        for name, value in ((layer.weight, scaled), (layer.bias, delta)):
            if name:
                out[name] += over_positions(module, value)


def covariances(
    network: Network, layer: Layer, calls: Sequence[Call], widest: int
) -> tuple[Tensor | None, Tensor | None, int]:
    """Sum the outer products of a and of δ over examples, positions and calls.

    Args:
        network: the model.
        layer: a matrix layer.
        calls: its calls.
        widest: a side wider than this is left out.

    Returns:
        Σ a aᵀ [g, K', K'] and Σ δ δᵀ [g, O, O], each None where it is too wide; the number of positions summed over.
    """
    module = network.model.get_submodule(layer.name)
    into: Tensor | None = None
    out: Tensor | None = None
    summed = 0
    for _, part in _parts(calls, _side_numbers(layer, calls)):
        a, d = sides(layer, module, part)
        summed += len(d) * d.shape[2]
        if layer.width <= widest:
            square = _square(_by_group(a), ones=bool(layer.bias))
            into = square if into is None else into.add_(square)
        if layer.outputs <= widest:
            square = _square(_by_group(d))
            out = square if out is None else out.add_(square)
    return into, out, summed


def _square(flat: Tensor, *, ones: bool = False) -> Tensor:
    """Multiply [g, N, K] with itself; with ``ones`` as if a column of ones were appended."""
    width, live = flat.shape[2], _live(flat)
    size = width + ones
    if live is None:
        inner = flat.transpose(1, 2) @ flat
        if not ones:
            return inner
        square = flat.new_empty(len(flat), size, size)
        square[:, :width, :width] = inner
    else:
        square = flat.new_zeros(len(flat), size, size)
        part = flat[..., live]
        square[:, live[:, None], live] = part.transpose(1, 2) @ part
    if not ones:
        return square
    square[:, :width, width] = square[:, width, :width] = flat.sum(dim=1)
    square[:, width, width] = flat.shape[1]
    return square


def sketched(network: Network, layer: Layer, calls: Sequence[Call], side: str, sketch: Tensor) -> Tensor:
    """Multiply Σ a aᵀ (``side`` a) or Σ δ δᵀ (``d``) with a sketch [w, s], without forming the square: [g, w, s]."""
    module = network.model.get_submodule(layer.name)
    total: Tensor | None = None
    for _, part in _parts(calls, _side_numbers(layer, calls)):
        a, d = sides(layer, module, part)
        flat = _by_group(a if side == "a" else d)
        image = _times(flat, sketch.to(flat).expand(len(flat), *sketch.shape))
        back = flat.transpose(1, 2) @ image
        if side == "a" and layer.bias:
            back = torch.cat([back, image.sum(dim=1, keepdim=True)], dim=1)
        total = back if total is None else total + back
    if total is None:
        raise ValueError("the layer was not called")
    return total


def gradient_squares(network: Network, layer: Layer, calls: Sequence[Call]) -> Tensor:
    """Sum ‖G_i‖² over the examples."""
    numbers = _side_numbers(layer, calls) + layer.groups * layer.outputs * layer.width
    norms = [gradient(network, layer, part).square().sum() for _, part in _parts(calls, numbers)]
    return torch.stack(norms).sum()


def example_squares(network: Network, layer: Layer, calls: Sequence[Call]) -> Tensor:
    """Give ‖G_i‖² of each example [b]: ‖δ‖²(‖a‖² + 1), without forming a gradient, if the layer reads one position."""
    module, norms = network.model.get_submodule(layer.name), []
    for _, part in _parts(calls, _side_numbers(layer, calls) + layer.groups * layer.outputs * layer.width):
        a, d = sides(layer, module, part)
        if a.shape[2] == 1:
            squares = (a.square().sum(dim=3) + float(bool(layer.bias))) * d.square().sum(dim=3)
            norms.append(squares.flatten(1).sum(dim=1))
        else:
            norms.append(_gradient(layer, a, d).square().flatten(1).sum(dim=1))
    return torch.cat(norms)


def rotated(network: Network, layer: Layer, calls: Sequence[Call], q_out: Tensor, q_in: Tensor) -> Iterator[Tensor]:
    """Rotate the example gradients into a basis: Q_GᵀGQ_A, in the cheapest order.

    Args:
        network: the model.
        layer: a matrix layer.
        calls: its calls.
        q_out: Q_G [g, O, r].
        q_in: Q_A [g, K', s].

    Yields:
        [c, g, r, s] for c consecutive examples at a time, in order until all are done.
    """
    module = network.model.get_submodule(layer.name)
    tokens, g = positions(layer, calls), layer.groups
    (o, r), (k, s) = q_out.shape[1:], q_in.shape[1:]
    order = cheapest(tokens, (o, r), (k, s))
    numbers = _side_numbers(layer, calls) + g * (r * s if order != "sides" else tokens * (r + s))
    numbers += g * {"sides": 0, "output": r * (tokens + k), "gradient": o * (k + s)}[order]
    for _, part in _parts(calls, numbers):
        a, d = sides(layer, module, part)
        if order == "gradient":
            yield q_out.transpose(1, 2) @ _turn(_gradient(layer, a, d), q_in)
        elif order == "output":
            yield _turn(_gradient(layer, a, _turn(d, q_out)), q_in)
        else:
            # Products with a wide basis need many rows at once; each outer product needs room for r × s numbers.
            left, right = _turn(d, q_out), _turn(a, q_in)
            step = max(1, _workspace(left) // max(1, g * r * s))
            for start in range(0, len(left), step):
                yield _outer(left[start : start + step], right[start : start + step])


def turned_sides(
    network: Network, layer: Layer, calls: Sequence[Call], q_out: Tensor, q_in: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Give Q_Gᵀδ [b, g, r] and Q_Aᵀa [b, g, s] if the gradient is their outer product: one call, one position."""
    if positions(layer, calls) != 1:
        return None
    a, d = sides(layer, network.model.get_submodule(layer.name), calls)
    return _turn(d, q_out)[:, :, 0], _turn(a, q_in)[:, :, 0]


def positions(layer: Layer, calls: Sequence[Call]) -> int:
    """Count the positions T over which an example's gradient is summed, over all calls."""
    return sum(
        call.delta.numel() // max(1, len(call.delta) * layer.groups * layer.outputs)
        for call in calls
        if call.delta is not None
    )


def cheapest(tokens: int, out: Sequence[int], into: Sequence[int]) -> str:
    """Choose an order by its multiply-adds per example and group.

    Args:
        tokens: T, positions.
        out: (O, r) of Q_G.
        into: (K', s) of Q_A.

    Returns:
        ``sides``: rotate δ and a, then take the outer product; ``output``: rotate δ, then the gradient, then Q_A;
        ``gradient``: form the gradient, then rotate it.
    """
    (o, r), (k, s) = out, into
    costs = {
        "sides": tokens * (o * r + k * s + r * s),
        "output": tokens * (o * r + r * k) + r * k * s,
        "gradient": tokens * o * k + o * k * s + o * r * s,
    }
    return min(costs, key=lambda order: costs[order])


def inner(network: Network, layer: Layer, calls: Sequence[Call], vectors: Tensor) -> Tensor:
    """Multiply example gradients with vectors: ⟨S_m, G_i⟩.

    Args:
        network: the model.
        layer: a matrix layer.
        calls: its calls.
        vectors: S [m, g, O, K'].

    Returns:
        [b, m].
    """
    if positions(layer, calls) == 1:
        # ⟨S, δaᵀ⟩ = δᵀ(Sa): no gradient is formed.
        a, d = sides(layer, network.model.get_submodule(layer.name), calls)
        inputs, weights = a[:, :, 0], vectors[..., : a.shape[3]]
        live = _live(inputs.transpose(0, 1))
        if live is not None:
            inputs, weights = inputs[..., live], weights[..., live]
        turned = torch.einsum("bgk,mgok->bmgo", inputs, weights)
        if layer.bias:
            turned = turned + vectors[..., -1]
        return (turned * d[:, None, :, 0]).sum(dim=(2, 3))
    flat = vectors.flatten(1).T
    numbers = _side_numbers(layer, calls) + layer.groups * layer.outputs * layer.width
    return torch.cat([gradient(network, layer, part).flatten(1) @ flat for _, part in _parts(calls, numbers)])


def _side_numbers(layer: Layer, calls: Sequence[Call]) -> int:
    """Count the numbers in a and δ of an example, patches unfolded."""
    return positions(layer, calls) * layer.groups * (layer.inputs + layer.outputs)


def _parts(calls: Sequence[Call], numbers: int) -> Iterator[tuple[int, list[Call]]]:
    """Cut the calls of a batch into consecutive examples that stay within the workspace.

    Args:
        calls: of a layer.
        numbers: per example.
    """
    calls = [call for call in calls if call.delta is not None]
    count = len(calls[0].a) if calls else 0
    step = max(1, _workspace(calls[0].a) // max(1, numbers)) if calls else 1
    for start in range(0, count, step):
        part = slice(start, start + step)
        yield start, [replace(c, a=c.a[part], delta=c.delta[part]) for c in calls if c.delta is not None]


def _workspace(like: Tensor) -> int:
    return GPU_WORKSPACE if like.is_cuda else WORKSPACE


def _outer(d: Tensor, a: Tensor) -> Tensor:
    """Sum the outer products of [b, g, T, o] and [b, g, T, k] over positions: [b, g, o, k]."""
    return d.transpose(2, 3) * a if a.shape[2] == 1 else d.transpose(2, 3) @ a


def _by_group(x: Tensor) -> Tensor:
    """Put examples and positions together: [b, g, T, w] to [g, b·T, w]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[3])


def _live(flat: Tensor) -> Tensor | None:
    """Give the indices of the columns of [g, N, w] that are not all zero; None if that is most of them, or w is small.

    A kernel over an image of one pixel reads mostly padding: eight of nine columns can be skipped.
    """
    if flat.shape[2] < WIDE or 2 * int(torch.count_nonzero(flat[:, :64].any(dim=1).any(dim=0))) > flat.shape[2]:
        return None
    live = torch.nonzero(flat.ne(0).any(dim=1).any(dim=0))[:, 0]
    return live if 2 * len(live) <= flat.shape[2] else None


def _times(flat: Tensor, basis: Tensor) -> Tensor:
    """Multiply [g, N, w] with [g, w, r]; a row beyond w multiplies a column of ones."""
    width, live = flat.shape[2], _live(flat)
    if live is not None:
        rest = torch.arange(width, basis.shape[1], device=live.device)
        return _times(flat[..., live], basis[:, torch.cat([live, rest])])
    if basis.shape[1] == width:
        return torch.bmm(flat, basis)
    if not width:
        return basis.expand(-1, flat.shape[1], -1)
    return torch.baddbmm(basis[:, width:], flat, basis[:, :width])


def _turn(x: Tensor, basis: Tensor) -> Tensor:
    """Multiply [b, g, T, w] with one matrix per group [g, w, r] (or w + 1 rows, as in ``_times``)."""
    turned = _times(_by_group(x), basis)
    return turned.reshape(x.shape[1], x.shape[0], x.shape[2], basis.shape[2]).transpose(0, 1)


def _add_embedding(module: Any, indices: Tensor, delta: Tensor, out: Tensor) -> None:
    b, words, width = len(indices), module.num_embeddings, module.embedding_dim
    rows = indices.reshape(b, -1) + words * torch.arange(b, device=indices.device)[:, None]
    delta = delta.reshape(-1, width)
    if module.padding_idx is not None:
        delta = delta * (indices.reshape(-1, 1) != module.padding_idx)
    total = out.new_zeros(b * words, width).index_add_(0, rows.reshape(-1), delta.to(out.dtype))
    out += total.view(b, -1)
