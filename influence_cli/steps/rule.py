"""One step of an optimiser, what a change before it becomes after it, and the transposed of that.

SGD and Adam are elementwise but for clipping, so each coordinate has a small Jacobian of its own. With G the gradient
of the batch's mean loss, t the number of steps before this one, and g = clip(G) + decay·θ (AdamW: clip(G)):

    SGD     m' = μ m + g                                            θ' = θ − η (m', or g + μ m' with Nesterov)
    Adam    m' = β₁ m + (1 − β₁) g,  v' = β₂ v + (1 − β₂) g²        θ' = θ − η m̂ / (√(v̂ + ε_root) + ε)
            m̂ = m'/(1 − β₁^(t+1)),  v̂ = v'/(1 − β₂^(t+1))           AdamW: θ' = (1 − η decay) θ − …

as ``torch.optim`` has them; ε_root, which torch does not have, gives √v̂ a derivative at 0. ``clip_grad_norm_`` divides
by ‖G‖ + 1e-6 where that is above the largest norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What clip_grad_norm_ adds to the norm.
CLIP_EPS = 1e-6
# The least share of the rate by which a number must move for its derivative to count.
MOVES = 1e-3

Slots = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """One step of an optimiser.

    Attributes:
        kind: the optimiser.
        rate: η: a number, or one per parameter [p].
        number: t, the steps before this one.
        momentum: μ of SGD, β₁ of Adam.
        second: β₂ of Adam.
        nesterov: SGD looks ahead.
        eps: ε of Adam.
        eps_root: ε_root of Adam, under the root.
        decay: of the weights: a number, or one per parameter [p].
        clip: the largest norm of a batch's gradient; None for any.
    """

    kind: Literal["sgd", "adam", "adamw"]
    rate: float | Tensor
    number: int
    momentum: float = 0.0
    second: float = 0.999
    nesterov: bool = False
    eps: float = 1e-8
    eps_root: float = 0.0
    decay: float | Tensor = 0.0
    clip: float | None = None

    @property
    def slots(self) -> int:
        """Count the vectors that the optimiser keeps beside the parameters."""
        if self.kind != "sgd":
            return 2
        return 1 if self.momentum else 0

    def step(self, parameters: Tensor, slots: Slots, gradient: Tensor) -> tuple[Tensor, Slots]:
        """Take the step: parameters [p] and slots [p] after it, from the gradient [p] of the batch's mean loss."""
        g = self._decayed(parameters, gradient * self._scale(gradient))
        if self.kind == "sgd":
            if not self.momentum:
                return parameters - self.rate * g, ()
            m = self.momentum * slots[0] + g
            return parameters - self.rate * (g + self.momentum * m if self.nesterov else m), (m,)
        m = self.momentum * slots[0] + (1 - self.momentum) * g
        v = self.second * slots[1] + (1 - self.second) * g.square()
        return self._shrink() * parameters - self.rate * (m / self._first_share) / (self._root(v) + self.eps), (m, v)

    def push(
        self, parameters: Tensor, slots: Slots, gradient: Tensor, tangents: tuple[Tensor, Slots, Tensor]
    ) -> tuple[Tensor, Slots]:
        """Give the change after the step for a change before it.

        Args:
            parameters: θ [p].
            slots: [p] each.
            gradient: G [p].
            tangents: the changes of the three, [K, p] each.
        """
        moved, moved_slots, moved_gradient = tangents
        g_ = self._clip_derivative(gradient, moved_gradient)
        if self.kind != "adamw":
            g_ = g_ + self.decay * moved
        if self.kind == "sgd":
            if not self.momentum:
                return moved - self.rate * g_, ()
            m_ = self.momentum * moved_slots[0] + g_
            return moved - self.rate * (g_ + self.momentum * m_ if self.nesterov else m_), (m_,)
        g = self._decayed(parameters, gradient * self._scale(gradient))
        by_first, by_second = self._adam_slopes(slots, g)
        m_ = self.momentum * moved_slots[0] + (1 - self.momentum) * g_
        v_ = self.second * moved_slots[1] + 2 * (1 - self.second) * g * g_
        return self._shrink() * moved + by_first * m_ + by_second * v_, (m_, v_)

    def pull(
        self, parameters: Tensor, slots: Slots, gradient: Tensor, cotangents: tuple[Tensor, Slots]
    ) -> tuple[Tensor, Slots, Tensor]:
        """Give the derivative before the step for the derivative after it: the transposed of ``push``.

        Args:
            parameters: θ [p].
            slots: [p] each.
            gradient: G [p].
            cotangents: of parameters and slots after the step, [K, p] each.

        Returns:
            Those of parameters and slots before it, the first without the way through the gradient, and of the
            gradient: [K, p] each.
        """
        after, after_slots = cotangents
        g = self._decayed(parameters, gradient * self._scale(gradient))
        before: Slots
        if self.kind == "sgd" and not self.momentum:
            g_, before, parameters_ = -self.rate * after, (), after
        elif self.kind == "sgd":
            m_ = after_slots[0] - self.rate * (self.momentum if self.nesterov else 1.0) * after
            g_ = m_ - self.rate * after if self.nesterov else m_
            before, parameters_ = (self.momentum * m_,), after
        else:
            by_first, by_second = self._adam_slopes(slots, g)
            m_, v_ = after_slots[0] + by_first * after, after_slots[1] + by_second * after
            g_ = (1 - self.momentum) * m_ + 2 * (1 - self.second) * g * v_
            before, parameters_ = (self.momentum * m_, self.second * v_), self._shrink() * after
        if self.kind != "adamw":
            parameters_ = parameters_ + self.decay * g_
        return parameters_, before, self._clip_derivative(gradient, g_)

    def without_derivative(self, after: Slots) -> Tensor:
        """Say which numbers Adam moves although their derivative is lost in the precision: bool [p].

        A number moves where |m̂| / (√(v̂ + ε_root) + ε) is not small. ∂θ'/∂v' divides by √(v̂ + ε_root) times the square
        of that sum; where this is below the least normal number, or v' itself is 0, it has no digits or is infinite.

        Args:
            after: the slots after the step, [p] each.
        """
        if self.kind == "sgd":
            return torch.zeros_like(after[0] if after else torch.zeros(1), dtype=torch.bool)
        m, v = after
        root = self._root(v)
        divisor = root + self.eps
        moves = (m / self._first_share).abs() > MOVES * divisor
        return moves & (root * divisor.square() < torch.finfo(m.dtype).tiny)

    def _adam_slopes(self, slots: Slots, g: Tensor) -> tuple[Tensor, Tensor]:
        """Give ∂θ'/∂m' and ∂θ'/∂v' of each coordinate [p]."""
        m = self.momentum * slots[0] + (1 - self.momentum) * g
        v = self.second * slots[1] + (1 - self.second) * g.square()
        root = self._root(v)
        divisor = root + self.eps
        by_first = -self.rate / (self._first_share * divisor)
        # Without ε_root a coordinate that has never had a gradient has no derivative in v: m' is 0 there as well.
        slope = torch.where(root > 0, m / (2 * self._second_share * root * divisor.square()), torch.zeros_like(m))
        return by_first, self.rate * slope / self._first_share

    @property
    def _first_share(self) -> float:
        return 1.0 - self.momentum ** (self.number + 1)

    @property
    def _second_share(self) -> float:
        return 1.0 - self.second ** (self.number + 1)

    def _root(self, v: Tensor) -> Tensor:
        return (v / self._second_share + self.eps_root).sqrt()

    def _shrink(self) -> float | Tensor:
        return 1.0 - self.rate * self.decay if self.kind == "adamw" else 1.0

    def _decayed(self, parameters: Tensor, g: Tensor) -> Tensor:
        if self.kind == "adamw" or (isinstance(self.decay, float) and self.decay == 0):
            return g
        return g + self.decay * parameters

    def _scale(self, gradient: Tensor) -> Tensor | float:
        if self.clip is None:
            return 1.0
        return torch.clamp(self.clip / (gradient.norm() + CLIP_EPS), max=1.0)

    def _clip_derivative(self, gradient: Tensor, vectors: Tensor) -> Tensor:
        """Multiply vectors [K, p] by the derivative of the clipped gradient, which is symmetric."""
        if self.clip is None:
            return vectors
        norm = gradient.norm()
        scale = self.clip / (norm + CLIP_EPS)
        if scale >= 1:
            return vectors
        # clip(G) = c G/(‖G‖ + 1e-6)
        along = (vectors @ gradient)[..., None] / (norm * (norm + CLIP_EPS))
        clipped: Tensor = scale * (vectors - along * gradient)
        return clipped
