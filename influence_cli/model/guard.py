"""Around each call of the user's model: what its forward changes, besides its outputs, does not reach the work here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError, few
from influence_cli.runtime import fence


@dataclass(eq=False)
class Guard:
    """Hooks before and after the forward of a model. Torch's modes are as before; inputs changed in place are copies.

    Attributes:
        copies: whether the model gets a copy of its input, because it changes it.
        settled: whether that is decided: a change of an input that is no copy is then an error.
        opened: modes of torch and the input's version at the start of each call that has not returned.
    """

    copies: bool = False
    settled: bool = False
    opened: list[tuple[Any, int]] = field(default_factory=list)

    def before(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note the modes, and give a copy of the input where the model changes it."""
        given = (inputs[0].clone(), *inputs[1:]) if self.copies and inputs and isinstance(inputs[0], Tensor) else inputs
        self.opened.append((fence.item_modes(), _version(given)))
        return given if self.copies else None

    def after(self, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        """Restore the modes, also after an error; refuse or note a change of the input.

        Raises:
            InfluenceError: the input was changed in place, and the first examples were not.
        """
        modes, version = self.opened.pop()
        fence.set_item_modes(modes)
        if self.copies or _version(inputs) == version:
            return
        if self.settled:
            raise InfluenceError(
                "the model changes some of its inputs in place, but not the first ones",
                "in its forward, write x = x - mean instead of x -= mean",
            )
        self.copies = True


def add_guard(model: nn.Module, guard: Guard | None) -> None:
    """Put a guard on a model, before and after any other hook of it."""
    if guard is not None and guard_of(model) is None:
        model.register_forward_pre_hook(guard.before, prepend=True)
        model.register_forward_hook(guard.after, always_call=True)


def take_guard(model: nn.Module) -> Guard | None:
    """Take the guard off a model, and give it; None if it has none."""
    guard = guard_of(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Guard):
                del hooks[number]
    return guard


def guard_of(model: nn.Module) -> Guard | None:
    """Give the guard of a model, or None."""
    holders = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((holder for holder in holders if isinstance(holder, Guard)), None)


def settle_as(model: nn.Module, other: nn.Module) -> None:
    """Give a model of the same architecture its input as another one gets it."""
    guard, known = guard_of(model), guard_of(other)
    if guard is not None and known is not None:
        guard.copies, guard.settled = known.copies, known.settled


def settle(model: nn.Module, inputs: Tensor, run: Callable[[Tensor], Tensor], where: str) -> Tensor:
    """Run the first example, and look for what a forward pass leaves behind: a changed input, changed buffers.

    Args:
        model: in eval mode.
        inputs: [1, …]; left as they are.
        run: gives the model's outputs.
        where: the start of errors.

    Returns:
        The outputs [1, C].

    Raises:
        InfluenceError: numbers of the model change with every forward pass, as those of a BatchNorm in training do.
    """
    before = _buffers(model)
    given = inputs.clone()
    outputs = run(given)
    guard = guard_of(model)
    if guard is not None:  # what is changed past autograd's counter shows in the numbers alone
        guard.copies, guard.settled = guard.copies or not torch.equal(given, inputs), True
    if _changed(model, before):
        # A model may keep what it has computed once; a second pass then changes nothing.
        before = _buffers(model)
        run(inputs.clone())
        _refuse_changed(model, _changed(model, before), where)
    return outputs


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    now = _buffers(model)
    return [
        name
        for name, value in now.items()
        if name not in before or value.shape != before[name].shape or bool((value != before[name]).any())
    ]


def _refuse_changed(model: nn.Module, names: list[str], where: str) -> None:
    if not names:
        return
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    training = [name.rpartition(".")[0] for name, module in modules.items() if module.training]
    raise InfluenceError(
        f"{where}: every forward pass of the model changes {few(names)}, in eval mode too",
        f"{few(list(dict.fromkeys(training)))} is in training mode although the model is not: its forward, train or "
        "eval must leave it in eval mode"
        if any(training)
        else "a forward pass in eval mode must leave the numbers of the model as they are",
    )


def _version(inputs: tuple[Any, ...]) -> int:
    """Give autograd's counter of changes of the first input; an inference tensor has none."""
    given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
    return 0 if given is None or given.is_inference() else given._version
