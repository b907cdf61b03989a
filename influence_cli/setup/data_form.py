"""Which data set a folder or file is, by its form: training examples, and test examples beside them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_cli.errors import InfluenceError, counted
from influence_cli.setup.guesses import DataGuess
from influence_cli.setup.tables import LABEL_COLUMNS, TABLES, read_table_form

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation", "dev", "eval")
# Files that torchvision's data sets leave in their root, and how their training and test examples are asked for.
DOWNLOADED = (
    ("MNIST/raw/train-images-idx3-ubyte*", "MNIST", {"train": True}, {"train": False}),
    ("FashionMNIST/raw/train-images-idx3-ubyte*", "FashionMNIST", {"train": True}, {"train": False}),
    ("KMNIST/raw/train-images-idx3-ubyte*", "KMNIST", {"train": True}, {"train": False}),
    ("cifar-10-batches-py/data_batch_1", "CIFAR10", {"train": True}, {"train": False}),
    ("cifar-100-python/train", "CIFAR100", {"train": True}, {"train": False}),
    ("stl10_binary/train_X.bin", "STL10", {"split": "train"}, {"split": "test"}),
)
# Sets of pictures, of 28 pixels or the size in the name; those of volumes end with 3d.
MEDMNIST = re.compile(r"([a-z]+mnist)(?:_(\d+))?\.npz")
# So many folders below one are looked through for an image.
LOOKED_AT = 5000
FORMS = (
    "a folder of a folder for each class, with or without train/ and val/ above; a .csv, .tsv or .jsonl list of "
    "images; Parquet files; tar shards; a folder of datasets; an .npz file of MedMNIST"
)


@dataclass(frozen=True)
class Form:
    """One data set of a known form.

    Attributes:
        section: the keys of ``train`` or ``test``.
        why: what was seen.
    """

    section: dict[str, Any]
    why: str


def guess_data(data: Path, test: Path | None) -> DataGuess:
    """Find out which form data have.

    Args:
        data: a folder or file of training examples, or of both.
        test: a folder or file of test examples, or None for those beside the training examples, if there are any.

    Raises:
        InfluenceError: there is no such path, its form is not known, or it has a single class.
    """
    if not os.path.lexists(data):
        raise InfluenceError(f"there is no {data}", "influence init CHECKPOINT DATA [TEST]: DATA is a folder or a file")
    pair = _pair(data)
    if pair is None:
        raise InfluenceError(f"{data}: {_seen(data)}, no form of data that is known", f"known: {FORMS}")
    train, beside = pair
    if test is None:
        return DataGuess(train.section, train.why, *((beside.section, beside.why) if beside else ()))
    if not os.path.lexists(test):
        raise InfluenceError(f"there is no {test}", "TEST is a folder or a file, as DATA is")
    pair = _pair(test)
    if pair is None:
        raise InfluenceError(f"{test}: {_seen(test)}, no form of data that is known", f"known: {FORMS}")
    # Of a folder of both, the test examples are meant.
    chosen = pair[1] or pair[0]
    return DataGuess(train.section, train.why, chosen.section, chosen.why)


def _pair(data: Path) -> tuple[Form, Form | None] | None:
    """Find training examples, and test examples that lie with them; None where the form is not known."""
    if data.is_file():
        return _of_file(data)
    for look in (_saved, _downloaded, _split_folders, _in_files, _of_classes, _listed):
        pair = look(data)
        if pair is not None:
            return pair
    return None


def _of_file(path: Path) -> tuple[Form, Form | None] | None:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(str(path), path.name), None
    if suffix == ".tar":
        return _tar(str(path), path.name), None
    if suffix in TABLES:
        train, test = read_table_form(path)
        why = f"{path.name} is a list of images"
        return Form(train, why), Form(test, f"the other split of {path.name}") if test else None
    return _medmnist(path)


def _medmnist(path: Path) -> tuple[Form, Form | None] | None:
    """Take a file of MedMNIST by its name, of images with one label each; the library reads it."""
    named = MEDMNIST.fullmatch(path.name)
    if named is None:
        return None
    if importlib.util.find_spec("medmnist") is None:
        raise InfluenceError(f"{path} has a name of MedMNIST, but medmnist is not installed", "pip install medmnist")
    import medmnist

    about = medmnist.INFO.get(named[1])
    if about is None or "multi-label" in about["task"]:
        return None
    dataset = f"medmnist.{about['python_class']}"
    size = {"size": int(named[2])} if named[2] else {}
    train, test = (
        {"dataset": dataset, "args": {"root": str(path.parent), "split": split, **size}} for split in ("train", "test")
    )
    return Form(train, f"{path.name} is {about['python_class']}"), Form(test, f"the other split of {path.name}")


def _saved(folder: Path) -> tuple[Form, Form | None] | None:
    """Take what ``save_to_disk`` of Hugging Face's datasets wrote."""
    if (folder / "dataset_dict.json").is_file():
        names = sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file())
        train = next((name for name in names if name.lower() in TRAIN), None)
        if train is None:
            raise InfluenceError(
                f"{folder} has the splits {', '.join(names) or 'none'}, and none is called train",
                "name the folder of a split: influence init CHECKPOINT DATA/SPLIT TEST/SPLIT",
            )
        test = next((name for wanted in TEST for name in names if name.lower() == wanted), None)
        why, label = f"dataset_dict.json in {folder}", _label_of(folder / train)
        section = {"huggingface": str(folder)}
        return (
            Form({**section, "split": train, **label}, why),
            Form({**section, "split": test, **label}, why) if test else None,
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        section = {"huggingface": str(folder), **_label_of(folder)}
        return Form(section, f"dataset_info.json in {folder}"), None
    return None


def _label_of(folder: Path) -> dict[str, str]:
    """Name the column of labels of a saved data set where it has several, the finer classes first."""
    try:
        features = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items()}
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return {}  # the reader says what is wrong with it
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    usual = [name for wanted in LABEL_COLUMNS for name in labels if name.lower() == wanted]
    return {"label": usual[0]} if len(labels) > 1 and usual else {}


