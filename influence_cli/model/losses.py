"""Losses by name, and the loss that a config names: (outputs [b, C], targets [b]) to losses [b].

``hinge`` has no curvature, so it cannot explain an SVM: its second derivative is 0 wherever it exists.
``smooth_hinge`` replaces it to explain a model trained with the hinge (Koh & Liang, ICML 2017, section 4.3, figure 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.config.schema import Config
from influence_cli.config.user_code import bind, call, import_object
from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.model.outputs import Loss

# Koh & Liang's: estimates agree with retraining there, r = .98 (bench/paper/hinge.py).
TEMPERATURE = 0.001
# Scores near 1 are 1e-7 apart in float32, so rounding would decide inside a narrower bend.
LEAST_TEMPERATURE = 1e-6


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute max(0, 1 − s) of the margin s = f_y − max_{j≠y} f_j: the hinge of Crammer & Singer (JMLR 2001).

    It is convex in f, because s is concave in f and the hinge falls with s. For two classes s is the output difference.
    If two classes tie for the maximum, or s = 1, the slope is the mean of both sides' slopes.

    Args:
        outputs: f [b, C], scores, C ≥ 2.
        targets: y [b].

    Returns:
        Losses [b], ≥ 0, in units of the score.

    Raises:
        ValueError: a single output has no margin.
    """
    return _excess(outputs, targets).amax(dim=1)


def smooth_hinge(outputs: Tensor, targets: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Compute t·log(1 + Σ_{j≠y} exp((1 − f_y + f_j)/t)), the hinge with its kinks rounded off over a width of about t.

    For two classes it is SmoothHinge(s, t) = t·log(1 + exp((1 − s)/t)) of Koh & Liang (ICML 2017, section 4.3), s the
    difference of the outputs. For more it is smooth where two classes tie for the largest score, too. It is convex in
    f for any C, lies between the hinge and the hinge + t·log C, and is t times the cross-entropy of the outputs, one
    added to all but the label's, at temperature t. ∇²_f is large near the margin (1/(4t) in s) and 0 far from it,
    where misclassified examples still have their whole slope: directions without curvature count.

    Args:
        outputs: f [b, C], scores, C ≥ 2.
        targets: y [b].
        temperature: t > 0, in units of the score.

    Returns:
        Losses [b], ≥ 0, in units of the score.

    Raises:
        ValueError: a single output has no margin.
    """
    return temperature * torch.logsumexp(_excess(outputs, targets) / temperature, dim=1)


def _excess(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 − f_y + f_j of the other classes j, 0 for the label: [b, C].

    Differences first: then the large scores cancel before they are divided by t, and both derivatives add up to zero
    over the classes exactly.
    """
    if outputs.shape[1] < 2:
        raise ValueError("a hinge needs two or more classes, one output per class")
    label_scores = outputs.gather(1, targets[:, None])
    label = torch.arange(outputs.shape[1], device=outputs.device) == targets[:, None]
    return (1 + (outputs - label_scores)).masked_fill(label, 0.0)


def load_loss(config: Config) -> tuple[Loss, bool]:
    """Resolve the loss: a name that is known, or a class to make, or a function with its arguments bound.

    Returns:
        The loss, and whether it is known to be convex in the outputs.

    Raises:
        InfluenceError: an unknown name or argument, or a temperature out of range, at the config's line.
    """
    name, args = config.loss.factory, config.loss.args

    def where(*keys: str) -> str:
        return config.where("loss", *(keys or ("factory",)))

    if "." not in name and ":" not in name:
        return _by_name(name, args, where), True
    factory = import_object(name, config.folder, where())
    if isinstance(factory, type):
        made = call(factory, args, config.folder, name, where)
        # Softmax cross-entropy is convex in the logits, smoothed and weighted included.
        return made, isinstance(made, nn.CrossEntropyLoss)
    if not callable(factory):
        raise InfluenceError(f"{where()}: {name} is a {type(factory).__name__}, not a function or a class")
    return bind(factory, args, name, where), False


def may_lack_curvature(loss: Loss, name: str) -> bool:
    """Say whether the loss may have a slope along a direction in which it has no curvature, as a hinge has.

    A cross-entropy has none: its slope lies in the range of ∇²_f ℓ, so a direction of curvature 0 can be left out.
    """
    return not (name == "cross_entropy" or isinstance(loss, nn.CrossEntropyLoss))


def _by_name(name: str, args: dict[str, Any], where: Callable[..., str]) -> Loss:
    if name not in ("cross_entropy", "hinge", "smooth_hinge"):
        raise InfluenceError(
            f"{where()}: unknown loss {name!r}",
            "write cross_entropy, hinge, smooth_hinge, a dotted name, or {factory: ./losses.py:mine}: "
            "(outputs, targets) to [batch]",
        )
    if name == "smooth_hinge":
        for key in args:
            if key != "temperature":
                hint = did_you_mean(key, ["temperature"])
                raise InfluenceError(f"{where('args', key)}: loss smooth_hinge takes no argument {key!r}", hint)
        temperature = _temperature(args.get("temperature", TEMPERATURE), where("args", "temperature"))
        return partial(smooth_hinge, temperature=temperature)
    if args:
        raise InfluenceError(
            f"{where('args')}: loss {name} takes no args",
            "for smoothing: {factory: torch.nn.CrossEntropyLoss, args: {label_smoothing: 0.1, reduction: none}}"
            if name == "cross_entropy"
            else "for smoothing: {factory: smooth_hinge, args: {temperature: 0.001}}",
        )
    return hinge if name == "hinge" else partial(nn.functional.cross_entropy, reduction="none")


def _temperature(given: Any, where: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise InfluenceError(f"{where}: temperature is {given!r}: expected a number", "such as 0.001")
    if not (math.isfinite(given) and given >= LEAST_TEMPERATURE):
        raise InfluenceError(
            f"{where}: temperature is {given:g}: expected a finite number ≥ {LEAST_TEMPERATURE:g}",
            "for the hinge itself use loss: hinge; float32 scores cannot resolve a smaller temperature"
            if given < 1
            else "such as 0.001",
        )
    return float(given)
