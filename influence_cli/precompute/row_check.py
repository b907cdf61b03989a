"""A cheap check that stays on: some rows of every block are compared with the gradient that plain autograd gives.

The sum of the example gradients of a few examples has to be the gradient of their summed loss: one forward and backward
pass of one example in ``EVERY``. Where it is not, autograd computes those rows again in the batch that the layer pass
had, and if these differ as well, the block is computed by autograd alone and the layer is named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.coordinates import Basis, parameter_vectors, vector_coordinates
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, loss_slopes, owner_of
from influence_cli.model.outputs import logits_of
from influence_cli.passes.coverage import example_by_example
from influence_cli.passes.gradients import example_gradients, summed_gradient

# One example in so many is checked, and one at least per block.
EVERY = 256
# Allowed difference, relative to the norms of the rows, by the precision of the layer pass.
TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}
# Random directions that rows are compared in, and up to how many parameters; beyond there is one.
DIRECTIONS, MANY = 3, 30_000_000


@dataclass(frozen=True)
class RowCheck:
    """What the rows of a store are compared with autograd by.

    Attributes:
        network: the model.
        basis: P of the coordinates; None for raw gradients.
        directions: random normal c [m, k]: the norm of a difference of rows is that of its products with them, in the
            mean over c.
        vectors: P c [m, p], so that (Pᵀg)ᵀc = gᵀ(P c) needs no projection of g.
    """

    network: Network
    basis: Basis
    directions: Tensor
    vectors: Tensor


def make_row_check(network: Network, basis: Basis) -> RowCheck:
    """Draw the directions, always the same ones."""
    count = DIRECTIONS if network.size <= MANY else 1
    width = network.size if basis is None else basis.width
    directions = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(network.device())
    return RowCheck(network, basis, directions, parameter_vectors(network, basis, directions))


def checked_rows(count: int) -> np.ndarray:
    """Choose the rows of a block that are checked: one in ``EVERY``, one at least."""
    return np.arange(min(EVERY // 2, count // 2), count, EVERY)


def rows_or_autograd(check: RowCheck, batch: Batch, values: Tensor, rows: np.ndarray) -> tuple[Tensor, str]:
    """Check some rows that the layer pass gave, and compute all of them by autograd where one is wrong.

    Args:
        check: model, basis and directions.
        batch: the examples of all rows.
        values: their coordinates [b, k].
        rows: which of them are checked.

    Returns:
        The coordinates [b, k], and the module whose gradient was wrong; empty if none was.
    """
    network, basis = check.network, check.basis
    if not len(rows) or network.rest == network.names:
        return values, ""  # nothing comes from the layer pass
    chosen = torch.from_numpy(rows)
    summed = summed_gradient(network, batch.inputs[chosen], batch.targets[chosen])[0]
    given = values[chosen.to(values.device)].to(check.directions.dtype)
    allowed = TOLERANCE[network.precision] * float(given.norm()) + 1e-12
    difference = given.sum(dim=0) @ check.directions.T - summed.to(check.vectors.dtype) @ check.vectors.T
    if float(difference.square().mean().sqrt()) <= allowed:
        return values, ""
    truth = _in_the_batch(network, batch, rows)
    if float((vector_coordinates(network, basis, truth) - given).norm()) <= allowed:
        return values, ""  # a unit at its kink: rounding differs between two batches, and each gradient is right
    plain = replace(network, layers=(), rest=network.names, vectorised=False, unused=())
    grads = example_gradients(plain, batch.inputs, batch.targets)[0]
    return vector_coordinates(network, basis, grads), _culprit(network, batch, rows, truth)


def _in_the_batch(network: Network, batch: Batch, rows: np.ndarray) -> Tensor:
    """Give the gradients of some examples [rows, p] by autograd, in one forward of the whole batch."""
    with torch.no_grad():
        outputs = logits_of(network.model(batch.inputs.to(network.device())))
    slopes = loss_slopes(network, outputs, batch.targets.to(network.device()))[1]
    return example_by_example(network, batch.inputs, slopes, rows.tolist())[0]


def _culprit(network: Network, batch: Batch, rows: np.ndarray, truth: Tensor) -> str:
    """Name the module whose part of the example gradients differs most from autograd's."""
    grads = example_gradients(network, batch.inputs, batch.targets)[0][torch.from_numpy(rows).to(truth.device)]
    worst = max(network.names, key=lambda name: float((grads - truth)[:, network.slots[name]].norm()))
    return owner_of(worst) or worst
