"""M⁻¹ ≈ (GGN + (l2 + λ)I)⁻¹ for iterative solvers, from the largest parts of the GGN.

With Sᵢ = Σ_c w_ic u_ic u_icᵀ the curvature of example i's loss in its outputs, the GGN is the mean of r rᵀ over rows
r = √w_ic Jᵢᵀu_ic. A trained network is sure of most examples: few rows have weight, so some thousands of them hold
most of the curvature. The preconditioner is exact in their span. EK-FAC's factors would be smaller, but on a trained
network they need more products than no preconditioner (bench/results/solvers.md).

A preconditioner only needs to be symmetric and positive definite: it changes how many products with the curvature a
solver needs, not what it finds. So λ is chosen without it, and a Hessian is solved with that of the GGN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from influence_cli.curvature.operator import Examples
from influence_cli.model.network import Network, evaluate
from influence_cli.model.outputs import output_curvature
from influence_cli.passes.batch_size import micro_batch
from influence_cli.passes.gradients import example_products

Product = Callable[[Tensor], Tensor]

# Most rows, and most numbers in them: 2²⁸, 1 GB in float32. Their Gram matrix takes as long as some products.
ROWS, NUMBERS = 4_096, 2**28


def heaviest_rows(network: Network, examples: Examples, count: int | None = None) -> Tensor:
    """Compute the rows √(w_ic / n) Jᵢᵀu_ic of largest w_ic; the sum of their outer products is at most the GGN.

    Args:
        network: the model.
        examples: all training examples.
        count: rows at most; None for 4,096, or what 1 GB holds.

    Returns:
        [rows, p], on the model's device; no rows if no loss is convex in the outputs.
    """
    if count is None:
        count = max(1, min(ROWS, NUMBERS // network.size))
    weights, directions = [], []
    for start in range(0, len(examples), examples.batch):
        x, y = examples.inputs[start : start + examples.batch], examples.targets[start : start + examples.batch]
        curvature = output_curvature(network.loss, evaluate(network, x, y)[1].float(), y).double().cpu()
        values, vectors = torch.linalg.eigh((curvature + curvature.transpose(1, 2)) / 2)
        weights.append(values)
        directions.append(vectors.transpose(1, 2) * values.clamp_min(0).sqrt()[:, :, None])
    flat = torch.cat(weights).flatten()
    chosen = flat.argsort(descending=True, stable=True)[:count]
    # Rows below rounding add nothing.
    chosen = chosen[flat[chosen] > 1e-6 * float(flat.max())].sort()[0]
    classes = weights[0].shape[1]
    at, slopes = chosen // classes, torch.cat(directions).flatten(0, 1)[chosen]
    like = next(network.model.parameters())
    step = micro_batch(network, examples.batch)
    slopes, at = slopes.to(like) / len(examples) ** 0.5, at.to(examples.targets.device)
    parts = [
        example_products(network, examples.inputs[at[start : start + step]], slopes[start : start + step])
        for start in range(0, len(at), step)
    ]
    return torch.cat(parts).detach() if parts else like.new_zeros(0, network.size)


def row_preconditioner(rows: Tensor, floor: float) -> Product:
    """Make R ↦ R M⁻¹ with M = Σ r rᵀ + floor·I: M⁻¹ = (I − Gᵀ(floor·I + GGᵀ)⁻¹G) / floor (Woodbury 1950).

    Args:
        rows: G [r, p].
        floor: the curvature of every other direction, > 0: at least l2 + λ.
    """
    if len(rows) >= rows.shape[1]:
        direct, _ = _factor((rows.T @ rows).double().cpu(), floor)
        return lambda residuals: torch.cholesky_solve(residuals.T.double().cpu(), direct).T.to(residuals)
    factor, floor = _factor((rows @ rows.T).double().cpu(), floor)

    def apply(residuals: Tensor) -> Tensor:
        inner = (residuals.to(rows.dtype) @ rows.T).T.double().cpu()
        weights = torch.cholesky_solve(inner, factor).T.to(rows)
        return (residuals - weights @ rows) / floor

    return apply


def _factor(square: Tensor, floor: float) -> tuple[Tensor, float]:
    """Decompose a positive semi-definite matrix + floor·I by Cholesky, with the floor raised above its rounding."""
    for _ in range(60):
        shifted = square.clone()
        shifted.diagonal().add_(floor)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not bool(failed):
            break
        floor *= 10
    return factor, floor
