"""Linear solvers for (H + λI) x = v: plain functions of a product with the matrix, each returning (x, info).

Conjugate gradients (Hestenes & Stiefel 1952) when a product over all data is affordable: exact, certified by its
residual. LiSSA (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017, section 3) when only mini-batches are. Both take
several right sides at once; ``lanczos`` measures the ends of a spectrum and ``power_iteration`` its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolveInfo:
    """What a solver did.

    Attributes:
        method: ``cg`` or ``lissa``.
        iterations: products with the whole matrix (cg), steps (lissa).
        residual: the largest ‖v − A x‖ / ‖v‖ of all right sides, measured with the whole matrix.
        tolerance: what was asked.
        converged: residual ≤ tolerance.
        scale: LiSSA's divisor of A; None for cg.
    """

    method: str
    iterations: int
    residual: float
    tolerance: float
    converged: bool
    scale: float | None = None


def conjugate_gradients(
    product: Product,
    v: Tensor,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    on_iteration: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Solve A x = v for symmetric positive definite A; the right sides share each product.

    Args:
        product: V [m, p] to V A [m, p].
        v: right sides [m, p].
        tolerance: of the relative residual ‖v − A x‖ / ‖v‖.
        max_iterations: products at most.
        on_iteration: called with (iterations, relative residual).

    Returns:
        x [m, p] in v's dtype, and what was done; the residual is measured anew at the end, not the recurrence's.

    Raises:
        InfluenceError: a direction of negative curvature: A is not positive definite.
    """
    # The recurrence runs in float64: in float32 the residuals lose conjugacy long before 1e-6.
    b = v.double()
    norms = b.norm(dim=1).clamp_min(1e-300)
    x, r = torch.zeros_like(b), b.clone()
    d, rr = r.clone(), (b * b).sum(dim=1)
    iterations = 0
    # With float32 products the true residual stays above the recurrence's: aim at a tenth of what is asked.
    aim = 0.1 * tolerance * norms
    while iterations < max_iterations and bool((rr.sqrt() > aim).any()):
        active = rr.sqrt() > 0.1 * aim
        image = product(d.to(v.dtype)).double()
        iterations += 1
        bend = (d * image).sum(dim=1)
        if bool((bend[active] <= 0).any()):
            worst = float((bend / (d * d).sum(dim=1))[active].min())
            raise InfluenceError(
                f"conjugate gradients met a direction of curvature {worst:.3g}: H + λI is not positive definite",
                f"use curvature.matrix: ggn, or a damping above {-worst:.3g}",
            )
        step = torch.where(active, rr / bend, torch.zeros_like(rr))
        x += step[:, None] * d
        r -= step[:, None] * image
        # float32 products drift from the recurrence: take the true residual now and then.
        if iterations % 50 == 0:
            r = b - product(x.to(v.dtype)).double()
        fresh = (r * r).sum(dim=1)
        d = r + torch.where(active, fresh / rr.clamp_min(1e-300), torch.zeros_like(rr))[:, None] * d
        rr = fresh
        if on_iteration is not None:
            on_iteration(iterations, float((rr.sqrt() / norms).max()))
    residual = float(((b - product(x.to(v.dtype)).double()).norm(dim=1) / norms).max())
    solution = _finite(x.to(v.dtype), "conjugate gradients")
    return solution, SolveInfo("cg", iterations, residual, tolerance, residual <= tolerance)


def lissa(
    batch_product: Product,
    product: Product,
    v: Tensor,
    *,
    scale: float,
    steps: int = 200,
    tolerance: float = 1e-3,
    max_rounds: int = 200,
    on_round: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Solve A x = v by the Neumann series x ← v + (I − A_B/σ) x on mini-batches B, divided by σ at the end.

    One run of the series from mini-batches never settles: its noise is that of A_B. So each round runs ``steps``
    steps on what is left over, r = v − A x with the *whole* matrix, averages the second half of the iterates, and
    adds the result to x (iterative refinement). The noise shrinks with r, and r is a certificate.

    Args:
        batch_product: V [m, p] to V A_B [m, p] on the next mini-batch, unbiased: E[A_B] = A.
        product: the same with the whole matrix.
        v: right sides [m, p].
        scale: σ, at least the largest eigenvalue of any A_B; doubled where the series grows.
        steps: a round.
        tolerance: of the relative residual.
        max_rounds: rounds at most.
        on_round: called with (round, relative residual).

    Returns:
        x [m, p], and what was done.

    Raises:
        InfluenceError: it grows at any scale: A is not positive definite.
    """
    norms = v.norm(dim=1).clamp_min(1e-30)
    x, r = torch.zeros_like(v), v
    residual, taken, rounds, doublings = 1.0, 0, 0, 0
    while residual > tolerance and rounds < max_rounds:
        rounds += 1
        y, mean = r, torch.zeros_like(r)
        for step in range(steps):
            y = r + y - batch_product(y) / scale
            if step >= steps // 2:
                mean += y / (steps - steps // 2)
        taken += steps
        candidate = x + mean / scale
        left = v - product(candidate)
        now = float((left.norm(dim=1) / norms).max())
        if not math.isfinite(now) or now > 2 * residual:
            doublings += 1
            if doublings > 12:
                raise InfluenceError(
                    "LiSSA grows at any scale: H + λI is not positive definite",
                    "use curvature.matrix: ggn, or a larger damping",
                )
            scale *= 2
            continue
        x, r, residual = candidate, left, now
        if on_round is not None:
            on_round(rounds, residual)
    return _finite(x, "LiSSA"), SolveInfo("lissa", taken, residual, tolerance, residual <= tolerance, scale)


def power_iteration(product: Product, size: int, *, like: Tensor, iterations: int = 30, seed: int = 0) -> float:
    """Estimate the largest |eigenvalue| of a symmetric matrix, from below.

    Args:
        product: V [1, p] to V A [1, p].
        size: p.
        like: a tensor of the dtype and device to work in.
        iterations: products.
        seed: of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, size, generator=generator).to(like)
    value = 0.0
    for _ in range(iterations):
        vector = vector / vector.norm().clamp_min(1e-30)
        vector = product(vector)
        value = float(vector.norm())
    return value


def lanczos(
    product: Product, size: int, *, like: Tensor, iterations: int = 30, seed: int = 0
) -> tuple[float, float, float]:
    """Measure the ends of a symmetric matrix's spectrum and its mean (Lanczos 1950; Hutchinson 1990).

    The start is a random vector of ±1, so the first Rayleigh quotient is an unbiased estimate of the mean eigenvalue.
    Full reorthogonalisation in float64.

    Returns:
        (smallest, mean, largest) eigenvalue; the ends are estimates from inside the spectrum.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).to(like.device, torch.float64)
    basis = [start / start.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(iterations, size)):
        image = product(basis[-1][None].to(like.dtype))[0].double()
        alphas.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):
            image = image - known.T @ (known @ image)
        beta = float(image.norm())
        if beta <= 1e-10 * max(map(abs, alphas)):
            break
        betas.append(beta)
        basis.append(image / beta)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    for i, beta in enumerate(betas[: len(alphas) - 1]):
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = beta
    values = torch.linalg.eigvalsh(tridiagonal)
    return float(values[0]), alphas[0], float(values[-1])


def _finite(x: Tensor, name: str) -> Tensor:
    if not bool(x.isfinite().all()):
        raise InfluenceError(
            f"{name} gave a number that is not finite", "use a larger damping, or curvature.method: explicit"
        )
    return x
