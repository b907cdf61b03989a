"""The minimum of an objective after a small change: a few training examples out of many.

The Hessian has changed by a matrix of small rank, so conjugate gradients preconditioned with the old inverse take a few
steps, while a new factor would take the cube of the number of parameters. The inverse is kept as a matrix, because
torch copies a factor each time it solves with it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.model.outputs import output_curvature
from influence_cli.retrain.newton import (
    ACCURACY,
    ROUNDING,
    SHARED_STEPS,
    Problem,
    gradients_at,
    line_search,
    typical_gradient,
    value_at,
)
from influence_cli.solvers.cg import conjugate_gradients

# Accuracy of a Newton step, whose own error is quadratic anyway, and of s_test; steps of Newton's method.
STEP_TOLERANCE, TOLERANCE, STEPS = 1e-3, 1e-8, 50


def follow(problem: Problem, w: Tensor, inverse: Tensor, accuracy: float = ACCURACY) -> Tensor:
    """Find the minimum of an objective after a small change.

    Args:
        problem: the objective now.
        w: its old minimum W [C, d].
        inverse: of the Hessian near there [C d, C d].
        accuracy: the share of its norm at w that the gradient may keep.

    Returns:
        W [C, d].

    Raises:
        InfluenceError: there is no minimum to be found.
    """
    typical = typical_gradient(problem, w)
    slope = gradients_at(problem, w[None])[0]
    norm = float(slope.norm())
    wanted = max(accuracy * norm, ROUNDING * typical)
    for _ in range(SHARED_STEPS):
        if norm <= wanted:
            return w
        tried = w - (slope.flatten() @ inverse).view_as(w)
        slope_there = gradients_at(problem, tried[None])[0]
        fresh = float(slope_there.norm())
        if fresh >= 0.5 * norm:
            break
        w, slope, norm = tried, slope_there, fresh
    value = value_at(problem, w, None)
    for _ in range(STEPS):
        if norm <= wanted:
            return w
        direction = solve_at(problem, w, inverse, slope[None], STEP_TOLERANCE)[0]
        tried, now = line_search(problem, w, slope, direction, value)
        slope = gradients_at(problem, tried[None])[0]
        fresh = float(slope.norm())
        # Near the minimum the value no longer shows progress, but the gradient does; if neither falls, it is rounding.
        if not (now < value or fresh < norm):
            break
        w, value, norm = tried, now, fresh
    if norm > max(wanted, 1e-6 * typical):
        raise InfluenceError(
            f"the top layer did not reach a minimum with the changed images: the gradient norm stays at {norm:.3g}",
            "use a larger l2",
        )
    return w


def solve_at(problem: Problem, w: Tensor, inverse: Tensor, v: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Multiply v [m, C, d] by the inverse of the Hessian at w, preconditioned with the inverse at a nearby point."""
    product = _hessian_product(problem, w)
    solution, _ = conjugate_gradients(
        product, v.flatten(1), precondition=lambda rows: rows @ inverse, tolerance=tolerance
    )
    return solution.view_as(v)


def _hessian_product(problem: Problem, w: Tensor) -> Callable[[Tensor], Tensor]:
    """Give V [m, C d] to V H, H = (1/n) Σ Sᵢ ⊗ aᵢaᵢᵀ + l2 I at w."""
    examples, (classes, width) = problem.examples, w.shape
    curvature = output_curvature(problem.loss, examples.a @ w.T + examples.fixed, examples.targets)

    def product(rows: Tensor) -> Tensor:
        change = (examples.a @ rows.reshape(-1, width).T).view(problem.n, len(rows), classes)
        curved = change @ curvature  # symmetric in the classes
        products = (curved.flatten(1).T @ examples.a).view(len(rows), -1)
        return products / problem.n + rows * (problem.l2.reshape(-1) if isinstance(problem.l2, Tensor) else problem.l2)

    return product
