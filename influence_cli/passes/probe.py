"""Look at examples before the work starts, to find what would make every later number wrong.

They are spread over the classes and over the set: a data set is sorted by class, and its first examples are alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import Batch, computing, read_batches
from influence_cli.data.split import Split, spread
from influence_cli.errors import InfluenceError
from influence_cli.model.configured_loss import check_loss
from influence_cli.model.heads import refuse_probabilities
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task
from influence_cli.passes.finite import check_finite
from influence_cli.passes.randomness import refuse_random_items, refuse_random_outputs
from influence_cli.runtime import work
from influence_cli.runtime.terminal import Terminal, or_silent

# Examples whose ways through the model are compared, whose outputs are looked at, and that stand for a small batch.
SAMPLE, LOOKED, FEW = 100, 32, 8
# Examples that are read twice where nothing is known yet.
READ_TWICE = 64
# Of the examples of each class, this share has to agree on an output, before predictions tell the order; of so many.
AGREED, LEAST = 0.6, 3
# Numbers that the inputs of a sample may have: 2^26, 256 MB.
NUMBERS = 2**26


def look(task: Task, terminal: Terminal | None = None, *, known: bool = False) -> Batch:
    """Check data, model and loss of a task on examples; further calls of the same task do nothing.

    Every command does this before its first number.

    Args:
        task: one checkpoint and its data.
        terminal: told of what draws random numbers without an effect.
        known: whether a complete store of the task exists, whose outputs are compared as well: fewer examples are read.

    Returns:
        Up to ``SAMPLE`` readable training examples (``FEW`` if ``known``), spread over the classes; two at least.

    Raises:
        InfluenceError: a random transform, outputs that are random or depend on the rest of the batch, probabilities
            where logits are expected, a loss of the wrong shape, not finite, or that depends on the rest of the batch.
    """
    terminal, known = or_silent(terminal), known and False not in task.samples
    if known not in task.samples:
        task.samples[known] = _read(task, terminal, known=known)
    sample = task.samples[known]
    if known in task.looked:
        return sample
    with computing(task.train, sample), work.during("the first look at examples"):
        outputs, drawn = _check_outputs(task, sample)
        _check_losses(task, sample, outputs)
    if drawn:
        terminal.warn(
            f"model ({task.checkpoint.name}): it draws random numbers in eval mode ({drawn}), though no output differed"
        )
    task.looked.add(known)
    return sample


def few_of(sample: Batch) -> Batch:
    """Choose up to ``FEW`` examples, evenly: a batch to plan and measure with."""
    return _rows(sample, _evenly(len(sample), FEW))


def _read(task: Task, terminal: Terminal, *, known: bool) -> Batch:
    """Read the examples, and refuse a data set that is random."""
    for split in (task.train, task.test):
        if split is not None:
            some = FEW if known or split is task.test else READ_TWICE
            drawn = refuse_random_items(split, spread(split, some))
            if drawn:
                what = f"{split.where}: the {split.name} data set draws random numbers ({drawn})"
                terminal.warn(f"{what}, though no reading differed")
    return _sample(task.train, FEW if known else SAMPLE)


def _sample(split: Split, count: int) -> Batch:
    """Read examples over all classes; if none of them can be read, the first ones that can."""
    chosen = spread(split, count)
    first = next(read_batches(split, chosen[:1], 1))
    if len(first):
        chosen = spread(split, max(2, min(count, NUMBERS // max(1, first.inputs.numel()))))
    batch = next(read_batches(split, chosen, len(chosen)))
    for start in range(0, len(split), FEW):
        if len(batch):
            break
        batch = next(read_batches(split, split.indices[start : start + FEW], FEW))
    if not len(batch):
        raise InfluenceError(f"{split.where}: no training example can be read: {batch.unreadable[0][1]}")
    # Two copies of one example show as much as two examples.
    return batch if len(batch) > 1 else _rows(batch, np.zeros(2, dtype=np.int64))


def _evenly(count: int, most: int) -> np.ndarray:
    """Choose up to so many of some rows, evenly, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def _rows(batch: Batch, rows: np.ndarray) -> Batch:
    return replace(batch, inputs=batch.inputs[rows], targets=batch.targets[rows], indices=batch.indices[rows])


