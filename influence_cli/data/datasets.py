"""From the config to a data set: call it, check its items, read its labels, classes and paths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli.config.schema import Config, DataConfig
from influence_cli.config.user_code import call, import_object
from influence_cli.data.class_outputs import decide, in_outputs, map_classes, read_class_outputs, refuse_missing
from influence_cli.data.described import described, in_order, innermost, listed_labels
from influence_cli.data.huggingface import HubImages, choose_split, is_hub_set, load_hub_set
from influence_cli.data.image_files import Strays, look_through, refuse_no_classes, stray_remarks, without_strays
from influence_cli.data.label_files import check_weights, read_indices, read_labels, read_numbers
from influence_cli.data.listed_images import ListedImages
from influence_cli.data.split import ClassOutputs, Split, raw_item
from influence_cli.data.transforms import build_transform
from influence_cli.errors import InfluenceError, describe
from influence_cli.runtime.terminal import Terminal, or_silent


def load_splits(config: Config, terminal: Terminal | None = None) -> tuple[Split, Split | None]:
    """Build the training and test examples, which must agree on the classes; no model is needed."""
    train = load_split(config, "train", config.train, terminal)
    if config.test is None:
        return train, None
    test = load_split(config, "test", config.test, terminal, train.source_classes, train.given_classes)
    _check_mapping(train, test, only_shared=config.train.classes is not None)
    return train, test


def load_split(
    config: Config,
    name: str,
    section: DataConfig,
    terminal: Terminal | None = None,
    known: Sequence[str] | None = None,
    given: ClassOutputs | None = None,
) -> Split:
    """Build the training or the test examples: data set, transform, labels, exclusions.

    Args:
        config: the run's config.
        name: ``train`` or ``test``.
        section: of the config.
        terminal: told what was guessed and what was left out.
        known: the classes of the training examples, for test labels that are names; empty where they have none.
        given: for the test examples, how the training examples read ``train.classes``.

    Raises:
        InfluenceError: at the config's line, for whatever does not exist or fit.
    """

    def where(*keys: str) -> str:
        return config.where(name, *(keys or (section.kind,)))

    source, factory, remarks = _open(config, section, where, known)
    if len(source) == 0:
        raise InfluenceError(f"{where()}: the {name} data set is empty", "check its args")
    description = described(source, config.folder)
    for remark in remarks:
        or_silent(terminal).warn(f"{where()}: {remark}")
    for remark in description.remarks:
        or_silent(terminal).say(f"{where()}: {remark}")
    transform, transform_text = build_transform(config, name, section, factory)
    classes = description.classes
    split = Split(
        name=name,
        source=source,
        transform=transform,
        labels=np.full(len(source), -1, dtype=np.int64),
        indices=np.arange(len(source), dtype=np.int64),
        paths=description.paths,
        classes=classes,
        mapping=description.mapping,
        where=where(),
        transform_text=transform_text,
        folder=None if Path.cwd() == config.folder else config.folder,
        files=description.files,
    )
    split = replace(split, source_classes=tuple(in_order(split.mapping) or classes or ()))
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
    weights = None if section.weights is None else _weights(config, section, source, where("weights"), split.paths)
    split = replace(split, labels=labels, indices=indices, weights=weights)
    if given is not None:
        refuse_missing(split, own, classes, given)
    return split


def _weights(config: Config, section: DataConfig, source: Any, where: str, paths: Sequence[str] | None) -> np.ndarray:
    """Read the weights of the training examples: a column of the list, or else a file beside the config.

    Raises:
        InfluenceError: neither exists, or a weight is no finite number ≥ 0.
    """
    name = str(section.weights)
    column = source.column(name) if isinstance(source, ListedImages) else None
    if column is not None:
        return check_weights(column, where, f"column {name!r} of {section.csv}")
    path = config.folder / name
    if not path.is_file():
        columns = f"nor a column of {section.csv}" if isinstance(source, ListedImages) else "(.npy, .csv or .txt)"
        raise InfluenceError(
            f"{where}: train.weights is {name!r}: there is no such file {columns}",
            "give one number per training example, in the order of the data set",
        )
    return check_weights(read_numbers(path, len(source), where, paths), where, str(path.name))


def _open(
    config: Config, section: DataConfig, where: Callable[..., str], known: Sequence[str] | None
) -> tuple[Any, Any, list[str]]:
    """Call what the section names.

    Returns:
        The data set, what made it, and remarks for the user, a line each.
    """
    kind, folder, args = section.kind, config.folder, section.args
    picked = {"image": section.image, "label": section.label}
    if kind == "csv":
        args = {**picked, "file": section.csv, "root": section.root, "split": section.split, "classes": known}
        return call(ListedImages, args, folder, kind, where), ListedImages, []
    factory: Any
    if kind == "folder" and section.folder is not None:
        from torchvision.datasets import ImageFolder

        factory = ImageFolder
        args = {"root": str(section.folder)}
        refuse_no_classes(section.folder, where())
    elif kind == "huggingface":
        factory, args = load_hub_set, {"name": section.huggingface, "split": section.split, "args": args}
    else:
        factory = import_object(section.dataset, folder, where())
    base = getattr(sys.modules.get("torchvision.datasets"), "DatasetFolder", None)
    root, made = args.get("root"), factory
    looked = {}
    if base is not None and isinstance(factory, type) and issubclass(factory, base) and isinstance(root, str):
        looked[str(folder / root)] = look_through(folder / root, where())
        made = without_strays(factory, base)
    source = call(made, args, folder, section.dataset or kind, where)
    if any(is_hub_set(part) for part in innermost(source)):
        return _hub_images(source, config, section, where, known), factory, []
    for key in ("image", "label", "split"):
        if getattr(section, key) is not None:
            raise InfluenceError(
                f"{where(key)}: {key} is for a set of the datasets library, but {section.dataset} returned a "
                f"{type(source).__name__}",
                "remove it",
            )
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise InfluenceError(
            f"{where()}: {section.dataset} returned a {type(source).__name__}, without a length or items by index",
            "use a map-style data set, with __len__ and __getitem__",
        )
    return source, factory, _folder_remarks(source, folder, looked, where())


def _hub_images(
    source: Any, config: Config, section: DataConfig, where: Callable[..., str], known: Sequence[str] | None
) -> Any:
    """Choose split and columns of a set of the ``datasets`` library, also inside of a ``Subset``."""
    if type(source) is torch.utils.data.Subset:
        return type(source)(_hub_images(source.dataset, config, section, where, known), source.indices)
    if type(source) is torch.utils.data.ConcatDataset:
        return type(source)([_hub_images(part, config, section, where, known) for part in source.datasets])
    if not is_hub_set(source):
        return source
    if section.kind == "dataset":
        split = {"made": source, "split": section.split, "name": section.dataset}
        source = call(choose_split, split, config.folder, section.dataset, where)
    if not hasattr(source, "__len__"):
        raise InfluenceError(f"{where()}: the data set streams, so its examples have no numbers", "streaming: false")
    args = {"source": source, "image": section.image, "label": section.label, "classes": known}
    return call(HubImages, args | {"rgb": section.kind == "huggingface"}, config.folder, section.kind, where)


def _folder_remarks(source: Any, folder: Path, looked: dict[str, Strays], where: str) -> list[str]:
    """Say what lies in the class folders of a data set and is not in it, also if the user's own code made it."""
    base = getattr(sys.modules.get("torchvision.datasets"), "DatasetFolder", None)
    lines: list[str] = []
    for part in innermost(source):
        if base is None or not isinstance(part, base):
            continue
        root = str(folder / str(part.root))
        if root not in looked:
            looked[root] = look_through(Path(root), where)
        files = (str(folder / path) for path, _ in part.samples)
        lines += stray_remarks(looked[root], root, part.classes, files)
    return list(dict.fromkeys(lines))


