"""From the config to a data set: call it, check its items, read its labels, classes and paths."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli.config.schema import Config, DataConfig
from influence_cli.config.user_code import call, import_object
from influence_cli.data.file_sets import DataFiles
from influence_cli.data.image_files import refuse_folder_loops
from influence_cli.data.label_files import read_indices, read_labels
from influence_cli.data.split import Split, raw_item
from influence_cli.data.transforms import build_transform
from influence_cli.errors import InfluenceError, describe


def load_splits(config: Config) -> tuple[Split, Split | None]:
    """Build the training and test examples, which must agree on the classes; no model is needed."""
    train = load_split(config, "train", config.train)
    test = load_split(config, "test", config.test) if config.test is not None else None
    if test is not None:
        _check_mapping(train, test)
    return train, test


def load_split(config: Config, name: str, section: DataConfig) -> Split:
    """Build the training or the test examples: data set, transform, labels, exclusions."""

    def where(*keys: str) -> str:
        return config.where(name, *(keys or ("dataset",)))

    factory, root = import_object(section.dataset, config.folder, where()), section.args.get("root")
    if _is_folder_of_classes(factory) and isinstance(root, str):
        refuse_folder_loops(config.folder / root, where())
    source = call(factory, section.args, config.folder, section.dataset, where)
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise InfluenceError(
            f"{where()}: {section.dataset} returned a {type(source).__name__}, without a length or items by index",
            "use a map-style data set, with __len__ and __getitem__",
        )
    if len(source) == 0:
        raise InfluenceError(f"{where()}: the {name} data set is empty", "check its args")
    transform, transform_text = build_transform(config, name, section, factory)
    classes = _source_classes(source)
    mapping = getattr(source, "class_to_idx", None)
    files = getattr(source, "files", None)
    files = files if isinstance(files, DataFiles) else None
    split = Split(
        name=name,
        source=source,
        transform=transform,
        labels=np.full(len(source), -1, dtype=np.int64),
        indices=np.arange(len(source), dtype=np.int64),
        paths=source.paths if files is not None else _source_paths(source, config.folder),
        classes=classes,
        mapping=dict(mapping) if isinstance(mapping, dict) else None,
        where=where(),
        transform_text=transform_text,
        folder=None if Path.cwd() == config.folder else config.folder,
        files=files,
    )
    labels = source_labels(split)
    if section.labels is not None:
        labels = read_labels(section.labels, labels, classes, where("labels"), split.paths)
    indices = split.indices
    if section.exclude is not None:
        indices = np.setdiff1d(indices, read_indices(section.exclude, len(source), where("exclude"), split.paths))
        if not len(indices):
            raise InfluenceError(f"{where('exclude')}: {section.exclude} leaves no {name} example")
    return replace(split, labels=labels, indices=indices)


def _is_folder_of_classes(factory: Any) -> bool:
    """Say whether this is torchvision's ImageFolder or similar, without importing torchvision for other data sets."""
    base = getattr(sys.modules.get("torchvision.datasets"), "DatasetFolder", None)
    return base is not None and isinstance(factory, type) and issubclass(factory, base)


def _source_classes(source: Any) -> tuple[str, ...] | None:
    classes = getattr(source, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return tuple(" / ".join(map(str, c)) if isinstance(c, tuple | list) else str(c) for c in classes)
    return None


def _source_paths(source: Any, folder: Path) -> tuple[str, ...] | None:
    for attribute in ("samples", "imgs"):
        samples = getattr(source, attribute, None)
        if (
            isinstance(samples, list)
            and len(samples) == len(source)
            and all(isinstance(sample, tuple | list) and isinstance(sample[0], str | Path) for sample in samples)
        ):
            return tuple(str(folder / sample[0]) for sample in samples)
    return None


def source_labels(split: Split) -> np.ndarray:
    """Find the data set's own labels, without decoding images if possible; check them on three examples."""
    source = split.source
    targets = next((getattr(source, a) for a in ("targets", "labels", "_labels") if hasattr(source, a)), None)
    if targets is None and isinstance(source, torch.utils.data.TensorDataset) and len(source.tensors) > 1:
        targets = source.tensors[1]
    if targets is not None:
        try:
            given = np.asarray(targets).reshape(-1)
            labels = given.astype(np.int64) if given.dtype.kind in "biu" else np.empty(0, dtype=np.int64)
        except (TypeError, ValueError):
            labels = np.empty(0, dtype=np.int64)
        probes = {0, len(source) // 2, len(source) - 1}
        if len(labels) == len(source) and all(_agrees(split, i, int(labels[i])) for i in probes):
            return labels
    return np.array([_item_label(split, i) for i in range(len(source))], dtype=np.int64)


def _agrees(split: Split, index: int, label: int) -> bool:
    try:
        return _item_label(split, index) == label
    except InfluenceError:
        # An unreadable image says nothing about its label; the pass that needs the image names it.
        return True


def _item_label(split: Split, index: int) -> int:
    _, label = raw_item(split, index)
    try:
        number = int(label)
        if number != label or abs(number) >= 2**63:
            raise ValueError("not a whole number that fits")
    except (TypeError, ValueError, OverflowError) as error:
        raise InfluenceError(
            f"{split.where}: {split.title(index)} has the label {label!r}, not a class number ({describe(error)})"
        ) from error
    return number


def _check_mapping(train: Split, test: Split) -> None:
    if train.mapping is not None and test.mapping is not None and train.mapping != test.mapping:
        only = [
            f"only in {split} {', '.join(sorted(mine.keys() - others.keys())[:6])}"
            for split, mine, others in (
                ("train", train.mapping, test.mapping),
                ("test", test.mapping, train.mapping),
            )
            if mine.keys() - others.keys()
        ]
        moved = sorted(name for name in train.mapping if train.mapping[name] != test.mapping.get(name))
        raise InfluenceError(
            f"{test.where}: class_to_idx differs between train and test: "
            + ("; ".join(only) or f"different numbers for {', '.join(moved[:6])}"),
            "train and test need the same class folders, so that a number means the same class",
        )
