"""Check that losses and gradients are finite, and name the first example and layer that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import Batch
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network, evaluate
from influence_cli.passes.curvature_products import curvature_product


def refuse_culprit(
    split: Split, network: Network, batches: Iterable[Batch], is_finite: Callable[[Batch], bool], what: str
) -> NoReturn:
    """Stop and name the first example whose loss, or whose part of a sum, is not finite.

    Args:
        split: the examples' data set.
        network: the model.
        batches: all that was summed.
        is_finite: says whether a sum over some examples is finite.
        what: what was summed, such as ``curvature``.

    Raises:
        InfluenceError: always.
    """
    for batch in batches:
        check_finite(split, batch, evaluate(network, batch.inputs, batch.targets)[0])
        if not is_finite(batch):
            while len(batch) > 1:  # by halves: checking every example alone would take a long time
                half = len(batch) // 2
                parts = [_part(batch, slice(half)), _part(batch, slice(half, None))]
                bad = [part for part in parts if not is_finite(part)]
                if not bad:
                    break
                batch = bad[0]
            title = split.title(int(batch.indices[0]))
            if len(batch) == 1:
                refuse_not_finite(split, batch.indices, torch.zeros(1, dtype=torch.bool), what)
            raise InfluenceError(
                f"the {what} summed over {len(batch)} examples, from {title} on, is too large for float32",
                "check those images for extreme pixels",
            )
    raise InfluenceError(
        f"the {what} summed over all training examples is too large for float32", "check for extreme pixels or weights"
    )


def refuse_product(split: Split, network: Network, batches: Iterable[Batch], matrix: str) -> NoReturn:
    """Stop and name the example whose own curvature times some vector is not finite.

    Args:
        split: the examples' data set.
        network: the model.
        batches: all of them.
        matrix: ``ggn`` or ``hessian``.

    Raises:
        InfluenceError: always.
    """
    vector = torch.ones(1, network.size, device=network.device())

    def is_finite(batch: Batch) -> bool:
        inputs, targets = batch.inputs.to(vector.device), batch.targets.to(vector.device)
        return bool(curvature_product(network, inputs, targets, vector, matrix).isfinite().all())

    refuse_culprit(split, network, batches, is_finite, "curvature")


def _part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.inputs[rows], batch.targets[rows], batch.indices[rows])


def check_gradients(split: Split, batch: Batch, losses: Tensor, grads: Tensor) -> None:
    """Stop at the first example whose loss, gradient [b, p] or squared gradient norm is not finite, by name."""
    norms = torch.linalg.vector_norm(grads, dim=1)
    check_finite(split, batch, losses, (norms * norms)[:, None])


def check_finite(split: Split, batch: Batch, losses: Tensor, grads: Tensor | None = None) -> None:
    """Stop at the first example whose loss or gradient is not finite, by name."""
    good = losses.isfinite()
    what = "loss"
    if bool(good.all()) and grads is not None:
        # A row's sum is finite exactly if all of the row is, except for an overflow, which is an error as well.
        good, what = grads.sum(dim=1).isfinite(), "gradient, or its square,"
    refuse_not_finite(split, batch.indices, good, what)


def refuse_not_finite(split: Split, indices: np.ndarray, good: Tensor, what: str) -> None:
    """Stop and name the first of some examples whose flag is False."""
    if not bool(good.all()):
        index = int(indices[int(torch.nonzero(~good.cpu())[0])])
        raise InfluenceError(
            f"the {what} of {split.title(index)} is NaN or infinite",
            "check that image and its label; list it under exclude to continue without it",
        )
