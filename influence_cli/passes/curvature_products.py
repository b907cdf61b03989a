"""Products of the curvature with vectors, summed over a batch, without forming a matrix.

Plain reverse mode twice works for any trainable model:
Hessian: ∇²L v = ∇(∇L · v).  Gauss–Newton: JᵀS(Jv), with Jv as the derivative of Jᵀu in u (Pearlmutter 1994;
Schraudolph 2002).  For many vectors the layer pass costs less: it pulls the C outputs back to every layer once, and
each vector then takes products with what stands there: a and δ of a linear layer, J's columns of any other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.model.network import Layer, Network, differentiable_attention, flatten, recurrent_backward, unflatten
from influence_cli.model.outputs import logits_of, output_curvature
from influence_cli.passes.batch_size import GRADIENT_NUMBERS
from influence_cli.passes.contractions import flat_gradient, positions
from influence_cli.passes.layers import Tape, forward
from influence_cli.passes.sides import sides


def curvature_product(network: Network, inputs: Tensor, targets: Tensor, vectors: Tensor, matrix: str) -> Tensor:
    """Multiply the summed curvature of a batch with vectors.

    Args:
        network: the model.
        inputs: [b, …].
        targets: [b].
        vectors: V [m, p].
        matrix: ``ggn`` for Σ JᵀSJ, ``hessian`` for Σ ∇²L.

    Returns:
        [m, p]: row j is the *sum* over the batch times row j of V; divide by the number of examples for the mean.
    """
    inputs, targets = inputs.to(network.device()), targets.to(network.device())
    step = _layer_pass_examples(network, inputs, len(vectors)) if matrix == "ggn" else 0
    if not step:
        return reverse_product(network, inputs, targets, vectors, matrix)
    parts = zip(torch.split(inputs, step), torch.split(targets, step), strict=True)
    return sum((_layer_pass_product(network, x, y, vectors) for x, y in parts), torch.zeros_like(vectors))


def reverse_product(network: Network, inputs: Tensor, targets: Tensor, vectors: Tensor, matrix: str) -> Tensor:
    """Do the same by reverse mode twice, one vector after another."""
    with torch.enable_grad(), differentiable_attention(), recurrent_backward(network.model):
        product = _hessian_product if matrix == "hessian" else _ggn_product
        return product(network, inputs, targets, vectors)


def _hessian_product(network: Network, inputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    wanted = list(network.parameters().values())
    total = network.loss(logits_of(network.model(inputs)), targets).sum()
    slopes = torch.autograd.grad(total, wanted, create_graph=True, materialize_grads=True, allow_unused=True)
    rows = []
    for vector in vectors:
        product = torch.autograd.grad(
            slopes, wanted, unflatten(network, vector), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        rows.append(flatten(product))
    return torch.stack(rows)


def _ggn_product(network: Network, inputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    wanted = list(network.parameters().values())
    outputs = logits_of(network.model(inputs))
    curvature = output_curvature(network.loss, outputs, targets)
    # Jᵀu is linear in u, so its derivative along v is Jv for every u.
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, wanted, u, create_graph=True, materialize_grads=True, allow_unused=True)
    rows = []
    for vector in vectors:
        (pushed,) = torch.autograd.grad(pulled, u, unflatten(network, vector), retain_graph=True)
        weighted = torch.einsum("bcd,bd->bc", curvature, pushed)
        product = torch.autograd.grad(
            outputs, wanted, weighted, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        rows.append(flatten(product))
    return torch.stack(rows)


def _layer_pass_examples(network: Network, inputs: Tensor, count: int) -> int:
    """Say how many examples go through the layer pass at once; 0 if it costs more than reverse mode twice.

    Multiply-adds per example: the layer pass takes C times about two forward passes for all vectors, plus two
    multiplications per vector. Reverse mode takes four forward passes per vector.
    """
    if network.rest or count < 2:
        return 0
    tape = forward(network, inputs[:1])
    calls = tape.backward(torch.zeros_like(tape.outputs))
    classes, one_pass, multiplied, held = tape.outputs.shape[1], 0, 0, 0
    alone = _factored(network, tape)
    for number, (layer, layer_calls) in enumerate(zip(network.layers, calls, strict=False)):
        size = sum(_widths(network, layer))
        if layer.is_matrix:
            one_pass += positions(layer, layer_calls) * layer.groups * layer.outputs * layer.inputs
        multiplied += size if number in alone else classes * size
        held += count * layer.outputs if number in alone else classes * size
    if 2 * classes * one_pass + 2 * count * multiplied >= 4 * count * one_pass:
        return 0
    return max(1, min(len(inputs), GRADIENT_NUMBERS // held))


def _factored(network: Network, tape: Tape) -> set[int]:
    """Give the numbers of the layers whose J is δ aᵀ: linear ones that are called once, on one position."""
    calls = [call for call in tape.calls if network.layers[call.layer].kind == "linear"]
    often = Counter(call.layer for call in calls)
    return {call.layer for call in calls if often[call.layer] == 1 and call.a.ndim == 2}


def _widths(network: Network, layer: Layer) -> list[int]:
    return [network.slots[name].stop - network.slots[name].start for name in layer.names]


@dataclass(frozen=True)
class _Part:
    """One layer's Jacobian of the outputs.

    Attributes:
        layer: the layer.
        a: its inputs [b, K] if it is factored, otherwise None.
        rows: δ [C, b, O] if it is factored, otherwise J [C, b, numbers of the layer].
    """

    layer: Layer
    a: Tensor | None
    rows: Tensor


def _jacobian(network: Network, tape: Tape) -> list[_Part]:
    """Pull every output back to every layer."""
    batch, classes = tape.outputs.shape
    unit = torch.eye(classes, dtype=tape.outputs.dtype, device=tape.outputs.device)
    alone, parts = _factored(network, tape), dict[int, _Part]()
    for c in range(classes):
        calls = tape.backward(unit[c].expand(batch, -1), again=c + 1 < classes)
        for number, (layer, layer_calls) in enumerate(zip(network.layers, calls, strict=False)):
            if not layer_calls:
                continue
            if number in alone:
                a, d = (side[:, 0, 0] for side in sides(layer, network.model.get_submodule(layer.name), layer_calls))
                part = parts.setdefault(number, _Part(layer, a, d.new_zeros(classes, *d.shape)))
                part.rows[c] = d
                continue
            widths = _widths(network, layer)
            if number not in parts:
                dtype = torch.promote_types(tape.outputs.dtype, torch.float32)
                rows = torch.zeros(classes, batch, sum(widths), dtype=dtype, device=tape.outputs.device)
                parts[number] = _Part(layer, None, rows)
            views = torch.split(parts[number].rows[c], widths, dim=1)
            flat_gradient(network, layer, layer_calls, dict(zip(layer.names, views, strict=True)))
    return list(parts.values())


def _layer_pass_product(network: Network, inputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    tape = forward(network, inputs)
    curvature = output_curvature(network.loss, tape.outputs.detach().to(vectors.dtype), targets)
    parts = _jacobian(network, tape)
    pushed = sum((_pushed(network, part, vectors) for part in parts), vectors.new_zeros(()))
    weighted = torch.einsum("bcd,dbm->cbm", curvature, pushed)
    total = torch.zeros_like(vectors)
    for part in parts:
        _add_pulled(network, part, weighted, total)
    return total


def _pushed(network: Network, part: _Part, vectors: Tensor) -> Tensor:
    """Multiply a layer's J with its part of the vectors: [C, b, m]."""
    layer, slots = part.layer, network.slots
    if part.a is None:
        return part.rows @ torch.cat([vectors[:, slots[name]] for name in layer.names], dim=1).T
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
    if part.a is None:
        product = weighted.flatten(0, 1).T @ part.rows.flatten(0, 1)
        for name, part_of in zip(layer.names, torch.split(product, _widths(network, layer), dim=1), strict=True):
            total[:, slots[name]] += part_of
        return
    slopes = torch.einsum("cbm,cbo->bmo", weighted, part.rows)
    if layer.weight:
        total[:, slots[layer.weight]] += (slopes.flatten(1).T @ part.a).view(len(total), -1)
    if layer.bias:
        total[:, slots[layer.bias]] += slopes.sum(dim=0)
