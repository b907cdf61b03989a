"""From a config to a run that can be replayed, with the checks that it is the run of this checkpoint and this data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from influence_cli.config.schema import Config
from influence_cli.errors import InfluenceError, describe, near_path
from influence_cli.model.data_fingerprint import with_contents
from influence_cli.model.fingerprint import DATA_MEANING, splits_fingerprint, training_fingerprint
from influence_cli.model.outputs import Loss
from influence_cli.model.task import Task, build_model
from influence_cli.recording.step_files import RECORD_ANEW
from influence_cli.replay.examples import Examples
from influence_cli.replay.recipe import START, Recipe, make_recipe
from influence_cli.replay.recipe_run import RecipeRun
from influence_cli.replay.record import Record, check_states
from influence_cli.replay.recorded_run import check_rebuilt, prepare_model, recorded_facts, recorded_run, set_modes
from influence_cli.runtime import disk
from influence_cli.runtime.memory import reuse_freed
from influence_cli.runtime.seeds import seed_all
from influence_cli.runtime.terminal import Terminal, or_silent
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import Run, State

MEANING = {
    **{name: text for name, text in DATA_MEANING.items() if name.startswith("train.")},
    "recipe": "training.recipe",
    "model": "the model (its factory's file or its arguments)",
    "loss": "the loss (its file or its arguments)",
    "torch": "the version of torch",
}
# The largest difference between a checkpoint and the end of its run, relative to the largest weight of a parameter:
# a checkpoint may have been saved in half precision.
SAME = 2e-3


@dataclass(frozen=True)
class Replayed:
    """A checkpoint with the run that made it.

    Attributes:
        task: the checkpoint and its data.
        network: as it trains.
        run: its steps and states.
        record: its folder.
    """

    task: Task
    network: TrainedNetwork
    run: Run
    record: Record


def record_of(config: Config) -> Record:
    """Name the record of a run: beside the store, ``influence.run`` for ``influence.h5``."""
    if config.training is not None and config.training.record is not None:
        return Record(config.training.record, RECORD_ANEW)
    store = config.gradients.store
    return Record(store.with_name(f"{store.stem}.run"))


def recipe_run(config: Config, task: Task) -> tuple[TrainedNetwork, RecipeRun]:
    """Make the untrained network of a recipe, and the run that it describes.

    Raises:
        InfluenceError: no recipe, or one that contradicts itself.
    """
    reuse_freed()
    recipe = make_recipe(config, len(task.train))
    if config.training is not None and config.training.record is not None:
        raise InfluenceError(
            f"{config.where('training', 'record')}: record is of a loop of your own, recipe of influence train",
            "leave one of them out",
        )
    seed_all(recipe.seed(START))
    model = build_model(config).to(task.device, recipe.dtype)
    network = trained_network(model, recipe.trained_loss(task.loss))
    data = Examples(task.train, recipe.dtype, task.device, task.loading)
    return network, RecipeRun(recipe, data, record_of(config))


def trained_network(model: nn.Module, loss: Loss) -> TrainedNetwork:
    """Give a model in training mode with the loss whose mean is trained.

    Raises:
        InfluenceError: nothing of it is trained, or a BatchNorm averages over all batches.
    """
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            raise InfluenceError(
                f"{name} is a BatchNorm with momentum=None, which a replay cannot follow", "give it momentum=0.1"
            )
    if not any(value.requires_grad for value in model.parameters()):
        raise InfluenceError("no parameter of the model is trained: all have requires_grad=False")
    return TrainedNetwork(model, loss)


def made_of(config: Config, task: Task, recipe: Recipe, recorded: Mapping[str, str]) -> dict[str, str]:
    """Describe what a run by a recipe depends on, part by part.

    Args:
        config: the model and the loss.
        task: its training examples.
        recipe: how it trains.
        recorded: what the record was made from; empty if it is yet to be made.
    """
    parts = {**_depends(config, task), "recipe": recipe.described()}
    return with_contents(parts, recorded, task.train, "train.")


def _depends(config: Config, task: Task) -> dict[str, str]:
    examples = {name: value for name, value in splits_fingerprint(task).items() if name.startswith("train.")}
    return examples | training_fingerprint(config, task)


def differing(recorded: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Say which parts of a run differ."""
    return [MEANING[name] for name in MEANING if recorded.get(name) != wanted.get(name)]


def checkpoint_path(config: Config) -> Path:
    """Name the file that a training writes.

    Raises:
        InfluenceError: the config names none, or several.
    """
    sources = config.model.sources
    if len(sources) != 1 or sources[0] is None:
        given = "names none" if sources[0] is None else f"names {len(sources)}"
        raise InfluenceError(
            f"{config.where('model', 'checkpoint')}: a run has one checkpoint, but the config {given}",
            "model: {checkpoint: model.pt}",
        )
    return sources[0].file


