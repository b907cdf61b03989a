"""Products of the curvature with vectors, summed over a batch, without forming a matrix.

Plain reverse mode twice works for any trainable model:
Hessian: ∇²L v = ∇(∇L · v).  Gauss–Newton: JᵀS(Jv), with Jv as the derivative of Jᵀu in u (Pearlmutter 1994;
Schraudolph 2002).  For many vectors the layer pass costs less: it pulls the C outputs back to every layer once, and
each vector then takes products with what stands there: a and δ of a linear layer, J's columns of any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_cli.model.network import Network, differentiable_attention, flatten, recurrent_backward, unflatten
from influence_cli.model.outputs import logits_of, output_curvature
from influence_cli.passes.batch_size import GRADIENT_NUMBERS
from influence_cli.passes.contractions import positions
from influence_cli.passes.jacobian import factored, keep_jacobian, kept_product, widths
from influence_cli.passes.layers import forward


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
    alone = factored(network, tape)
    for number, (layer, layer_calls) in enumerate(zip(network.layers, calls, strict=False)):
        size = sum(widths(network, layer.names))
        if layer.is_matrix:
            one_pass += positions(layer, layer_calls) * layer.groups * layer.outputs * layer.inputs
        multiplied += size if number in alone else classes * size
        held += count * layer.outputs if number in alone else classes * size
    if 2 * classes * one_pass + 2 * count * multiplied >= 4 * count * one_pass:
        return 0
    return max(1, min(len(inputs), GRADIENT_NUMBERS // held))


def _layer_pass_product(network: Network, inputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    return kept_product(network, keep_jacobian(network, inputs, targets, vectors.dtype), vectors)
