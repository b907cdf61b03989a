"""The one rule for the damping λ, and the check that H + (l2 + λ)I has no pole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from influence_cli.errors import InfluenceError

# λ = C × the mean eigenvalue of each layer. By the linear datamodeling scores of two networks
# (bench/results/lds.md) the best C is 1 for one of them and below 0.01 for the other; 0.1 loses the least on both.
C = 0.1
# For an exact matrix over all layers. Most of its eigenvalues are almost zero; if λ is as well, the loss is not linear
# enough: by the same scores 0.1 and 1 times the mean lose to EK-FAC or equal it, 10 times beats it.
C_EXACT = 10.0
# The training of `damping: training` counts as so many segments, as SOURCE's does (Bae et al. 2024).
SEGMENTS = 3.0


@dataclass(frozen=True)
class Damping:
    """λ in absolute units, and why.

    Attributes:
        values: λ ≥ 0 per group of coordinates: one for a joint basis, one per layer for a basis per layer.
        reason: ``given``, or the line of the rule that gave it.
        advice: empty, or what to do instead.
    """

    values: tuple[float, ...]
    reason: str
    advice: str = ""

    @property
    def value(self) -> float | None:
        """Give λ if it is one number for all coordinates, otherwise None."""
        return self.values[0] if len(set(self.values)) == 1 else None

    def times(self, multiple: float, l2: float) -> Damping:
        """Give multiple × λ; if λ is 0, multiple × l2 in addition to l2 itself."""
        base = self.values if any(self.values) else (l2,) * len(self.values)
        name = "λ" if any(self.values) else "l2"
        return Damping(tuple(multiple * value for value in base), f"{multiple:g} × {name}")

    def text(self) -> str:
        """Write λ in absolute units: one number, or the range over layers."""
        if self.value is not None:
            return f"{self.value:.6g}"
        return f"{min(self.values):.3g} to {max(self.values):.3g} by layer"


@dataclass(frozen=True)
class TrainingTime:
    """How far training went, which gives a λ without any tuning.

    Attributes:
        whole: η·K, the rate times the steps; over all parameters where layers differ.
        by_layer: η·K of each layer by name, where the optimiser gave each a rate of its own (Adam).
        source: where it is from.
    """

    whole: float
    by_layer: Mapping[str, float] = field(default_factory=dict)
    source: str = "η·K"

    def damping(self, groups: Sequence[str]) -> Damping:
        """Compute λ = 3/(η K) of each group of coordinates, by name."""
        times = [self.by_layer.get(name, self.whole) for name in groups]
        span = f"{min(times):.3g}" if min(times) == max(times) else f"{min(times):.3g} to {max(times):.3g} by layer"
        return Damping(tuple(map(training_damping, times)), f"training: 3/(η·K), {self.source} = {span}")


def adam_time(time: float, by_layer: Mapping[str, float], whole: float) -> TrainingTime:
    """Give η·K of each layer under Adam: lr·K divided by the layer's mean of √v̂ + ε.

    Args:
        time: lr·K.
        by_layer: the mean of √v̂ + ε by layer.
        whole: that over all parameters.
    """
    return TrainingTime(time / whole, {name: time / slow for name, slow in by_layer.items()}, "Adam's η·K")


def training_damping(time: float) -> float:
    """Compute λ = 3/(η K), time = η·K: 1/(η·steps) of one of SOURCE's three segments (ASTRA, Wang et al. 2025).

    η is the rate of plain gradient descent: under momentum β that of the optimiser divided by 1 − β. A direction of
    curvature Λ has been learned where Λ·η·K is large; below λ it has hardly moved, and removing an example changes it
    no further.

    Args:
        time: η·K > 0.
    """
    return SEGMENTS / time


def choose_damping(
    given: float | str | Damping,
    *,
    convex: bool,
    l2: float,
    matrix: str,
    smallest: float,
    means: Sequence[float],
    largest: float,
    layered: bool = True,
) -> Damping:
    """Apply the rule of ``auto``.

    Convex with l2 > 0: 0. Hessian with a negative eigenvalue: 2·|min Λ|. Else 0.1 × mean eigenvalue, layer by layer
    where the basis is; 10 × of a matrix over all layers at once, unless the objective is convex.

    Args:
        given: ``auto``, λ, or that of ``training``, beside which the reason names ``auto``.
        convex: whether the objective is convex in the tracked parameters.
        l2: λ₂.
        matrix: ``ggn``, ``empirical`` or ``hessian``.
        smallest: min Λ.
        means: mean of Λ of each group of coordinates.
        largest: max Λ.
        layered: whether the matrix is one approximation per layer.

    Raises:
        InfluenceError: λ is negative or not finite.
    """
    if isinstance(given, Damping):
        auto = choose_damping(
            "auto",
            convex=convex,
            l2=l2,
            matrix=matrix,
            smallest=smallest,
            means=means,
            largest=largest,
            layered=layered,
        )
        return replace(given, reason=f"{given.reason}; auto: {auto.text()}")
    if not isinstance(given, str):
        if not 0 <= given < np.inf:
            raise InfluenceError(f"a damping of {given:g}: expected auto or a number ≥ 0", "λ = 0 means no damping")
        return Damping((float(given),) * len(means), "given")
    if convex and l2 > 0:
        return Damping((0.0,) * len(means), "auto: the objective is convex and l2 > 0")
    # Rounding leaves eigenvalues slightly below zero; they count as zeros.
    if matrix == "hessian" and smallest < -1e-6 * abs(largest):
        return Damping(
            (2 * abs(smallest),) * len(means),
            f"auto: 2 × |min Λ|; the Hessian's smallest eigenvalue is {smallest:.3g}",
            "the Hessian is not positive definite here; curvature.matrix: ggn has no negative eigenvalue",
        )
    c = C if layered or convex else C_EXACT
    each = " of each layer" if len(means) > 1 else ""
    return Damping(tuple(c * max(mean, 0.0) for mean in means), f"auto: {c:g} × mean eigenvalue{each}")


def check_poles(smallest: float, shift: float | np.ndarray) -> None:
    """Refuse a spectrum with Λⱼ + l2 + λ ≤ 0 anywhere: its inverse is meaningless there.

    Args:
        smallest: min Λ of the coordinates in use.
        shift: l2 + λ; the smallest one of several groups.

    Raises:
        InfluenceError: naming −min Λ.
    """
    least = float(np.min(shift))
    if smallest + least <= 0:
        raise InfluenceError(
            f"the curvature is singular or indefinite: l2 + λ = {least:.3g} is not above −min Λ = {-smallest:.3g}",
            f"set curvature.damping above {max(-smallest, 0.0):.3g}, or leave it at auto"
            + (", or use curvature.matrix: ggn" if smallest < 0 else ""),
        )
