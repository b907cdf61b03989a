"""The features that a run names: in the config under ``evidence.features``, and by ``--features FILE``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from influence_cli.config.schema import Config
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.evidence.feature_files import read_features, read_probabilities
from influence_cli.evidence.features import Features
from influence_cli.evidence.network_features import network_features
from influence_cli.model.other_network import Network, load_network
from influence_cli.model.task import Task, measure_loading
from influence_cli.runtime.terminal import Terminal

KEY = ("evidence", "features")


def load_features(
    config: Config, task: Task, split: Split, files: Sequence[Path], terminal: Terminal, *, skip: bool
) -> tuple[Features, ...]:
    """Read or compute all features of a split; files are read, and networks loaded, before any pass.

    Args:
        config: with ``evidence.features``.
        task: whose device and classes count.
        split: the examples. Files of the config have rows of the training examples, and are left out for others.
        files: of ``--features``.
        terminal: progress, and what was left out.
        skip: continue without unreadable examples.

    Returns:
        The features, in the order of the config, then of the files. In all processes of a job but the first, those of
        networks have no rows.

    Raises:
        InfluenceError: a file, a network or a name that does not fit.
    """
    sources: list[Features | Network] = []
    for number, item in enumerate(config.evidence.features):
        where = _where(config, number)
        path = item.file or item.probabilities
        if path is not None and split.name != "train":
            terminal.say(f"features {item.title}: {path.name} is of the training examples, and is left out here")
        elif item.file is not None:
            sources.append(replace(read_features(item.file, split, where("file")), name=item.title))
        elif item.probabilities is not None:
            at = where("probabilities")
            values = read_probabilities(item.probabilities, len(split.labels), task.classes, at)
            sources.append(Features(item.title, values, probabilities=True))
        else:
            sources.append(load_network(config, item, where, split, terminal))
    sources += [read_features(path, split, "--features") for path in files]
    names: set[str] = set()
    for source in sources:
        if source.name in names:
            raise InfluenceError(
                f"--features: two features have the name {source.name}", "a file is called by its name: rename one"
            )
        names.add(source.name)
    if any(isinstance(source, Network) for source in sources):
        measure_loading(task, terminal)
    return tuple(
        network_features(source, config.gradients.store, task.device, task.loading, terminal, skip=skip)
        or Features(source.name, np.empty((0, 0)))
        if isinstance(source, Network)
        else source
        for source in sources
    )


def _where(config: Config, number: int) -> Callable[..., str]:
    """Make the function that names the line of a key of one of the features: a list of them, or a single mapping."""

    def where(*keys: str | int) -> str:
        line = config.where(*KEY, number, *keys)
        return line if line != config.where(*KEY) else config.where(*KEY, *keys)

    return where
