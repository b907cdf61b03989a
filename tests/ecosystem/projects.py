"""A combination as a project, and the same model and pictures as plain as can be, to compare with."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tests.ecosystem.checkpoint import State
from tests.ecosystem.combinations import Combination
from tests.ecosystem.networks import NETWORKS, trained
from tests.ecosystem.pictures import pictures, write_folders
from tests.ecosystem.transforms import Apply

# A data set of inputs that the library's own transform has made, with the labels as outputs of the model.
REFERENCE = """
import torch
from torch.utils.data import TensorDataset


def data(file):
    content = torch.load(file)
    made = TensorDataset(content["inputs"], content["labels"])
    made.targets = content["labels"]
    return made
"""
Run = Callable[[Path], Any]


# A function for `--model`, of a network that has no source here.
NET = """
import importlib


def build():
    return getattr(importlib.import_module({module!r}), {name!r})(**{args!r})
"""


def section(lines: str) -> Any:
    """Read lines of a config, in braces or without."""
    return yaml.safe_load(lines)


def make_project(folder: Path, combination: Combination) -> tuple[State, Apply]:
    """Write what the libraries write, and a config; give the plain state dict and the library's own transform."""
    network, checkpoint = NETWORKS[combination.network], combination.checkpoint
    write_folders(folder)
    if network.source:
        (folder / "model.py").write_text(network.source)
    else:
        module, _, name = network.factory.rpartition(".")
        (folder / "net.py").write_text(NET.format(module=module, name=name, args=dict(network.args)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        state = checkpoint.make(folder, trained(combination.network))
        combination.data.make(folder)
        apply = combination.transform.make(folder)
    (folder / "influence.yaml").write_text(yaml.safe_dump(config_of(combination), sort_keys=False))
    return state, apply


def config_of(combination: Combination) -> dict[str, Any]:
    """Put the sections of a config together."""
    network = NETWORKS[combination.network]
    own = section(combination.checkpoint.model)
    model = own if "factory" in own else {**network.config(), **own}
    train = section(combination.data.train) | {"transform": section(combination.transform.lines)}
    config = {"model": model, "l2": 0.01, "train": train, "test": section(combination.data.test)}
    return config | {"loss": network.loss} if network.loss else config


def line_of(combination: Combination, key: str) -> str:
    """Give a line of a combination's config as ``-s`` takes it: ``train.transform=…``."""
    part: Any = config_of(combination)
    for word in key.split("."):
        part = part[word]
    return f"{key}={json.dumps(part)}"


def make_reference(folder: Path, combination: Combination, state: State, apply: Apply) -> None:
    """Write the state dict alone, and tensors that need no transform."""
    network, data = NETWORKS[combination.network], combination.data
    model = network.config() | {"checkpoint": "plain.safetensors"}
    if combination.checkpoint.reference:
        (folder / "reference_model.py").write_text(combination.checkpoint.reference)
        model["factory"] = "./reference_model.py:build"
    if network.source:
        (folder / "model.py").write_text(network.source)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "plain.safetensors")
    for part in ("train", "val"):
        kept = [(image, data.outputs[label]) for image, label in pictures(part) if label in data.outputs]
        torch.save(
            {
                "inputs": torch.stack([apply(image) for image, _ in kept]),
                "labels": torch.tensor([label for _, label in kept]),
            },
            folder / f"{part}.pt",
        )
    (folder / "reference.py").write_text(REFERENCE)
    sections = {
        name: {"dataset": "./reference.py:data", "args": {"file": f"{part}.pt"}}
        for name, part in (("train", "train"), ("test", "val"))
    }
    config = {"model": model, "l2": 0.01, **sections}
    if network.loss:
        config["loss"] = network.loss
    (folder / "influence.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def key_of(combination: Combination, state: State) -> str:
    """Tell references apart: by network, weights, transform and labels."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes() if state[name].ndim else b"")
    about = (
        combination.network,
        combination.checkpoint.reference,
        combination.transform.lines,
        combination.data.outputs,
    )
    return f"{digest.hexdigest()} {about}"


def number_of(combination: Combination, label: str | int | None) -> int | None:
    """Say which output a label of a row stands for."""
    data = combination.data
    if label in data.names:
        place = data.names.index(str(label))
        return data.outputs.get(place, place)
    return None if label is None else int(label)
