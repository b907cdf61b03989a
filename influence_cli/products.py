"""Products of the curvature with vectors, summed over a batch, without ever forming a matrix.

Plain reverse mode twice, which any model that can be trained can go through:
Hessian: ∇²L v = ∇(∇L · v).  Gauss–Newton: JᵀS(Jv), with Jv as the derivative of Jᵀu in u (Pearlmutter 1994;
Schraudolph 2002).
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_cli.network import (
    Network,
    differentiable_attention,
    flatten,
    output_curvature,
    recurrent_backward,
    unflatten,
)
from influence_cli.task import logits_of


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
    with torch.enable_grad(), differentiable_attention(), recurrent_backward(network.model):
        if matrix == "hessian":
            return _hessian_product(network, inputs, targets, vectors)
        return _ggn_product(network, inputs, targets, vectors)


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
    # Jᵀu is linear in u; its derivative along v is Jv, whatever u is.
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