def _check_outputs(task: Task, sample: Batch) -> tuple[Tensor, str]:
    """Give the outputs of the first ``LOOKED`` examples' choice, and what draws random numbers without effect."""
    where = f"model ({task.checkpoint.name})"
    inputs = sample.inputs.to(task.device)
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        bad = int(sample.indices[int(torch.nonzero(~inputs.isfinite().flatten(1).all(1))[0])])
        raise InfluenceError(f"{task.train.title(bad)} has NaN or infinite pixels", "fix it, or list it under exclude")

    def run(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(task.model(inputs))

    looked = inputs[_evenly(len(inputs), LOOKED)]
    outputs, drawn = refuse_random_outputs(run, looked, where)
    if not bool(outputs.isfinite().all()):
        row = int(torch.nonzero(~outputs.isfinite().all(dim=1))[0])
        title = task.train.title(int(sample.indices[_evenly(len(inputs), LOOKED)[row]]))
        raise InfluenceError(f"{where}: the model gives NaN or infinity on {title}")
    few = _evenly(len(looked), FEW)
    alone = torch.cat([run(looked[row : row + 1]) for row in few.tolist()])
    if not torch.allclose(outputs[few], alone, rtol=1e-3, atol=1e-3 * float(outputs.abs().max()) + 1e-6):
        raise InfluenceError(
            f"{where}: an example's output depends on the rest of its batch",
            "such a model has no per-example gradient; BatchNorm without running statistics causes this",
        )
    if task.loss_name == "cross_entropy":
        refuse_probabilities(task.model, outputs, where)
    return outputs, drawn


def _check_losses(task: Task, sample: Batch, outputs: Tensor) -> None:
    """Refuse a loss that is not one finite number per example, or not the example's alone."""
    looked = _rows(sample, _evenly(len(sample), LOOKED))
    targets = looked.targets.to(outputs.device)
    losses = check_loss(task.loss, task.loss_name, outputs, targets)
    check_finite(task.train, looked, losses)
    with torch.no_grad():
        alone = torch.cat([task.loss(outputs[row : row + 1], targets[row : row + 1]) for row in range(len(targets))])
    if not torch.allclose(losses, alone, rtol=1e-3, atol=1e-3 * float(losses.abs().max()) + 1e-6):
        raise InfluenceError(
            f"loss {task.loss_name}: an example's loss depends on the rest of its batch",
            "it must return each example's own loss, not divided by what the batch holds (a sum of weights, say)",
        )


def checkpoint_warnings(
    accuracy: float,
    classes: int,
    gradient_norm: float,
    typical_norm: float,
    examples: int | None = None,
    *,
    order: str = "",
) -> list[str]:
    """Say what makes every later number doubtful: accuracy near chance, or a point that is not a minimum.

    Args:
        accuracy: on the training examples.
        classes: their number.
        gradient_norm: ‖∇R + l2·θ̂‖.
        typical_norm: root mean square of ‖gᵢ‖.
        examples: how many were sampled, or None for all.
        order: what ``other_order`` says of them.
    """
    warnings = []
    if order:
        warnings.append(f"training accuracy {accuracy:.1%}, but {order}")
    elif near_chance(accuracy, classes):
        warnings.append(
            f"training accuracy {accuracy:.1%} is near chance: check the transform, the class order and the checkpoint"
        )
    if not_minimum(gradient_norm, typical_norm, examples):
        warnings.append(
            "training stopped early (usual with augmentation): trust the order, not the sizes; mislabels is "
            "unaffected; if training did not stop early, check l2 and the transform"
        )
    return warnings


def by_predictions(classes: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> dict[str, int] | None:
    """Read the output of each class from what the model says of its examples.

    Args:
        classes: names by class number.
        labels: int64 [n], class numbers of the data.
        predicted: int64 [n], outputs.

    Returns:
        The output by class name; None unless every class has at least three examples, most of which agree, and no two
        classes share an output.
    """
    wide = int(max(predicted.max(initial=0) + 1, len(classes)))
    pairs, counts = np.unique(labels.astype(np.int64) * wide + predicted, return_counts=True)
    best: dict[int, tuple[int, int, int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        number, output = divmod(pair, wide)
        most, of, total = best.get(number, (0, 0, 0))
        best[number] = (*((count, output) if count > most else (most, of)), total + count)
    outputs: dict[str, int] = {}
    for number, name in enumerate(classes):
        most, output, total = best.get(number, (0, 0, 0))
        if total < LEAST or most < AGREED * total:
            return None
        outputs[name] = output
    return outputs if len(set(outputs.values())) == len(outputs) else None


def other_order(classes: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> str:
    """Say which order of the classes the predictions fit, if it is another one than the data set's.

    Args:
        classes: names by output number.
        labels: int64 [n].
        predicted: int64 [n], outputs.
    """
    outputs = by_predictions(classes, labels, predicted)
    if outputs is None or list(outputs.values()) == list(range(len(classes))):
        return ""
    moved = sum(number != output for number, output in enumerate(outputs.values()))
    written = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {output}" for name, output in outputs.items())
    return (
        f"the predictions fit another order of the classes ({moved} of {len(classes)} have another output): if the "
        f"model was trained with it, write train.classes: {{{written}}}"
    )


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
