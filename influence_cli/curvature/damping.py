"""The one rule for the damping λ, and the check that H + (l2 + λ)I has no pole."""

from __future__ import annotations

from dataclasses import dataclass

from influence_cli.errors import InfluenceError


@dataclass(frozen=True)
class Damping:
    """λ in absolute units, and why.

    Attributes:
        value: λ ≥ 0.
        reason: ``given``, or the line of the rule that gave it.
        advice: empty, or what to do instead.
    """

    value: float
    reason: str
    advice: str = ""


def choose_damping(
    given: float | str, *, convex: bool, l2: float, matrix: str, smallest: float, mean: float, largest: float
) -> Damping:
    """Apply the rule of ``auto``.

    Convex with l2 > 0: 0. Hessian with a negative eigenvalue: 2·|min Λ|. Else 1 × mean eigenvalue.

    Args:
        given: ``auto``, or λ.
        convex: whether the objective is convex in the tracked parameters.
        l2: λ₂.
        matrix: ``ggn`` or ``hessian``.
        smallest: min Λ.
        mean: mean of Λ.
        largest: max Λ.
    """
    if not isinstance(given, str):
        return Damping(float(given), "given")
    if convex and l2 > 0:
        return Damping(0.0, "auto: the objective is convex and l2 > 0")
    # Rounding leaves eigenvalues a hair below zero; they are zeros.
    if matrix == "hessian" and smallest < -1e-6 * abs(largest):
        return Damping(
            2 * abs(smallest),
            f"auto: 2 × |min Λ|, the Hessian's smallest eigenvalue being {smallest:.3g}",
            "the Hessian is not positive definite here: curvature.matrix: ggn has no such direction",
        )
    return Damping(max(mean, 0.0), "auto: 1 × mean eigenvalue")


def check_poles(smallest: float, shift: float) -> None:
    """Refuse a spectrum with Λⱼ + l2 + λ ≤ 0 anywhere: its inverse means nothing there.

    Args:
        smallest: min Λ of the coordinates in use.
        shift: l2 + λ.

    Raises:
        InfluenceError: naming −min Λ.
    """
    if smallest + shift <= 0:
        raise InfluenceError(
            f"the curvature is singular or indefinite: −min Λ = {-smallest:.3g}, l2 + λ = {shift:.3g} is not above it",
            f"set curvature.damping above {max(-smallest, 0.0):.3g}, or leave it at auto",
        )
