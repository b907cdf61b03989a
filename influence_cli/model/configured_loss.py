"""The loss that a config names: by name, by dotted name with plain lists, or the user's own; checked before any work.

Losses of torch that are a cross-entropy of the outputs become one, which is convex in them and has a curvature:

- ``NLLLoss`` of log-softmax outputs o: −o_y = −log softmax(o)_y for every parameter, because log-softmax changes
  nothing the second time. As a function of o it is linear, so the GGN of its own form would be 0.
- ``binary_cross_entropy_with_logits`` of one logit f: the cross-entropy of (0, f), with the class weights
  (w, w·pos_weight).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.config.schema import Config
from influence_cli.config.user_code import bind, call, import_object
from influence_cli.errors import InfluenceError, describe, did_you_mean
from influence_cli.model.heads import OneLogitLoss
from influence_cli.model.losses import LEAST_TEMPERATURE, TEMPERATURE, hinge, smooth_hinge
from influence_cli.model.outputs import Loss
from influence_cli.model.sample_weights import WeightedLoss

PLAIN = "cross_entropy"
BINARY = "binary_cross_entropy_with_logits"
BY_NAME = (PLAIN, BINARY, "hinge", "smooth_hinge")
# What a loss reads: logits of classes; one logit; log-probabilities of classes; whatever the user's own loss reads.
CLASSES, LOGIT, LOG_PROBABILITIES, OWN = "classes", "logit", "log-probabilities", "own"
# Arguments that change nothing here.
OLD = ("reduction", "reduce", "size_average")


@dataclass(frozen=True)
class ConfiguredLoss:
    """A loss before it is known what the model returns.

    Attributes:
        loss: (outputs, targets) to losses.
        name: for fingerprints and reports.
        written: as the config writes it, without its arguments.
        convex: whether it is known to be convex in the outputs; None for a loss of the user's own, which is measured
            (model/measured_loss.py).
        reads: ``CLASSES``, ``LOGIT``, ``LOG_PROBABILITIES`` or ``OWN``.
        from_library: whether it is one of torch or torchvision, whose targets for one logit are numbers like it.
        where: the config's line.
        weights: class weights w [C] by whose sum over the examples the loss's own mean divides; None for n.
        ignored: the label whose examples that mean leaves out; None if there is none.
    """

    loss: Loss
    name: str
    written: str
    convex: bool | None
    reads: str
    from_library: bool
    where: str
    weights: Tensor | None = None
    ignored: int | None = None


def load_loss(config: Config) -> ConfiguredLoss:
    """Resolve the loss: a name that is known, or a class to make, or a function with its arguments bound.

    Raises:
        InfluenceError: an unknown name or argument, or a value that does not fit, at the config's line.
    """
    name, args = config.loss.factory, config.loss.args
    title = name + (f" {args}" if args else "")

    def where(*keys: str) -> str:
        return config.where("loss", *(keys or ("factory",)))

    if "." not in name and ":" not in name:
        if name == BINARY:
            return _known_binary(BINARY, args, where)
        return ConfiguredLoss(
            _by_name(name, args, where), title, name, convex=True, reads=CLASSES, from_library=False, where=where()
        )
    factory = import_object(name, config.folder, where())
    if not callable(factory):
        raise InfluenceError(f"{where()}: {name} is a {type(factory).__name__}, not a function or a class")
    given = _per_example(factory, _with_tensors(factory, args, where), where)
    if factory in (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits):
        return _known_binary(name, {key: value for key, value in given.items() if key not in OLD}, where)
    if factory in (nn.NLLLoss, functional.nll_loss):
        made = call(nn.CrossEntropyLoss, given, config.folder, name, where)
        plain = not any(value is not None for key, value in args.items() if key not in OLD)
        return ConfiguredLoss(
            made,
            PLAIN if plain else title,
            name,
            convex=True,
            reads=LOG_PROBABILITIES,
            from_library=True,
            where=where(),
            **_divisor(made),
        )
    if factory is functional.cross_entropy:
        factory = nn.CrossEntropyLoss
    from_library = str(getattr(factory, "__module__", "")).split(".")[0] in ("torch", "torchvision")
    if isinstance(factory, type):
        made = call(factory, given, config.folder, name, where)
        # Softmax cross-entropy is convex in the logits, smoothed and weighted included; a subclass may compute more.
        known = isinstance(made, nn.CrossEntropyLoss) and type(made).forward is nn.CrossEntropyLoss.forward
        reads = CLASSES if isinstance(made, nn.CrossEntropyLoss) else OWN
        return ConfiguredLoss(
            made,
            title,
            name,
            convex=True if known else None,
            reads=reads,
            from_library=from_library,
            where=where(),
            **(_divisor(made) if known else {}),
        )
    bound: Loss = bind(factory, given, name, where)
    if any(isinstance(value, Tensor) for value in given.values()):
        bound = BoundLoss(factory, given)
    return ConfiguredLoss(bound, title, name, convex=None, reads=OWN, from_library=from_library, where=where())


def loss_for(configured: ConfiguredLoss, outputs: int, *, one_logit: bool) -> Loss:
    """Give the loss of the logits [b, C] of a model, whose single logit is read as two classes.

    Args:
        configured: the loss.
        outputs: C.
        one_logit: whether the model returned one logit per example.

    Raises:
        InfluenceError: a loss of one logit for a model with several, or the other way round.
    """
    where, name, reads = configured.where, configured.written, configured.reads
    if reads == LOGIT and not one_logit:
        raise InfluenceError(
            f"{where}: {name} takes one logit per example, but the model returns {outputs}",
            "for one label per image use loss: cross_entropy; if the model was trained on several yes-or-no answers "
            "per image, name your own loss: loss: {factory: ./losses.py:mine}",
        )
    if reads == LOG_PROBABILITIES and one_logit:
        raise InfluenceError(
            f"{where}: {name} takes log-probabilities of classes, but the model returns one logit",
            "the loss of one logit is cross_entropy or binary_cross_entropy_with_logits",
        )
    if reads == OWN and one_logit:
        return OneLogitLoss(configured.loss, plain=configured.from_library)
    return configured.loss


def check_loss(loss: Loss, name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Run the loss on a few examples: one number per example, with a slope in the outputs.

    Args:
        loss: (outputs [b, C], targets [b]) to losses [b].
        name: for messages.
        outputs: [b, C].
        targets: int64 [b], on the same device.

    Returns:
        Losses [b], detached.

    Raises:
        InfluenceError: it fails, returns another shape, changes its targets, or gives no gradient.
    """
    # A copy, because a tensor that was made in inference mode cannot get a gradient.
    leaves, given = outputs.detach().clone().requires_grad_(), targets.clone()
    try:
        with torch.enable_grad():
            losses = loss(leaves, given)
    except InfluenceError:
        raise
    except Exception as error:
        raise InfluenceError(
            f"loss {name} fails on outputs {list(outputs.shape)} and targets {list(targets.shape)}: {describe(error)}",
            "the loss of a single logit gets (logit [batch, 1], targets [batch], 0 or 1) and returns [batch]"
            if isinstance(loss, OneLogitLoss)
            else "a loss takes (outputs [batch, classes], targets [batch]) and returns [batch]",
        ) from error
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        shape = list(losses.shape) if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        one = isinstance(losses, Tensor) and losses.numel() == 1
        raise InfluenceError(
            f"loss {name} returns {'one number' if one else shape} for a batch of {len(targets)}",
            "it must return one loss per example, [batch]"
            + (": use reduction='none' (args: {reduction: none})" if one else ""),
        )
    if given._version:
        raise InfluenceError(
            f"loss {name} changes its targets in place", "write targets = targets - 1 instead of targets -= 1"
        )
    if not losses.requires_grad:
        raise InfluenceError(
            f"loss {name} has no gradient in the outputs", "it must not detach them, nor compute outside of torch"
        )
    return losses.detach()


