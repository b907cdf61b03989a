"""The Jacobian of the outputs at a fixed checkpoint, layer by layer, and Gauss–Newton products with it.

One backward pass per output pulls it back to every layer. A linear layer that is called once keeps a and δ, whose outer
product is its Jacobian; any other keeps the columns. It depends on the checkpoint alone: a solver that multiplies
several times with the same examples keeps it, where it fits the memory, in place of new backward passes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.model.network import Layer, Network
from influence_cli.model.outputs import output_curvature
from influence_cli.passes.contractions import flat_gradient
from influence_cli.passes.gradients import rest_products
from influence_cli.passes.layers import Tape, forward
from influence_cli.passes.sides import sides


@dataclass(frozen=True)
class _Part:
    """The Jacobian of the outputs in one layer's parameters.

    Attributes:
        names: its parameters.
        layer: the layer; None for the parameters outside the layer pass.
        a: its inputs [b, K] if it is factored, otherwise None.
        rows: δ [C, b, O] if it is factored, otherwise J [C, b, numbers of the parameters].
    """

    names: tuple[str, ...]
    layer: Layer | None
    a: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class KeptJacobian:
    """What a batch's Gauss–Newton products take.

    Attributes:
        parts: J, part by part.
        curvature: S = ∇²_f ℓ of each example, [b, C, C].
    """

    parts: tuple[_Part, ...]
    curvature: Tensor


def keep_jacobian(network: Network, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> KeptJacobian:
    """Pull every output back to every layer.

    Args:
        network: the model.
        inputs: [b, …], on the model's device.
        targets: [b].
        dtype: of S, that of the vectors to come.
    """
    tape = forward(network, inputs)
    curvature = output_curvature(network.loss, tape.outputs.detach().to(dtype), targets)
    batch, classes = tape.outputs.shape
    unit = torch.eye(classes, dtype=tape.outputs.dtype, device=tape.outputs.device)
    alone, parts, rest = factored(network, tape), dict[int, _Part](), list[Tensor]()
    wide = torch.promote_types(tape.outputs.dtype, torch.float32)
    for c in range(classes):
        slopes = unit[c].expand(batch, -1)
        if network.rest:
            rest.append(rest_products(network, inputs, slopes).to(wide))
        for number, (layer, calls) in enumerate(
            zip(network.layers, tape.backward(slopes, again=c + 1 < classes), strict=False)
        ):
            if not calls:
                continue
            if number in alone:
                a, d = (side[:, 0, 0] for side in sides(layer, network.model.get_submodule(layer.name), calls))
                part = parts.setdefault(number, _Part(layer.names, layer, a, d.new_zeros(classes, *d.shape)))
                part.rows[c] = d
                continue
            sizes = widths(network, layer.names)
            if number not in parts:
                rows = torch.zeros(classes, batch, sum(sizes), dtype=wide, device=tape.outputs.device)
                parts[number] = _Part(layer.names, layer, None, rows)
            views = torch.split(parts[number].rows[c], sizes, dim=1)
            flat_gradient(network, layer, calls, dict(zip(layer.names, views, strict=True)))
    loose = [_Part(network.rest, None, None, torch.stack(rest))] if rest else []
    return KeptJacobian((*parts.values(), *loose), curvature)


def kept_product(network: Network, kept: KeptJacobian, vectors: Tensor) -> Tensor:
    """Compute Σ JᵀSJ v of the batch for each row of vectors: [m, p]."""
    pushed = sum((_pushed(network, part, vectors) for part in kept.parts), vectors.new_zeros(()))
    weighted = torch.einsum("bcd,dbm->cbm", kept.curvature, pushed)
    total = torch.zeros_like(vectors)
    for part in kept.parts:
        _add_pulled(network, part, weighted, total)
    return total


def numbers_per_example(network: Network, inputs: Tensor) -> int:
    """Count the numbers that a kept Jacobian has per example, S included; the shapes of ``inputs`` [b, …] tell."""
    tape = forward(network, inputs[:1])
    tape.backward(torch.zeros_like(tape.outputs))
    classes, alone = tape.outputs.shape[1], factored(network, tape)
    ran = {call.layer for call in tape.calls}
    total = classes * classes + classes * sum(widths(network, network.rest))
    for number, layer in enumerate(network.layers):
        if number in alone:
            total += (layer.inputs if layer.weight else 0) + classes * layer.outputs
        elif number in ran:
            total += classes * sum(widths(network, layer.names))
    return total


def factored(network: Network, tape: Tape) -> set[int]:
    """Give the numbers of the layers whose J is δ aᵀ: linear ones that are called once, on one position."""
    calls = [call for call in tape.calls if network.layers[call.layer].kind == "linear"]
    often = Counter(call.layer for call in calls)
    return {call.layer for call in calls if often[call.layer] == 1 and call.a.ndim == 2}


def widths(network: Network, names: tuple[str, ...]) -> list[int]:
    """Count the numbers of each of some parameters."""
    return [network.slots[name].stop - network.slots[name].start for name in names]


def _pushed(network: Network, part: _Part, vectors: Tensor) -> Tensor:
    """Multiply a layer's J with its part of the vectors: [C, b, m]."""
    layer, slots = part.layer, network.slots
    if part.a is None or layer is None:
        return part.rows @ torch.cat([vectors[:, slots[name]] for name in part.names], dim=1).T
    moved = vectors.new_zeros(len(part.a), len(vectors), layer.outputs)
    if layer.weight:
        weights = vectors[:, slots[layer.weight]].reshape(-1, layer.inputs)
        moved += (part.a @ weights.T).view_as(moved)
    if layer.bias:
        moved += vectors[:, slots[layer.bias]]
    return torch.einsum("cbo,bmo->cbm", part.rows, moved)


def _add_pulled(network: Network, part: _Part, weighted: Tensor, total: Tensor) -> None:
    """Add a layer's Jᵀ times [C, b, m] to its part of the result [m, p]."""
    layer, slots = part.layer, network.slots
    if part.a is None or layer is None:
        product = weighted.flatten(0, 1).T @ part.rows.flatten(0, 1)
        for name, part_of in zip(part.names, torch.split(product, widths(network, part.names), dim=1), strict=True):
            total[:, slots[name]] += part_of
        return
    slopes = torch.einsum("cbm,cbo->bmo", weighted, part.rows)
    if layer.weight:
        total[:, slots[layer.weight]] += (slopes.flatten(1).T @ part.a).view(len(total), -1)
    if layer.bias:
        total[:, slots[layer.bias]] += slopes.sum(dim=0)
