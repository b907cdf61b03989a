"""Do model, data and loss fit together? Found out with one example, before any work, for every command alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.config.schema import Config
from influence_cli.data.split import Split, raw_item, spread, to_input
from influence_cli.errors import InfluenceError, describe
from influence_cli.model.configured_loss import ConfiguredLoss, check_loss, loss_for, refuse_logits
from influence_cli.model.guard import settle
from influence_cli.model.heads import has_one_logit, refuse_probabilities, refuse_sigmoid
from influence_cli.model.outputs import Loss, logits_of
from influence_cli.runtime.fence import fenced

# Examples that may be unreadable before the first; examples that a probability is told from a logit by.
TRIED, SPREAD = 8, 32
# Labels of examples that a loss leaves out, by custom and by torch's default.
IGNORED = (-1, -100)


def match(
    model: nn.Module, train: Split, test: Split | None, configured: ConfiguredLoss, config: Config
) -> tuple[tuple[str, ...], Loss]:
    """Run one training example through the model and the loss.

    Args:
        model: on its device, in eval mode.
        train: training examples.
        test: test examples, or None.
        configured: the loss.
        config: for the lines of errors.

    Returns:
        Class names by output number, and the loss of the model's logits.

    Raises:
        InfluenceError: the input, the number of outputs, a label or the loss does not fit.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    where = config.where("model", "factory")
    index, outputs = _first_outputs(model, train, device, where)
    names = _class_names(train, test, outputs.shape[1], config, one_logit=has_one_logit(model))
    refuse_sigmoid(model, outputs, lambda: spread_outputs(model, train, device, SPREAD)[1], where)
    if config.loss.factory == "cross_entropy":
        refuse_probabilities(model, outputs, where)
    loss = loss_for(configured, outputs.shape[1], one_logit=has_one_logit(model))
    refuse_logits(configured, outputs)
    target = int(train.labels[index])
    if target >= 0:  # an excluded example may have none
        # Two examples: one number for both is then no loss per example.
        check_loss(loss, configured.name, outputs.repeat(2, 1), torch.tensor([target, target], device=device))
    return names, loss


def _first_outputs(model: nn.Module, train: Split, device: torch.device, where: str) -> tuple[int, Tensor]:
    """Run the first training example that can be read: does the input fit? Its position, and its outputs [1, C]."""
    for index in train.indices[:TRIED].tolist():
        try:
            image, _ = raw_item(train, index)
        except InfluenceError:
            continue  # unreadable: the pass over the data names it
        tensor = to_input(train, image, train.title(index))[None]
        title = train.title(index)
        with fenced():
            outputs = settle(model, tensor, partial(_run, model, device=device, title=title, where=where), where)
        if outputs.ndim != 2 or not outputs.shape[1]:
            raise InfluenceError(
                f"{where}: the model returns {list(outputs.shape)} for one example",
                "a classifier returns [batch, classes], or [batch, 1] for two classes",
            )
        if has_one_logit(model):
            # One number for one example may be a sum over the batch.
            title = f"{train.title(index)}, given twice,"
            twice = _run(model, torch.cat([tensor, tensor]), device, title, where)
            if twice.shape != (2, 2):
                raise InfluenceError(
                    f"{where}: the model returns {list(twice.shape)} for two examples",
                    "a classifier returns [batch, classes], or [batch, 1] for two classes",
                )
        return index, outputs
    # All of the first few are unreadable: the pass reports the first of them, by name.
    raw_item(train, int(train.indices[0]))
    raise InfluenceError(f"{train.where}: no training example can be read")


def _run(model: nn.Module, tensor: Tensor, device: torch.device, title: str, where: str) -> Tensor:
    try:
        with torch.no_grad():
            return logits_of(model(tensor.to(device)))
    except InfluenceError as error:
        at = "" if error.message.startswith(where.rpartition(":")[0]) else f"{where}: "
        raise InfluenceError(f"{at}{error.message}", error.hint) from error
    except Exception as error:
        if "more than 1 value per channel" in str(error):  # of torch's batch norm, for a batch of one example
            raise InfluenceError(
                f"{where}: the model's output for an example depends on the rest of its batch: {describe(error)}",
                "such a model has no per-example gradient; BatchNorm without running statistics causes this",
            ) from error
        missing = _other_arguments(model.forward)
        raise InfluenceError(
            f"{where}: the model fails on {title} of shape {list(tensor.shape[1:])}: {describe(error)}",
            f"the model is called with images alone, but its forward also needs {', '.join(missing)}: name a wrapper "
            f"whose forward(self, x) gives the logits without it: factory: ./model.py:build"
            if missing
            else "does train.transform give what the model was trained on?",
        ) from error


