"""What a store belongs to, part by part: weights, data, labels, transform, layers, loss, basis, versions.

Every part is compared when a store is opened; a difference is told by its name, and the store is never used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import nn

from influence_cli import __version__
from influence_cli.curvature.choice import Choice
from influence_cli.data import Split, read_batches
from influence_cli.data_files import near
from influence_cli.errors import InfluenceError, describe
from influence_cli.runtime import distributed
from influence_cli.task import Task

# Examples hashed to recognise a data set that is not made of files.
SAMPLED = 64

MEANING = {
    "weights": "the checkpoint's weights",
    "count": "the training examples in use (number, order or exclusions)",
    "labels": "the training labels",
    "files": "the training files (a path, size or time of change)",
    "examples": "the training examples themselves",
    "transform": "train.transform",
    "layers": "the tracked layers",
    "loss": "the loss",
    "basis": "the curvature",
    "seed": "the seed of the curvature's draws",
    "precision": "the precision of the layer pass",
    "store_dtype": "gradients.store_dtype",
    "versions": "the versions of torch or torchvision",
}

_DATA = ("count", "labels", "files", "examples", "transform")
# What the parts of ``split_facts`` are called.
DATA_MEANING = {
    **{f"train.{part}": MEANING[part] for part in _DATA},
    **{f"test.{part}": MEANING[part].replace("training", "test").replace("train.", "test.") for part in _DATA},
}


def fingerprint(task: Task, choice: Choice, store_dtype: str) -> dict[str, str]:
    """Describe what the rows of a store depend on.

    Args:
        task: model and data.
        choice: curvature and tracked parameters.
        store_dtype: ``float32``, ``float16`` or ``int8``.
    """
    return {
        "weights": weights_hash(task.model),
        **data_facts(task.train),
        "layers": f"{choice.network.size} {xxhash.xxh3_64_hexdigest(' '.join(choice.network.names).encode())}",
        "loss": task.loss_name,
        "basis": f"{choice.method} {choice.matrix}" if choice.has_basis else "raw gradients",
        # Which examples choose a basis a layer, and which labels are drawn for them.
        **({"seed": str(task.seed)} if choice.is_layered else {}),
        "precision": choice.network.precision,
        "store_dtype": store_dtype,
        "versions": versions(),
    }


def data_facts(split: Split) -> dict[str, str]:
    """Describe the examples of a split: which, their labels, the transform, and the files or a sample of inputs."""
    files = file_facts(split)
    return {
        "count": f"{len(split)} {xxhash.xxh3_64_hexdigest(split.indices.tobytes())}",
        "labels": xxhash.xxh3_64_hexdigest(split.labels[split.indices].tobytes()),
        "transform": split.transform_text,
        **({"examples": _sample(split)} if files is None else {"files": files}),
    }


def split_facts(task: Task) -> dict[str, str]:
    """Describe the examples of both splits, the names beginning with ``train.`` and ``test.``."""
    test = {} if task.test is None else data_facts(task.test)
    return {
        **{f"train.{part}": value for part, value in data_facts(task.train).items()},
        **{f"test.{part}": value for part, value in test.items()},
    }


def agree_on(tasks: Sequence[Task], more: Mapping[str, str]) -> None:
    """Refuse to begin where the processes of a job do not see the same model, data, command or versions.

    Args:
        tasks: a task a checkpoint.
        more: what else has to be the same: the command, the config.

    Raises:
        InfluenceError: naming the process and what differs.
    """
    facts = {
        **more,
        **{f"weights.{number}": weights_hash(task.model) for number, task in enumerate(tasks)},
        **split_facts(tasks[0]),
        "versions": f"{versions()} influence {__version__}",
    }
    meaning = {
        "config": "the config",
        "command": "the command line",
        **{f"weights.{number}": f"the weights of checkpoint {number}" for number in range(len(tasks))},
        **DATA_MEANING,
        "versions": "the versions of torch, torchvision or influence",
    }
    distributed.agree(facts, meaning)


def versions() -> str:
    """Name the installed torch and torchvision."""
    # Read from the installed package: its import takes two seconds, and only some projects need it.
    return f"torch {torch.__version__} torchvision {version('torchvision')}"


def differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """List the parts in which two fingerprints differ."""
    return [name for name in MEANING if found.get(name) != wanted.get(name)]


def compare(found: Mapping[str, str], wanted: Mapping[str, str], path: str) -> None:
    """Refuse a store that belongs to something else, saying what differs.

    Raises:
        InfluenceError: naming every part that differs.
    """
    different = differing(found, wanted)
    if not different:
        return
    said = []
    for name in different:
        readable = name in ("basis", "seed", "precision", "store_dtype", "versions", "loss")
        said.append(
            f"{MEANING[name]} ({found.get(name)} in the store, {wanted.get(name)} now)" if readable else MEANING[name]
        )
    grown = "; a store grows by itself where images have come after all others" if "count" in different else ""
    raise InfluenceError(
        f"{path} belongs to another run; what differs: {'; '.join(said)}",
        "keep it and write another: -s gradients.store=OTHER.h5, or replace it: influence gradients --overwrite"
        + grown,
    )


def _status(path: Path) -> os.stat_result:
    """Look at a file; a link that leads nowhere is there: whoever reads it will name it, or go on without it."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return path.lstat()


def file_facts(split: Split) -> str | None:
    """Hash path, size and time of change of every file in use; None where the examples are not in files.

    Paths count from the folder that all files lie in: a project that is moved as a whole stays the same.
    """
    whole: Sequence[str]
    named: Iterable[tuple[str, str]]
    if split.files is not None:
        whole, named = split.files.names, ((near(name), name) for name in split.files.used(split.indices))
    elif split.paths is not None:
        whole, paths = split.paths, split.paths
        named = ((split.title(int(index)), paths[int(index)]) for index in split.indices)
    else:
        return None
    state = xxhash.xxh3_128()
    root = os.path.commonpath([os.path.dirname(path) for path in whole])  # noqa: PTH120 (50,000 of them)
    for title, path in named:
        try:
            status = _status(Path(path))
        except OSError as error:
            raise InfluenceError(f"{title} cannot be read: {describe(error)}") from error
        fact = f"{os.path.relpath(path, root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        state.update(fact.encode(errors="surrogateescape"))
    return state.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Hash all parameters and buffers, by name."""
    state = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        state.update(name.encode())
        array = value.detach().cpu().contiguous()
        state.update(array.reshape(-1).view(torch.uint8).numpy().data if array.numel() else b"")
    return state.hexdigest()


def _sample(split: Split) -> str:
    # Always the same examples: a store does not depend on the config's seed.
    chosen = np.random.default_rng(0).choice(split.indices, min(SAMPLED, len(split)), replace=False)
    state = xxhash.xxh3_128()
    for batch in read_batches(split, np.sort(chosen), SAMPLED):
        state.update(batch.digest().to_bytes(8, "little"))
    return state.hexdigest()
