"""Which images are copies of each other: the same pixels, or the same picture after a crop, a flip or compression.

Two images are near-duplicates if, laid over each other, their whitened pixels (whitening.py) are several times more
alike than those of the images around them:

    residual(a, b) ≤ NEAR · min(reach(a), reach(b)),  residual = √(1 − ρ²)

reach is the residual of an image and its ``RANK``-th nearest: in a data set of digits different images are near, in one
of photographs they are far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.inspection.alignment import fit
from influence_cli.inspection.candidates import find_candidates
from influence_cli.inspection.whitening import Whitening, whiten

# Chosen on Fashion-MNIST and MNIST (bench/results/duplicates.md): above it different shirts and ones are taken for one.
NEAR = 0.2
# The neighbour that says how near different images are: more than a group of copies has members, mostly.
RANK = 9
# With fewer images there is nothing to whiten by, and pixels themselves have to agree: √(1 − ρ²) below PLAIN.
FEWEST, PLAIN = 32, 0.1
# Pixels that are black or white, most change of light, and the part of the pixels that has to be neither.
DARKEST, LIGHTEST, GAIN, ENOUGH = 4, 251, 2.0, 0.2
# Pairs that are laid over each other at once.
PAIRS = 4_096


@dataclass(frozen=True)
class Links:
    """Pairs of images that are copies.

    Attributes:
        pairs: int64 [m, 2], rows, the first below the second.
        similarity: float64 [m], the correlation of their whitened pixels; 1 for the same pixels.
        exact: bool [m], whether their pixels are the same.
    """

    pairs: np.ndarray
    similarity: np.ndarray
    exact: np.ndarray


def find_links(
    pictures: Tensor,
    hashes: np.ndarray,
    features: Tensor | None,
    on_examples: Callable[[int], None] = lambda _: None,
    device: torch.device | None = None,
) -> Links:
    """Find all pairs of copies among some images.

    Args:
        pictures: small pictures, uint8 [n, c, s, s].
        hashes: uint64 [n], of the pixels; 0 where they are not known.
        features: the network's points, float32 [n, d], or None.
        on_examples: called with the number of finished images, ``candidates.SEARCHES`` times for each.
        device: that does the work; the CPU by default.

    Returns:
        The pairs: of images with the same pixels each with the first of them, and the near ones among these firsts.
    """
    exact = same_pixels(hashes)
    firsts = np.setdiff1d(np.arange(len(pictures)), exact[:, 1])
    near, similarity = np.empty((0, 2), dtype=np.int64), np.empty(0)
    if len(firsts) > 1:
        chosen, device = torch.from_numpy(firsts), device or torch.device("cpu")
        pairs, correlation = _near(
            pictures[chosen].to(device), None if features is None else features[chosen].to(device), on_examples
        )
        near, similarity = firsts[pairs.cpu().numpy()], correlation.cpu().numpy().astype(np.float64)
    return Links(
        np.concatenate([exact, near]),
        np.concatenate([np.ones(len(exact)), similarity]),
        np.arange(len(exact) + len(near)) < len(exact),
    )


def same_pixels(hashes: np.ndarray) -> np.ndarray:
    """Pair every later image of equal hash with the first one, int64 [k, 2]."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = first[group]
    later = np.flatnonzero((firsts != np.arange(len(hashes))) & (hashes != 0))
    return np.stack([firsts[later], later], axis=1).astype(np.int64)


def _near(pictures: Tensor, features: Tensor | None, on_examples: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Find pairs of near-duplicates, int64 [m, 2], and their correlations [m]."""
    whitening = whiten(pictures)
    pixels = whitening.apply(pictures), whitening.apply(pictures.flip(3))
    candidates = find_candidates(pictures, pixels, features, RANK, on_examples)
    correlation = _compared(pictures, candidates.pairs, candidates.mirrored, whitening)
    residual = (1 - correlation.clamp(0, 1).square()).sqrt()
    if len(pictures) >= FEWEST:
        limit = NEAR * torch.minimum(*(candidates.reach[candidates.pairs[:, side]] for side in (0, 1)))
    else:
        limit = torch.full_like(residual, PLAIN)
    kept = residual <= limit
    pairs, correlation = candidates.pairs[kept], correlation[kept]
    # A pair that is found as it is and mirrored counts once, at its best.
    numbers = pairs[:, 0] * len(pictures) + pairs[:, 1]
    unique, place = torch.unique(numbers, return_inverse=True)
    best = torch.full((len(unique),), -1.0, device=correlation.device)
    best.scatter_reduce_(0, place, correlation, "amax")
    return torch.stack([unique // len(pictures), unique % len(pictures)], dim=1), best


def _compared(pictures: Tensor, pairs: Tensor, mirrored: Tensor, whitening: Whitening) -> Tensor:
    """Lay the pictures of each pair over each other, both ways, and correlate them, [m] in [−1, 1]."""
    plain = len(pictures) < FEWEST
    parts = []
    for chosen, turned in zip(torch.split(pairs, PAIRS), torch.split(mirrored, PAIRS), strict=True):
        one, other = pictures[chosen[:, 0]], pictures[chosen[:, 1]]
        one = torch.where(turned[:, None, None, None], one.flip(3), one)
        best = _correlation(one, other, whitening, plain=plain)
        for a, b in ((one, other), (other, one)):
            best = torch.maximum(best, _correlation(exposed(a, b), b, whitening, plain=plain))
            laid, near = fit(a, b)
            now = _correlation(laid, b, whitening, plain=plain)
            best = torch.where(near > 0, torch.maximum(best, now), best)
        parts.append(best)
    return torch.cat(parts) if parts else torch.empty(0, device=pictures.device)


def exposed(one: Tensor, other: Tensor) -> Tensor:
    """Give pictures the light of others, with what is too dark or too bright cut off as it is there.

    Gain and offset are those of least squares over the pixels of ``other`` that are neither black nor white.

    Args:
        one: uint8 [m, c, s, s].
        other: the same shape.

    Returns:
        float32, the same shape, in [0, 255]; ``one`` as it is where too few pixels say which light.
    """
    a, b = one.float().flatten(1), other.float().flatten(1)
    free = ((b > DARKEST) & (b < LIGHTEST)).float()
    count = free.sum(dim=1, keepdim=True)
    means = [(x * free).sum(dim=1, keepdim=True) / count.clamp_min(1) for x in (a, b)]
    x, y = (a - means[0]) * free, (b - means[1]) * free
    gain = (x * y).sum(dim=1, keepdim=True) / x.square().sum(dim=1, keepdim=True).clamp_min(1e-6)
    gain = gain.clamp(1 / GAIN, GAIN)
    lit = (gain * (a - means[0]) + means[1]).clamp(0, 255)
    return torch.where(count >= ENOUGH * a.shape[1], lit, a).view(one.shape)


def _correlation(one: Tensor, other: Tensor, whitening: Whitening, *, plain: bool) -> Tensor:
    if plain:
        a, b = (x.float().flatten(1) for x in (one, other))
        a, b = (torch.nn.functional.normalize(x - x.mean(dim=1, keepdim=True), dim=1) for x in (a, b))
        return (a * b).sum(dim=1)
    return (whitening.apply(one) * whitening.apply(other)).sum(dim=1)
