"""Decide before any work: how each parameter's example gradients are computed, and which curvature is used.

A store remembers the first. Another command on a complete store then decides nothing again, and takes the same way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from influence_cli.config.schema import Config
from influence_cli.curvature.choice import Choice, choose_curvature
from influence_cli.curvature.coordinates import mixed_layers
from influence_cli.data.batches import Batch, computing
from influence_cli.errors import InfluenceError, counted, few
from influence_cli.model.network import Layer, Network, track
from influence_cli.model.task import Task, set_precision
from influence_cli.passes.coverage import make_network
from influence_cli.passes.probe import few_of, look
from influence_cli.runtime import distributed, work
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.store import Store


def decide(
    config: Config, task: Task, terminal: Terminal, path: Path | None = None, slow: Collection[str] = ()
) -> tuple[Choice, Batch]:
    """Look at the task and choose the curvature; stderr names what is chosen or left out.

    Args:
        config: the run's config.
        task: one checkpoint and its data.
        terminal: told of the choice.
        path: of a store that may know the way of each parameter's gradients.
        slow: parameters that the layer pass does not take.
    """
    where = config.where("gradients", "layers")
    # Gradients are compared with autograd's in float32: the rounding of TF32 is as large as the allowed difference.
    set_precision("float32")
    network = track(task.model, task.loss, config.gradients.layers, where)
    known = None if path is None or slow else distributed.from_first(lambda: remembered_description(path, network))
    sample = look(task, terminal, known=known is not None)
    batch = few_of(sample)
    if known is None:
        with computing(task.train, sample), work.during("the first look at gradients"):
            network = make_network(network, sample.inputs, slow)
    else:
        network = remembered_network(network, known)
    network = replace(network, precision=config.precision)
    set_precision(config.precision)
    choice = choose_curvature(
        config.curvature.method,
        config.curvature.matrix,
        network,
        batch.inputs,
        config.where("curvature", "method"),
    )
    _check_l2(config, task, choice, terminal)
    if choice.note:
        terminal.detail(choice.note)
    for names, what in (
        (network.left_out, "parameters left out"),
        (network.unused, "parameters that no output depends on"),
        (network.rest, f"parameters outside the layer pass, by {_rest_way(choice)}"),
    ):
        if names:
            terminal.say(f"{what} ({len(names)}): {few(names, 6)}")
    if network.obstacle:
        terminal.say(f"torch.func cannot differentiate the model: {network.obstacle}")
    return choice, batch


def _check_l2(config: Config, task: Task, choice: Choice, terminal: Terminal) -> None:
    """Refuse an l2 by parameter where the curvature or the ensemble has one number for all; say what EK-FAC does.

    Raises:
        InfluenceError: as said, or no pattern matches a tracked parameter.
    """
    l2, where = task.objective.over(choice.network), config.where("l2")
    if task.train.weights is not None and (choice.method == "fisher" or choice.matrix == "empirical"):
        raise InfluenceError(
            f"{config.where('train', 'weights')}: curvature {choice.method} {choice.matrix} squares the weights",
            "use curvature.matrix: ggn, with curvature.method: explicit, ekfac or cg",
        )
    if isinstance(l2, float):
        return
    if choice.method == "fisher" or config.model.ensemble == "source":
        what = "curvature fisher" if choice.method == "fisher" else "model.ensemble source"
        raise InfluenceError(
            f"{where}: {what} takes one l2 for all tracked parameters, but it differs between them",
            "use curvature.method: explicit, arnoldi, ekfac, kfac, cg, nystrom, lissa or neumann"
            if choice.method == "fisher"
            else "use model.ensemble: mean, or one number for l2",
        )
    if choice.is_layered:
        mixed = mixed_layers(choice.network, l2)
        if mixed:
            terminal.say(
                f"l2 differs inside {counted(len(mixed), 'layer')} ({few(mixed, 3)}): {choice.method} takes it along "
                "each of its directions, without what mixes them; explicit and cg are exact in l2"
            )


def _rest_way(choice: Choice) -> str:
    return "torch.func" if choice.network.vectorised else "a loop of autograd, one example at a time (slower)"


def describe_network(network: Network) -> dict[str, Any]:
    """Give what ``make_network`` decided, JSON-able."""
    return {
        "layers": [asdict(layer) for layer in network.layers],
        "rest": list(network.rest),
        "unused": list(network.unused),
        "vectorised": network.vectorised,
        "obstacle": network.obstacle,
    }


def remembered_description(path: Path, network: Network) -> dict[str, Any] | None:
    """Read what a complete store remembers of the probe.

    Args:
        path: of the store.
        network: from ``track``.

    Returns:
        None where there is no complete store, where it was made before this was kept, or where it is about other
        parameters.
    """
    if not path.exists():
        return None
    with Store.open(path) as store:
        described: dict[str, Any] | None = store.facts.get("network")
        if described is None or not store.facts.get("rows", True) or not store.done().all():
            return None
    layers = [Layer(**layer) for layer in described["layers"]]
    names = {*(name for layer in layers for name in layer.names), *described["rest"], *described["unused"]}
    return described if names == set(network.names) else None


def remembered_network(network: Network, described: dict[str, Any]) -> Network:
    """Give a network as it was decided when its store was made."""
    return replace(
        network,
        layers=tuple(Layer(**layer) for layer in described["layers"]),
        rest=tuple(described["rest"]),
        unused=tuple(described["unused"]),
        vectorised=described["vectorised"],
        obstacle=described["obstacle"],
    )