def open_run(config: Config, task: Task, terminal: Terminal | None = None) -> Replayed:
    """Open the run that made a checkpoint.

    Args:
        config: with ``training.recipe`` or ``training.record``.
        task: the checkpoint.
        terminal: told when a recorded loop is compared with its states, once.

    Raises:
        InfluenceError: there is no record, it is not finished, or it is another run's: it names what differs.
    """
    if config.training is not None and config.training.record is not None and config.training.recipe is None:
        return _open_recorded(config, task, or_silent(terminal))
    network, run = recipe_run(config, task)
    record, checkpoint = run.record, near_path(checkpoint_path(config))
    recorded = record.made_of()
    if not recorded:
        raise InfluenceError(
            f"there is no record of the run that made {checkpoint}: {record.shown} does not exist",
            "influence train --overwrite trains by training.recipe, and records the run",
        )
    different = differing(recorded, made_of(config, task, run.recipe, recorded))
    if different:
        raise InfluenceError(
            f"{record.shown} records another run; what differs: {'; '.join(different)}",
            "undo the change, or run influence train --overwrite",
        )
    missing = sorted({*run.kept} - {*record.kept})
    if missing:
        raise InfluenceError(
            f"{record.shown} is not finished: the state before step {missing[0]:,} of {run.steps:,} is missing",
            "influence train continues it",
        )
    check_end(network, run, task, checkpoint)
    return Replayed(task, network, run, record)


def _open_recorded(config: Config, task: Task, terminal: Terminal) -> Replayed:
    """Open the run of a recorded loop."""
    record, checkpoint = record_of(config), near_path(checkpoint_path(config))
    facts = recorded_facts(record, config.where("training", "record"))
    if config.train.weights is not None:
        raise InfluenceError(
            f"{config.where('train', 'weights')}: a replay takes every example alike", "leave train.weights out"
        )
    first = record.read(0, torch.device("cpu"))
    run = recorded_run(facts, record, Examples(task.train, first.parameters.dtype, task.device, task.loading))
    check_states(run.steps, len(run.kept), first, config.gradients.budget, config.where("gradients", "budget"))
    model = build_model(config).to(task.device, first.parameters.dtype)
    prepare_model(model, facts, record, first)
    network = trained_network(model, task.loss)
    set_modes(model, facts)
    cut = "" if facts.steps is not None else ", and was cut off: recorder.close() keeps the last state"
    check_end(network, run, task, checkpoint, f"the record has {run.steps:,} steps{cut}")
    check_rebuilt(network, run, _depends(config, task), terminal.say)
    return Replayed(task, network, run, record)


def check_end(
    network: TrainedNetwork,
    run: Run,
    task: Task,
    checkpoint: Path,
    hint: str = "influence train --overwrite trains by the recipe, and writes this checkpoint",
) -> None:
    """Refuse a checkpoint that is not the end of the run.

    Args:
        network: that was trained.
        run: with its last state.
        task: the checkpoint.
        checkpoint: its file.
        hint: what makes another one.

    Raises:
        InfluenceError: it names the parameter that differs most.
    """
    last = run.state(run.steps)
    worst, most = "", 0.0
    for name in network.names:
        weights, end = task.model.get_parameter(name).detach(), last.parameters[network.slot(name)]
        difference = float((weights.reshape(-1) - end).abs().max() / end.abs().max().clamp_min(1e-12))
        if not difference <= most:
            worst, most = name, difference
    if not most <= SAME:
        raise InfluenceError(
            f"{checkpoint} is not the end of the recorded run: {worst} differs by {most:.1%} of its largest weight",
            hint,
        )


def is_trained(config: Config, run: RecipeRun, wanted: dict[str, str]) -> bool:
    """Say whether a training has nothing left to do, before it starts.

    Args:
        config: names the checkpoint.
        run: with its record.
        wanted: from ``made_of``.

    Raises:
        InfluenceError: it would overwrite a checkpoint, or the record of another run.
    """
    record, path = run.record, checkpoint_path(config)
    recorded = record.made_of()
    different = differing(recorded, wanted) if recorded else []
    if different:
        raise InfluenceError(
            f"{record.shown} records another run; what differs: {'; '.join(different)}",
            "influence train --overwrite replaces the checkpoint and the record; -s gradients.store=other.h5 keeps it",
        )
    if not path.exists():
        return False
    if not recorded:
        raise InfluenceError(
            f"{near_path(path)} exists, and {record.shown} does not record how it was trained",
            "influence train --overwrite replaces it; -s model.checkpoint=other.pt keeps it",
        )
    return {*run.kept} <= {*record.kept}


def save_checkpoint(network: TrainedNetwork, state: State, path: Path) -> None:
    """Write the weights of a state as a checkpoint of the model.

    Raises:
        InfluenceError: the file cannot be written.
    """
    network.load(state)
    try:
        disk.make_folder(path.parent)
        with disk.whole(path) as part:
            torch.save(network.model.state_dict(), part)
    except OSError as error:
        raise InfluenceError(f"{near_path(path)} cannot be written: {describe(error)}") from error
