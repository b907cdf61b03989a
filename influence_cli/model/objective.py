"""The objective that the checkpoint minimises: (1/D) Σᵢ wᵢ ℓᵢ + ½ Σ_p l2_p θ_p², D what the trainer's mean divides by.

Everything else here divides sums over the training examples by n. The minimum of the objective is that of

    (1/n) Σᵢ wᵢ ℓᵢ + ½ Σ_p (D/n · l2_p) θ_p²,

so D enters by the factor D/n of l2 alone: the influence (1/D) s_testᵀgᵢ with H of the trainer's mean is then the same
number as (1/n) s_testᵀgᵢ with H of the plain mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network


@dataclass(frozen=True)
class Objective:
    """What the config says of the training objective, in addition to the loss.

    Attributes:
        rules: (pattern of parameter names, λ₂ as the trainer means it); the first match counts.
        shares: what each training example in use adds to D, float64; None for 1 each.
        where: the config's line of l2.
    """

    rules: tuple[tuple[str, float], ...] = (("*", 0.0),)
    shares: np.ndarray | None = None
    where: str = "l2"

    @property
    def factor(self) -> float:
        """Give D/n: 1 for a plain mean."""
        return 1.0 if self.shares is None else float(self.shares.mean())

    def without(self, rows: np.ndarray, n: int) -> float:
        """Give D/D' of a mean over all of n examples but some rows: l2 times this keeps the other examples' part."""
        if self.shares is None:
            return n / (n - len(rows))
        total = float(self.shares.sum())
        return total / (total - float(self.shares[rows].sum()))

    def l2_of(self, name: str) -> float:
        """Give λ₂ of a parameter against the plain mean: D/n times that of the trainer.

        Raises:
            InfluenceError: no pattern matches it.
        """
        for pattern, value in self.rules:
            if fnmatchcase(name, pattern):
                return value * self.factor
        raise InfluenceError(
            f"{self.where}: no pattern of l2 matches the parameter {name}",
            'every tracked parameter needs a number: add "*": 0.0 as the last one',
        )

    def over(self, network: Network) -> float | Tensor:
        """Give λ₂ against the plain mean: a number if it is the same for all tracked parameters, else float64 [p].

        Raises:
            InfluenceError: no pattern matches one of them.
        """
        values = [self.l2_of(name) for name in network.names]
        if len(set(values)) <= 1:
            return values[0] if values else 0.0
        vector = torch.zeros(network.size, dtype=torch.float64)
        for name, value in zip(network.names, values, strict=True):
            vector[network.slots[name]] = value
        return vector

    def text(self) -> str:
        """Write λ₂ against the plain mean."""
        if len(self.rules) == 1:
            return f"{self.rules[0][1] * self.factor:g}"
        return ", ".join(f"{value * self.factor:g} ({pattern})" for pattern, value in self.rules)

    def trainer_l2(self, times: float = 1.0) -> float | dict[str, float]:
        """Give λ₂ as the training function takes it: a number, or the mapping of the config, multiplied."""
        if [pattern for pattern, _ in self.rules] == ["*"]:
            return self.rules[0][1] * times
        return {pattern: value * times for pattern, value in self.rules}


def example_shares(labels: np.ndarray, weights: Tensor | None, ignored: int | None) -> np.ndarray | None:
    """Say what each example adds to the divisor of a class-weighted mean: its class's weight, 0 if it is ignored.

    Args:
        labels: of the training examples in use, int64.
        weights: class weights [C]; None for 1.
        ignored: the label that the mean leaves out.

    Returns:
        float64 [n]; None if every example adds 1.
    """
    shares = np.ones(len(labels))
    if weights is not None:
        shares = weights.detach().cpu().double().numpy()[labels]
    if ignored is not None:
        shares = np.where(labels == ignored, 0.0, shares)
    return None if bool((shares == 1).all()) else shares