def source_labels(split: Split) -> np.ndarray:
    """Find the data set's own labels, without decoding images if possible; check them on three examples.

    They are numbers of outputs where ``train.classes`` says which class is which.
    """
    labels = _own_labels(split)
    return labels if split.class_outputs is None else in_outputs(labels, split.class_outputs)


def _own_labels(split: Split) -> np.ndarray:
    source = split.source
    if isinstance(source, ListedImages | HubImages):
        return np.array(source.targets)
    labels = listed_labels(source)
    if labels is not None:
        probes = {0, len(source) // 2, len(source) - 1}
        if all(_agrees(split, i, int(labels[i])) for i in probes):
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
    if isinstance(label, np.ndarray | torch.Tensor) and label.ndim:
        if len(label.reshape(-1)) != 1:
            raise InfluenceError(
                f"{split.where}: {split.title(index)} has {len(label.reshape(-1))} labels at once",
                "influence explains classifiers with one class an example: give the class number instead of a vector",
            )
        label = label.reshape(-1)[0]
    try:
        number = int(label)
        if number != label or abs(number) >= 2**63:
            raise ValueError("not a whole number that fits")
    except (TypeError, ValueError, OverflowError) as error:
        raise InfluenceError(
            f"{split.where}: {split.title(index)} has the label {label!r}, not a class number ({describe(error)})"
        ) from error
    return number


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
