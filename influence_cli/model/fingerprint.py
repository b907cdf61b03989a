"""What distinguishes checkpoints, and where two fingerprints differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
import xxhash
from torch import nn

from influence_cli import __version__
from influence_cli.config.schema import Config
from influence_cli.config.source_code import object_hash
from influence_cli.config.user_code import import_object
from influence_cli.model.configured_loss import own_loss
from influence_cli.model.data_fingerprint import data_fingerprint, with_contents
from influence_cli.model.task import Task
from influence_cli.runtime import distributed

MEANING = {
    "weights": "the checkpoint's weights",
    "count": "the training examples in use (number, order or exclusions)",
    "labels": "the training labels",
    "files": "the training files (a path, or what one of them holds)",
    "examples": "the training examples themselves",
    "transform": "train.transform",
    "example_weights": "train.weights",
    "output": "which of the model's outputs the logits are (model.output)",
    "layers": "the tracked layers",
    "loss": "the loss",
    "basis": "the curvature",
    "l2": "l2, which differs between parameters",
    "seed": "the seed of the curvature's draws",
    "precision": "the precision of the layer pass",
    "store_dtype": "gradients.store_dtype",
    "versions": "the versions of torch or torchvision",
}

_DATA = ("count", "labels", "files", "examples", "transform", "example_weights")
# What the parts of ``splits_fingerprint`` are called.
DATA_MEANING = {
    **{f"train.{part}": MEANING[part] for part in _DATA},
    **{f"test.{part}": MEANING[part].replace("training", "test").replace("train.", "test.") for part in _DATA},
}


def splits_fingerprint(task: Task, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Describe the examples of both splits, the names beginning with ``train.`` and ``test.``.

    Args:
        task: its data.
        recorded: the fingerprint to compare with, or an empty one that this is to be: the contents of the files count
            then (``with_contents``). None: their sizes and times do.
    """
    parts: dict[str, str] = {}
    for name, split in (("train.", task.train), ("test.", task.test)):
        if split is not None:
            said = {f"{name}{part}": value for part, value in data_fingerprint(split).items()}
            parts |= said if recorded is None else with_contents(said, recorded, split, name)
    return parts


def training_fingerprint(config: Config, task: Task) -> dict[str, str]:
    """Describe what a training depends on besides its examples and its recipe: model, loss, the version of torch."""
    build = import_object(config.model.factory, config.folder, config.where("model", "factory"))
    output = "" if config.model.output is None else f" output {config.model.output}"
    return {
        "model": f"{config.model.factory} {object_hash(build, config.model.args)}{output}",
        "loss": f"{task.loss_name} {object_hash(own_loss(task.loss), config.loss.args)}",
        "torch": torch.__version__,
    }


def agree_on(tasks: Sequence[Task], more: Mapping[str, str]) -> None:
    """Refuse to start if the processes of a job do not see the same model, data, command or versions.

    Args:
        tasks: one task per checkpoint.
        more: what else must be the same: the command, the config.

    Raises:
        InfluenceError: naming the process and what differs.
    """
    parts = {
        **more,
        **{f"weights.{number}": weights_hash(task.model) for number, task in enumerate(tasks)},
        **splits_fingerprint(tasks[0]),
        "versions": f"{versions()} influence {__version__}",
    }
    meaning = {
        "config": "the config",
        "command": "the command line",
        **{f"weights.{number}": f"the weights of checkpoint {number}" for number in range(len(tasks))},
        **DATA_MEANING,
        "versions": "the versions of torch, torchvision or influence",
    }
    distributed.agree(parts, meaning)


def versions() -> str:
    """Name the installed torch and torchvision."""
    # Read from the installed package: its import takes two seconds, and only some projects need it.
    return f"torch {torch.__version__} torchvision {version('torchvision')}"


def weights_hash(model: nn.Module) -> str:
    """Hash all parameters and buffers, by name."""
    state = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        state.update(name.encode())
        array = value.detach().cpu().contiguous()
        state.update(array.reshape(-1).view(torch.uint8).numpy().data if array.numel() else b"")
    return state.hexdigest()
