"""Slopes at the outputs whose outer products have the Fisher as their mean: the draws that EK-FAC and others average.

F = E_x E_{y from p(y|x)} [∇ℓ ∇ℓᵀ] = E_x [JᵀSJ], S = ∇²_f ℓ: the GGN of a loss that is convex in the outputs f.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from influence_cli.model.network import Network, loss_slopes
from influence_cli.model.outputs import output_curvature

# How the draws are made.
SAMPLED, EXACT, ROOT, EMPIRICAL = "sampled", "exact", "root", "empirical"


# Examples that share a generator: making one per draw would take longer than the layer pass.
TOGETHER = 64


def draws(
    network: Network, outputs: Tensor, targets: Tensor, how: str, seed: int, indices: np.ndarray
) -> Iterator[Tensor]:
    """Yield slopes u [b, C]; the expectation of Σ u uᵀ over what is yielded is S (for ``empirical`` the given label's).

    Args:
        network: for its loss.
        outputs: f [b, C].
        targets: the given labels [b].
        how: ``sampled``, one label drawn from the softmax; ``exact``, every label weighted by its probability;
            ``root``, S^{1/2}ε with random signs ε, for a loss that is convex in f; ``empirical``, the given labels.
        seed: of all draws.
        indices: int64 [b], the examples' positions: each gets the same draw in any batch and stage.
    """
    f = outputs.detach().float()
    if how == EMPIRICAL:
        yield loss_slopes(network, outputs, targets.to(f.device))[1]
    elif how == SAMPLED:
        soft = f.softmax(dim=1)
        below = soft.double().cpu().cumsum(dim=1) <= uniforms(seed, indices, 1)
        labels = below.sum(dim=1, keepdim=True).clamp_max(f.shape[1] - 1).to(f.device)
        yield soft.scatter_add(1, labels, torch.full_like(soft[:, :1], -1).expand_as(labels))
    elif how == EXACT:
        soft = f.softmax(dim=1)
        for label in range(f.shape[1]):
            slope = soft.clone()
            slope[:, label] -= 1
            yield slope * soft[:, label, None].sqrt()
    else:
        matrix = output_curvature(network.loss, f, targets.to(f.device)).double()
        values, vectors = torch.linalg.eigh(matrix)
        signs = (uniforms(seed, indices, f.shape[1]) < 0.5).to(f.device, torch.float64).mul(2).sub(1)
        scaled = vectors * values.clamp_min(0).sqrt()[:, None, :]
        yield torch.einsum("bcd,bd->bc", scaled, signs).to(f.dtype)


def uniforms(seed: int, indices: np.ndarray, width: int) -> Tensor:
    """Draw numbers in [0, 1), float64 [b, width], that depend only on the examples' positions."""
    numbers = torch.empty(len(indices), width, dtype=torch.float64)
    groups = indices // TOGETHER
    for group in np.unique(groups).tolist():
        generator = torch.Generator().manual_seed(part_seed(seed, group))
        rows = torch.rand(TOGETHER, width, dtype=torch.float64, generator=generator)
        members = np.flatnonzero(groups == group)
        numbers[members] = rows[indices[members] % TOGETHER]
    return numbers


def part_seed(seed: int, number: int) -> int:
    """Give the seed of one part of a random procedure."""
    return (seed * 1_000_003 + number) % 2**63
