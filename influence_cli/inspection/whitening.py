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
FLAT, CHUNK = 4.0, 4_096


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
        parts = [_unit(part) - self.mean * _seen(part) for part in pictures.split(CHUNK)]
        return functional.normalize(torch.cat([part @ self.directions for part in parts]), dim=1)


def whiten(pictures: Tensor, most: int = COMPONENTS) -> Whitening:
    """Find the principal components of pictures and of their mirror images.

    Args:
        pictures: [n, c, s, s].
        most: components.
    """

    def units() -> Iterator[Tensor]:
        for part in pictures.split(CHUNK):
            yield _unit(part)
            yield _unit(part.flip(3))

    count, width = 2 * len(pictures), pictures[0].numel()
    mean = sum((part.sum(dim=0) for part in units()), torch.zeros(width)) / count
    moment = torch.zeros(width, width)
    for part in units():
        moment += part.T @ part
    moment -= count * mean.outer(mean)
    values, vectors = torch.linalg.eigh(moment.double() / count)
    values, vectors = values.flip(0), vectors.flip(1)
    most = min(most, max(1, len(pictures) // PICTURES))
    used = int((values[:most] > 1e-6 * values[0].clamp_min(1e-30)).sum())
    return Whitening(mean, (vectors[:, :used] / values[:used].clamp_min(1e-30).sqrt()).float())


def _seen(pictures: Tensor) -> Tensor:
    return (pictures.float().flatten(1).std(dim=1, keepdim=True) >= FLAT).float()


def _unit(pictures: Tensor) -> Tensor:
    """Centre pictures and scale them to length 1, [b, p]; flat ones become 0."""
    x = pictures.float().flatten(1)
    return functional.normalize(x - x.mean(dim=1, keepdim=True), dim=1) * _seen(pictures)
