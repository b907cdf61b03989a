"""Look into a checkpoint: its weights, and what its writer left beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from influence_cli.checkpoints.load import read_content, without_weights
from influence_cli.checkpoints.restricted_pickle import entries_of
from influence_cli.checkpoints.weights import NESTS, Candidate, find_weights
from influence_cli.errors import InfluenceError

# The start of errors of a reader that names a line of the config elsewhere.
WHERE = "influence init"
# Under these names people keep the options of a run beside the weights.
SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg", "train_args", "options")
# And under these the names of the classes.
CLASS_NAMES = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id", "labels", "categories")


@dataclass(frozen=True)
class Inside:
    """What a checkpoint holds.

    Attributes:
        path: the file or folder.
        content: everything in it, as ``read_content`` gives it.
        candidates: what could be its weights, the usual keys first.
    """

    path: Path
    content: object
    candidates: tuple[Candidate, ...] = ()

    @property
    def top(self) -> dict[str, Any]:
        """Give the entries at the top."""
        return plain(self.content)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Give the likeliest weights; none where there are none."""
        return self.candidates[0].tensors if self.candidates else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Give the options of the run, those of the first place before those of later ones."""
        gathered: dict[str, Any] = {}
        for key in SETTINGS:
            gathered = plain(self.top.get(key)) | gathered
        return gathered

    def class_names(self) -> tuple[tuple[str, ...], str] | None:
        """Give class names by output, and the key under which they are; None where there are none."""
        for place in (self.top, self.settings):
            for key in CLASS_NAMES:
                names = names_by_output(place.get(key))
                if names is not None:
                    return names, key
        return None

    def checkpoint(self, candidate: Candidate) -> tuple[Any, str]:
        """Write ``model.checkpoint`` for some weights of the file, and a remark on others of the same kind."""
        usual = all(part in NESTS for part in candidate.key.split(".")) or not candidate.key
        others = [item.key for item in self.candidates if item is not candidate and _alike(candidate, item)]
        remark = ""
        if others:
            remark = f"{candidate.key or 'the weights at the top'}; {others[0]} fits too: key: {others[0]} takes it"
        if usual or not others:
            return str(self.path), remark
        return {"file": str(self.path), "key": candidate.key}, remark


def look_inside(path: Path) -> Inside:
    """Read a checkpoint; nothing in it is imported or called.

    Raises:
        InfluenceError: there is no such file, it is damaged, or it has no weights.
    """
    if not path.exists():
        raise InfluenceError(
            f"there is no checkpoint {path}", "influence init CHECKPOINT DATA: CHECKPOINT is a file or a folder"
        )
    content = read_content(path, WHERE)
    candidates = tuple(find_weights(content))
    if not candidates:
        raise without_weights(content, path, WHERE)
    return Inside(path, content, candidates)


def beside(folder: Path) -> Inside:
    """Read what the Trainer of transformers leaves in a folder beside the weights: the optimiser and its options."""
    content: dict[str, Any] = {"args": {"optim": "adamw"}}
    for name, key in (("optimizer.pt", "optimizer"), ("training_args.bin", "args")):
        if (folder / name).is_file():
            try:
                value = read_content(folder / name, WHERE)
            except InfluenceError:  # it is read for a hint alone
                continue
            content[key] = value if key == "optimizer" else content["args"] | plain(getattr(value, "state", value))
    return Inside(folder, content)


def plain(value: object) -> dict[str, Any]:
    """Give the entries of a mapping or a namespace whose names are words; none for anything else."""
    return {key: item for key, item in (entries_of(value) or {}).items() if isinstance(key, str)}


def _alike(one: Candidate, other: Candidate) -> bool:
    """Say whether two sets of weights are of the same shapes: the same network, whatever stands before its names."""
    mine, others = (Counter(value.shape for value in item.tensors.values() if value.ndim) for item in (one, other))
    return mine == others


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