def _other_arguments(forward: Callable[..., object]) -> list[str]:
    """Name what a forward needs besides its first argument."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in parameters if parameter.kind in kinds]
    others = positional[1:] + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [repr(parameter.name) for parameter in others if parameter.default is parameter.empty]


def spread_outputs(model: nn.Module, train: Split, device: torch.device, count: int) -> tuple[np.ndarray, Tensor]:
    """Run labelled examples from all over the training set and its classes: their positions [k], and outputs [k, C]."""
    chosen = spread(train, count)
    kept, outputs = [], list[Tensor]()
    for index in chosen.tolist():
        try:
            image, _ = raw_item(train, index)
        except InfluenceError:
            if index == chosen[-1] and not outputs:
                raise  # none of them can be read
            continue  # unreadable: the pass over the data names it, and the others decide
        with torch.no_grad():
            outputs.append(logits_of(model(to_input(train, image, train.title(index))[None].to(device))))
        kept.append(index)
    return np.array(kept, dtype=np.int64), torch.cat(outputs)


def _class_names(train: Split, test: Split | None, outputs: int, config: Config, *, one_logit: bool) -> tuple[str, ...]:
    said = "one logit (two classes)" if one_logit else f"{outputs} outputs"
    used = train.labels[train.indices]
    if train.class_outputs is not None:
        top = max(train.class_outputs.values(), default=-1)
        if top >= outputs:
            name = (train.classes or ())[top]
            raise InfluenceError(
                f"{config.where('train', 'classes')}: {name} is output {top}, but the model has {said}, 0 to "
                f"{outputs - 1}"
            )
    elif train.classes is not None and len(train.classes) != outputs:
        raise InfluenceError(
            f"{train.where}: {len(train.classes)} names, {said}, labels {used.min()} to {used.max()}: "
            "name the classes yourself",
            "train.classes: "
            + (
                f"a list of {outputs} names, one per output in order"
                if len(train.classes) > outputs and used.max() < outputs
                else f"{{{train.classes[int(used.min())]}: {min(int(used.min()), outputs - 1)}, …}}, each class with "
                "its output number, or a file with the name of every output"
            ),
        )
    for split in (train, test):
        if split is not None and not (split is test and split.is_unlabelled):
            _refuse_outside(split, outputs, said)
    if train.classes is None:
        return tuple(str(number) for number in range(outputs))
    return numbered(train.classes, outputs)


def numbered(names: tuple[str, ...], outputs: int) -> tuple[str, ...]:
    """Give outputs beyond the names their number as a name, and cut names of outputs that there are not."""
    more = (str(number) if str(number) not in names else f"output {number}" for number in range(len(names), outputs))
    return (*names[:outputs], *more)


def _refuse_outside(split: Split, outputs: int, said: str) -> None:
    used = split.labels[split.indices]
    outside = split.indices[(used < 0) | (used >= outputs)]
    if not len(outside):
        return
    index, values = int(outside[0]), np.unique(used)
    hint = f"{len(outside)} examples are out of range; do labels start at 0, and is this the right model?"
    if len(values) <= outputs and split.name == "train" and split.class_outputs is None:
        pairs = ", ".join(f"{value}: {number}" for number, value in enumerate(values[:4].tolist()))
        hint = f"if each label is one output, train.classes: {{{pairs}{', …' if len(values) > 4 else ''}}} says which"
    elif split.name == "train" and int(split.labels[index]) in IGNORED:
        count = int((used == split.labels[index]).sum())
        hint = f"a loss ignores such examples ({count} here), so they have no influence: list them under train.exclude"
    raise InfluenceError(
        f"{split.where}: {split.title(index)} has the label {split.labels[index]}, but the model has {said}, "
        f"so labels are 0 to {outputs - 1}",
        hint,
    )
