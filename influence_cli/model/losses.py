"""Losses by name: (outputs [b, C], targets [b]) to losses [b].

``hinge`` has no curvature, so it cannot explain an SVM: its second derivative is 0 wherever it exists.
``smooth_hinge`` replaces it to explain a model trained with the hinge (Koh & Liang, ICML 2017, section 4.3, figure 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence_cli.model.outputs import Loss

# Koh & Liang's: estimates agree with retraining there, r = .98 (bench/paper/hinge.py).
TEMPERATURE = 0.001
# Scores near 1 are 1e-7 apart in float32, so rounding would decide inside a narrower bend.
LEAST_TEMPERATURE = 1e-6


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute max(0, 1 − s) of the margin s = f_y − max_{j≠y} f_j: the hinge of Crammer & Singer (JMLR 2001).

    It is convex in f, because s is concave in f and the hinge falls with s. For two classes s is the output difference.
    If two classes tie for the maximum, or s = 1, the slope is the mean of both sides' slopes.

    Args:
        outputs: f [b, C], scores, C ≥ 2.
        targets: y [b].

    Returns:
        Losses [b], ≥ 0, in units of the score.

    Raises:
        ValueError: a single output has no margin.
    """
    return _excess(outputs, targets).amax(dim=1)


def smooth_hinge(outputs: Tensor, targets: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Compute t·log(1 + Σ_{j≠y} exp((1 − f_y + f_j)/t)), the hinge with its kinks rounded off over a width of about t.

    For two classes it is SmoothHinge(s, t) = t·log(1 + exp((1 − s)/t)) of Koh & Liang (ICML 2017, section 4.3), s the
    difference of the outputs. For more it is smooth where two classes tie for the largest score, too. It is convex in
    f for any C, lies between the hinge and the hinge + t·log C, and is t times the cross-entropy of the outputs, one
    added to all but the label's, at temperature t. ∇²_f is large near the margin (1/(4t) in s) and 0 far from it,
    where misclassified examples still have their whole slope: directions without curvature count.

    Args:
        outputs: f [b, C], scores, C ≥ 2.
        targets: y [b].
        temperature: t > 0, in units of the score.

    Returns:
        Losses [b], ≥ 0, in units of the score.

    Raises:
        ValueError: a single output has no margin.
    """
    return temperature * torch.logsumexp(_excess(outputs, targets) / temperature, dim=1)


def _excess(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 − f_y + f_j of the other classes j, 0 for the label: [b, C].

    Differences first: then the large scores cancel before they are divided by t, and both derivatives add up to zero
    over the classes exactly.
    """
    if outputs.shape[1] < 2:
        raise ValueError("a hinge needs two or more classes, one output per class")
    label_scores = outputs.gather(1, targets[:, None])
    label = torch.arange(outputs.shape[1], device=outputs.device) == targets[:, None]
    return (1 + (outputs - label_scores)).masked_fill(label, 0.0)


def negative_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute −log(p_y/(1 − p_y)) = log Σ_{j≠y} exp f_j − f_y, the margin of a softmax with its sign changed.

    log(p_y/(1 − p_y)) is what TRAK (Park et al. 2023, section 3), SOURCE and ASTRA measure in place of the loss: it has
    no ceiling where the loss ends at 0. With this sign a rise is bad, as that of a loss is.

    Args:
        outputs: f [b, C], logits, C ≥ 2.
        targets: y [b].

    Returns:
        [b], in nats; below 0 where the label is likelier than all other classes together.
    """
    label = torch.arange(outputs.shape[1], device=outputs.device) == targets[:, None]
    others = outputs.masked_fill(label, -torch.inf).logsumexp(dim=1)
    return others - outputs.gather(1, targets[:, None])[:, 0]


def may_lack_curvature(loss: Loss, name: str) -> bool:
    """Say whether the loss may have a slope along a direction in which it has no curvature, as a hinge has.

    A cross-entropy has none: its slope lies in the range of ∇²_f ℓ, so a direction of curvature 0 can be left out.
    """
    known = isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward
    return not (name == "cross_entropy" or known)
