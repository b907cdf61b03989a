"""Conjugate gradients for A x = v, A = H + (l2 + λ)I: a plain function of a product with A, returning (x, info).

Use it if a product over all data is affordable: it is exact, and its residual certifies that. All right-hand sides are
solved in one block, so that each profits from the directions of the others (O'Leary 1980). Any symmetric positive
definite preconditioner may be given: it changes the number of products, not the answer. solvers/lissa.py has series of
mini-batches, solvers/nystrom.py a preconditioner from random products, solvers/lanczos.py the ends of a spectrum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError

Product = Callable[[Tensor], Tensor]

# A direction whose part outside the others is smaller than the root of this is left out of a block.
DEPENDENT = 1e-12


@dataclass(frozen=True)
class SolveInfo:
    """What a solver did.

    Attributes:
        method: ``cg``, ``nystrom``, ``lissa`` or ``neumann``.
        iterations: products of a block of vectors with the whole matrix (cg, nystrom), steps (lissa, neumann).
        products: vectors multiplied with the matrix: the whole one (cg, nystrom) or that of a mini-batch.
        residual: the largest ‖v − A x‖ / ‖v‖ of all right-hand sides, measured with the whole matrix; where no product
            was left for that, and after a fixed number of products, that of the recurrence.
        tolerance: the requested residual; None where a number of products was asked for instead.
        converged: residual ≤ tolerance; None without a tolerance.
        preconditioner: ``ggn-rows``, ``ekfac``, ``nystrom``, or empty for none.
        scale: σ of a series; None for cg and nystrom.
        damping: λ of A = H + (l2 + λ)I; None if the caller gave only a product, or if it differs between layers.
        examples: training examples that the curvature is the mean of; None if the caller gave only a product.
    """

    method: str
    iterations: int
    products: int
    residual: float
    tolerance: float | None
    converged: bool | None
    preconditioner: str = ""
    scale: float | None = None
    damping: float | None = None
    examples: int | None = None


def conjugate_gradients(
    product: Product,
    v: Tensor,
    *,
    precondition: Product | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    on_iteration: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Solve A x = v for symmetric positive definite A by block conjugate gradients that cannot break down.

    With R the residuals, Z = M⁻¹R and P an orthonormal basis of the directions (Ji & Li 2017, algorithm 2):
    α = (PᵀAP)⁻¹PᵀR, X ← X + Pα, R ← R − APα, β = −(PᵀAP)⁻¹(AP)ᵀZ, P ← orth(Z + Pβ).
    A right-hand side that has converged, or whose direction depends on the others', adds no more directions but still
    uses theirs.

    Args:
        product: V [m, p] to V A [m, p].
        v: right-hand sides [m, p].
        precondition: R [m, p] to R M⁻¹, M symmetric positive definite and like A; None for M = I.
        tolerance: of the relative residual ‖v − A x‖ / ‖v‖.
        max_iterations: most products of a block, those that measure the residual included.
        on_iteration: called with (iterations, relative residual).

    Returns:
        x [m, p] in v's dtype, and what was done; the residual is measured at the end, not taken from the recurrence
        (except where ``max_iterations`` is 1).

    Raises:
        InfluenceError: a direction of negative curvature: A is not positive definite; a number that is not finite.
    """
    check_limits(tolerance, max_iterations)
    # The recurrence runs in float64: in float32 the residuals lose conjugacy long before 1e-6.
    b = v.to(_wide(v))
    norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    block = _Block(
        product, precondition or (lambda rows: rows), v.dtype, norms, tolerance, max_iterations, on_iteration
    )
    x, r = torch.zeros_like(b), b.clone()
    residual, last = _largest(r, norms), float("inf")
    # float32 products drift from the recurrence: continue from the true residual while that helps.
    while residual > tolerance and residual < 0.5 * last and block.left > (1 if block.iterations else 0):
        last = residual
        step, r = block.run(r)
        x = x + step
        if block.left:
            r = b - block.multiply(x)
        residual = _largest(r, norms)
    info = SolveInfo("cg", block.iterations, block.products, residual, tolerance, residual <= tolerance)
    return finite(x.to(v.dtype), "conjugate gradients"), info


