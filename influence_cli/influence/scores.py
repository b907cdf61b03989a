"""From coordinates to influence: the only place with a sign.

``influence[t, i]`` = (1/n) · s_testᵀ gᵢ, s_test = (H + (l2 + λ)I)⁻¹ ∇L(z_t): the estimated rise of the loss of test
example t if training example i is removed, in the loss's units (nats for cross-entropy). It is −1/n times the
I_up,loss of Koh & Liang (ICML 2017, equation 2). Above zero, removing hurts, so the example is helpful.
``perturbation`` is the same for a training image that is changed, not removed: again the estimated rise of the loss.

In a basis with spectrum Λ the same is (1/n) Σⱼ c_tj c_ij / (Λⱼ + l2 + λ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError

Array = TypeVar("Array", Tensor, np.ndarray)


def preconditioned(coordinates: Tensor, spectrum: Tensor, shift: float | Tensor) -> Tensor:
    """Apply the inverse curvature: s = c / (Λ + shift), the coordinates of s_test.

    Args:
        coordinates: [m, k].
        spectrum: Λ [k].
        shift: l2 + λ, of all coordinates or of each [k].

    Returns:
        [m, k], in the coordinates' dtype.
    """
    inverse = 1.0 / (spectrum.double() + shift)
    return coordinates * inverse.to(coordinates)


def removal(product: Array, n: int) -> Array:
    """Turn s_testᵀgᵢ into influence: the estimated rise of the loss if example i is removed, + (1/n) s_testᵀgᵢ."""
    return product / n


def weight_removal(slopes: Array) -> Array:
    """Turn the derivative of a loss in an example's weight into influence: a removal takes a unit of weight from it."""
    return -slopes


def perturbation(product: Array, n: int) -> Array:
    """Turn s_testᵀ(∂g/∂x)δ into the estimated rise of the loss if x becomes x + δ: − (1/n) s_testᵀ(∂g/∂x)δ.

    It is 1/n times I_pert,loss of Koh & Liang (ICML 2017, section 2.2): the training objective gains
    (1/n)(L(x + δ) − L(x)), its minimum moves by −(1/n) H⁻¹(g(x + δ) − g(x)), and the loss follows. Where δ need not be
    small, that is the influence of x minus that of x + δ: one is removed, the other put in its place.
    """
    return -product / n


def influence(s_test: Tensor, rows: Tensor, n: int) -> Tensor:
    """Compute influence[t, i] = (1/n) · s_testᵀ gᵢ for all pairs at once.

    Args:
        s_test: [m, k], coordinates of s_test (or s_test itself with raw gradients).
        rows: [b, k], coordinates (or gradients) of training examples.
        n: number of training examples of the objective.

    Returns:
        [m, b]; > 0 helpful, < 0 harmful.
    """
    return removal(s_test, n) @ rows.T


def change_in_parameters(solved: Tensor) -> Tensor:
    """Compute ‖(H + (l2 + λ)I)⁻¹gᵢ‖ [b], n times how far the parameters move if example i is removed.

    Args:
        solved: (H + (l2 + λ)I)⁻¹gᵢ [b, k].
    """
    size: Tensor = torch.linalg.vector_norm(solved, dim=1)
    return size


def change_in_loss(solved: Tensor, rows: Tensor) -> Tensor:
    """Compute √(gᵢᵀ(H + (l2 + λ)I)⁻¹gᵢ) [b], n times how far the losses move (root mean square) if it is removed.

    Args:
        solved: (H + (l2 + λ)I)⁻¹gᵢ [b, k].
        rows: gᵢ [b, k].
    """
    return (solved * rows).sum(dim=1).clamp_min(0).sqrt()


def relative(values: np.ndarray, norms: np.ndarray, tests: np.ndarray | None, n: int) -> np.ndarray:
    """Normalise influence by what a training example changes: s_testᵀgᵢ / ‖·‖ᵢ, its sign that of the influence.

    With ``change_in_parameters`` it is the θ-relative influence of RelatIF (Barshan et al., AISTATS 2020), the rise of
    the loss per unit that removing the example moves the parameters; with ``change_in_loss`` the ℓ-relative one; with
    that of the test example as well, the cosine of the two gradients in the metric of the inverse curvature.

    Args:
        values: influence [m, b].
        norms: norms of the training examples [b].
        tests: norms of the test examples [m]; None for 1.
        n: number of training examples of the objective, which influence was divided by.

    Returns:
        [m, b]; 0 where a norm is 0: such an example changes nothing.
    """
    scale = norms[None] * (np.ones((len(values), 1)) if tests is None else tests[:, None])
    return np.asarray(np.divide(values * n, scale, out=np.zeros(values.shape), where=scale != 0))


def effect(value: float) -> str:
    """Name the effect of an influence: ``helpful`` above zero, ``harmful`` below, ``neither`` at zero."""
    return "helpful" if value > 0 else "harmful" if value < 0 else "neither"


def harmful_part(values: np.ndarray) -> np.ndarray:
    """Give the harmful part of influence: values below zero, 0 for all others (and for NaN, which does not count)."""
    return np.where(values < 0, values, 0)


def most_harmful_first(values: np.ndarray) -> np.ndarray:
    """Order by influence, most harmful first, ties by position; NaN comes last."""
    return np.argsort(values, kind="stable")


