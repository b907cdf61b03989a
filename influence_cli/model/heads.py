"""From what a model returns to one logit per class: which output is meant, and one logit read as two classes.

``build_model`` puts one forward hook on the model. Everything that calls the model then sees logits [b, C], under
torch.func as well, while parameters keep their names. The user's training function gets the model without the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from influence_cli.config.schema import Config
from influence_cli.config.user_code import import_object
from influence_cli.errors import InfluenceError, describe, did_you_mean
from influence_cli.model.outputs import Loss, logits_of, two_classes


@dataclass(eq=False)
class Head:
    """A forward hook that makes logits [b, C] of what a model returns.

    Attributes:
        pick: takes the logits out of what the model returns; None for the rule of ``logits_of``.
        returned: what the model returned last, in words; empty for a plain tensor.
        width: the number of logits that it returned per example, 1 for one that is read as two classes.
    """

    pick: Callable[[Any], Tensor] | None
    returned: str = ""
    width: int = 0

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Give the logits, or None to leave the output as it is."""
        logits = logits_of(output) if self.pick is None else self.pick(output)
        self.returned = _in_words(output)
        batch = len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim else 0
        # A model may drop the axis of its single logit.
        if logits.numel() == batch and logits.ndim < 2:
            logits = logits.reshape(-1, 1)
        self.width = logits.shape[1] if logits.ndim == 2 else 0
        if self.width == 1:
            return two_classes(logits)
        return None if self.pick is None else logits


def add_head(model: nn.Module, head: Head | None) -> None:
    """Put a head on a model, before any other hook of it."""
    if head is not None and head_of(model) is None:
        model.register_forward_hook(head, prepend=True)


def take_head(model: nn.Module) -> Head | None:
    """Take the head off a model, and give it; None if it has none."""
    for number, hook in list(model._forward_hooks.items()):
        if isinstance(hook, Head):
            del model._forward_hooks[number]
            return hook
    return None


def head_of(model: nn.Module) -> Head | None:
    """Give the head of a model, or None."""
    return next((hook for hook in model._forward_hooks.values() if isinstance(hook, Head)), None)


def has_one_logit(model: nn.Module) -> bool:
    """Say whether a model that has run returned one logit per example."""
    head = head_of(model)
    return head is not None and head.width == 1


def make_head(config: Config) -> Head:
    """Make the head that ``model.output`` describes: an index, a key, or a function of what the model returns.

    Raises:
        InfluenceError: a function that does not exist.
    """
    output, where = config.model.output, config.where("model", "output")
    if output is None:
        return Head(None)
    if isinstance(output, str) and ("." in output or ":" in output):
        function = import_object(output, config.folder, where)
        if not callable(function):
            raise InfluenceError(f"{where}: {output} is a {type(function).__name__}, not a function")
        return Head(partial(_called, function, output, where))
    return Head(partial(_taken, output, where))


def _called(function: Callable[[Any], Any], name: str, where: str, returned: Any) -> Tensor:
    try:
        logits = function(returned)
    except Exception as error:
        given = _in_words(returned) or "a tensor"
        raise InfluenceError(f"{where}: {name} fails on what the model returns, {given}: {describe(error)}") from error
    return _a_tensor(logits, f"{where}: {name} returns")


def _taken(key: int | str, where: str, returned: Any) -> Tensor:
    given = _in_words(returned)
    if isinstance(key, int):
        # A dict of transformers gives its values by number as well.
        items = returned if isinstance(returned, tuple | list) else getattr(returned, "to_tuple", lambda: None)()
        if items is None:
            hint = "write its key" if isinstance(returned, dict) else "leave model.output out"
            raise InfluenceError(
                f"{where}: output {key} is asked for, but the model returns {given or 'a tensor'}", hint
            )
        if not -len(items) <= key < len(items):
            raise InfluenceError(f"{where}: there is no output {key}: the model returns {given}", "0 is the first")
        return _a_tensor(items[key], f"{where}: output {key} is")
    known = [str(word) for word in returned] if isinstance(returned, dict) else []
    value = returned.get(key) if isinstance(returned, dict) else getattr(returned, key, None)
    if value is None or isinstance(returned, Tensor):
        hint = did_you_mean(key, known) if known else "a number takes one of a tuple; a tensor needs no model.output"
        raise InfluenceError(f"{where}: there is no output {key!r}: the model returns {given or 'a tensor'}", hint)
    return _a_tensor(value, f"{where}: output {key!r} is")