def few_products(
    product: Product,
    v: Tensor,
    count: int,
    *,
    precondition: Product,
    on_iteration: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Take a few steps of preconditioned conjugate gradients for A x = v from x = 0, each right-hand side by itself.

    z = M⁻¹r, α = rᵀz / pᵀAp, x ← x + αp, r ← r − αAp, β = r₊ᵀz₊ / rᵀz, p ← z₊ + βp (Hestenes & Stiefel 1952).
    A block would share its directions: after a few products its x would depend on which right-hand sides are solved
    together. Here the products are shared, the directions are not.

    Args:
        product: V [m, p] to V A [m, p].
        v: right-hand sides [m, p].
        count: products, at least 1.
        precondition: R [m, p] to R M⁻¹, M symmetric positive definite and like A.
        on_iteration: called with (products, relative residual).

    Returns:
        x [m, p] in v's dtype, and what was done; the residual is the recurrence's, which a few products do not spoil.

    Raises:
        InfluenceError: a direction of negative curvature: A is not positive definite; a number that is not finite.
    """
    r = v.to(_wide(v))
    norms = r.norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny)
    x, z = torch.zeros_like(r), precondition(v).to(r.dtype)
    p, slope = z, (r * z).sum(dim=1)
    for taken in range(1, count + 1):
        image = product(p.to(v.dtype)).to(r.dtype)
        bend = finite((p * image).sum(dim=1), "conjugate gradients")
        moving = slope > 0
        if bool((bend[moving] <= 0).any()):
            refuse_indefinite(
                float((bend / p.square().sum(dim=1))[moving].min()), "conjugate gradients met a direction"
            )
        step = torch.where(moving, slope / torch.where(moving, bend, 1.0), 0.0)[:, None]
        x, r = x + step * p, r - step * image
        if on_iteration is not None:
            on_iteration(taken, _largest(r, norms))
        if taken < count:
            z, last = precondition(r.to(v.dtype)).to(r.dtype), slope
            slope = (r * z).sum(dim=1)
            p = z + torch.where(moving, slope / torch.where(moving, last, 1.0), 0.0)[:, None] * p
    info = SolveInfo("cg", count, count * len(v), _largest(r, norms), None, None)
    return finite(x.to(v.dtype), "conjugate gradients"), info


class _Block:
    """The recurrence, and what it has taken so far."""

    def __init__(
        self,
        product: Product,
        precondition: Product,
        dtype: torch.dtype,
        norms: Tensor,
        tolerance: float,
        most: int,
        tell: Callable[[int, float], None] | None,
    ) -> None:
        self._product, self._precondition, self._dtype = product, precondition, dtype
        self._norms, self._tolerance, self._most, self._tell = norms, tolerance, most, tell
        self.iterations = self.products = 0

    @property
    def left(self) -> int:
        """Count the products that are still allowed."""
        return self._most - self.iterations

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply a block with the matrix, and count it."""
        self.iterations += 1
        self.products += len(rows)
        return self._product(rows.to(self._dtype)).to(rows.dtype)

    def run(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for some residuals [m, p] until the recurrence says that all are within the tolerance.

        One product is left for measuring the residual, if there is more than one.

        Returns:
            x [m, p], and what the recurrence says is left.
        """
        x, r, active = torch.zeros_like(residuals), residuals, self._active(residuals)
        p = orthonormal(self._preconditioned(r[active]))
        kept_back = min(1, self.left - 1)
        while self.left > kept_back and len(p):
            image = self.multiply(p)
            bend = finite(p @ image.T, "conjugate gradients")
            bend = (bend + bend.T) / 2
            require_positive(bend, "conjugate gradients met a direction")
            step = torch.linalg.solve(bend, p @ r.T).T
            x = x + step @ p
            r = r - step @ image
            if self._tell is not None:
                self._tell(self.iterations, _largest(r, self._norms))
            active = self._active(r)
            if not bool(active.any()):
                break
            z = self._preconditioned(r[active])
            p = orthonormal(z - torch.linalg.solve(bend, image @ z.T).T @ p)
        return x, r

    def _active(self, r: Tensor) -> Tensor:
        unsolved: Tensor = r.norm(dim=1) > self._tolerance * self._norms
        return unsolved

    def _preconditioned(self, r: Tensor) -> Tensor:
        z: Tensor = self._precondition(r.to(self._dtype))
        return z.to(r.dtype)


def orthonormal(rows: Tensor) -> Tensor:
    """Give an orthonormal basis of the span of rows [m, p]: [at most m, p]; dependent rows are left out."""
    sizes = rows.norm(dim=1, keepdim=True)
    rows = (rows / sizes.clamp_min(torch.finfo(rows.dtype).tiny))[sizes[:, 0] > 0]
    if not len(rows):
        return rows
    # Twice: the first pass squares the condition number, which spoils the smaller directions.
    for _ in range(2):
        values, turn = torch.linalg.eigh(rows @ rows.T)
        used = values > DEPENDENT * float(values[-1])
        rows = (turn[:, used] / values[used].sqrt()).T @ rows
    return rows


def require_positive(bend: Tensor, where: str) -> None:
    """Refuse a matrix A if PᵀAP [d, d], with P orthonormal, has an eigenvalue ≤ 0: then A has one as well.

    Raises:
        InfluenceError: naming that eigenvalue, an upper bound of A's smallest.
    """
    worst = float(torch.linalg.eigvalsh(bend)[0])
    if worst <= 0:
        refuse_indefinite(worst, where)


def refuse_indefinite(worst: float, where: str) -> None:
    """Say that A = H + (l2 + λ)I is not positive definite, and what to do.

    Raises:
        InfluenceError: always.
    """
    raise InfluenceError(
        f"{where} of curvature {worst:.3g}: H + λI is not positive definite",
        f"use curvature.matrix: ggn, or raise curvature.damping by more than {max(-worst, 0.0):.3g}",
    )


def check_limits(tolerance: float, max_iterations: int) -> None:
    """Refuse limits that cannot solve anything.

    Raises:
        InfluenceError: a tolerance outside (0, 1), or no iteration.
    """
    if not 0 < tolerance < 1:
        raise InfluenceError(f"a tolerance of {tolerance:g}: expected a relative residual between 0 and 1")
    if max_iterations < 1:
        raise InfluenceError(f"a limit of {max_iterations} iterations cannot solve anything", "allow at least 1")


def finite(x: Tensor, name: str) -> Tensor:
    """Return a tensor that is finite.

    Raises:
        InfluenceError: some number is not.
    """
    if not bool(x.isfinite().all()):
        raise InfluenceError(
            f"{name} gave a number that is not finite", "use a larger damping, or curvature.method: explicit"
        )
    return x


def _largest(r: Tensor, norms: Tensor) -> float:
    return float((r.norm(dim=1) / norms).max()) if len(r) else 0.0


def _wide(v: Tensor) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if v.device.type == "mps" else torch.float64
