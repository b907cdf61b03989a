"""What a data set says of itself without reading an example: labels, classes and files, through what wraps it.

A ``Subset`` has those of the examples that it takes, a ``ConcatDataset`` those of its parts one after another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch

from influence_cli.data.file_sets import DataFiles, joined

# Where data sets of torchvision, timm, MedMNIST and others keep (file, class number) pairs, files, and class numbers.
PAIRS = ("samples", "imgs", "_samples")
FILES = ("_image_files", "_images", "image_files")
LABELS = ("targets", "labels", "_labels")


@dataclass(frozen=True)
class Description:
    """What is known of the examples of a data set.

    Attributes:
        labels: int64 [n], as the data set lists them; None if it lists none that are whole numbers.
        paths: the file of each example, or a stand-in for it; None if there are none.
        classes: class names by number, or None.
        mapping: class numbers by name, or None.
        files: the files that hold the examples, if several are in one.
        remarks: what its user has to know, in a line each.
    """

    labels: np.ndarray | None = None
    paths: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None
    mapping: dict[str, int] | None = None
    files: DataFiles | None = None
    remarks: tuple[str, ...] = ()


def described(source: Any, folder: Path) -> Description:
    """Describe a data set.

    Args:
        source: any data set with a length.
        folder: its relative paths are from there.
    """
    inner = Description()
    if isinstance(source, torch.utils.data.ConcatDataset):
        inner = _joined([described(part, folder) for part in source.datasets])
    elif (indices := _taken(source)) is not None:
        inner = _some(described(source.dataset, folder), indices)
    reader = getattr(source, "reader", None)  # timm's ImageDataset keeps its list in there
    holders = [source] if reader is None else [source, reader]
    files = getattr(source, "files", None)
    mine = isinstance(files, DataFiles)
    paths = source.paths if mine else next((p for h in holders if (p := _paths(h, len(source), folder))), None)
    mapping = next((m for h in holders if isinstance(m := getattr(h, "class_to_idx", None), dict) and m), None)
    classes = _classes(source) or (None if reader is None else in_order(mapping))
    classes = inner.classes if classes is None else classes
    mapping = inner.mapping if mapping is None else dict(mapping)
    remarks = inner.remarks + tuple(getattr(source, "remarks", ()))
    if (moved := _contradiction(classes, mapping)) is not None:
        classes, mapping = None, None
        remarks += (f"{moved}: classes are numbers here, train.classes names them",)
    return Description(
        listed_labels(source),
        inner.paths if paths is None else paths,
        classes,
        mapping,
        files if mine else inner.files if paths is None else None,
        remarks,
    )


def listed_labels(source: Any) -> np.ndarray | None:
    """Read the class numbers that a data set or what it wraps lists: int64 [n]; None if there are none."""
    holders = [source, *(reader for reader in [getattr(source, "reader", None)] if reader is not None)]
    labels = next((given for holder in holders if (given := _labels(holder, len(source))) is not None), None)
    if labels is None and isinstance(source, torch.utils.data.ConcatDataset):
        parts = [listed_labels(part) for part in source.datasets]
        known = [part for part in parts if part is not None]
        labels = np.concatenate(known) if len(known) == len(parts) else None
    elif labels is None and (indices := _taken(source)) is not None:
        inner = listed_labels(source.dataset)
        labels = None if inner is None else inner[indices]
    return labels


def innermost(source: Any) -> Iterator[Any]:
    """Give the data sets that others wrap, or the data set itself."""
    if isinstance(source, torch.utils.data.ConcatDataset):
        for part in source.datasets:
            yield from innermost(part)
    elif _taken(source) is not None:
        yield from innermost(source.dataset)
    else:
        yield source


def _taken(source: Any) -> np.ndarray | None:
    """Give the positions that a Subset takes from its data set, int64 [n]; None if it is no Subset."""
    if not hasattr(source, "dataset") or not hasattr(source, "indices"):
        return None
    try:
        count, inner, indices = len(source), len(source.dataset), np.asarray(source.indices)
    except (TypeError, ValueError):
        return None
    if indices.shape != (count,) or indices.dtype.kind not in "iu":
        return None
    indices = np.where(indices < 0, indices + inner, indices).astype(np.int64)
    return indices if len(indices) and indices.min() >= 0 and indices.max() < inner else None


def _some(whole: Description, indices: np.ndarray) -> Description:
    return replace(
        whole,
        paths=None if whole.paths is None else tuple(whole.paths[int(index)] for index in indices),
        files=None if whole.files is None else whole.files.take(indices),
    )


def _joined(parts: Sequence[Description]) -> Description:
    """Describe examples one after another; what one part lacks, the whole lacks."""
    paths = [part.paths for part in parts if part.paths is not None]
    files = [part.files for part in parts if part.files is not None]
    longest = max((part.classes or () for part in parts), key=len)
    # Numbers mean the same where one list of names begins another; a part without names has numbers only.
    agree = all(part.classes is not None and longest[: len(part.classes)] == part.classes for part in parts)
    remarks = tuple(dict.fromkeys(remark for part in parts for remark in part.remarks))
    if longest and not agree:
        lists = dict.fromkeys(", ".join(part.classes[:4]) if part.classes else "numbers" for part in parts)
        remarks += (f"data sets with different classes are joined ({' | '.join(lists)}): classes are numbers here",)
    whole = len(paths) == len(parts) and len(files) in (0, len(parts))
    mapping = next((part.mapping for part in parts if part.classes == longest), None)
    return Description(
        None,
        tuple(path for some in paths for path in some) if whole else None,
        longest if longest and agree else None,
        mapping if agree else None,
        joined(files) if files and whole else None,
        remarks,
    )


def _labels(source: Any, count: int) -> np.ndarray | None:
    """Read the class numbers that a data set lists."""
    given = next((getattr(source, name) for name in LABELS if hasattr(source, name)), None)
    if given is None and isinstance(source, torch.utils.data.TensorDataset) and len(source.tensors) > 1:
        given = source.tensors[1]
    if given is None and (pairs := _pairs(source, count)) is not None and all(len(pair) > 1 for pair in pairs):
        given = [pair[1] for pair in pairs]
    if given is None:
        return None
    try:
        numbers = np.asarray(given).reshape(-1)
        labels = numbers.astype(np.int64) if numbers.dtype.kind in "biu" else None
    except (TypeError, ValueError):
        return None
    return labels if labels is not None and len(labels) == count else None


def _pairs(source: Any, count: int) -> Sequence[Any] | None:
    """Find the list of tuples that begin with a file."""
    for name in PAIRS:
        pairs = getattr(source, name, None)
        if (
            isinstance(pairs, list | tuple)
            and len(pairs) == count
            and all(isinstance(pair, tuple | list) and pair and isinstance(pair[0], str | Path) for pair in pairs)
        ):
            return pairs
    return None


def _paths(source: Any, count: int, folder: Path) -> tuple[str, ...] | None:
    files: Sequence[Any] | None = None
    if (pairs := _pairs(source, count)) is not None:
        files = [pair[0] for pair in pairs]
    else:
        lists = (getattr(source, name, None) for name in FILES)
        files = next(
            (
                given
                for given in lists
                if isinstance(given, list | tuple)
                and len(given) == count
                and all(isinstance(file, str | Path) for file in given)
            ),
            None,
        )
    return None if files is None else tuple(str(folder / file) for file in files)


def _classes(source: Any) -> tuple[str, ...] | None:
    """Read class names: ``classes``, or the ``info`` of MedMNIST."""
    classes = getattr(source, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return tuple(" / ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in classes)
    info = getattr(source, "info", None)
    names = info.get("label") if isinstance(info, dict) else None
    if isinstance(names, dict) and all(str(number).isdecimal() for number in names):
        return in_order({str(name): int(number) for number, name in names.items()})
    return None


def _contradiction(classes: tuple[str, ...] | None, mapping: dict[str, int] | None) -> str | None:
    """Find a name whose number differs between the list of names and the mapping of a data set."""
    for name, number in (mapping or {}).items():
        if classes is not None and str(name) in classes and classes.count(str(name)) == 1:
            at = classes.index(str(name))
            if at != number:
                return f"{name} is {at} in classes of the data set and {number} in its class_to_idx"
    return None


def in_order(mapping: dict[Any, Any] | None) -> tuple[str, ...] | None:
    """Give the names of a mapping in the order of their numbers, if these are 0, 1, …"""
    if not mapping or sorted(map(str, mapping.values())) != sorted(map(str, range(len(mapping)))):
        return None
    return tuple(str(name) for name, _ in sorted(mapping.items(), key=lambda pair: int(pair[1])))


def folders_hint(one: Collection[str], other: Collection[str]) -> str:
    """Say what two sets with other class folders need; of names that only look alike, what is different.

    Args:
        one: the names of one set's classes.
        other: those of the other set.
    """
    if {normalize("NFC", name) for name in one} == {normalize("NFC", name) for name in other} and set(one) != set(
        other
    ):
        return (
            "the names look alike, but their accents are written in two ways (Unicode NFC and NFD, as after a copy "
            "from macOS): rename the folders of one set"
        )
    return "train and test need the same class folders, so that a number means the same class"
