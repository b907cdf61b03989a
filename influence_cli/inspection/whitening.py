"""What tells the images of a data set apart: their small pictures, whitened.

Two shirts have most of their pixels in common, because all shirts have. In the leading principal components of the data
set's own pictures, each scaled to variance one, that counts no more: pictures of different things have a correlation
near 0 there, and two copies of one picture keep one near 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Components; fewer in a small set, a component for so many pictures.
COMPONENTS, PICTURES = 128, 2
# Standard deviation, of 255, below which a picture shows nothing that could be compared; pictures at once.
FLAT, CHUNK = 4.0, 1_024
# Pictures that the components are found from, and steps of subspace iteration.
SAMPLE, ITERATIONS = 8_192, 8


@dataclass(frozen=True)
class Whitening:
    """The map from small pictures to whitened components.

    Attributes:
        mean: of the pictures, each centred and of length 1, float32 [p].
        directions: principal directions, each divided by its standard deviation, float32 [p, m].
    """

    mean: Tensor
    directions: Tensor

    def apply(self, pictures: Tensor) -> Tensor:
        """Give the whitened components of pictures [b, c, s, s] at length 1, float32 [b, m]; 0 for flat ones."""
        offset = self.mean @ self.directions
        parts = []
        for part in torch.split(pictures, CHUNK):
            unit, seen = _unit(part)
            parts.append(unit @ self.directions - offset * seen)
        return functional.normalize(torch.cat(parts), dim=1)


def whiten(pictures: Tensor, most: int = COMPONENTS) -> Whitening:
    """Find the principal components of pictures and of their mirror images.

    Args:
        pictures: [n, c, s, s]; of more than ``SAMPLE`` so many, evenly spaced.
        most: components.
    """
    chosen = pictures if len(pictures) <= SAMPLE else pictures[torch.arange(SAMPLE) * len(pictures) // SAMPLE]

    def units() -> Iterator[Tensor]:
        for part in torch.split(chosen, CHUNK):
            yield _unit(part)[0]
            yield _unit(part.flip(3))[0]

    count, width = 2 * len(chosen), pictures[0].numel()
    mean, moment = pictures.new_zeros(width, dtype=torch.float32), torch.zeros(width, width, device=pictures.device)
    for part in units():
        mean += part.sum(dim=0) / count
        moment.addmm_(part.T, part)
    moment = moment / count - mean.outer(mean)
    most = min(most, max(1, len(pictures) // PICTURES), width)
    values, vectors = _leading(moment, most)
    used = int((values > 1e-6 * values[0].clamp_min(1e-30)).sum())
    return Whitening(mean, vectors[:, :used] / values[:used].clamp_min(1e-30).sqrt())


def _leading(moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give the largest eigenvalues, falling, [count], and eigenvectors [p, count] of a symmetric matrix.

    All of them are dear where only a few are wanted; subspace iteration finds those to a thousandth, which is enough
    for a scale. What it starts from does not depend on the seed.
    """
    if count * 4 > len(moment):
        values, vectors = torch.linalg.eigh(moment.double())
        return values.flip(0)[:count].float(), vectors.flip(1)[:, :count].float()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(moment), count + count // 2, generator=generator).to(moment.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(moment @ basis).Q
    values, turn = torch.linalg.eigh(basis.T @ moment @ basis)
    return values.flip(0)[:count].clamp_min(0), (basis @ turn.flip(1))[:, :count]


def _unit(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Centre pictures and scale them to length 1, [b, p], flat ones to 0; and which are not flat, [b, 1]."""
    x = pictures.flatten(1).float()
    x = x - x.mean(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    seen = (length >= FLAT * x.shape[1] ** 0.5).float()
    return x.mul_(seen / length.clamp_min(1e-12)), seen
