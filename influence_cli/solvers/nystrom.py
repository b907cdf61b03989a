"""Nyström: conjugate gradients preconditioned by a randomised low-rank approximation of A = H + (l2 + λ)I.

Use it if few directions are much more curved than the rest and layer-wise factors are not available: ``rank`` products
with random vectors find those directions, and A is then inverted in them at once (Frangella, Tropp & Udell 2023). What
the approximation misses costs iterations, never accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from influence_cli.solvers.cg import Product, SolveInfo, conjugate_gradients, finite, orthonormal, refuse_indefinite

RANK = 100
# Most numbers in the random vectors: 2²⁷, 512 MB in float32.
NUMBERS = 2**27
# Random vectors in one product.
AT_ONCE = 25
# An eigenvalue below this share of the largest is rounding of the products.
ROUNDING = 1e-6


def nystrom(
    product: Product,
    v: Tensor,
    *,
    rank: int = RANK,
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    on_iteration: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Solve A x = v for symmetric positive definite A.

    A ≈ AΩ(ΩᵀAΩ)⁻¹(AΩ)ᵀ = UΛ̂Uᵀ from random orthonormal Ω [p, r], and
    M⁻¹ = λ̂_r UΛ̂⁻¹Uᵀ + (I − UUᵀ) (Frangella, Tropp & Udell 2023, section 5, of A itself: its shift is in Λ̂).

    Args:
        product: V [m, p] to V A [m, p].
        v: right-hand sides [m, p].
        rank: r, at most p.
        seed: of Ω.
        tolerance: of the relative residual.
        max_iterations: products of a block at most, those with Ω not counted.
        on_iteration: called with (iterations, relative residual).

    Returns:
        x [m, p], and what was done; its ``products`` count those with Ω.

    Raises:
        InfluenceError: ΩᵀAΩ has a negative eigenvalue, so A has one; or an error of conjugate gradients.
    """
    rank = max(1, min(rank, v.shape[1], NUMBERS // v.shape[1]))
    precondition = _preconditioner(product, v, rank, seed)
    x, info = conjugate_gradients(
        product,
        v,
        precondition=precondition,
        tolerance=tolerance,
        max_iterations=max_iterations,
        on_iteration=on_iteration,
    )
    return x, replace(info, method="nystrom", products=info.products + rank, preconditioner="nystrom")


def _preconditioner(product: Product, v: Tensor, rank: int, seed: int) -> Product:
    wide = torch.float32 if v.device.type == "mps" else torch.float64
    generator = torch.Generator().manual_seed(seed)
    omega = orthonormal(torch.randn(rank, v.shape[1], generator=generator).to(v.device, wide))
    image = torch.cat([product(omega[at : at + AT_ONCE].to(v.dtype)).to(wide) for at in range(0, rank, AT_ONCE)])
    core = finite(omega @ image.T, "the products with random vectors")
    weights, turn = torch.linalg.eigh((core + core.T) / 2)
    if float(weights[0]) <= -ROUNDING * float(weights[-1].abs()):
        refuse_indefinite(float(weights[0]), "the products with random vectors found a direction")
    used = weights > ROUNDING * float(weights[-1])
    # A_nys = BᵀB with B = (ΩᵀAΩ)^{-1/2} (AΩ)ᵀ; its eigenvectors are the right singular vectors of B.
    half = (turn[:, used] / weights[used].sqrt()).T @ image
    values, left = torch.linalg.eigh(half @ half.T)
    kept = values > ROUNDING * float(values[-1])
    values = values[kept]
    u = ((left[:, kept] / values.sqrt()).T @ half).to(v.dtype)
    gain = (1 - values[0] / values).to(v.dtype)
    return lambda r: r - ((r @ u.T) * gain) @ u
