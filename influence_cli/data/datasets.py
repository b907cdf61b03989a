"""From the config to a data set: call it, check its items, read its labels, classes and paths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli.config.quick_torchvision import import_torchvision
from influence_cli.config.schema import Config, DataConfig
from influence_cli.config.user_code import call, import_object
from influence_cli.data.class_outputs import (
    by_names,
    decide,
    in_outputs,
    map_classes,
    read_class_outputs,
    refuse_missing,
)
from influence_cli.data.described import described, folders_hint, in_order, innermost, listed_labels
from influence_cli.data.huggingface import HubImages, choose_split, is_hub_set, load_hub_set
from influence_cli.data.image_files import Strays, look_through, refuse_no_classes, stray_remarks, without_strays
from influence_cli.data.label_files import given_labels, known_labels, read_indices, read_weights
from influence_cli.data.listed_images import ListedImages
from influence_cli.data.split import (
    ClassOutputs,
    Split,
    label_conflict,
    label_number,
    named_label,
    raw_item,
    spread,
    to_input,
)
from influence_cli.data.transforms import build_transform
from influence_cli.errors import InfluenceError
from influence_cli.runtime.opened_files import noting_opened
from influence_cli.runtime.terminal import Terminal, or_silent

# Their data sets and transforms open no file besides those of the examples.
LIBRARIES = ("torch", "torchvision")
# Examples whose label is compared with the list; sets up to this size are read for their labels where the two differ,
# and of larger ones so many examples.
PROBES, READABLE, SAMPLED = 64, 60_000, 2_048


def load_splits(config: Config, terminal: Terminal | None = None) -> tuple[Split, Split | None]:
    """Build the training and test examples, which must agree on the classes; no model is needed."""
    with noting_opened() as opened:
        train = load_split(config, "train", config.train, terminal)
        _read_one(train, config.train)
    train = replace(train, opened=opened.files())
    if config.test is None:
        return train, None
    test = load_split(config, "test", config.test, terminal, train.source_classes, train.given_classes)
    inside = bool(train.source_classes) and set(test.source_classes or ()) <= set(train.source_classes or ())
    _check_mapping(train, test, only_shared=inside or config.train.classes is not None)
    return train, test


def _read_one(split: Split, section: DataConfig) -> None:
    """Read an example if code of the user takes part in it: that code may open its files only now."""
    names = [section.dataset, *(step.name for step in section.transform or ())]
    if any(":" in name or ("." in name and name.partition(".")[0] not in LIBRARIES) for name in names):
        with suppress(InfluenceError):  # the pass over the data names it
            index = int(split.indices[0])
            to_input(split, raw_item(split, index)[0], split.title(index))


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
    for tell, told in ((or_silent(terminal).warn, remarks), (or_silent(terminal).say, description.remarks)):
        for remark in told:
            tell(f"{where()}: {remark}")
    transform, transform_text = build_transform(config, name, section, factory)
    split = Split(
        name=name,
        source=source,
        transform=transform,
        labels=np.full(len(source), -1, dtype=np.int64),
        indices=np.arange(len(source), dtype=np.int64),
        paths=description.paths,
        classes=description.classes,
        mapping=description.mapping,
        where=where(),
        transform_text=transform_text,
        folder=None if Path.cwd() == config.folder else config.folder,
        files=description.files,
    )
    stated = section.labels is not None
    split = _with_item_labels(split, listed_labels(source), or_silent(terminal), stated=stated)
    classes = split.classes
    split = replace(split, source_classes=tuple(in_order(split.mapping) or classes or ()))
    labels = own = source_labels(split)
    if config.train.classes is not None and given is None:
        given = decide(
            read_class_outputs(config.train.classes, config.where("train", "classes")), replace(split, labels=own)
        )
    elif given is None and (given := by_names(split, known or ())) is not None:
        or_silent(terminal).say(
            f"{where()}: the {name} data set numbers its classes in another way than the training set; they are mapped "
            "by their names"
        )
    if given is not None:
        split = replace(map_classes(replace(split, labels=own), given), given_classes=given)
        labels = in_outputs(own, split.class_outputs or {})
    if section.labels is not None:
        at, given_there = given_labels(section.labels, len(source), split.classes, where("labels"), split.paths)
        labels, overridden = labels.copy(), np.zeros(len(source), dtype=bool)
        labels[at], overridden[at] = given_there, True
        labels = known_labels(labels, split.classes, section.labels, where("labels"))
        split = replace(split, overridden=overridden)
        odd = [(n, word) for n, word in enumerate(split.classes or ()) if word.isdecimal() and int(word) != n]
        if odd and section.labels.suffix == ".csv":
            number, word = odd[0]
            or_silent(terminal).say(
                f"{where('labels')}: {section.labels.name} gives class names: {word} is the class of that name, number "
                f"{number}"
            )
    indices = split.indices
    if section.exclude is not None:
        indices = np.setdiff1d(indices, read_indices(section.exclude, len(source), where("exclude"), split.paths))
        if not len(indices):
            raise InfluenceError(f"{where('exclude')}: {section.exclude} leaves no {name} example")
    weights = (
        None if section.weights is None else read_weights(config.folder, section, source, where("weights"), split.paths)
    )
    split = replace(split, labels=labels, indices=indices, weights=weights)
    if given is not None:
        refuse_missing(split, own, classes, given)
    return split


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
        import_torchvision()
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
    """Give the data set's own labels, before overrides: those that its items give.

    They are numbers of outputs where ``train.classes`` says which class is which.
    """
    labels = split.labels if split.item_labels is None else split.item_labels
    return labels if split.class_outputs is None else in_outputs(labels, split.class_outputs)


def _with_item_labels(split: Split, listed: np.ndarray | None, terminal: Terminal, *, stated: bool) -> Split:
    """Find the label that each item gives, without decoding images if possible, and the names of these numbers.

    A list of labels is compared with items from all over the set, of every class; every pass over the data compares
    the others. A trainer saw what the items give, so they are right: where they differ from the list, they are read.

    Args:
        split: without labels yet.
        listed: int64 [n], the data set's own list; None if it has none.
        terminal: told where the two differ.
        stated: whether the config names a file of labels.
    """
    source, every = split.source, np.arange(len(split.source))
    if isinstance(source, ListedImages | HubImages):
        return replace(split, item_labels=np.array(source.targets))
    if listed is None:
        return replace(split, item_labels=np.array([_item_label(split, i) for i in every.tolist()], dtype=np.int64))
    if _gives_its_list(source):
        return replace(split, item_labels=listed)
    split = replace(split, labels=listed, item_labels=listed)
    probes = np.union1d(spread(split, PROBES), every[[0, -1]])
    conflict = next((error for i in probes if (error := _conflict(split, int(i))) is not None), None)
    if conflict is None:
        return split
    if len(source) <= READABLE:
        at, items = every, _given_or(split, every, listed)
    else:
        at = np.union1d(spread(split, SAMPLED), probes)
        items = _given_or(split, at, listed)
    renumbered = _renumbering(listed[at], items)
    if renumbered is not None and set(np.unique(listed)) <= renumbered.keys():
        moved = [f"{named_label(split, a)} is {b}" for a, b in renumbered.items() if a != b]
        terminal.say(
            f"{split.where}: the items of the {split.name} data set number the classes in another way than its list of "
            f"labels: {', '.join(moved[:4])}{', …' if len(moved) > 4 else ''}; the items count, names go with the class"
        )
        return _renumbered(split, renumbered)
    if len(at) < len(every):
        if stated:
            return split
        raise conflict
    kept = float((items == listed).mean()) > 0.5
    terminal.say(
        f"{conflict.message}; the labels of the items count ({int((items != listed).sum()):,} differ)"
        + ("" if kept or split.classes is None else ", and classes are numbers here: their names are not known")
    )
    names = split if kept else replace(split, classes=None, mapping=None)
    return replace(names, item_labels=items)


def _gives_its_list(source: Any) -> bool:
    """Say whether the items of a data set give the labels of its list by torchvision's or torch's own code."""
    if type(source) is torch.utils.data.TensorDataset:
        return True
    if type(source) is torch.utils.data.Subset:
        return _gives_its_list(source.dataset)
    if type(source) is torch.utils.data.ConcatDataset:
        return all(_gives_its_list(part) for part in source.datasets)
    base = getattr(sys.modules.get("torchvision.datasets"), "DatasetFolder", None)
    return (
        base is not None
        and isinstance(source, base)
        and type(source).__getitem__ is base.__getitem__
        and source.target_transform is None
        and [label for _, label in source.samples] == list(source.targets)
    )


def _item_label(split: Split, index: int) -> int:
    return label_number(split, index, raw_item(split, index)[1])


def _conflict(split: Split, index: int) -> InfluenceError | None:
    try:
        return label_conflict(split, index, raw_item(split, index)[1])
    except InfluenceError:
        # An unreadable image says nothing about its label; the pass that needs the image names it.
        return None


def _given_or(split: Split, at: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Read the labels of some items, int64 [k]; one that cannot be read keeps that of the list."""
    labels: np.ndarray = listed[at]
    for row, index in enumerate(at.tolist()):
        try:
            label = raw_item(split, index)[1]
        except InfluenceError:
            continue
        labels[row] = label_number(split, index, label)
    return labels


