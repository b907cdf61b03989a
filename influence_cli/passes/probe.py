"""Look at a few examples before the work starts, to find what would make every later number wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import Batch, read_batches
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError
from influence_cli.model.configured_loss import check_loss
from influence_cli.model.heads import refuse_probabilities
from influence_cli.model.network import Network, track
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task
from influence_cli.passes.finite import check_finite
from influence_cli.passes.gradients import make_network

EXAMPLES = 8
# A random flip with probability ½ goes unnoticed in this many readings once in 128 times.
READINGS = 8


def probe(task: Task, patterns: Sequence[str], where: str) -> tuple[Network, Batch]:
    """Check data, model and loss on a few training examples, and decide how example gradients are computed.

    Args:
        task: one checkpoint and its data.
        patterns: ``gradients.layers``.
        where: the config's line of them.

    Returns:
        The network with its tracked parameters, and the examples.

    Raises:
        InfluenceError: a random transform, outputs that are random or depend on the rest of the batch, probabilities
            where logits are expected, a loss of the wrong shape or not finite.
    """
    check_repeatable(task.train)
    if task.test is not None:
        check_repeatable(task.test)
    network = track(task.model, task.loss, patterns, where)
    batch = _readable(task.train)
    outputs = _check_outputs(task, network, batch)
    losses = check_loss(task.loss, task.loss_name, outputs, batch.targets.to(outputs.device))
    check_finite(task.train, batch, losses)
    if len(batch) < 2:
        # Two copies of one example test vmap as well as two examples.
        batch = Batch(batch.inputs.repeat_interleave(2, 0), batch.targets.repeat(2), np.repeat(batch.indices, 2))
    return make_network(network, batch.inputs), batch


def check_repeatable(split: Split) -> None:
    """Refuse a split whose first item changes from one reading to the next."""
    index = int(split.indices[0])
    title = split.title(index)
    try:
        first = to_input(split, raw_item(split, index)[0], title)
    except InfluenceError:
        return  # unreadable or not an input: the pass over the data names it
    for _ in range(READINGS - 1):
        again = to_input(split, raw_item(split, index)[0], title)
        if again.shape != first.shape or not torch.equal(again, first):
            raise InfluenceError(
                f"{split.where}: the {split.name} transform is random: two readings of {title} differ",
                "give the evaluation transform, without augmentation: a gradient belongs to one fixed input",
            )


def _readable(split: Split) -> Batch:
    """Read the first few training examples that can be read."""
    for start in range(0, len(split), EXAMPLES):
        batch = next(read_batches(split, split.indices[start : start + EXAMPLES], EXAMPLES))
        if len(batch):
            return batch
    raise InfluenceError(f"{split.where}: no training example can be read: {batch.unreadable[0][1]}")


def _check_outputs(task: Task, network: Network, batch: Batch) -> Tensor:
    inputs = batch.inputs.to(network.device())
    where = f"model ({task.checkpoint.name})"
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        bad = int(batch.indices[int(torch.nonzero(~inputs.isfinite().flatten(1).all(1))[0])])
        raise InfluenceError(f"{task.train.title(bad)} has NaN or infinite pixels", "fix it, or list it under exclude")
    outputs = _forward(task, inputs)
    if not torch.equal(outputs, _forward(task, inputs)):
        raise InfluenceError(
            f"{where}: the outputs are random in eval mode",
            "dropout outside nn.Dropout? F.dropout needs training=self.training",
        )
    if not bool(outputs.isfinite().all()):
        raise InfluenceError(f"{where}: the model gives NaN or infinity on the first training examples")
    alone = torch.cat([_forward(task, x[None]) for x in inputs])
    if not torch.allclose(outputs, alone, rtol=1e-3, atol=1e-3 * float(outputs.abs().max()) + 1e-6):
        raise InfluenceError(
            f"{where}: an example's output depends on the rest of its batch",
            "such a model has no per-example gradient; BatchNorm without running statistics causes this",
        )
    if task.loss_name == "cross_entropy":
        refuse_probabilities(task.model, outputs, where)
    return outputs


def _forward(task: Task, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(task.model(inputs))


def checkpoint_warnings(
    accuracy: float, classes: int, gradient_norm: float, typical_norm: float, examples: int | None = None
) -> list[str]:
    """Say what makes every later number doubtful: accuracy near chance, or a point that is not a minimum.

    Args:
        accuracy: on the training examples.
        classes: their number.
        gradient_norm: ‖∇R + l2·θ̂‖.
        typical_norm: root mean square of ‖gᵢ‖.
        examples: how many were sampled, or None for all.
    """
    warnings = []
    if near_chance(accuracy, classes):
        warnings.append(
            f"training accuracy {accuracy:.1%} is near chance: check the transform, the class order and the checkpoint"
        )
    if not_minimum(gradient_norm, typical_norm, examples):
        warnings.append(
            "training stopped early (usual with augmentation): trust the order, not the sizes; mislabels is "
            "unaffected; if training did not stop early, check l2 and the transform"
        )
    return warnings


def near_chance(accuracy: float, classes: int) -> bool:
    """Say whether an accuracy is near chance (less than a tenth of the way to 1)."""
    return (accuracy - 1 / classes) < 0.1 * (1 - 1 / classes)


def not_minimum(gradient_norm: float, typical_norm: float, examples: int | None = None) -> bool:
    """Say whether the mean gradient is too large for a minimum: above a tenth of a single example's.

    Args:
        gradient_norm: ‖∇R + l2·θ̂‖.
        typical_norm: root mean square of ‖gᵢ‖.
        examples: how many were sampled (their mean is noisy), or None for all.
    """
    noise = 2 / np.sqrt(examples) if examples else 0.0
    return gradient_norm > (0.1 + noise) * typical_norm > 0
