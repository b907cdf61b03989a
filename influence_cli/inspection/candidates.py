"""Which images may be copies of each other: the nearest of each in several spaces, by blocks.

No matrix of images × images is ever held. The spaces: the network's (a flip, a crop or another light hardly moves an
image there), whitened pixels as they are and mirrored, and coarse pixels of the image and of five windows of it, for
one that is a crop of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.inspection.whitening import whiten

# Similarities held at once, 64 MB; per part, as the nearest k are in the k parts with the largest maxima; pictures
# at once.
HELD, PART, CHUNK = 2**24, 32, 1_024
# Windows: the side of one, as a part of the picture's, and where it lies in what is left over, across and down.
ZOOM, WINDOWS = 0.9, ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
# The side of coarse pictures, and their components.
COARSE, COARSE_COMPONENTS = 8, 64
# A pair is worth laying over each other if its whitened pixels correlate by PLAIN, or its coarse ones in one of the
# windows by ROUGH: of a copy .9 and .65 at least, of the nearest different photographs .36 and .54 in the middle.
PLAIN, ROUGH = 0.45, 0.65
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
    n = len(pictures)
    rows, near = closest(plain, plain, rank, on_examples)
    reach = (1 - near[:, -1].clamp(0, 1).square()).sqrt()
    numbers = [_numbered(rows[:, :2], turned=False)[near[:, :2] >= PLAIN]]
    rows, near = closest(mirrored, plain, 1, on_examples)
    numbers.append(_numbered(rows, turned=True)[near >= PLAIN])
    coarse = whiten(_shrunk(pictures), COARSE_COMPONENTS)
    base = coarse.apply(_shrunk(pictures))
    windows = [coarse.apply(_shrunk(pictures, zoomed=place)) for place in WINDOWS]
    for window in windows:
        rows, near = closest(window, base, 1, on_examples)
        numbers.append(_numbered(rows, turned=False)[near >= ROUGH])
    if features is not None:
        unit = functional.normalize(features, dim=1)
        rows = closest(unit, unit, 1, on_examples)[0]
        first, other = torch.arange(n, device=rows.device), rows[:, 0]
        rough = torch.stack(
            [_products(a[one], base[two]) for a in windows for one, two in ((first, other), (other, first))]
        ).amax(dim=0)
        alike = (_products(plain[first], plain[other]) >= PLAIN) | (rough >= ROUGH)
        turned = _products(mirrored[first], plain[other]) >= PLAIN
        numbers += [_numbered(rows, turned=False)[alike[:, None]], _numbered(rows, turned=True)[turned[:, None]]]
    unique = torch.unique(torch.cat(numbers))
    pairs = torch.stack([unique // 2 // n, unique // 2 % n], dim=1)
    return Candidates(pairs, unique % 2 == 1, reach)


def _numbered(others: Tensor, *, turned: bool) -> Tensor:
    """Write the pairs of each row with its others [n, k] as numbers; mirrored it does not matter which is turned."""
    rows = torch.arange(len(others), device=others.device)[:, None]
    low, high = torch.minimum(rows, others), torch.maximum(rows, others)
    return (low * len(others) + high) * 2 + int(turned)


def _products(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=1)


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


def _shrunk(pictures: Tensor, zoomed: tuple[float, float] | None = None) -> Tensor:
    """Give the coarse pictures, or those of the window that lies there."""
    side = pictures.shape[-1]
    wide = side if zoomed is None else round(ZOOM * side)
    left, top = (0, 0) if zoomed is None else (round((side - wide) * part) for part in zoomed)
    window = pictures[:, :, top : top + wide, left : left + wide]
    return torch.cat([_coarse(part.float()) for part in torch.split(window, CHUNK)])


def _coarse(window: Tensor) -> Tensor:
    return functional.interpolate(window, size=(COARSE, COARSE), mode="bilinear", antialias=True)