def _renumbering(listed: np.ndarray, items: np.ndarray) -> dict[int, int] | None:
    """Find the number that the items give each class of the list; None if it is not one number per class."""
    pairs, counts = np.unique(np.stack([listed, items]), axis=1, return_counts=True)
    numbers = dict(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))
    if len(numbers) < len(counts):
        return None
    merged = len(set(numbers.values())) < len(numbers)
    # A class of one or two examples may differ by chance, and then it would lend its name to another one.
    seldom = any(a != b and count < 3 for (a, b), count in zip(numbers.items(), counts.tolist(), strict=True))
    return None if merged and seldom else numbers


def _renumbered(split: Split, numbers: dict[int, int]) -> Split:
    """Move the names of classes to the numbers that the items give them."""
    values, at = np.unique(split.labels, return_inverse=True)
    items = np.array([numbers[int(value)] for value in values], dtype=np.int64)[at.reshape(-1)]
    names: dict[int, list[str]] = {}
    for number, name in enumerate(split.classes or ()):
        if numbers.get(number, -1) >= 0:
            names.setdefault(numbers[number], []).append(name)
    taken = set(split.classes or ())
    classes = tuple(
        " / ".join(names.get(number, [str(number) if str(number) not in taken else f"label {number}"]))
        for number in range(max(names, default=-1) + 1)
    )
    mapping = None if split.mapping is None else {n: numbers[v] for n, v in split.mapping.items() if v in numbers}
    return replace(split, item_labels=items, classes=classes or None, mapping=mapping)


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
            folders_hint(train.mapping, test.mapping),
        )
