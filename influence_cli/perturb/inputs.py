"""The training image that a perturbation changes, read and checked."""

from __future__ import annotations

import numpy as np
import torch

from influence_cli.data.batches import Batch, read_batches, refuse_unreadable
from influence_cli.errors import InfluenceError
from influence_cli.model.network import recurrent_backward
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task


def read_training_image(task: Task, index: int) -> Batch:
    """Read one training example as the model takes it.

    Raises:
        InfluenceError: it is not in use, cannot be read, or the model is not differentiable there.
    """
    split = task.train
    if not 0 <= index < len(split.source):
        raise InfluenceError(f"there is no training example {index}; valid indices are 0 to {len(split.source) - 1}")
    if index not in split.indices:
        raise InfluenceError(f"{split.title(index)} is excluded (train.exclude)", "choose one that is in use")
    batch = next(read_batches(split, np.array([index]), 1))
    refuse_unreadable(batch)
    check_differentiable(task, batch)
    return batch


def check_differentiable(task: Task, batch: Batch) -> None:
    """Refuse inputs of whole numbers, and a model without a derivative with respect to its input."""
    title = task.train.title(int(batch.indices[0]))
    if not batch.inputs.is_floating_point():
        raise InfluenceError(
            f"the input of {title} is {batch.inputs.dtype}: whole numbers have no derivative",
            "perturb works on float images; influence rank and verify work here",
        )
    x = batch.inputs.to(task.device).clone().requires_grad_()
    with torch.enable_grad(), recurrent_backward(task.model):
        outputs = logits_of(task.model(x.clone()))
        # Some models have frozen parameters: without a path to its input the output then has no graph.
        cut = not outputs.requires_grad or torch.autograd.grad(outputs.sum(), x, allow_unused=True)[0] is None
    if cut:
        raise InfluenceError(
            f"{_name(task)} is not differentiable with respect to its input: no output depends on the pixels "
            "through operations that autograd follows",
            "something inside the model detaches them, such as .detach(), torch.no_grad(), numpy or rounding to whole "
            "numbers: do that on a copy, or move it to train.transform",
        )


def _name(task: Task) -> str:
    return f"model ({task.checkpoint.name})"
