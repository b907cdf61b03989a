"""The curvature values Λ along the coordinates in use, and their effective dimension under λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.blocks import Block, groups, joined
from influence_cli.curvature.damping import Damping

# What is left of a trace after its eigenvalues are subtracted, relative to it, is rounding up to here.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Group:
    """Coordinates that share one λ: a layer, or all of a joint basis.

    Attributes:
        name: of the layer; empty for a joint basis.
        size: parameters.
        trace: ΣΛ over all of them, including what is not kept.
        whole: every Λ of the group if they are known, otherwise None.
        penalty: the part of the trace that is l2, where Λ contains it.
    """

    name: str
    size: int
    trace: float
    whole: Tensor | None
    penalty: float = 0.0

    @property
    def mean(self) -> float:
        """Give the mean eigenvalue, without l2."""
        return (self.trace - self.penalty) / max(1, self.size)


@dataclass(frozen=True)
class Spectrum:
    """Λ of the kept coordinates.

    Attributes:
        values: Λ [k], float64.
        owner: group of each coordinate, int64 [k].
        groups: the groups.
        smallest: min Λ of the whole curvature, not of the kept part.
    """

    values: Tensor
    owner: Tensor
    groups: tuple[Group, ...]
    smallest: float

    def shift(self, damping: Damping, l2: float) -> Tensor:
        """Give l2 + λ of each coordinate: float64 [k]."""
        return l2 + torch.tensor(damping.values, dtype=torch.float64)[self.owner]

    def dimension(self, damping: Damping, l2: float) -> tuple[float, float]:
        """Compute d_eff = ΣΛ/(Λ + l2 + λ) of the kept coordinates, and of all (a bound where not all Λ are known)."""
        kept = effective_dimension(self.values, self.shift(damping, l2))
        whole = 0.0
        for number, (group, value) in enumerate(zip(self.groups, damping.values, strict=True)):
            if group.whole is not None:
                whole += effective_dimension(group.whole, l2 + value)
                continue
            group_values = self.values[self.owner == number]
            beyond = max(0.0, group.trace - float(group_values.clamp_min(0).sum()))
            beyond = beyond if beyond > ROUNDING * abs(group.trace) else 0.0
            whole += effective_dimension(group_values, l2 + value) + (beyond / (l2 + value) if beyond else 0.0)
        return kept, whole

    def decided(self, l2: float, time: float) -> tuple[float, float]:
        """Compute ΣΛ(1 − e^(−time·(Λ + l2)))/(Λ + l2) of the kept coordinates, and of all (or a bound).

        It is the counterpart of the effective dimension for a training time: the directions that training determines.
        """

        def dimension(values: Tensor) -> float:
            positive = values.double().clamp_min(0)
            return float((positive * relaxation(positive + l2, time)).sum())

        whole = 0.0
        for number, group in enumerate(self.groups):
            group_values = self.values[self.owner == number]
            beyond = max(0.0, group.trace - float(group_values.clamp_min(0).sum()))
            whole += dimension(group.whole) if group.whole is not None else dimension(group_values) + time * beyond
        return dimension(self.values), whole


def joint(values: Tensor, *, size: int, trace: float, smallest: float, penalty: float = 0.0) -> Spectrum:
    """Describe the kept part of a joint basis."""
    owner = torch.zeros(len(values), dtype=torch.int64)
    return Spectrum(values.double(), owner, (Group("", size, trace, None, penalty),), smallest)


def layered(blocks: Sequence[Block], chosen: np.ndarray | None, penalties: Tensor | None = None) -> Spectrum:
    """Describe the chosen coordinates of one basis per layer (None: all of them).

    Args:
        blocks: all of them.
        chosen: positions of the coordinates in use.
        penalties: l2 of every coordinate, where it differs: it becomes a part of Λ.
    """
    values, owner = joined(blocks).double(), torch.from_numpy(groups(blocks)).long()
    values = values if penalties is None else values + penalties
    parts = torch.split(values, [block.count for block in blocks])
    least = 0.0 if penalties is None else float(penalties.min())
    if chosen is not None:
        index = torch.from_numpy(chosen)
        values, owner = values[index], owner[index]
    described = tuple(
        Group(block.name, block.size, block.trace, block.values if penalties is None else part)
        for block, part in zip(blocks, parts, strict=True)
    )
    return Spectrum(values, owner, described, least)


def relaxation(spectrum: Tensor, time: float) -> Tensor:
    """Compute (1 − e^(−time·σ))/σ, how much of a gradient along σ gradient descent has followed; it tends to 1/σ.

    Args:
        spectrum: σ = Λ + l2 [k], float64.
        time: η·K, rate times steps; the limit at σ → 0.

    Returns:
        [k], in (0, time] for σ ≥ 0.
    """
    safe = torch.where(spectrum == 0, 1.0, spectrum)
    return torch.where(spectrum == 0, time, -torch.expm1(-time * safe) / safe)


def effective_dimension(spectrum: Tensor, shift: float | Tensor) -> float:
    """Compute d_eff = Σⱼ Λⱼ / (Λⱼ + shift), the number of directions that the data determine, not the damping."""
    positive = spectrum.double().clamp_min(0)
    return float((positive / (positive + shift)).nan_to_num(0.0).sum())
