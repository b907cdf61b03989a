"""The logits in what a model returns, and the second derivative of their loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError


def logits_of(outputs: Any) -> Tensor:
    """Get the logits from what a model returns: a tensor, the first of a tuple, or ``logits``/``out`` of a dict."""
    if isinstance(outputs, Tensor):
        return outputs
    for key in ("logits", "out"):
        logits = outputs.get(key) if isinstance(outputs, dict) else getattr(outputs, key, None)
        if isinstance(logits, Tensor):
            return logits
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    keys = f" with the keys {', '.join(map(repr, outputs))}" if isinstance(outputs, dict) else ""
    raise InfluenceError(
        f"the model returns a {type(outputs).__name__}{keys}, which has no logits",
        "it must return a tensor, a tuple whose first item is the logits, or a dict with 'logits'; model.output names "
        "another item (a number, a key or a function)",
    )


def two_classes(logit: Tensor) -> Tensor:
    """Turn one logit f [b, 1] into the logits (0, f) [b, 2] of two classes: softmax(0, f)₁ = σ(f), exactly."""
    return torch.cat([torch.zeros_like(logit), logit], dim=1)


def output_curvature(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute S = ∇²_f ℓ(f, y), the Hessian of each example's loss in its outputs: [b, C, C], symmetric.

    For softmax cross-entropy this is diag(π) − π πᵀ with the model's probabilities π.
    """
    outputs = outputs.detach().requires_grad_()
    with torch.enable_grad():
        total = loss(outputs, targets).sum()
        (slope,) = torch.autograd.grad(total, outputs, create_graph=True)
        if not slope.requires_grad:  # linear in the outputs: no curvature
            return outputs.new_zeros(*outputs.shape, outputs.shape[1]).detach()
        rows = [
            torch.autograd.grad(slope[:, c].sum(), outputs, retain_graph=True, materialize_grads=True)[0]
            for c in range(outputs.shape[1])
        ]
    return torch.stack(rows, dim=1).detach()


Loss = Callable[[Tensor, Tensor], Tensor]
