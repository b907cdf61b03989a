"""Which images belong to none of the classes: far from every class, and from every other image, in the features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.inspection.candidates import closest

# Neighbours whose mean distance counts; off topic: so many deviations (1.48 × the median deviation) above the median,
# both of logarithms, as outliers of mislabels.
NEIGHBOURS, DEVIATIONS = 5, 4.0
# Ridge on the covariance within classes, as a part of its mean eigenvalue.
RIDGE = 0.01


@dataclass(frozen=True)
class OffTopic:
    """How far images are from everything else.

    Attributes:
        distance: float64 [n], larger is further off; comparable among the images of one call alone.
        rows: int64 [k], those that are off topic, the furthest first.
    """

    distance: np.ndarray
    rows: np.ndarray


def find_off_topic(features: Tensor, labels: np.ndarray) -> OffTopic:
    """Rank images by how far they are from every class.

    The distance is the geometric mean of two: Mahalanobis' to the nearest class mean, with one covariance within
    classes (Lee et al. 2018), and the mean one to the nearest other images.

    Args:
        features: float32 [n, d], columns that count alike.
        labels: int64 [n], −1 where unknown.
    """
    if len(features) <= NEIGHBOURS + 1:
        return OffTopic(np.zeros(len(features)), np.empty(0, dtype=np.int64))
    unit = functional.normalize(features, dim=1)
    near = 1 - closest(unit, unit, NEIGHBOURS)[1].double().mean(dim=1)
    far = _to_classes(features.double(), torch.from_numpy(labels))
    logs = 0.5 * (near.clamp_min(1e-12).log() + far.clamp_min(1e-12).log()).numpy()
    above = logs - np.median(logs)
    deviation = 1.4826 * np.median(np.abs(above))
    limit = DEVIATIONS * deviation if deviation > 0 else np.inf
    rows = np.flatnonzero(above > limit)
    return OffTopic(np.exp(logs), rows[np.argsort(-above[rows], kind="stable")])


def _to_classes(x: Tensor, labels: Tensor) -> Tensor:
    """Give Mahalanobis' distance to the nearest class mean [n]; of unlabelled images all are one class."""
    known = labels >= 0
    names, members = torch.unique(labels if bool(known.any()) else torch.zeros_like(labels), return_inverse=True)
    kept = known if bool(known.any()) else torch.ones_like(known)
    sums = torch.zeros(len(names), x.shape[1], dtype=x.dtype).index_add_(0, members[kept], x[kept])
    counts = torch.bincount(members[kept], minlength=len(names))
    means = sums / counts.clamp_min(1)[:, None]
    within = x[kept] - means[members[kept]]
    covariance = within.T @ within / len(within)
    covariance += RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(x.shape[1], dtype=x.dtype)
    half = torch.linalg.cholesky(torch.linalg.inv(covariance))
    turned, centres = x @ half, (means @ half)[counts > 0]
    return torch.cat([torch.cdist(part, centres).amin(dim=1) for part in torch.split(turned, 4_096)])
