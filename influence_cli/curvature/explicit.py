"""The exact GGN or Hessian as a matrix, and its eigenvectors: for convex models, last layers, p up to about 10,000.

Nothing is approximated, so it is the reference for every other curvature. Cost: n·C·p² operations for the GGN (n·C²·d²
for an output layer of d inputs and C outputs), n·p backward passes for a Hessian, p³ for the eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from influence_cli.curvature.progress import Progress
from influence_cli.data.batches import Batch
from influence_cli.model.network import (
    Network,
    differentiable_attention,
    evaluate,
    flatten,
    layer_inputs,
    reads_one_logit,
    recurrent_backward,
)
from influence_cli.model.outputs import logits_of, output_curvature
from influence_cli.passes.batch_size import micro_batch
from influence_cli.passes.gradients import jacobians
from influence_cli.runtime import distributed, exchange
from influence_cli.solvers.eigen import eigenpairs

# Examples per product for an output layer.
ROWS = 4096


def curvature_matrix(
    network: Network,
    batches: Iterable[Batch],
    matrix: str,
    output: nn.Linear | None = None,
    on_examples: Callable[[int], None] = lambda _: None,
    *,
    progress: Progress | None = None,
    save: Callable[[Progress], None] = lambda _: None,
) -> Tensor:
    """Average the curvature over the training examples.

    GGN: (1/n) Σᵢ JᵢᵀSᵢJᵢ, Jᵢ = ∂f/∂θ, Sᵢ = ∇²_f ℓ. Hessian: (1/n) Σᵢ ∇²_θ L(zᵢ).

    Args:
        network: the model and its tracked parameters.
        batches: the training examples, from batch ``progress.done`` on.
        matrix: ``ggn`` or ``hessian``.
        output: the output layer, if it holds all tracked parameters: both matrices are then the same and cheap.
        on_examples: called with the number of examples that each step has finished.
        progress: where an earlier call stopped.
        save: called after every batch (every few, for an output layer); it decides when to write.

    Returns:
        H [p, p] over the batches of all processes of a job (runtime/distributed.py), float64, symmetric,
        on the model's device (the CPU for MPS, which has no float64).
    """
    device = _float64_device(network.device())
    progress = progress or Progress("matrix")

    def finished(count: int, examples: int) -> None:
        progress.done, progress.examples = progress.done + count, progress.examples + examples
        save(progress)

    if output is not None:
        total = _output_layer(network, output, batches, on_examples, progress, finished, device)
    else:
        total = _sum_so_far(progress, (network.size, network.size), device)
        for batch in batches:
            if len(batch) and matrix == "hessian":
                total += _batch_hessian(network, batch).to(device)
            elif len(batch):
                _add_batch_ggn(total, network, batch)
            on_examples(len(batch))
            finished(1, len(batch))
        total = exchange.sum_tensor(total)
    return (total + total.T) / (2 * max(sum(distributed.gathered(progress.examples)), 1))


def _sum_so_far(progress: Progress, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Give the sum of an earlier call, or zeros; additions to it are in the progress."""
    known = progress.arrays.get("sum")
    total = torch.zeros(shape, dtype=torch.float64, device=device) if known is None else known.to(device)
    progress.arrays["sum"] = total
    return total


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose H = P Λ Pᵀ in float64.

    Returns:
        P [p, p] with eigenvectors in columns, Λ [p], largest first.
    """
    values, vectors = eigenpairs(matrix[None])
    return vectors[0], values[0]


def _add_batch_ggn(total: Tensor, network: Network, batch: Batch) -> None:
    outputs = evaluate(network, batch.inputs[:1], batch.targets[:1])[1].shape[1]
    step = micro_batch(network, len(batch), columns=outputs)
    for start in range(0, len(batch), step):
        jacobian, curvature, _ = jacobians(
            network, batch.inputs[start : start + step], batch.targets[start : start + step]
        )
        weighted = torch.einsum("bcd,bdp->bcp", curvature, jacobian)
        total += (jacobian.flatten(0, 1).T @ weighted.flatten(0, 1)).to(total)


def _batch_hessian(network: Network, batch: Batch) -> Tensor:
    """Sum the Hessian over a batch, one row per backward pass, from the row's own parameter on: the rest is symmetric.

    A row then stops at its own layer, and most rows belong to late layers, which are cheap to reach.
    """
    inputs, targets = batch.inputs.to(network.device()), batch.targets.to(network.device())
    wanted = list(network.parameters().values())
    total = torch.zeros(network.size, network.size, dtype=wanted[0].dtype, device=network.device())
    with torch.enable_grad(), differentiable_attention(), recurrent_backward(network.model):
        loss = network.loss(logits_of(network.model(inputs)), targets).sum()
        slopes = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True, allow_unused=True)
        start = 0
        for number, slope in enumerate(slopes):
            end = start + slope.numel()
            if not slope.requires_grad:  # the loss is linear in it, or does not depend on it
                start = end
                continue
            for place, direction in enumerate(torch.eye(slope.numel(), dtype=slope.dtype, device=slope.device)):
                row = torch.autograd.grad(
                    slope,
                    wanted[number:],
                    direction.view_as(slope),
                    retain_graph=True,
                    materialize_grads=True,
                    allow_unused=True,
                )
                total[start + place, start:] = flatten(row)
            total[end:, start:end] = total[start:end, end:].T
            start = end
    return total


def _output_layer(
    network: Network,
    layer: nn.Linear,
    batches: Iterable[Batch],
    on_examples: Callable[[int], None],
    progress: Progress,
    finished: Callable[[int, int], None],
    device: torch.device,
) -> Tensor:
    """Sum Sᵢ ⊗ aᵢaᵢᵀ: for the output layer ∂f_c/∂W_c = a, so one [d, d] product per pair of classes suffices."""
    classes, width = layer.out_features, layer.in_features + (layer.bias is not None)
    lower = _sum_so_far(progress, (classes, classes, width, width), device)
    for a, curvature, count in _features(network, layer, batches, on_examples):
        for c in range(classes):
            for d in range(c + 1):
                lower[c, d] += ((a * curvature[:, c, d, None]).T @ a).to(lower)
        finished(count, len(a))
    blocks = exchange.sum_tensor(lower.clone())
    for c in range(classes):
        for d in range(c):
            blocks[d, c] = blocks[c, d].T
    # From [class, input (bias last)] to the order of the flattened parameters.
    grid = torch.arange(classes * width, device=device).view(classes, width)
    parameters = dict(layer.named_parameters())
    order = []
    for name in network.names:
        part = name.rpartition(".")[2]
        order.append(grid[:, : layer.in_features].reshape(-1) if part == "weight" else grid[:, -1])
        if part not in parameters:
            raise ValueError(f"{name} is not a parameter of the output layer")
    index = torch.cat(order)
    return blocks.permute(0, 2, 1, 3).reshape(classes * width, classes * width)[index][:, index]


def _features(
    network: Network,
    layer: nn.Linear,
    batches: Iterable[Batch],
    on_examples: Callable[[int], None],
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield (a [b, d], S [b, C, C], number of batches) with b near ROWS, because accumulation has a cost."""
    inputs: list[Tensor] = []
    curvatures: list[Tensor] = []
    count = 0
    for batch in batches:
        count += 1
        if len(batch):
            a, outputs = layer_inputs(network, layer, batch.inputs)
            inputs.append(a)
            curvature = output_curvature(network.loss, outputs, batch.targets.to(outputs.device))
            # Of one logit f the outputs are (0, f), and only f moves.
            curvatures.append(curvature[:, 1:, 1:] if reads_one_logit(layer, outputs) else curvature)
        on_examples(len(batch))
        if sum(map(len, inputs)) >= ROWS:
            yield torch.cat(inputs), torch.cat(curvatures), count
            inputs, curvatures, count = [], [], 0
    if inputs:
        yield torch.cat(inputs), torch.cat(curvatures), count


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device
