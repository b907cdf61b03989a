"""H + (l2 + λ)I as a product over the whole training set, for the solvers, without forming anything of size p²."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import Batch
from influence_cli.model.network import Network
from influence_cli.passes.batch_size import GRADIENT_NUMBERS
from influence_cli.passes.curvature_products import curvature_product
from influence_cli.passes.jacobian import keep_jacobian, kept_product, numbers_per_example
from influence_cli.runtime import distributed, exchange
from influence_cli.runtime.memory import available_bytes
from influence_cli.solvers.lanczos import power_iteration

# Share of the free memory for a kept Jacobian; the rest is for vectors, rows of the store and other processes.
KEPT_SHARE = 0.4


@dataclass(frozen=True)
class Examples:
    """Training examples in memory, in one tensor: an iterative solver reads them hundreds of times.

    Attributes:
        inputs: [n, …].
        targets: [n].
        batch: examples per step of a product.
    """

    inputs: Tensor
    targets: Tensor
    batch: int

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.targets)


def hold(batches: Iterable[Batch], device: torch.device, batch: int) -> Examples:
    """Gather the training examples in the device's memory."""
    kept = [batch for batch in batches if len(batch)]
    return Examples(
        torch.cat([batch.inputs for batch in kept]).to(device),
        torch.cat([batch.targets for batch in kept]).to(device),
        batch,
    )


def mean_product(
    network: Network,
    examples: Examples,
    matrix: str,
    shift: float | Tensor,
    on_examples: Callable[[int], None] = lambda _: None,
) -> Callable[[Tensor], Tensor]:
    """Make V ↦ V (H + shift·I), H the mean over all examples: batches are summed inside the product, never inverted.

    All processes of a job hold the examples and call it together; each takes a part of the batches.

    Args:
        network: the model.
        examples: the training examples.
        matrix: ``ggn`` or ``hessian``.
        shift: l2 + λ, of all parameters or of each [p].
        on_examples: called with the number of examples that each step has finished.
    """

    def product(vectors: Tensor) -> Tensor:
        # Summed in float64: rounding over hundreds of batches would otherwise limit the solver.
        total = torch.zeros(vectors.shape, dtype=_accumulator(vectors), device=vectors.device)
        for start in range(0, len(examples), examples.batch)[distributed.rank() :: distributed.size()]:
            x, y = examples.inputs[start : start + examples.batch], examples.targets[start : start + examples.batch]
            total += curvature_product(network, x, y, vectors, matrix)
            on_examples(len(y))
        exchange.sum_tensor(total)
        return (total / len(examples) + shift * vectors).to(vectors.dtype)

    return product


def kept_mean_product(
    network: Network,
    examples: Examples,
    shift: float | Tensor,
    dtype: torch.dtype,
    on_examples: Callable[[int], None] = lambda _: None,
) -> Callable[[Tensor], Tensor]:
    """Make the product of ``mean_product`` with the GGN, the Jacobian computed once here and kept.

    Args:
        network: the model.
        examples: the training examples; each process of a job keeps the Jacobian of its part.
        shift: l2 + λ, of all parameters or of each [p].
        dtype: of the vectors to come.
        on_examples: called with the number of examples whose Jacobian is there.
    """
    kept = []
    step = max(1, min(examples.batch, GRADIENT_NUMBERS // numbers_per_example(network, examples.inputs[:1])))
    for start in range(0, len(examples), step)[distributed.rank() :: distributed.size()]:
        x, y = examples.inputs[start : start + step], examples.targets[start : start + step]
        kept.append(keep_jacobian(network, x, y, dtype))
        on_examples(len(y))

    def product(vectors: Tensor) -> Tensor:
        total = torch.zeros(vectors.shape, dtype=_accumulator(vectors), device=vectors.device)
        for part in kept:
            total += kept_product(network, part, vectors)
        exchange.sum_tensor(total)
        return (total / len(examples) + shift * vectors).to(vectors.dtype)

    return product


def fits_kept(network: Network, examples: Examples) -> bool:
    """Say whether the Jacobian of all examples fits into the free memory, in every process of a job."""
    need = 4 * numbers_per_example(network, examples.inputs[:1]) * len(examples) // distributed.size()
    return all(distributed.gathered(need <= KEPT_SHARE * available_bytes(network.device())))


def batch_product(
    network: Network, examples: Examples, matrix: str, shift: float | Tensor, seed: int
) -> Callable[[Tensor], Tensor]:
    """Make V ↦ V (H_B + shift·I) with the next mini-batch B of a seeded shuffle: unbiased for the mean product."""
    source = _shuffled(len(examples), examples.batch, seed)

    def product(vectors: Tensor) -> Tensor:
        chosen = torch.from_numpy(next(source)).to(examples.targets.device)
        total = curvature_product(network, examples.inputs[chosen], examples.targets[chosen], vectors, matrix)
        return total / len(chosen) + shift * vectors

    return product


def largest_batch_eigenvalue(
    network: Network,
    examples: Examples,
    matrix: str,
    shift: float | Tensor,
    seed: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    batches: int = 4,
) -> float:
    """Estimate the largest eigenvalue of M⁻¹(H_B + shift·I) of a mini-batch B, over a few of them, by power iteration.

    Args:
        network: the model.
        examples: the training examples.
        matrix: ``ggn`` or ``hessian``.
        shift: l2 + λ.
        seed: of the mini-batches and the start.
        precondition: R [m, p] to R M⁻¹; None for M = I.
        batches: how many.
    """
    source = _shuffled(len(examples), examples.batch, seed)
    largest = 0.0
    for _ in range(batches):
        chosen = torch.from_numpy(next(source)).to(examples.targets.device)
        x, y = examples.inputs[chosen], examples.targets[chosen]

        def product(vectors: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            image = curvature_product(network, x, y, vectors, matrix) / len(y) + shift * vectors
            return image if precondition is None else precondition(image)

        like = next(network.model.parameters())
        largest = max(largest, power_iteration(product, network.size, like=like, iterations=12, seed=seed))
    return largest


def _accumulator(vectors: Tensor) -> torch.dtype:
    return torch.float32 if vectors.device.type == "mps" else torch.float64


def _shuffled(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Yield mini-batches of equal size endlessly; every pass has a new order."""
    generator = np.random.default_rng(seed)
    batch = min(batch, count)
    while True:
        order = generator.permutation(count)
        # A short last batch would weight its examples more, so it is left out; another order includes them.
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
