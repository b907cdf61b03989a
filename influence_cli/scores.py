"""From coordinates to influence: the only place with a sign.

``influence[t, i]`` = (1/n) · s_testᵀ gᵢ, s_test = (H + (l2 + λ)I)⁻¹ ∇L(z_t): the estimated rise of the loss of test
example t if training example i is removed, in the loss's units (nats for cross-entropy). It is −1/n times the
I_up,loss of Koh & Liang (ICML 2017, equation 2). Above zero, removing hurts: the example is helpful.

In a basis with spectrum Λ the same is (1/n) Σⱼ c_tj c_ij / (Λⱼ + l2 + λ).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError


def preconditioned(coordinates: Tensor, spectrum: Tensor | None, shift: float) -> Tensor:
    """Apply the inverse curvature: s = c / (Λ + shift), the coordinates of s_test.

    Args:
        coordinates: [m, k].
        spectrum: Λ [k], or None for ``identity``: then s = c.
        shift: l2 + λ.

    Returns:
        [m, k], in the coordinates' dtype.
    """
    if spectrum is None:
        return coordinates
    inverse = 1.0 / (spectrum.double() + shift)
    return coordinates * inverse.to(coordinates)


def influence(s_test: Tensor, rows: Tensor, n: int) -> Tensor:
    """Compute influence[t, i] = (1/n) · s_testᵀ gᵢ for all pairs at once.

    Args:
        s_test: [m, k], coordinates of s_test (or s_test itself beside raw gradients).
        rows: [b, k], coordinates (or gradients) of training examples.
        n: number of training examples of the objective.

    Returns:
        [m, b]; > 0 helpful, < 0 harmful.
    """
    return (s_test / n) @ rows.T


def self_influence(rows: Tensor, spectrum: Tensor | None, shift: float, n: int) -> Tensor:
    """Compute self_influence[i] = (1/n) Σⱼ c_ij² / (Λⱼ + shift): the rise of its own loss if example i is removed.

    Args:
        rows: [b, k].
        spectrum: Λ [k], or None for ``identity``: then ‖gᵢ‖²/n.
        shift: l2 + λ.
        n: number of training examples of the objective.

    Returns:
        [b], ≥ 0.
    """
    return (preconditioned(rows, spectrum, shift) * rows).sum(dim=1) / n


def effect(value: float) -> str:
    """Name the effect of an influence: ``helpful`` above zero, ``harmful`` below, ``neither`` at zero."""
    return "helpful" if value > 0 else "harmful" if value < 0 else "neither"


def strongest(values: np.ndarray, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Order examples by effect; ties by position.

    Args:
        values: influence [n]; NaN for examples that take no part.
        count: how many an effect, or None for all.

    Returns:
        Positions of the most helpful (falling influence) and of the most harmful (rising).
    """
    known = np.flatnonzero(~np.isnan(values))
    helpful, harmful = known[values[known] > 0], known[values[known] < 0]
    return _largest(values, helpful, count), _largest(-values, harmful, count)


def effective_dimension(spectrum: Tensor, shift: float) -> float:
    """Compute d_eff = Σⱼ Λⱼ / (Λⱼ + shift), the number of directions that the data rather than the damping decide."""
    positive = spectrum.double().clamp_min(0)
    return float((positive / (positive + shift)).nan_to_num(0.0).sum())


def require_finite(values: Tensor | np.ndarray, what: str) -> None:
    """Refuse to pass on a number that is not finite.

    Raises:
        InfluenceError: some number is NaN or infinite.
    """
    tensor = torch.as_tensor(values)
    if not bool(tensor.isfinite().all()):
        raise InfluenceError(f"{what} has numbers that are not finite", "use a larger curvature.damping")


def _largest(values: np.ndarray, among: np.ndarray, count: int | None) -> np.ndarray:
    if count is not None and count < len(among):
        cut = np.partition(values[among], len(among) - count)[len(among) - count]
        among = among[values[among] >= cut]
    # Falling value, then rising position: sort keys, never edited scores.
    order = np.lexsort((among, -values[among]))
    return among[order[:count]]