def _downloaded(folder: Path) -> tuple[Form, Form | None] | None:
    """Take what torchvision's data sets have downloaded into their root."""
    for pattern, name, train, test in DOWNLOADED:
        if next(folder.glob(pattern), None) is not None:
            why = f"{folder / pattern.partition('/')[0]}"
            dataset = f"torchvision.datasets.{name}"
            train_form, test_form = (
                Form({"dataset": dataset, "args": {"root": str(folder), **args}}, why) for args in (train, test)
            )
            return train_form, test_form
    return None


def _split_folders(folder: Path) -> tuple[Form, Form | None] | None:
    """Take train/ and val/, each a data set of a known form."""
    inner = {entry.name.lower(): entry for entry in _folders(folder)}
    train = next((inner[name] for name in TRAIN if name in inner), None)
    if train is None:
        return None
    pair = _pair_of_part(train)
    if pair is None:
        return None
    for name in TEST:
        test = _pair_of_part(inner[name]) if name in inner else None
        if test is not None:
            others = [inner[word].name for word in TEST if word in inner and word != name]
            rest = f"; {', '.join(others)} is there too" if others else ""
            return pair, Form(test.section, test.why + rest)
    return pair, None


def _pair_of_part(folder: Path) -> Form | None:
    for look in (_saved, _of_classes, _in_files):
        pair = look(folder)
        if pair is not None:
            return pair[0]
    return None


