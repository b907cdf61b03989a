"""Weights of training examples, as a weighted sampler has them: example i counts wᵢ times in the objective.

A batch of weighted training examples carries (label, weight) as one whole number per example, and the loss takes it
apart: wᵢ ℓ(fᵢ, yᵢ). So every slope, curvature and product with them has the weight, whatever computes it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.data.batches import SLOT
from influence_cli.data.split import Split
from influence_cli.model.outputs import Loss


class WeightedLoss(nn.Module):
    """A loss times the weight of each example; test examples and plain labels have the weight 1."""

    def __init__(self, loss: Loss, weights: np.ndarray) -> None:
        super().__init__()
        self.loss = loss
        # Slot 0 is that of labels without a weight.
        self.register_buffer("weights", torch.from_numpy(np.concatenate([[1.0], weights])).float())

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give w ℓ [b]."""
        losses = self.loss(outputs, targets % SLOT)
        weights: Tensor = self.get_buffer("weights")[targets // SLOT]
        return losses * weights.to(losses)


def weighted(loss: Loss, split: Split, device: torch.device) -> Loss:
    """Weight a loss by the weights of a split, if it has any."""
    if split.weights is None:
        return loss
    return WeightedLoss(loss, np.unique(split.weights)).to(device)


def plain_losses(loss: Loss, outputs: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """Give the losses [b] of some examples without their weights.

    Args:
        loss: of the network.
        outputs: [b, C].
        targets: as a batch has them.
        losses: with the weights.
    """
    if not isinstance(loss, WeightedLoss):
        return losses
    with torch.no_grad():
        plain: Tensor = loss.loss(outputs.detach().to(losses), targets.to(outputs.device) % SLOT)
    return plain


def own_rise(values: Tensor, split: Split, rows: slice | np.ndarray) -> Tensor:
    """Turn w² gᵀ(H + (l2 + λ)I)⁻¹g of some examples into the rise of their own, unweighted loss: divide by w.

    Args:
        values: [b], or [m, b].
        split: of the examples.
        rows: which of those in use.
    """
    if split.weights is None:
        return values
    weights = torch.from_numpy(split.weights[split.indices[rows]]).to(values)
    return torch.where(weights > 0, values / weights, torch.zeros_like(values))
