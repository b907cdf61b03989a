"""The top eigenpairs of the curvature by Lanczos iteration, the symmetric case of Arnoldi's (Schioppa et al. 2022).

Use it if p is large and few directions matter: it needs only products with H, and p numbers per direction. Influence
is restricted to the span of the directions found. An unknown mean eigenvalue is estimated from random vectors
(Hutchinson).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.solvers.lanczos import beside, tridiagonal

# Krylov vectors, and the number of eigenpairs kept if their residual allows it.
KRYLOV, KEPT = 200, 100
# A Ritz pair is kept while ‖Hv − Λv‖ is below this share of the largest |Λ|.
RESIDUAL = 1e-2
PROBES = 8


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs.

    Attributes:
        values: Λ [k], float64, largest size first; includes negative ones of a Hessian.
        vectors: [p, k], orthonormal columns.
        smallest: the smallest Ritz value of all.
        trace: estimate of ΣΛ.
        residual: largest ‖Hv − Λv‖ / max|Λ| of the kept pairs.
        products: products with H.
    """

    values: Tensor
    vectors: Tensor
    smallest: float
    trace: float
    residual: float
    products: int


def top_eigenvectors(
    product: Callable[[Tensor], Tensor],
    size: int,
    *,
    like: Tensor,
    seed: int = 0,
    krylov: int = KRYLOV,
    kept: int = KEPT,
    free: int | None = None,
    on_product: Callable[[int], None] = lambda _: None,
) -> Ritz:
    """Run Lanczos with full reorthogonalisation and keep the pairs that have converged.

    Args:
        product: V [m, p] to V H [m, p].
        size: p.
        like: a tensor of the dtype and device to work in.
        seed: of the start and the probes.
        krylov: products, at most p.
        kept: pairs at most.
        free: bytes of memory that may be used, or None.
        on_product: called after each product.

    Raises:
        InfluenceError: two dozen vectors do not fit the memory, or H is zero.
        FloatingPointError: a product is NaN or infinite.
    """
    if free is not None:
        fits = int(0.5 * free) // (like.element_size() * size)
        if fits < 24:
            raise InfluenceError(
                f"curvature arnoldi needs at least 24 vectors of {size:,} numbers "
                f"({human_bytes(48 * like.element_size() * size)}), but {human_bytes(free)} is free",
                "track fewer layers (gradients.layers), or use curvature.method: ekfac",
            )
        krylov = min(krylov, fits)
    generator = torch.Generator().manual_seed(seed)
    steps = min(krylov, size)
    basis = torch.zeros(steps, size, dtype=like.dtype, device=like.device)
    vector = torch.randn(size, generator=generator).to(like)
    vector /= vector.norm()
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        basis[step] = vector
        image = product(vector[None])[0]
        on_product(1)
        alphas.append(float(vector.double() @ image.double()))
        if not math.isfinite(alphas[-1]):
            raise FloatingPointError("a product with the curvature")
        image = beside(basis[: step + 1], image)
        beta, zero = float(image.norm()), 1e-6 * max(map(abs, alphas))
        betas.append(beta if beta > zero else 0.0)
        if beta <= zero:
            if abs(alphas[-1]) <= zero:
                break
            # An invariant space, in which a repeated eigenvalue was found only once: continue outside of it.
            image = beside(basis[: step + 1], torch.randn(size, generator=generator).to(like))
        vector = image / image.norm()
    count = len(alphas)
    values, turn = torch.linalg.eigh(tridiagonal(alphas, betas))
    largest = float(values.abs().max())
    if largest <= 0:
        raise InfluenceError("the curvature is zero along every direction tried", "is the model trained at all?")
    # ‖Hv − Λv‖ = β_m |last entry| of a Ritz pair (Parlett 1980, theorem 13.2).
    residuals = betas[-1] * turn[-1].abs() / largest
    order = values.abs().argsort(descending=True)[:kept]
    order = order[residuals[order] <= RESIDUAL]
    if not len(order):
        order = values.abs().argsort(descending=True)[:1]
    order = order[values[order].argsort(descending=True)]
    vectors = basis[:count].T @ turn[:, order].to(like)
    # The trace is known in the Krylov space; the probes estimate the rest (Meyer et al. 2021).
    trace, probes = sum(alphas), min(PROBES, max(1, size))
    for _ in range(probes):
        probe = beside(basis[:count], torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1).to(like))[None]
        trace += float((product(probe).double() * probe.double()).sum()) / probes
        on_product(1)
    return Ritz(values[order], vectors, float(values[0]), trace, float(residuals[order].max()), count + probes)