def _in_files(folder: Path) -> tuple[Form, Form | None] | None:
    """Take Parquet files or tar shards, of both splits or of one."""
    for place in (folder, folder / "data"):
        for suffix, make in ((".parquet", _parquet), (".tar", _tar)):
            names = sorted(entry.name for entry in _entries(place) if entry.name.lower().endswith(suffix))
            if not names:
                continue
            parts = {kind: [name for name in names if name.lower().startswith(kind)] for kind in (TRAIN[0], *TEST)}
            if not parts["train"]:
                return make(str(place / f"*{suffix}"), counted(len(names), f"{suffix} file")), None
            test = next((kind for kind in TEST if parts[kind]), None)
            pattern = str(place / f"train*{suffix}")
            form = make(pattern, counted(len(parts["train"]), f"{suffix} file"))
            if test is None:
                return form, None
            return form, make(str(place / f"{test}*{suffix}"), counted(len(parts[test]), f"{suffix} file"))
    return None


def _parquet(files: str, seen: str) -> Form:
    from influence_cli.setup.tables import parquet_section

    return Form(parquet_section(files), seen)


def _tar(files: str, seen: str) -> Form:
    return Form({"dataset": "influence_cli.data.tar_images.TarImages", "args": {"files": files}}, seen)


def _of_classes(folder: Path) -> tuple[Form, Form | None] | None:
    """Take a folder of a folder for each class."""
    classes = [entry for entry in _folders(folder) if _has_image(entry)]
    if len(classes) < 2 or any(entry.name.lower() in TRAIN for entry in classes):
        return None
    section = {"dataset": "torchvision.datasets.ImageFolder", "args": {"root": str(folder)}}
    return Form(section, f"{counted(len(classes), 'folder')} of images in {folder}"), None


def _listed(folder: Path) -> tuple[Form, Form | None] | None:
    """Take a list of images beside them: train.csv with train/, labels.csv, metadata.jsonl."""
    tables = [entry for entry in _entries(folder) if entry.suffix.lower() in TABLES and not entry.name.startswith(".")]
    order = ("train", "training", "metadata", "labels", "annotations")
    named = sorted(
        (path for path in tables if path.stem.lower() in order or path.stem.lower().startswith("train")),
        key=lambda path: order.index(path.stem.lower()) if path.stem.lower() in order else len(order),
    )
    chosen = named[0] if named else tables[0] if len(tables) == 1 else None
    if chosen is None:
        return None
    train, test = read_table_form(chosen)
    why = f"the list {chosen.name}"
    if test is None:
        other = next((path for name in TEST for path in tables if path.stem.lower() == name), None)
        if other is not None:
            try:
                return Form(train, why), Form(read_table_form(other)[0], f"the list {other.name}")
            except InfluenceError:  # the usual test.csv of a contest has no labels
                return Form(train, f"{why}; {other.name} has no labels"), None
    return Form(train, why), Form(test, f"the other split of {chosen.name}") if test else None


def _folders(folder: Path) -> list[Path]:
    """List the folders in a folder that are not hidden, in the order of names."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return [folder / name for name in sorted(names)]


def _entries(folder: Path) -> list[Path]:
    """List a folder in the order of names."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _has_image(folder: Path) -> bool:
    return next(_images(folder), None) is not None


def _images(folder: Path) -> Iterator[str]:
    """Walk a folder until an image comes; links in a circle end where the system says so."""
    for _count, (_, folders, files) in zip(range(LOOKED_AT), os.walk(folder), strict=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (name for name in files if name.lower().endswith(IMAGES) and not name.startswith("."))


def _seen(data: Path) -> str:
    """Say what is there instead."""
    if data.is_file():
        return f"a {data.suffix or 'file without a suffix'} file" if data.suffix else "a file without a suffix"
    if not data.is_dir():
        return "a broken link"
    folders, entries = _folders(data), _entries(data)
    images = sum(entry.name.lower().endswith(IMAGES) for entry in entries)
    if not entries:
        return "an empty folder"
    parts = [counted(len(folders), "folder")] if folders else []
    parts += [counted(images, "image")] if images else []
    with_images = [entry.name for entry in folders if _has_image(entry)]
    if len(with_images) == 1 and not images:
        return f"a folder with images in {with_images[0]}/ alone, which would be a single class"
    if images and not folders:
        return f"a folder of {counted(images, 'image')} without classes"
    return f"a folder of {' and '.join(parts) or counted(len(entries), 'file')}"
