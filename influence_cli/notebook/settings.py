"""From the arguments of a `Debugger` to the config that a YAML file would say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from influence_cli.config.load import parse_config
from influence_cli.config.schema import Config
from influence_cli.config.yaml_reader import Keys
from influence_cli.errors import InfluenceError
from influence_cli.notebook.handed import MEANS, Handed, code_of

HANDED = "influence_cli.notebook.handed"
NAME = "Debugger"
# How a message names one of the factories, and its arguments.
_HANDED_NAME = re.compile(rf"(?:loss )?{re.escape(HANDED)}\.(\w+)(?: \{{[^}}]*\}})?")
# What a message calls each part, in the place of a line of a file.
PLACES: dict[Keys, str] = {
    (): NAME,
    ("model",): "the model",
    ("loss",): "loss",
    ("l2",): "l2",
    ("train",): "train",
    ("train", "classes"): "classes",
    ("test",): "test",
    ("device",): "device",
    ("curvature", "method"): "method",
    ("curvature", "damping"): "damping",
    ("gradients", "store"): "store",
}
# Losses of torch that the config knows, and the arguments of each that change it.
_KNOWN = {
    nn.CrossEntropyLoss: ("weight", "ignore_index", "label_smoothing"),
    nn.NLLLoss: ("weight", "ignore_index"),
    nn.BCEWithLogitsLoss: ("weight", "pos_weight"),
}
_UNCHANGED = {"ignore_index": -100, "label_smoothing": 0.0}
_FUNCTIONS = {
    functional.cross_entropy: "cross_entropy",
    functional.nll_loss: "torch.nn.functional.nll_loss",
    functional.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}


def config_of(
    handed: Handed,
    loss: str | dict[str, Any],
    *,
    classes: Sequence[str] | None,
    values: Mapping[str, object],
    folder: Path,
) -> Config:
    """Write the config whose factories give the objects of the notebook.

    Args:
        handed: the objects.
        loss: from ``loss_section``.
        classes: the name of every output of the model; None for those of the training set.
        values: further keys, such as ``curvature.damping``; None leaves a key at its default.
        folder: that relative paths start from.

    Raises:
        InfluenceError: an unknown key, or a value that does not fit.
    """
    sections: dict[str, Any] = {
        "model": {"factory": f"{HANDED}.model", "args": {"code": code_of(handed.model)}},
        "loss": loss,
    }
    for name, examples in (("train", handed.train), ("test", handed.test)):
        if examples is not None:
            step = {"factory": f"{HANDED}.{name}_transform", "args": {"written": repr(examples.transform)}}
            # An empty list, not nothing: test examples would get the transform of the training examples.
            steps = [] if examples.transform is None else [step]
            sections[name] = {"dataset": f"{HANDED}.{name}", "transform": steps}
    if classes is not None:
        sections["train"]["classes"] = [str(name) for name in classes]
    overrides = [f"{key}={_written(key, value)}" for key, value in values.items() if value is not None]
    try:
        config = parse_config(json.dumps(sections), folder / NAME, overrides)
    except InfluenceError as error:
        raise in_python(error) from error
    config._places.clear()
    config._places.update(PLACES)
    return config


def _written(key: str, value: object) -> str:
    try:
        return json.dumps(str(value) if isinstance(value, Path) else value)
    except (TypeError, ValueError) as error:
        raise InfluenceError(
            f"{NAME}: {key} is a {type(value).__name__}: expected a number, a text, a list or a dict of these",
            "docs/config.md has every key",
        ) from error


def in_python(error: InfluenceError) -> InfluenceError:
    """Give an error in the words of Python: options are arguments here, and factories are what was given."""
    message, hint = (_HANDED_NAME.sub(lambda match: f"the {match[1].lower()}", t) for t in (error.message, error.hint))
    message = message.replace("--signal ", "signal ")
    if message.startswith("--set "):
        message = f"{NAME}: {message.removeprefix('--set ')}"
    return InfluenceError(message, hint)


def loss_section(loss: str | Callable[..., Any]) -> tuple[str | dict[str, Any], Callable[..., Any] | None]:
    """Say what ``loss`` of the config is, and which callable has to be handed for it.

    Args:
        loss: a name that the config knows, a loss of torch, or a callable (outputs, targets) to [batch].

    Raises:
        InfluenceError: it cannot be called, or it sums over the batch.
    """
    if isinstance(loss, str):
        return loss, None
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        loss = loss()
    if not callable(loss):
        raise InfluenceError(
            f"loss: a {type(loss).__name__} is neither a name nor a function",
            "give nn.CrossEntropyLoss(), or a function (outputs, targets) that returns one loss per example",
        )
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in MEANS:
        raise InfluenceError(
            f"loss: {type(loss).__name__} has reduction={reduction!r}, but the objective here is a mean",
            "give it with reduction='mean', and divide the weight decay of a sum by n (l2)",
        )
    if loss in _FUNCTIONS:
        return _FUNCTIONS[loss], None
    if type(loss) in _KNOWN:
        args = {name: _plain(getattr(loss, name)) for name in _KNOWN[type(loss)]}
        args = {name: value for name, value in args.items() if value is not None and value != _UNCHANGED.get(name)}
        return {"factory": f"torch.nn.{type(loss).__name__}", "args": args}, None
    return {"factory": f"{HANDED}.Loss", "args": {"code": code_of(loss)}}, loss


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
