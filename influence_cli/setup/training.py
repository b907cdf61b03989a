"""Read λ₂ of the training objective from what an optimiser left in a checkpoint.

The ``weight_decay`` of SGD, and of Adam as Kingma and Ba have it, adds λ₂·θ to the gradient: the minimum is that of
the mean loss plus λ₂/2·‖θ‖², so it is ``l2``. AdamW (Loshchilov & Hutter 2019) decays beside the step. Where it stands
still, ∇R = −weight_decay·(√v + ε)·θ with v the mean square of the gradient: a penalty of its own for every parameter,
far below ``weight_decay`` where gradients are small. No λ₂ says that; 0 is nearer than the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from influence_cli.checkpoints.optimizer_state import OPTIMIZERS
from influence_cli.checkpoints.restricted_pickle import Stand
from influence_cli.setup.guesses import PenaltyGuess
from influence_cli.setup.inside import Inside, plain

DECAYS = ("weight_decay", "wd", "weight-decay")
NAMED = ("opt", "optimizer", "optim", "optimizer_name")
# Optimisers, as scripts name them, whose weight decay is no part of the objective.
DECOUPLED = ("adamw", "nadamw", "lamb", "lion", "adafactor", "sgdw", "muon", "adan", "adamp", "sgdp", "lars")
COUPLED = ("sgd", "momentum", "nesterov", "adam", "rmsprop", "rmsproptf", "adagrad")


def guess_l2(inside: Inside) -> PenaltyGuess:
    """Give λ₂, and what it was read from."""
    groups, where = next(_param_groups(inside), ([], ""))
    decays = [decay for group in groups for decay in [_number(group, DECAYS)] if decay is not None]
    settings = inside.settings
    named = _optimizer_name(settings)
    if decays:
        kind = _kind(groups, named)
        largest = max(decays)
        others = " (other parameters have less)" if min(decays) < largest else ""
        return _penalty(largest, kind, f"{where} in {inside.path.name}", others)
    decay = _number(settings, DECAYS)
    if decay is not None:
        return _penalty(decay, named, f"the options in {inside.path.name}", "")
    return PenaltyGuess(0.0, f"{inside.path.name} has no optimiser: put SGD's weight decay here, if there was any")


def _penalty(decay: float, kind: str, where: str, others: str) -> PenaltyGuess:
    if decay == 0:
        return PenaltyGuess(0.0, f"no weight decay, from {where}")
    if kind in DECOUPLED:
        title = "AdamW" if kind == "adamw" else kind.upper()
        return PenaltyGuess(
            0.0,
            f"{title}'s weight decay {decay:g}{others} acts beside the objective, so it is no λ₂; from {where}",
        )
    if kind:
        title = {"sgd": "SGD", "momentum": "SGD", "nesterov": "SGD", "adam": "Adam"}.get(kind, kind)
        return PenaltyGuess(decay, f"{title}'s weight decay{others}, from {where}")
    return PenaltyGuess(decay, f"weight decay{others}, from {where}; 0 if the optimiser was AdamW")


def _param_groups(inside: Inside) -> Iterator[tuple[list[Mapping[str, Any]], str]]:
    """Find the parameter groups of optimisers, in the file or in the one that the Hugging Face Trainer writes."""
    for key in OPTIMIZERS:
        value = inside.top.get(key)
        for state in value if isinstance(value, list | tuple) else [value]:
            groups = state.get("param_groups") if isinstance(state, Mapping) else None
            if isinstance(groups, list) and groups and all(isinstance(group, Mapping) for group in groups):
                yield groups, key


def _kind(groups: list[Mapping[str, Any]], named: str) -> str:
    """Tell the optimiser by the keys that its groups have."""
    group = groups[0]
    if "dampening" in group or "nesterov" in group:
        return "sgd"
    if named:
        return named
    if "betas" in group:
        if "decoupled_weight_decay" in group:  # since torch 2.7, in Adam and AdamW
            return "adamw" if group["decoupled_weight_decay"] else "adam"
        return ""
    return "rmsprop" if "alpha" in group and "centered" in group else ""


def _optimizer_name(settings: Mapping[str, Any]) -> str:
    for key in NAMED:
        value = settings.get(key)
        if isinstance(value, Stand) and value.args:  # an enumeration, as transformers has it
            value = value.args[0]
        name = (value if isinstance(value, str) else str(plain(value).get("name", ""))).lower().replace("_", "")
        name = name.removeprefix("torch.optim.").removesuffix("torch").removesuffix("fused")
        if name in DECOUPLED or name in COUPLED:
            return name
    return ""


def _number(values: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    for key in keys:
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
    return None
