"""The vote of an example's nearest neighbours: the labels of examples that the network finds similar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from influence_cli.evidence.mapped import large, parts_of, row_parts

# Neighbours that vote, and the prior votes of every class.
NEIGHBOURS, PRIOR = 50, 1.0
# Nearest neighbours whose mean distance says how far an example is from all others.
CLOSEST = 10
# Similarities per part: the nearest k are in the k parts with the largest maxima.
PART = 32
# Similarities held at once: 64 MB in float32, and 1 GB on a GPU, which is slow on small parts.
HELD, HELD_GPU = 2**24, 2**28


def nearest(
    features: Tensor,
    count: int = NEIGHBOURS,
    on_examples: Callable[[int], None] = lambda _: None,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Find the nearest other examples by cosine similarity, exactly.

    Args:
        features: float32 [n, w].
        count: neighbours of each, fewer if there are fewer other examples.
        on_examples: called with the number of newly finished examples.
        part: rows whose neighbours are found, without a step; all.

    Returns:
        Rows int64 [m, k], nearest first, and similarities [m, k], of the part.
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    n, k = len(unit), min(count, len(unit) - 1)
    begin, end, _ = part.indices(n)
    neighbours = torch.empty(end - begin, k, dtype=torch.int64, device=unit.device)
    near = unit.new_empty(end - begin, k)
    held = HELD if unit.device.type == "cpu" else HELD_GPU
    step, parts = max(1, min(n, held // n)), -(-n // PART)
    turned, room = unit.T.contiguous(), unit.new_full((step, parts * PART), -torch.inf)
    places = torch.arange(PART, device=unit.device)
    for start in range(begin, end, step):
        some = unit[start : min(start + step, end)]
        similarity = torch.mm(some, turned, out=room[: len(some), :n])
        rows = torch.arange(len(some), device=unit.device)
        similarity[rows, start + rows] = -torch.inf  # an example does not vote on itself
        cut = room[: len(some)].view(len(some), parts, PART)
        best = cut.amax(dim=2).topk(min(k, parts), dim=1).indices
        inside = cut.gather(1, best[:, :, None].expand(-1, -1, PART)).flatten(1).topk(k, dim=1)
        found = slice(start - begin, start - begin + len(some))
        neighbours[found] = (best[:, :, None] * PART + places).flatten(1).gather(1, inside.indices)
        near[found] = inside.values
        on_examples(len(some))
    return neighbours, near


def vote(rows: Tensor, similarity: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Let the neighbours vote, weighted by similarity: wⱼ = max(0, cosⱼ)², scaled to a mean of 1.

    Returns:
        log-probabilities of the classes, log (Σ votes + prior)/(k + C·prior), float32 [m, C].
    """
    votes = large(len(rows), classes, device=similarity.device)
    for some in row_parts(*votes.shape):
        weight = similarity[some].clamp_min(0).square()
        weight = weight / weight.mean(dim=1, keepdim=True).clamp_min(1e-12)
        part = weight.new_zeros(len(weight), classes).scatter_add_(1, targets[rows[some]], weight).add_(PRIOR)
        votes[some] = part.div_(part.sum(dim=1, keepdim=True)).log_()
    return votes


def distance(features: Tensor, rows: Tensor, part: slice = slice(None)) -> Tensor:
    """Give the mean Euclidean distance to the nearest others; it is large for an example far from every class.

    Args:
        features: float32 [n, w].
        rows: int64 [m, k], of ``nearest``.
        part: the m rows whose neighbours they are.

    Returns:
        [m].
    """
    some, far = features[part], features.new_empty(len(rows))
    for place in parts_of(len(rows)):
        parts = [
            torch.linalg.vector_norm(features[rows[place, rank]] - some[place], dim=1)
            for rank in range(rows.shape[1])[:CLOSEST]
        ]
        far[place] = torch.stack(parts).mean(dim=0)
    return far
