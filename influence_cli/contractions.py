"""What is wanted of a layer, contracted from its input a and output slope δ in the order that costs least.

A matrix layer's example gradient is G = Σ_τ δ_τ a_τᵀ, [g, O, K'], with a one behind a where the layer has a bias; T
positions τ: pixels of a convolution (a is then a patch), tokens of a sequence. What follows from G (coordinates
Q_GᵀGQ_A, products ⟨S, G⟩, squares) either forms G first or turns a and δ first. Which of the two is decided by
counting multiply-adds, layer by layer: ``cheapest``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.layers import Call
from influence_cli.network import Layer, Network

# Numbers in the workspace of one contraction: 2²⁴, 64 MB in float32. More only leaves the caches.
WORKSPACE = 2**24


def sides(layer: Layer, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
    """Give a and δ of a matrix layer position by position.

    Returns:
        a [b, g, T, K'], with the column of ones where the layer has a bias; δ [b, g, T, O]; float32 or wider.
    """
    if call.delta is None:
        raise ValueError("the call has no slope")
    a, delta = _wide(call.a), _wide(call.delta)
    if layer.kind == "linear":
        d = delta.reshape(len(delta), 1, -1, layer.outputs)
        a = a.reshape(len(a), 1, -1, layer.inputs) if layer.weight else a.new_empty(*d.shape[:3], 0)
    else:
        d = delta.reshape(len(delta), layer.groups, layer.outputs, -1).transpose(2, 3)
        if layer.weight:
            patches = _patches(module, a)
            a = patches.reshape(len(a), layer.groups, layer.inputs, -1).transpose(2, 3)
        else:
            a = a.new_empty(*d.shape[:3], 0)
    if layer.bias:
        a = torch.cat([a, a.new_ones(*a.shape[:3], 1)], dim=3)
    return a, d


def gradient(network: Network, layer: Layer, calls: Sequence[Call]) -> Tensor:
    """Form the example gradients of a matrix layer, summed over its calls: [b, g, O, K']."""
    module = network.model.get_submodule(layer.name)
    total: Tensor | None = None
    for call in calls:
        a, d = sides(layer, module, call)
        part = _outer(d, a)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("the layer was not called")
    return total


def flat_gradient(network: Network, layer: Layer, calls: Sequence[Call], out: dict[str, Tensor]) -> None:
    """Add a layer's example gradients to flat views [b, numel], by the name of the parameter."""
    if layer.is_matrix:
        for part in _parts(layer, calls):
            grads = gradient(network, layer, part.calls)
            rows = slice(part.start, part.start + len(grads))
            if layer.weight:
                weight = grads[..., : layer.inputs] if layer.bias else grads
                out[layer.weight][rows].view(weight.shape).copy_(weight)
            if layer.bias:
                out[layer.bias][rows].view(grads.shape[:3]).copy_(grads[..., -1])
        return
    module = network.model.get_submodule(layer.name)
    for call in calls:
        if call.delta is None:
            continue
        delta = _wide(call.delta)
        if layer.kind == "embedding":
            if layer.weight:
                _add_embedding(module, call.a, delta, out[layer.weight])
            continue
        scaled = _wide(delta) * _normalised(module, _wide(call.a))
        for name, value in ((layer.weight, scaled), (layer.bias, delta)):
            if name:
                out[name] += _over_positions(module, value)


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
    totals: list[Tensor | None] = [None, None]
    summed = 0
    for part in _parts(layer, calls):
        for call in part.calls:
            both = sides(layer, module, call)
            summed += len(both[1]) * both[1].shape[2]
            for number, side in enumerate(both):
                if side.shape[3] <= widest:
                    flat = _by_group(side)
                    square = flat.transpose(1, 2) @ flat
                    total = totals[number]
                    totals[number] = square if total is None else total + square
    return totals[0], totals[1], summed


def sketched(network: Network, layer: Layer, calls: Sequence[Call], side: str, sketch: Tensor) -> Tensor:
    """Multiply Σ a aᵀ (``side`` a) or Σ δ δᵀ (``d``) with a sketch [w, s], the square never being formed: [g, w, s]."""
    module = network.model.get_submodule(layer.name)
    total: Tensor | None = None
    for part in _parts(layer, calls):
        for call in part.calls:
            flat = _by_group(sides(layer, module, call)[0 if side == "a" else 1])
            image = flat.transpose(1, 2) @ (flat @ sketch.to(flat))
            total = image if total is None else total + image
    if total is None:
        raise ValueError("the layer was not called")
    return total


def gradient_squares(network: Network, layer: Layer, calls: Sequence[Call]) -> Tensor:
    """Sum ‖G_i‖² over the examples."""
    norms = [gradient(network, layer, part.calls).square().sum() for part in _parts(layer, calls)]
    return torch.stack(norms).sum()


def rotated(network: Network, layer: Layer, calls: Sequence[Call], q_out: Tensor, q_in: Tensor) -> Iterator[Tensor]:
    """Turn the example gradients into a basis: Q_GᵀGQ_A.

    Args:
        network: the model.
        layer: a matrix layer.
        calls: its calls.
        q_out: Q_G [g, O, r].
        q_in: Q_A [g, K', s].

    Yields:
        [c, g, r, s] for c consecutive examples at a time, all of them in order.
    """
    module = network.model.get_submodule(layer.name)
    for part in _parts(layer, calls, extra=layer.groups * q_out.shape[2] * q_in.shape[2]):
        total: Tensor | None = None
        for call in part.calls:
            a, d = sides(layer, module, call)
            if cheapest(a.shape[2], q_out.shape[1:], q_in.shape[1:]) == "sides":
                new = _outer(_turn(d, q_out), _turn(a, q_in))
            else:
                grads = _outer(d, a)
                new = q_out.transpose(1, 2) @ _turn(grads, q_in)
            total = new if total is None else total + new
        if total is not None:
            yield total


def turned_sides(
    network: Network, layer: Layer, calls: Sequence[Call], q_out: Tensor, q_in: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Give Q_Gᵀδ [b, g, r] and Q_Aᵀa [b, g, s] where the gradient is their outer product: one call, one position."""
    if len(calls) != 1 or positions(layer, calls) != 1:
        return None
    a, d = sides(layer, network.model.get_submodule(layer.name), calls[0])
    return _turn(d, q_out)[:, :, 0], _turn(a, q_in)[:, :, 0]


def positions(layer: Layer, calls: Sequence[Call]) -> int:
    """Count the positions T over which an example's gradient is summed, over all calls."""
    return sum(
        call.delta.numel() // max(1, len(call.delta) * layer.groups * layer.outputs)
        for call in calls
        if call.delta is not None
    )


def cheapest(positions: int, out: Sequence[int], into: Sequence[int]) -> str:
    """Choose by multiply-adds of an example and group: turn the ``sides`` first, or the ``gradient``.

    Args:
        positions: T.
        out: (O, r) of Q_G.
        into: (K', s) of Q_A.
    """
    (o, r), (k, s) = out, into
    by_sides = positions * (o * r + k * s + r * s)
    by_gradient = positions * o * k + o * k * s + o * r * s
    return "sides" if by_sides <= by_gradient else "gradient"


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
    if len(calls) == 1 and positions(layer, calls) == 1:
        # ⟨S, δaᵀ⟩ = δᵀ(Sa): no gradient is formed.
        a, d = sides(layer, network.model.get_submodule(layer.name), calls[0])
        turned = torch.einsum("bgk,mgok->bmgo", a[:, :, 0], vectors)
        return (turned * d[:, None, :, 0]).sum(dim=(2, 3))
    flat = vectors.flatten(1).T
    parts = _parts(layer, calls)
    return torch.cat([gradient(network, layer, part.calls).flatten(1) @ flat for part in parts])


class _Part:
    """Some consecutive examples of a layer's calls."""

    def __init__(self, start: int, calls: list[Call]) -> None:
        self.start = start
        self.calls = calls


def _parts(layer: Layer, calls: Sequence[Call], extra: int = 0) -> Iterator[_Part]:
    """Cut the calls of a batch so that patches and gradients stay within the workspace."""
    calls = [call for call in calls if call.delta is not None]
    if not calls:
        return
    count, tokens = len(calls[0].a), positions(layer, calls[:1])
    numbers = layer.groups * (tokens * (layer.width + layer.outputs) + layer.outputs * layer.width) + extra
    step = max(1, WORKSPACE // max(1, numbers))
    for start in range(0, count, step):
        yield _Part(
            start,
            [
                replace(call, a=call.a[start : start + step], delta=call.delta[start : start + step])
                for call in calls
                if call.delta is not None
            ],
        )


def _outer(d: Tensor, a: Tensor) -> Tensor:
    """Sum the outer products of [b, g, T, o] and [b, g, T, k] over positions: [b, g, o, k]."""
    return d.transpose(2, 3) * a if a.shape[2] == 1 else d.transpose(2, 3) @ a


def _by_group(x: Tensor) -> Tensor:
    """Put examples and positions together: [b, g, T, w] to [g, b·T, w]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[3])


def _turn(x: Tensor, basis: Tensor) -> Tensor:
    """Multiply [b, g, T, w] with a matrix a group [g, w, r]."""
    turned = torch.bmm(_by_group(x), basis)
    return turned.view(x.shape[1], x.shape[0], x.shape[2], basis.shape[2]).transpose(0, 1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _patches(module: Any, x: Tensor) -> Tensor:
    """Unfold what each output position of a convolution reads: [b, channels × kernel size, positions]."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if all(k == 1 for k in kernel) and all(s == 1 for s in stride) and not _pads(module):
        return x.flatten(2)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0,) * len(kernel)
    else:
        padding = module.padding
    if len(kernel) == 2:
        return functional.unfold(x, kernel, dilation, padding, stride)
    if any(padding):
        x = functional.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    # [b, channels, positions …, kernel …] to [b, channels · kernel, positions]
    order = (0, 1, *range(2 + len(kernel), 2 + 2 * len(kernel)), *range(2, 2 + len(kernel)))
    x = x.permute(order)
    width = x.shape[1] * int(torch.tensor(kernel).prod())
    return x.reshape(len(x), width, -1)


def _pads(module: Any) -> bool:
    return any(module._reversed_padding_repeated_twice)


def _normalised(module: Any, x: Tensor) -> Tensor:
    """Give what a norm multiplies with its weight."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, list(module.normalized_shape), eps=module.eps)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    scale: Tensor = (module.running_var + module.eps).rsqrt()
    mean: Tensor = module.running_mean
    return (x - mean.view(shape)) * scale.view(shape)


def _over_positions(module: Any, x: Tensor) -> Tensor:
    """Sum over the positions that share a norm's weight: [b, numel]."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return x.reshape(len(x), -1, int(torch.tensor(module.normalized_shape).prod())).sum(dim=1)
    return x.reshape(len(x), x.shape[1], -1).sum(dim=2)


def _add_embedding(module: Any, indices: Tensor, delta: Tensor, out: Tensor) -> None:
    b, words, width = len(indices), module.num_embeddings, module.embedding_dim
    rows = indices.reshape(b, -1) + words * torch.arange(b, device=indices.device)[:, None]
    delta = delta.reshape(-1, width)
    if module.padding_idx is not None:
        delta = delta * (indices.reshape(-1, 1) != module.padding_idx)
    total = out.new_zeros(b * words, width).index_add_(0, rows.reshape(-1), delta.to(out.dtype))
    out += total.view(b, -1)
