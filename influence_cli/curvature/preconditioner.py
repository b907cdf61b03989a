"""M⁻¹ ≈ (GGN + (l2 + λ)I)⁻¹ for iterative solvers, from the largest parts of the GGN.

With Sᵢ = Σ_c w_ic u_ic u_icᵀ the curvature of example i's loss in its outputs, the GGN is the mean of r rᵀ over rows
r = √w_ic Jᵢᵀu_ic. A trained network is sure of most examples: few rows have weight, so some thousands of them hold
most of the curvature. The preconditioner is exact in their span, which a solve to a small residual needs. EK-FAC's
factors are smaller. At a λ far below the layers' own mean eigenvalue they need more products than no preconditioner
does (bench/results/solvers.md); at ten times that mean the first products with them hold what predicts retraining
(bench/results/cg.md).

A preconditioner only needs to be symmetric and positive definite: it changes how many products with the curvature a
solver needs, not what it finds. So λ is chosen without it, and a Hessian is solved with that of the GGN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from influence_cli.curvature.blocks import Block, joined, keep
from influence_cli.curvature.coordinates import Blocks, full_vectors, vector_coordinates
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


def scaled_row_preconditioner(rows: Tensor, shift: Tensor) -> Product:
    """Make R ↦ R M⁻¹ with M = Σ r rᵀ + diag(shift): that of the rows of D^(−1/2), between two factors D^(−1/2).

    Args:
        rows: G [r, p].
        shift: D, the curvature that is added along each parameter, > 0 [p].
    """
    root = shift.rsqrt().to(rows)
    inner = row_preconditioner(rows * root, 1.0)
    return lambda residuals: inner(residuals * root) * root


def block_preconditioner(network: Network, blocks: Sequence[Block], shifts: Sequence[float]) -> Product:
    """Make R ↦ R M⁻¹ with M = EK-FAC + shift: P (Λ + shift)⁻¹ Pᵀ, and 1/shift along what a basis leaves out.

    Args:
        network: the model.
        blocks: the curvature of each layer.
        shifts: l2 + λ of each block, > 0.
    """
    device = network.device()
    basis = Blocks(tuple(keep(blocks, None, device)))
    counts = torch.tensor([block.count for block in blocks])
    added = torch.repeat_interleave(torch.tensor(shifts, dtype=torch.float64), counts)
    inverse = 1 / (joined(blocks).double().clamp_min(0) + added)
    whole = all(block.count == block.size for block in blocks) and not network.unused
    outside = 1 / by_parameter(network, blocks, shifts)
    weights = (inverse if whole else inverse - 1 / added).float().to(device)
    outside = outside.float().to(device)

    def apply(residuals: Tensor) -> Tensor:
        turned = vector_coordinates(network, basis, residuals.to(weights)) * weights
        inside = full_vectors(network, basis, turned)
        return (inside if whole else inside + outside * residuals).to(residuals.dtype)

    return apply


def by_parameter(network: Network, blocks: Sequence[Block], values: Sequence[float]) -> Tensor:
    """Give every parameter the number of its block: float64 [p]; one that no output depends on, the smallest."""
    numbers = torch.full((network.size,), min(values), dtype=torch.float64)
    for block, value in zip(blocks, values, strict=True):
        for name in block.names:
            numbers[network.slots[name]] = value
    return numbers


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
