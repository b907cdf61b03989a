"""Look into a checkpoint: its weights, and what its writer left beside them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.model.checkpoint import _find_state_dict, read_checkpoint

# Under these names people keep the options of a run beside the weights.
SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg", "train_args", "options")
# And under these the names of the classes.
CLASS_NAMES = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id", "labels", "categories")


@dataclass(frozen=True)
class Inside:
    """What a checkpoint holds.

    Attributes:
        path: the file.
        state: its state dict.
        content: everything at its top; empty for a file of tensors alone.
        checkpoint: as ``model.checkpoint`` names it.
        remark: on which of several weights are taken.
    """

    path: Path
    state: Mapping[str, Tensor]
    content: Mapping[str, Any]
    checkpoint: Any = None
    remark: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Give the options of the run, those of the outermost place first."""
        gathered: dict[str, Any] = {}
        for key in SETTINGS:
            gathered = plain(self.content.get(key)) | gathered
        return gathered

    def class_names(self) -> tuple[tuple[str, ...], str] | None:
        """Give class names by output, and the key under which they are; None where there are none."""
        for place in (self.content, self.settings):
            for key in CLASS_NAMES:
                names = names_by_output(place.get(key))
                if names is not None:
                    return names, key
        return None


def look_inside(path: Path) -> Inside:
    """Read a checkpoint file.

    Raises:
        InfluenceError: there is no such file, it is damaged, or it has no state dict.
    """
    if not path.exists():
        raise InfluenceError(
            f"there is no checkpoint {path}", "influence init CHECKPOINT DATA: name a file or a folder"
        )
    if path.suffix == ".safetensors":
        return Inside(path, read_checkpoint(path, "init"), {}, str(path))
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return Inside(
        path, _find_state_dict(content, path, "init"), content if isinstance(content, Mapping) else {}, str(path)
    )


def plain(value: object) -> dict[str, Any]:
    """Give the entries of a mapping or an argparse.Namespace whose names are words; none for anything else."""
    inner = vars(value) if isinstance(value, argparse.Namespace) else value
    return {key: item for key, item in inner.items() if isinstance(key, str)} if isinstance(inner, Mapping) else {}


def names_by_output(value: object) -> tuple[str, ...] | None:
    """Read class names from a list, or from a mapping of names to numbers or of numbers to names."""
    if isinstance(value, list | tuple):
        return tuple(value) if len(value) > 1 and all(isinstance(item, str) for item in value) else None
    if not isinstance(value, Mapping) or len(value) < 2:
        return None
    numbered: dict[int, str] = {}
    for key, item in value.items():
        name, number = (key, item) if isinstance(key, str) and not isinstance(item, str) else (item, key)
        if isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) < 10:
            number = int(number)
        if not isinstance(name, str) or type(number) is not int or number in numbered:
            return None
        numbered[number] = name
    return tuple(numbered[n] for n in range(len(numbered))) if set(numbered) == set(range(len(numbered))) else None
