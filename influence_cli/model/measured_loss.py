"""What a loss of the user's own is, by measurement: convex in the outputs, smooth, a cross-entropy with class weights.

A name or a class says none of that: a subclass of ``CrossEntropyLoss`` may be a focal loss, and a function may be a
weighted cross-entropy. The measurement takes a few hundred evaluations of the loss, and no pass over the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.model.outputs import Loss, output_curvature

# Random outputs are drawn at these scales: from undecided to confidently wrong.
SCALES = (0.3, 1.0, 3.0, 8.0)
# Up to this scale the curvature of a cross-entropy is not lost in the rounding of float32.
MODERATE = 3.0
# Classes and points per class and scale; entries of all second derivatives together.
CLASSES, POINTS, ENTRIES = 16, 4, 2**23
# Relative to the largest: eigenvalues and products of slopes above minus this are zeros.
ROUNDING = 1e-4
# A loss is smooth enough for Newton steps if it has curvature at this share of the points.
CURVED, LEAST_CURVATURE = 0.9, 1e-6
# Weights beyond this number of classes are not measured; how far ratios of one class may differ.
MOST_CLASSES, SAME = 2048, 1e-3


@dataclass(frozen=True)
class LossShape:
    """What was measured.

    Attributes:
        convex: whether the loss is convex in the outputs.
        smooth: whether it is, and Newton steps in float64 can minimise it: it has curvature nearly everywhere.
        weights: w [C], float64, if the loss is w_y times the cross-entropy and the weights differ; otherwise None.
    """

    convex: bool
    smooth: bool
    weights: Tensor | None


def measure_loss(loss: Loss, outputs: Tensor, targets: Tensor) -> LossShape:
    """Measure a loss at random outputs and at those of the model.

    Convex means: no eigenvalue of ∇²_f ℓ is below zero at any point, and (∇ℓ(f) − ∇ℓ(f'))·(f − f') ≥ 0 for every pair
    of points of one class, which also sees the kinks of a loss without second derivatives.

    Args:
        loss: (outputs [b, C], targets [b]) to losses [b].
        outputs: of the model on examples spread over the classes [k, C].
        targets: their labels [k].
    """
    classes, generator = outputs.shape[1], torch.Generator().manual_seed(0)
    tried = torch.linspace(0, classes - 1, min(CLASSES, classes)).round().long()
    labels = torch.cat([tried.repeat_interleave(POINTS)] * len(SCALES))
    scales = torch.tensor(SCALES).repeat_interleave(len(tried) * POINTS)
    random = scales[:, None] * torch.randn(len(labels), classes, generator=generator)
    f = torch.cat([random.to(outputs.device), outputs.detach().float()])
    y = torch.cat([labels.to(outputs.device), targets.to(outputs.device)])
    exact = _takes_float64(loss, f, y)
    f = f.double() if exact else f
    try:
        convex = _slopes_rise(loss, f, y)
        weights = class_weights(loss, classes, f)
        smooth = False
        if convex:
            moderate = torch.cat([scales <= MODERATE, torch.zeros(len(outputs), dtype=torch.bool)])
            chosen = torch.linspace(0, len(f) - 1, min(len(f), max(8, ENTRIES // classes**2))).round().long()
            values = torch.linalg.eigvalsh(output_curvature(loss, f[chosen], y[chosen]).double().cpu())
            smallest, largest = values[:, 0], values[:, -1]
            convex = bool((smallest >= -ROUNDING * largest.max().clamp_min(1e-30)).all())
            curved = float((largest[moderate[chosen]] > LEAST_CURVATURE).double().mean())
            smooth = convex and curved >= CURVED and exact
    except Exception:  # not defined for some label or output: nothing is known of it
        return LossShape(convex=False, smooth=False, weights=None)
    return LossShape(convex, smooth, weights)


def class_weights(loss: Loss, classes: int, like: Tensor) -> Tensor | None:
    """Find w with ℓ(f, y) = w_y · cross-entropy(f, y), if there is one and its entries differ.

    Args:
        loss: (outputs [b, C], targets [b]) to losses [b].
        classes: C.
        like: a tensor on the device and of the precision of the loss.

    Returns:
        w [C] ≥ 0, float64, on the CPU; None for another loss, or one weight for all classes.
    """
    if classes > MOST_CLASSES:
        return None
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(classes, device=like.device)
    ratios = []
    for scale in (0.5, 1.0, 1.0, 2.0):
        f = (scale * torch.randn(classes, classes, generator=generator)).to(like)
        with torch.no_grad():
            ratios.append(
                (loss(f, labels).double() / functional.cross_entropy(f.double(), labels, reduction="none")).cpu()
            )
    table = torch.stack(ratios)
    weights = table.mean(dim=0)
    same = (table - weights).abs() <= SAME * weights.abs().clamp_min(1e-30)
    if not bool(same.all() and table.isfinite().all() and (weights >= 0).all() and weights.max() > 0):
        return None
    return weights if float(weights.max() - weights.min()) > SAME * float(weights.max()) else None


def _slopes_rise(loss: Loss, f: Tensor, y: Tensor) -> bool:
    """Say whether slopes rise along the line between any two points of one class; to the next point and two further."""
    slopes = _slopes(loss, f, y)
    if not bool(slopes.isfinite().all()):
        return False
    order = torch.argsort(y, stable=True)
    f, y, slopes = f[order], y[order], slopes[order]
    for step in (1, 2, 5):
        same = y[step:] == y[:-step]
        moved, turned = (f[step:] - f[:-step])[same], (slopes[step:] - slopes[:-step])[same]
        rises = (moved * turned).double().sum(dim=1)
        size = moved.double().norm(dim=1) * torch.maximum(slopes[step:].norm(dim=1), slopes[:-step].norm(dim=1))[same]
        if bool((rises < -ROUNDING * size - 1e-12).any()):
            return False
    return True


def _slopes(loss: Loss, f: Tensor, y: Tensor) -> Tensor:
    f = f.detach().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(loss(f, y).sum(), f)
    return slopes.detach()


def _takes_float64(loss: Loss, f: Tensor, y: Tensor) -> bool:
    try:
        return bool(loss(f[:2].double(), y[:2]).isfinite().all())
    except Exception:  # a tensor of its own in float32, for one
        return False
