"""Which images may be copies of each other: the nearest of each in several spaces, by blocks.

No matrix of images × images is ever held. The spaces: the network's (a flip, a crop or another light hardly moves an
image there), whitened pixels as they are and mirrored, and coarse pixels of the image and of five windows of it, for
one that is a crop of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.inspection.whitening import whiten

# Similarities held at once, 64 MB; per part, as the nearest k are in the k parts with the largest maxima.
HELD, PART = 2**24, 32
# Windows: the side of one, as a part of the picture's, and where it lies in what is left over, across and down.
ZOOM, WINDOWS = 0.9, ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
# The side of coarse pictures, and their components.
COARSE, COARSE_COMPONENTS = 8, 32
# How many searches over all images: whitened pixels, the same mirrored, the windows, the network.
SEARCHES = 3 + len(WINDOWS)


@dataclass(frozen=True)
class Candidates:
    """Pairs of images that may be copies.

    Attributes:
        pairs: int64 [m, 2], rows; of each pair the second may be a mirror image or a crop of the first.
        mirrored: bool [m], whether it is the mirror image of the first that is like the second.
        reach: float32 [n], the residual √(1 − ρ²) of the whitened pixels of each image and its ``rank``-th nearest: how
            near images of different things are here.
    """

    pairs: Tensor
    mirrored: Tensor
    reach: Tensor


def find_candidates(
    pictures: Tensor,
    pixels: tuple[Tensor, Tensor],
    features: Tensor | None,
    rank: int,
    on_examples: Callable[[int], None] = lambda _: None,
) -> Candidates:
    """Find the nearest image of each in every space.

    Args:
        pictures: uint8 [n, c, s, s].
        pixels: whitened components of the pictures and of their mirror images, float32 [n, m], of length 1.
        features: the network's points, float32 [n, d], or None.
        rank: of the neighbour whose residual is the reach.
        on_examples: called with the number of finished images, ``SEARCHES`` times for each.
    """
    plain, mirrored = pixels
    rows, near = closest(plain, plain, rank, on_examples)
    reach = (1 - near[:, -1].clamp(0, 1).square()).sqrt()
    found = [(rows[:, :2], False), (closest(mirrored, plain, 1, on_examples)[0], True)]
    coarse = whiten(_shrunk(pictures), COARSE_COMPONENTS)
    base = coarse.apply(_shrunk(pictures))
    for across, down in WINDOWS:
        windows = coarse.apply(torch.cat([_shrunk(part) for part in _zoomed(pictures, across, down)]))
        found.append((closest(windows, base, 1, on_examples)[0], False))
    if features is not None:
        unit = functional.normalize(features, dim=1)
        nearest = closest(unit, unit, 1, on_examples)[0]
        found += [(nearest, False), (nearest, True)]
    n = len(pictures)
    # A pair as one number; mirrored it does not matter which of the two is turned.
    numbers = []
    for others, turned in found:
        first = torch.arange(n).repeat_interleave(others.shape[1])
        low, high = torch.minimum(first, others.flatten()), torch.maximum(first, others.flatten())
        numbers.append((low * n + high) * 2 + int(turned))
    unique = torch.cat(numbers).unique()
    pairs = torch.stack([unique // 2 // n, unique // 2 % n], dim=1)
    return Candidates(pairs, unique % 2 == 1, reach)


def closest(
    queries: Tensor, base: Tensor, count: int, on_examples: Callable[[int], None] = lambda _: None
) -> tuple[Tensor, Tensor]:
    """Find the rows of ``base`` that are most like each query, other than the row of the same number, exactly.

    Args:
        queries: float32 [n, w], of length 1.
        base: float32 [n, w], of length 1.
        count: how many of each, fewer if there are fewer other rows.
        on_examples: called with the number of newly finished queries.

    Returns:
        Rows int64 [n, k], nearest first, and similarities [n, k].
    """
    n, k = len(base), min(count, len(base) - 1)
    rows, near = [], []
    step, parts = max(1, min(n, HELD // n)), -(-n // PART)
    turned, room = base.T.contiguous(), base.new_full((step, parts * PART), -torch.inf)
    places = torch.arange(PART, device=base.device)
    for start in range(0, n, step):
        part = queries[start : start + step]
        similarity = torch.mm(part, turned, out=room[: len(part), :n])
        numbers = torch.arange(len(part), device=base.device)
        similarity[numbers, start + numbers] = -torch.inf
        if k == 1:
            best, at = similarity.max(dim=1, keepdim=True)
            rows.append(at)
            near.append(best)
        else:
            cut = room[: len(part)].view(len(part), parts, PART)
            top = cut.amax(dim=2).topk(min(k, parts), dim=1).indices
            inside = cut.gather(1, top[:, :, None].expand(-1, -1, PART)).flatten(1).topk(k, dim=1)
            rows.append((top[:, :, None] * PART + places).flatten(1).gather(1, inside.indices))
            near.append(inside.values)
        on_examples(len(part))
    return torch.cat(rows), torch.cat(near)


def _shrunk(pictures: Tensor) -> Tensor:
    parts = [functional.adaptive_avg_pool2d(part.float(), COARSE) for part in pictures.split(4_096)]
    return torch.cat(parts)


def _zoomed(pictures: Tensor, across: float, down: float) -> Iterator[Tensor]:
    """Enlarge a window of each picture to the whole, by parts."""
    side = pictures.shape[-1]
    wide = round(ZOOM * side)
    left, top = round((side - wide) * across), round((side - wide) * down)
    for part in pictures.split(4_096):
        window = part[:, :, top : top + wide, left : left + wide].float()
        yield functional.interpolate(window, size=(side, side), mode="bilinear")