def _a_tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InfluenceError(
            f"{what} a {type(value).__name__}, not a tensor", "the logits are a tensor [batch, classes]"
        )
    return value


def _in_words(output: Any) -> str:
    """Say what a model returned; nothing for a tensor."""
    if isinstance(output, Tensor):
        return ""
    if isinstance(output, dict):
        return f"a dict with {', '.join(map(repr, output))}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


class OneLogitLoss(nn.Module):
    """The user's loss of one logit f = o₁ − o₀, as a loss of the two classes' logits o.

    Args:
        loss: (f [b, 1], targets int64 [b]) to losses [b] or [b, 1]; with ``plain``, (f [b], targets of f's dtype [b]),
            as the losses of torch and torchvision for one logit take them.
        plain: the form.
    """

    def __init__(self, loss: Loss, *, plain: bool) -> None:
        super().__init__()
        self.loss, self.plain = loss, plain

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the losses [b] of outputs [b, 2]."""
        logit = outputs[:, 1:] - outputs[:, :1]
        if self.plain:
            return self.loss(logit[:, 0], targets.to(logit.dtype))
        losses = self.loss(logit, targets)
        is_column = isinstance(losses, Tensor) and losses.shape == logit.shape
        return losses[:, 0] if is_column else losses


class PaddedLoss(nn.Module):
    """A loss of two classes' logits, as a loss of one logit f [b, 1]: ℓ((0, f), y)."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logit: Tensor, targets: Tensor) -> Tensor:
        """Give the losses [b]."""
        return self.loss(two_classes(logit), targets)


class ProbabilitiesError(InfluenceError):
    """The model gives probabilities where logits are needed."""


def refuse_probabilities(model: nn.Module, outputs: Tensor, where: str) -> None:
    """Refuse outputs [b, C] that a softmax has gone over: in [0, 1], summing to 1.

    Raises:
        ProbabilitiesError: they are probabilities; how to get at the logits.
    """
    if outputs.shape[1] < 2 or has_one_logit(model):
        return
    sums = outputs.sum(dim=1)
    if bool(((outputs >= 0) & (outputs <= 1)).all()) and bool(((sums - 1).abs() < 1e-4).all()):
        raise ProbabilitiesError(
            f"{where}: the outputs are probabilities (in [0, 1], summing to 1), but cross_entropy takes logits",
            _other_output(model) + "return the outputs before the softmax, or take their logarithm: "
            "model.output: torch.log; if the model really was trained like this, "
            "name your own loss: loss: {factory: ./losses.py:mine}",
        )


def refuse_sigmoid(model: nn.Module, outputs: Tensor, more: Callable[[], Tensor], where: str) -> None:
    """Refuse a single output that is a probability: within [0, 1] for every example that is looked at.

    Args:
        model: has run.
        outputs: [b, 2] of a few examples.
        more: gives those of more examples, called only if these look like probabilities.
        where: start of the error.

    Raises:
        ProbabilitiesError: all are in [0, 1]; how to get at the logit.
    """
    if not has_one_logit(model):
        return

    def within(outputs: Tensor) -> bool:
        return bool(((outputs[:, 1] >= 0) & (outputs[:, 1] <= 1)).all())

    if within(outputs) and within(more()):
        raise ProbabilitiesError(
            f"{where}: the single output is a probability (always in [0, 1]), not a logit",
            _other_output(model) + "return it before the sigmoid, or take it back: model.output: torch.logit",
        )


def _other_output(model: nn.Module) -> str:
    head = head_of(model)
    if head is None or not head.returned or head.pick is not None:
        return ""
    return f"the model returns {head.returned}: model.output names another one of it (a number or a key); or "
