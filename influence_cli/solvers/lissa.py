"""LiSSA and the preconditioned Neumann iteration for A x = v, A = H + (l2 + λ)I, from products with mini-batches of A.

Use it if a product over all data at each step is too expensive. LiSSA (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017,
section 3) needs steps in proportion to A's condition number, the preconditioned iteration (as in Wang et al. 2025,
"ASTRA") to that of M⁻¹A. Both are certified by their residual with the whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.solvers.cg import Product, SolveInfo, check_limits, finite, refuse_indefinite
from influence_cli.solvers.lanczos import lanczos, power_iteration

# σ relative to the largest eigenvalue, which power iteration finds from below.
MARGIN = 1.2
# How often σ is doubled before a series that does not converge is given up.
DOUBLINGS = 12
# Steps between two checks that a series is still finite.
LOOK = 50


@dataclass(frozen=True)
class Series:
    """How the series runs; both numbers are doubled if it does not converge.

    Attributes:
        scale: σ, at least half the largest eigenvalue of any M⁻¹A_B; None for 1.2 × what power iteration on
            mini-batches finds.
        steps: per round.
    """

    scale: float | None = None
    steps: int = 200


def lissa(
    batch_product: Product,
    product: Product,
    v: Tensor,
    *,
    precondition: Product | None = None,
    series: Series = Series(),
    tolerance: float = 1e-3,
    max_iterations: int = 40_000,
    on_round: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Solve A x = v by the series y ← M⁻¹r/σ + (I − M⁻¹A_B/σ) y on mini-batches B; M = I is LiSSA.

    One run of the series from mini-batches never converges: it keeps the noise of A_B. So each round runs
    ``series.steps`` steps on what is left over, r = v − A x with the *whole* matrix, averages the second half of the
    iterates, and adds the result to x (iterative refinement). The noise shrinks with r, and r is a certificate: along
    a direction of negative curvature it grows.

    Args:
        batch_product: V [m, p] to V A_B [m, p] on the next mini-batch, unbiased: E[A_B] = A.
        product: the same with the whole matrix.
        v: right-hand sides [m, p].
        precondition: R [m, p] to R M⁻¹, M symmetric positive definite; None for M = I.
        series: its scale σ and its steps per round.
        tolerance: of the relative residual.
        max_iterations: most steps.
        on_round: called with (steps so far, relative residual).

    Returns:
        x [m, p], and what was done; x is the best of all rounds.

    Raises:
        InfluenceError: A is not positive definite; no σ makes the series converge; a number that is not finite.
    """
    check_limits(tolerance, max_iterations)
    m_inverse = precondition or (lambda rows: rows)
    name = "LiSSA" if precondition is None else "the Neumann iteration"
    scale, steps = series.scale, series.steps
    if scale is None:
        scale = MARGIN * power_iteration(lambda u: m_inverse(batch_product(u)), v.shape[1], like=v)
    finite(torch.tensor(scale), "power iteration")
    norms = v.norm(dim=1).clamp_min(1e-30)
    x, r = torch.zeros_like(v), v
    residual = float((v.norm(dim=1) / norms).max())
    taken = doublings = 0
    positive = False
    while residual > tolerance and taken < max_iterations:
        count = min(steps, max_iterations - taken)
        y = _round(batch_product, m_inverse, r, scale, count)
        taken += count
        candidate = x + y
        left = v - product(candidate)
        now = float((left.norm(dim=1) / norms).max())
        if math.isfinite(now) and now < residual:
            x, r, residual = candidate, left, now
        else:
            # σ is too small, or noise needs more steps at a larger σ, or some direction never converges.
            positive = positive or _require_definite(product, v, name)
            doublings += 1
            if doublings > DOUBLINGS:
                raise InfluenceError(
                    f"{name} does not converge at any scale up to {scale:.3g}: H + λI is singular to rounding, "
                    "or not finite",
                    "use a larger curvature.damping, or curvature.method: cg",
                )
            scale, steps = 2 * scale, 2 * steps
        if on_round is not None:
            on_round(taken, residual)
    converged = residual <= tolerance
    if not converged and not positive:
        _require_definite(product, v, name)
    method = "lissa" if precondition is None else "neumann"
    return finite(x, name), SolveInfo(method, taken, taken * len(v), residual, tolerance, converged, scale=scale)


def _round(batch_product: Product, m_inverse: Product, r: Tensor, scale: float, steps: int) -> Tensor:
    """Run the series on r and average the second half of its iterates."""
    first = m_inverse(r) / scale
    y, mean = first, torch.zeros_like(r)
    for step in range(steps):
        y = first + y - m_inverse(batch_product(y)) / scale
        if step >= steps // 2:
            mean += y / (steps - steps // 2)
        if step % LOOK == LOOK - 1 and not bool(y.isfinite().all()):
            break
    return mean


def _require_definite(product: Product, v: Tensor, name: str) -> bool:
    """Measure the smallest eigenvalue if a series does not converge: an eigenvalue ≤ 0 explains it.

    Raises:
        InfluenceError: there is one.
    """
    smallest = lanczos(product, v.shape[1], like=v, iterations=60).smallest
    if smallest <= 0 or not math.isfinite(smallest):
        refuse_indefinite(smallest, f"{name} does not converge: there is a direction")
    return True