@dataclass(frozen=True)
class Strongest:
    """The training examples of strongest effect on one test example, strongest first.

    Attributes:
        helpful: their positions, int64.
        helpful_values: influence, > 0, largest first (or by the score that ranks them).
        harmful: likewise.
        harmful_values: influence, < 0, smallest first.
        helpful_scores: the score that ranks them, largest first; None for influence itself.
        harmful_scores: likewise, smallest first.
    """

    helpful: np.ndarray
    helpful_values: np.ndarray
    harmful: np.ndarray
    harmful_values: np.ndarray
    helpful_scores: np.ndarray | None = None
    harmful_scores: np.ndarray | None = None

    def effects(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Give (positions, influence) of the helpful ones, then of the harmful ones."""
        return (self.helpful, self.helpful_values), (self.harmful, self.harmful_values)

    def of(self, effect: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Give positions, influence, and the score that ranks them if it is another one, for one effect."""
        if effect == "helpful":
            return self.helpful, self.helpful_values, self.helpful_scores
        return self.harmful, self.harmful_values, self.harmful_scores


class Running:
    """Keeps the strongest effects while influence arrives block by block: memory m·(count), never m·n.

    Ties go to the earlier position: a block must be strictly greater than what came before.
    """

    def __init__(self, tests: int, count: int | None) -> None:
        self._count = count
        # Positions, the score that ranks them, and influence if that differs (otherwise the same array again).
        self._best: list[list[tuple[np.ndarray, ...]]] = [
            [(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32)) for _ in range(tests)]
            for _ in range(2)
        ]
        self._floor = np.zeros((2, tests))
        self._ranked = False

    def add(self, positions: np.ndarray, values: np.ndarray, scores: np.ndarray | None = None) -> None:
        """Take influence [m, b] of training examples at ``positions`` [b], rising from call to call.

        Args:
            positions: of the examples.
            values: influence.
            scores: what to rank by, [m, b], of the same signs; None for influence itself.
        """
        self._ranked = scores is not None
        ranked = values if scores is None else scores
        for side, signed in enumerate((ranked, -ranked)):
            above = signed > self._floor[side].astype(signed.dtype)[:, None]
            for test in np.flatnonzero(above.any(axis=1)):
                inside = np.flatnonzero(above[test])
                self._merge(side, int(test), positions[inside], signed[test, inside], values[test, inside])

    def _merge(self, side: int, test: int, *new: np.ndarray) -> None:
        known = tuple(map(np.concatenate, zip(self._best[side][test], new, strict=True)))
        count = self._count
        if count is not None and len(known[0]) >= count:
            order = _falling(*known[:2])[:count]
            known = tuple(part[order] for part in known)
            self._floor[side, test] = known[1][-1] if count else np.inf
        self._best[side][test] = known

    def results(self) -> list[Strongest]:
        """Give the strongest effects on each test example."""
        results = []
        for sides in zip(*self._best, strict=True):
            parts, ranked = [], []
            for sign, (where, scores, values) in zip((1, -1), sides, strict=True):
                order = _falling(where, scores)
                parts += [where[order], values[order]]
                ranked.append(sign * scores[order] if self._ranked else None)
            results.append(Strongest(*parts, *ranked))
        return results


def strongest(values: np.ndarray, count: int | None) -> Strongest:
    """Order examples by effect; ties by position.

    Args:
        values: influence [n]; NaN for examples that take no part.
        count: how many per effect, or None for all.
    """
    running = Running(1, count)
    running.add(np.arange(len(values)), values[None])
    return running.results()[0]


def merged(parts: Sequence[Sequence[Strongest]], count: int | None) -> list[Strongest]:
    """Merge the strongest effects on the same test examples of several parts of the training examples.

    Args:
        parts: of each part in order of the positions, one per test example.
        count: how many per effect, or None for all.
    """
    results = []
    for on_test in zip(*parts, strict=True):
        running = Running(1, count)
        for part in on_test:
            positions = np.concatenate([part.helpful, part.harmful])
            order = np.argsort(positions)
            values = np.concatenate([part.helpful_values, part.harmful_values])[order]
            scores = None
            if part.helpful_scores is not None and part.harmful_scores is not None:
                scores = np.concatenate([part.helpful_scores, part.harmful_scores])[None, order]
            running.add(positions[order], values[None], scores)
        results.append(running.results()[0])
    return results


def require_finite(values: Tensor | np.ndarray, what: str, title: Callable[..., str]) -> None:
    """Refuse numbers that are not finite.

    Args:
        values: scores.
        what: what they are, such as ``influence``.
        title: names the example of a score, by the score's place in ``values``.

    Raises:
        InfluenceError: some number is NaN or infinite.
    """
    finite = torch.as_tensor(values).isfinite()
    if not bool(finite.all()):
        place = torch.nonzero(~finite)[0].tolist()
        raise InfluenceError(
            f"the {what} of {title(*place)} is NaN or infinite",
            "use a larger curvature.damping, or check that image; list it under exclude to continue without it",
        )


def _falling(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    # Sort keys: value descending, then position ascending; the scores are never edited.
    return np.lexsort((positions, -values))
