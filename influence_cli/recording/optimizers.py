"""What torch's SGD, Adam and AdamW take at a step, and what of them a replay cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from influence_cli.errors import InfluenceError
from influence_cli.recording.passes import flat

Kind: TypeAlias = Literal["sgd", "adam", "adamw"]
# Settings that change the step in a way that a replay does not know, and the value of each that it does.
UNKNOWN = {"amsgrad": False, "maximize": False, "dampening": 0, "differentiable": False}


@dataclass(frozen=True)
class Settings:
    """The numbers of one step.

    Attributes:
        rates: η of each parameter group.
        decays: weight decay of each.
        momentum: μ of SGD, β₁ of Adam.
        second: β₂ of Adam.
        eps: ε of Adam.
        number: the optimiser's steps before this one.
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    momentum: float
    second: float
    eps: float
    number: int


@dataclass(frozen=True)
class OptimizerReader:
    """An optimiser with the parameters that it trains, in the model's order.

    Attributes:
        optimizer: one of torch.
        kind: ``sgd``, ``adam`` or ``adamw``.
        nesterov: SGD looks ahead.
        parameters: by name.
        groups: the group of each parameter.
        before: its steps before the first recorded one.
    """

    optimizer: Optimizer
    kind: Kind
    nesterov: bool
    parameters: dict[str, Tensor]
    groups: tuple[int, ...]
    before: int

    def settings(self, step: int) -> Settings:
        """Read the numbers of a step.

        Raises:
            InfluenceError: groups differ in what is one number per step, or the parameters are others now.
        """
        groups = self.optimizer.param_groups
        _refuse_unknown(groups)
        count = sum(len(group["params"]) for group in groups)
        if count != len(self.parameters):
            raise InfluenceError(
                f"the optimizer trains {count} parameters at step {step:,}, but {len(self.parameters)} at the first",
                "give it all parameters from the start: a replay follows one set",
            )
        first, second = (_one(groups, "momentum"), 0.0) if self.kind == "sgd" else _one(groups, "betas")
        if self.kind == "sgd" and bool(first) != bool(self._slots):
            raise InfluenceError(f"SGD's momentum becomes {first:g} at step {step:,}", "keep it above 0, or at 0")
        return Settings(
            tuple(float(group["lr"]) for group in groups),
            tuple(float(group["weight_decay"]) for group in groups),
            float(first),
            float(second),
            0.0 if self.kind == "sgd" else float(_one(groups, "eps")),
            self.before + step,
        )

    def gradient_norm(self, step: int) -> Tensor:
        """Give the norm of the gradient that the step takes.

        Raises:
            InfluenceError: a parameter has none; torch leaves it out of the step.
        """
        gradients = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None or parameter.grad.is_sparse:
                what = "no gradient" if parameter.grad is None else "a sparse gradient"
                raise InfluenceError(
                    f"{name} has {what} at step {step:,}, and a replay follows steps of all parameters",
                    "leave it out of the optimizer (requires_grad_(False)), or use it in every step",
                )
            gradients.append(parameter.grad)
        norm: Tensor = torch.stack([each.norm() for each in gradients]).norm()
        return norm

    def vectors(self) -> dict[str, Tensor]:
        """Copy the parameters and the optimiser's own vectors, end to end."""
        like = next(iter(self.parameters.values()))
        slots = {
            f"slot{number}": flat((self._slot(each, name) for each in self.parameters.values()), like)
            for number, name in enumerate(self._slots)
        }
        return {"parameters": flat(self.parameters.values(), like), **slots}

    @property
    def _slots(self) -> tuple[str, ...]:
        if self.kind != "sgd":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.optimizer.defaults["momentum"] else ()

    def _slot(self, parameter: Tensor, name: str) -> Tensor:
        # Before the first step there is none, and the first step starts as from zeros.
        value = self.optimizer.state.get(parameter, {}).get(name)
        return torch.zeros_like(parameter) if value is None else value


def read_optimizer(model: nn.Module, optimizer: Optimizer) -> OptimizerReader:
    """Look at an optimiser before the first step.

    Raises:
        InfluenceError: a replay cannot follow it; it says what.
    """
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise InfluenceError(
            f"the optimizer is a {type(optimizer).__name__}; a replay follows torch's SGD, Adam and AdamW",
            "if it wraps one of these, give that one",
        )
    groups = optimizer.param_groups
    _refuse_unknown(groups)
    places = {id(each): number for number, group in enumerate(groups) for each in group["params"]}
    parameters: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if id(value) in places}
    if len(parameters) < len(places):
        raise InfluenceError(
            f"the optimizer trains {len(places)} parameters, of which the model has {len(parameters)}",
            "give the model that holds all of them, not a part or a wrapper of it",
        )
    frozen = next((name for name, value in parameters.items() if not value.requires_grad), None)
    if frozen is not None:
        raise InfluenceError(
            f"{frozen} is in the optimizer, but has requires_grad=False", "give the optimizer what is trained"
        )
    kinds = {(value.dtype, value.device) for value in parameters.values()}
    if len(kinds) != 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
        named = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise InfluenceError(
            f"the trained parameters are {named}", "a replay takes one type, float32 or float64, on one device"
        )
    kind: Kind = "sgd"
    if not isinstance(optimizer, SGD):
        kind = "adamw" if _one(groups, "decoupled_weight_decay") else "adam"
    counts = {int(optimizer.state.get(each, {}).get("step", 0)) for each in parameters.values()}
    if len(counts) > 1:
        raise InfluenceError("the optimizer has taken more steps for some parameters than for others", "begin anew")
    nesterov = kind == "sgd" and bool(_one(groups, "nesterov"))
    order = tuple(places[id(value)] for value in parameters.values())
    reader = OptimizerReader(optimizer, kind, nesterov, parameters, order, counts.pop())
    reader.settings(0)
    return reader


def _refuse_unknown(groups: Sequence[dict[str, Any]]) -> None:
    for group in groups:
        for key, value in UNKNOWN.items():
            if group.get(key, value) != value:
                raise InfluenceError(
                    f"the optimizer has {key}={group[key]!r}, which a replay cannot follow", f"{key}={value!r}"
                )


def _one(groups: Sequence[dict[str, Any]], key: str) -> Any:
    """Read a setting in which all groups must agree."""
    values = [group[key] for group in groups]
    if any(value != values[0] for value in values):
        raise InfluenceError(
            f"the optimizer's groups differ in {key}: {', '.join(map(str, values))}",
            "groups may differ in lr and weight_decay",
        )
    return values[0]
