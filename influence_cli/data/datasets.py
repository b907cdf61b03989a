"""From the config to a data set: call it, check its items, read its labels, classes and paths."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from influence_cli.config.schema import Config, DataConfig
from influence_cli.config.user_code import accepts, call, import_object
from influence_cli.data.class_outputs import (
    decide,
    in_outputs,
    map_classes,
    read_class_outputs,
    refuse_missing,
)
from influence_cli.data.file_sets import DataFiles
from influence_cli.data.image_files import refuse_folder_loops
from influence_cli.data.label_files import read_indices, read_labels
from influence_cli.data.split import ClassOutputs, Split, raw_item
from influence_cli.errors import InfluenceError, describe, did_you_mean

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode


def load_splits(config: Config) -> tuple[Split, Split | None]:
    """Build the training and test examples, which must agree on the classes; no model is needed."""
    train = load_split(config, "train", config.train)
    test = load_split(config, "test", config.test, train.given_classes) if config.test is not None else None
    if test is not None:
        _check_mapping(train, test, only_shared=config.train.classes is not None)
    return train, test


def load_split(config: Config, name: str, section: DataConfig, given: ClassOutputs | None = None) -> Split:
    """Build the training or the test examples: data set, transform, labels, exclusions.

    Args:
        config: the run's config.
        name: ``train`` or ``test``.
        section: of it.
        given: for the test examples, how the training examples read ``train.classes``.

    Raises:
        InfluenceError: at the config's line, for whatever does not exist or fit.
    """

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
    transform = _build_transform(config, name, section, factory)
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
        transform_text="; ".join(f"{step.name} {step.args}" for step in section.transform or ()),
        folder=None if Path.cwd() == config.folder else config.folder,
        files=files,
    )
    labels = own = source_labels(split)
    if config.train.classes is not None:
        split = replace(split, labels=own)
        if given is None:
            given = decide(read_class_outputs(config.train.classes, config.where("train", "classes")), split)
        split = replace(map_classes(split, given), given_classes=given)
        labels = in_outputs(own, split.class_outputs or {})
    if section.labels is not None:
        labels = read_labels(section.labels, labels, split.classes, where("labels"), split.paths)
    indices = split.indices
    if section.exclude is not None:
        indices = np.setdiff1d(indices, read_indices(section.exclude, len(source), where("exclude"), split.paths))
        if not len(indices):
            raise InfluenceError(f"{where('exclude')}: {section.exclude} leaves no {name} example")
    split = replace(split, labels=labels, indices=indices)
    if given is not None:
        refuse_missing(split, own, classes, given)
    return split


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
    """Find the data set's own labels, without decoding images if possible; check them on three examples.

    They are numbers of outputs where ``train.classes`` says which class is which.
    """
    labels = _own_labels(split)
    return labels if split.class_outputs is None else in_outputs(labels, split.class_outputs)


def _own_labels(split: Split) -> np.ndarray:
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


def _build_transform(config: Config, name: str, section: DataConfig, factory: Any) -> Callable[[Any], Any] | None:
    if section.transform is None:
        return None
    from torchvision.transforms import v2

    steps = []
    for number, step in enumerate(section.transform):
        at = config.where(name, "transform", number)
        made = getattr(v2, step.name, None)
        if not isinstance(made, type):
            known = [word for word in dir(v2) if isinstance(getattr(v2, word), type)]
            raise InfluenceError(
                f"{at}: torchvision.transforms.v2 has no {step.name!r}", did_you_mean(step.name, known)
            )
        if step.name.startswith("Random"):
            raise InfluenceError(
                f"{at}: {step.name} is random: an example's gradient would change with every reading",
                "give the evaluation transform, without augmentation",
            )
        args = dict(step.args)
        for key, value in args.items():
            if key == "dtype" and isinstance(value, str):
                args[key] = _dtype(value, at)
            if key == "interpolation" and isinstance(value, str):
                args[key] = _interpolation(value, at)
        steps.append(call(made, args, config.folder, step.name, lambda *_, at=at: at))
    if accepts(factory, "transform") and "transform" in section.args:
        raise InfluenceError(f"{config.where(name, 'args', 'transform')}: give the transform under {name}.transform")
    return v2.Compose(steps) if steps else None


def _interpolation(name: str, where: str) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode]
    if name.lower() not in known:
        raise InfluenceError(f"{where}: there is no interpolation {name!r}", did_you_mean(name.lower(), known))
    return InterpolationMode(name.lower())


def _dtype(name: str, where: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InfluenceError(
            f"{where}: there is no dtype {name!r}", did_you_mean(name, ["float32", "float64", "uint8"])
        )
    return dtype


def _check_mapping(train: Split, test: Split, *, only_shared: bool) -> None:
    if only_shared and train.mapping is not None and test.mapping is not None:
        shared = train.mapping.keys() & test.mapping.keys()
        train, test = (
            replace(split, mapping={name: (split.mapping or {})[name] for name in shared}) for split in (train, test)
        )
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
