"""Lay one picture over another: the window of it that fits the other best, for crops and shifts.

Gauss–Newton steps from coarse to fine (Lucas & Kanade 1981, with a gain and an offset as in Evangelidis & Psarakis
2008): over scale and shift p, gain α and offset β they minimise Σₓ (α·a(W(x; p)) + β − b(x))², x over the part of b
that the window covers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Sides of the pictures from coarse to fine, in grey; then in full; steps at each.
COARSE, STEPS = (8, 16), 4
# A window is scaled and shifted by no more, in parts of the side; so much of the other picture has to be covered.
SCALED, SHIFTED, COVERED = 1.3, 0.15, 0.7
# Pairs at once, and the correlation of the coarse pictures below which they are not looked at in full.
PAIRS, ALIKE = 512, 0.95


def fit(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Find the windows of some pictures that fit others best, and lay them over these.

    Args:
        one: uint8 [m, channels, side, side].
        other: the same shape.

    Returns:
        ``one`` at its window, where that leaves ``other`` uncovered the latter, float32 [m, channels, side, side]; and
        the correlation of the two there, float32 [m]; 0 where even coarse pictures are not alike.
    """
    laid, near = [], []
    for a, b in zip(torch.split(one, PAIRS), torch.split(other, PAIRS), strict=True):
        part, correlation = _fit(a.float(), b.float())
        laid.append(part)
        near.append(correlation)
    return (torch.cat(laid), torch.cat(near)) if laid else (one.float(), torch.empty(0))


def _fit(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    # Scale and shift in both directions: x of b is at scale·x + shift of a, coordinates from −1 to 1.
    scale, shift = one.new_ones(len(one), 2), one.new_zeros(len(one), 2)
    grey = one.mean(dim=1, keepdim=True), other.mean(dim=1, keepdim=True)
    best = one.new_zeros(len(one))
    for side in COARSE:
        a, b = (functional.adaptive_avg_pool2d(x, side) for x in grey)
        scale, shift, best = _descend(a, b, scale, shift)
    laid = one.clone()
    rows = torch.nonzero(best >= ALIKE)[:, 0]
    near = torch.zeros_like(best)
    if len(rows):
        scale, shift, near[rows] = _descend(one[rows], other[rows], scale[rows], shift[rows])
        window, inside = _window(one[rows], scale, shift)
        laid[rows] = torch.where(inside > 0, window, other[rows])
    return laid, near


def _descend(a: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the steps on pictures of one size; the best of them, and its correlation [m]."""
    best = _correlation(*_window(a, scale, shift), b)
    kept = scale, shift
    for _ in range(STEPS):
        scale, shift = _step(a, b, scale, shift)
        now = _correlation(*_window(a, scale, shift), b)
        better = (now > best)[:, None]
        kept = torch.where(better, scale, kept[0]), torch.where(better, shift, kept[1])
        best = torch.maximum(now, best)
    return *kept, best


def _grid(side: int, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Give the places of a that the pixels of b lie at, [m, side, side, 2], and those of b, [side, side, 2]."""
    line = (2 * torch.arange(side, dtype=torch.float32, device=scale.device) + 1) / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack([x, y], dim=2)
    return places * scale[:, None, None] + shift[:, None, None], places


def _window(a: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Give a at the window [m, c, s, s], and which of its pixels lie in a [m, 1, s, s]."""
    grid, _ = _grid(a.shape[-1], scale, shift)
    inside = (grid.abs() <= 1).all(dim=3)[:, None].float()
    return functional.grid_sample(a, grid, padding_mode="border", align_corners=False), inside


def _correlation(window: Tensor, inside: Tensor, b: Tensor) -> Tensor:
    count = inside.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1) * b.shape[1]
    x, y = ((v - (v * inside).sum(dim=(1, 2, 3), keepdim=True) / count) * inside for v in (window, b))
    product = (x * y).sum(dim=(1, 2, 3))
    norm = (x.square().sum(dim=(1, 2, 3)) * y.square().sum(dim=(1, 2, 3))).clamp_min(1e-12).sqrt()
    covered = inside.mean(dim=(1, 2, 3)) >= COVERED
    return torch.where(covered, product / norm, torch.zeros_like(norm))


def _step(a: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Take a Gauss–Newton step in scale and shift, with gain and offset solved for."""
    side, channels = a.shape[-1], a.shape[1]
    padded = functional.pad(a, (1, 1, 1, 1), mode="replicate")
    slopes = torch.cat(
        [
            (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) * (side / 4),
            (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) * (side / 4),
        ],
        dim=1,
    )
    sampled, inside = _window(torch.cat([a, slopes], dim=1), scale, shift)
    _, places = _grid(side, scale, shift)
    window, right, down = torch.split(sampled, channels, dim=1)
    columns = torch.stack(
        [right * places[..., 0], down * places[..., 1], right, down, window, torch.ones_like(window)], dim=1
    )
    columns = (columns * inside[:, None]).flatten(2)
    normal = columns @ columns.transpose(1, 2)
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-6
    target = (columns @ (b * inside).flatten(1)[:, :, None])[:, :, 0]
    solved = torch.linalg.solve(normal + torch.diag_embed(ridge), target)
    gain = solved[:, 4:5].clamp_min(0.1)
    change = (solved[:, :4] / gain).clamp(-0.2, 0.2)
    return (
        (scale + change[:, :2]).clamp(1 / SCALED, SCALED),
        (shift + change[:, 2:]).clamp(-2 * SHIFTED, 2 * SHIFTED),
    )
