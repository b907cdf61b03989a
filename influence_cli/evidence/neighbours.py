"""The vote of an example's nearest neighbours: the labels of examples that the network finds similar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Neighbours that vote, and the prior votes of every class.
NEIGHBOURS, PRIOR = 50, 1.0
# Nearest neighbours whose mean distance says how far an example is from all others.
CLOSEST = 10
# Similarities per part: the nearest k are in the k parts with the largest maxima.
PART = 32
# Similarities held at once: 2²⁴, 64 MB in float32.
HELD = 2**24


def nearest(
    features: Tensor, count: int = NEIGHBOURS, on_examples: Callable[[int], None] = lambda _: None
) -> tuple[Tensor, Tensor]:
    """Find the nearest other examples by cosine similarity, exactly.

    Args:
        features: float32 [n, w].
        count: neighbours of each, fewer if there are fewer other examples.
        on_examples: called with the number of newly finished examples.

    Returns:
        Rows int64 [n, k], nearest first, and similarities [n, k].
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    n, k = len(unit), min(count, len(unit) - 1)
    neighbours, near = [], []
    step, parts = max(1, min(n, HELD // n)), -(-n // PART)
    turned, room = unit.T.contiguous(), unit.new_full((step, parts * PART), -torch.inf)
    places = torch.arange(PART, device=unit.device)
    for start in range(0, n, step):
        part = unit[start : start + step]
        similarity = torch.mm(part, turned, out=room[: len(part), :n])
        rows = torch.arange(len(part), device=unit.device)
        similarity[rows, start + rows] = -torch.inf  # an example does not vote on itself
        cut = room[: len(part)].view(len(part), parts, PART)
        best = cut.amax(dim=2).topk(min(k, parts), dim=1).indices
        inside = cut.gather(1, best[:, :, None].expand(-1, -1, PART)).flatten(1).topk(k, dim=1)
        neighbours.append((best[:, :, None] * PART + places).flatten(1).gather(1, inside.indices))
        near.append(inside.values)
        on_examples(len(part))
    return torch.cat(neighbours), torch.cat(near)


def vote(rows: Tensor, similarity: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Let the neighbours vote, weighted by similarity: wⱼ = max(0, cosⱼ)², scaled to a mean of 1.

    Returns:
        log-probabilities of the classes, log (Σ votes + prior)/(k + C·prior), float32 [n, C].
    """
    weight = similarity.clamp_min(0).square()
    weight = weight / weight.mean(dim=1, keepdim=True).clamp_min(1e-12)
    votes = similarity.new_zeros(len(rows), classes).scatter_add_(1, targets[rows], weight).add_(PRIOR)
    return votes.div_(votes.sum(dim=1, keepdim=True)).log_()


def distance(features: Tensor, rows: Tensor) -> Tensor:
    """Give the mean Euclidean distance to the nearest others, [n]; it is large for an example far from every class."""
    parts = [
        torch.linalg.vector_norm(features[rows[:, rank]] - features, dim=1) for rank in range(rows.shape[1])[:CLOSEST]
    ]
    return torch.stack(parts).mean(dim=0)