def refuse_logits(configured: ConfiguredLoss, outputs: Tensor) -> None:
    """Refuse outputs that are no log-probabilities under a loss that takes them.

    Raises:
        InfluenceError: their exponentials do not sum to 1.
    """
    if configured.reads == LOG_PROBABILITIES and bool((outputs.logsumexp(dim=1).abs() > 1e-3).any()):
        raise InfluenceError(
            f"{configured.where}: {configured.written} takes log-probabilities, but the model's outputs are none: "
            f"their exponentials sum to {float(outputs.exp().sum(dim=1)[0]):.3g}",
            "for a model that returns logits use loss: cross_entropy; it contains the log-softmax",
        )


def _divisor(loss: nn.CrossEntropyLoss) -> dict[str, Any]:
    """Say what torch's own mean divides by: Σ w_y over the examples whose label is not ignored."""
    return {"weights": loss.weight, "ignored": loss.ignore_index if loss.ignore_index >= 0 else None}


def own_loss(loss: Loss) -> Loss:
    """Give the loss that the config names, out of what was put around it."""
    while isinstance(loss, OneLogitLoss | BoundLoss | WeightedLoss):
        loss = loss.loss
    return loss


class BoundLoss(nn.Module):
    """A loss function with arguments of which some are tensors: they follow the model's device and precision."""

    def __init__(self, loss: Callable[..., Tensor], args: Mapping[str, Any]) -> None:
        super().__init__()
        self.loss = loss
        self.plain = {key: value for key, value in args.items() if not isinstance(value, Tensor)}
        self.names = [key for key in args if key not in self.plain]
        for key in self.names:
            self.register_buffer(f"of_{key}", args[key])

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the losses [b]."""
        tensors = {key: getattr(self, f"of_{key}") for key in self.names}
        return self.loss(outputs, targets, **self.plain, **tensors)


def _known_binary(name: str, args: Mapping[str, Any], where: Callable[..., str]) -> ConfiguredLoss:
    """Write BCE with logits as the cross-entropy of (0, f) with the class weights (w, w·pos_weight)."""
    for key in args:
        if key not in ("weight", "pos_weight"):
            hint = did_you_mean(key, ["weight", "pos_weight"])
            raise InfluenceError(f"{where('args', key)}: loss {name} takes no argument {key!r} here", hint)
    numbers = {key: _one_number(value, key, where) for key, value in args.items() if value is not None}
    if not numbers:
        loss: Loss = partial(functional.cross_entropy, reduction="none")
        return ConfiguredLoss(loss, PLAIN, name, convex=True, reads=LOGIT, from_library=True, where=where())
    weight = numbers.get("weight", 1.0)
    weights = torch.tensor([weight, weight * numbers.get("pos_weight", 1.0)])
    title = f"{name} {numbers}"
    return ConfiguredLoss(
        nn.CrossEntropyLoss(weights, reduction="none"),
        title,
        name,
        convex=True,
        reads=LOGIT,
        from_library=True,
        where=where(),
    )


def _one_number(value: Any, key: str, where: Callable[..., str]) -> float:
    number = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(number, list) and len(number) == 1:
        number = number[0]
    if isinstance(number, bool) or not isinstance(number, int | float) or not (math.isfinite(number) and number > 0):
        raise InfluenceError(
            f"{where('args', key)}: {key} is {number!r}: expected one number above 0", "one logit: [3.0]"
        )
    return float(number)


def _parameters(factory: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _with_tensors(factory: Any, args: Mapping[str, Any], where: Callable[..., str]) -> dict[str, Any]:
    """Make tensors of lists of numbers where the signature asks for a tensor."""
    made = dict(args)
    for key, parameter in _parameters(factory).items():
        if isinstance(made.get(key), list) and "Tensor" in str(parameter.annotation):
            try:
                made[key] = torch.tensor(made[key], dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InfluenceError(
                    f"{where('args', key)}: {key} is {made[key]!r}: expected a list of numbers", "such as [0.5, 2.0]"
                ) from error
    return made


def _per_example(factory: Any, args: dict[str, Any], where: Callable[..., str]) -> dict[str, Any]:
    """Ask for one loss per example where the signature has a reduction; a mean of them is the objective's part."""
    if "reduction" not in _parameters(factory):
        return args
    if args.get("reduction", "mean") not in ("mean", "none"):
        raise InfluenceError(
            f"{where('args', 'reduction')}: reduction is {args['reduction']!r}, but the objective here is a mean",
            "leave it out: the loss is called with reduction: none; divide the weight decay of a sum by n (l2)",
        )
    return {**args, "reduction": "none"}


def _by_name(name: str, args: Mapping[str, Any], where: Callable[..., str]) -> Loss:
    if name not in BY_NAME:
        raise InfluenceError(
            f"{where()}: unknown loss {name!r}",
            "write cross_entropy, binary_cross_entropy_with_logits, hinge, smooth_hinge, a dotted name, or "
            "{factory: ./losses.py:mine}: (outputs, targets) to [batch]",
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
            "for smoothing: {factory: torch.nn.CrossEntropyLoss, args: {label_smoothing: 0.1}}"
            if name == "cross_entropy"
            else "for smoothing: {factory: smooth_hinge, args: {temperature: 0.001}}",
        )
    return hinge if name == "hinge" else partial(functional.cross_entropy, reduction="none")


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
