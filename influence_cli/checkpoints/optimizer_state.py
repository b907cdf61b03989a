"""Adam's second moments, where a checkpoint keeps its optimiser: the rate at which each parameter was trained.

Adam moves a parameter by lr·m̂/(√v̂ + ε), v̂ the mean square of its gradient: gradient descent at the rate lr/(√v̂ + ε).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from influence_cli.checkpoints.load import read_content
from influence_cli.checkpoints.restricted_pickle import entries_of
from influence_cli.errors import InfluenceError

# Where training scripts put it, and the file in which the Trainer of transformers does.
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "optim", "opt", "optimizers")
BESIDE = "optimizer.pt"


def adam_slowness(path: Path, model: nn.Module, where: str) -> tuple[dict[str, float], float] | None:
    """Compute the mean of √v̂ + ε of each module's parameters: lr divided by it is the module's rate.

    Args:
        path: of the checkpoint.
        model: whose parameters the optimiser had, in their order.
        where: the start of errors.

    Returns:
        By the name of the module that owns the parameters; and the mean over all of them. None where the checkpoint
        has no optimiser, or one without second moments: SGD.

    Raises:
        InfluenceError: the state is not that of the model's parameters.
    """
    state = next(_states(path, where), None)
    if state is None:
        return None
    moments = {key: entries_of(value) or {} for key, value in (entries_of(state["state"]) or {}).items()}
    if not any("exp_avg_sq" in moment for moment in moments.values()):
        return None
    order = [(key, group) for group in state["param_groups"] for key in group["params"]]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    named = trained if len(trained) == len(order) else list(model.named_parameters())
    fits = len(named) == len(order) and all(
        isinstance(square := moments.get(key, {}).get("exp_avg_sq"), Tensor) and square.shape == parameter.shape
        for (key, _), (_, parameter) in zip(order, named, strict=True)
    )
    if not fits:
        raise InfluenceError(
            f"{where}: the Adam state in {path} ({len(order)} parameters) is not that of the model's parameters in "
            "their order, so their rates are unknown",
            "set curvature.damping to auto or to a number",
        )
    sums: dict[str, tuple[float, int]] = {}
    for (key, group), (name, parameter) in zip(order, named, strict=True):
        slow, owner = _slowness(moments[key], group), name.rpartition(".")[0]
        total, count = sums.get(owner, (0.0, 0))
        sums[owner] = total + float(slow.sum()), count + parameter.numel()
    whole = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    return {name: total / count for name, (total, count) in sums.items()}, whole


def _slowness(moment: Mapping[Any, Any], group: Mapping[str, Any]) -> Tensor:
    beta, step = float(group.get("betas", (0.9, 0.999))[1]), float(moment.get("step", 0))
    correction = 1 - beta**step if step > 0 else 1.0
    slow: Tensor = (moment["exp_avg_sq"].double() / correction).sqrt() + float(group.get("eps", 1e-8))
    return slow


def _states(path: Path, where: str) -> Iterator[Mapping[str, Any]]:
    """Find the state dicts of optimisers in a checkpoint, or beside it in its folder."""
    if path.is_dir():
        if not (path / BESIDE).is_file():
            return
        places: Sequence[object] = [read_content(path / BESIDE, where)]
    else:
        top = entries_of(read_content(path, where)) or {}
        places = [top, *(top.get(key) for key in OPTIMIZERS)]
    for place in places:
        for value in place if isinstance(place, list | tuple) else [place]:
            entries = entries_of(value)
            if entries and isinstance(entries.get("param_groups"), list) and "state" in entries:
                yield entries
