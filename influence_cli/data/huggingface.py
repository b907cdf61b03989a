"""Data sets of Hugging Face’s ``datasets``: ``train: {huggingface: cifar100, split: train, label: fine_label}``.

Rows are numbered as the set numbers them, labels are read from their column without decoding an image. The library is
imported only where a config names such a set.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from influence_cli.data.image_files import cut_off
from influence_cli.data.tables import LABEL_NAMES, number_labels, pick_column
from influence_cli.errors import InfluenceError, describe, did_you_mean

IMAGE_NAMES = (("image", "img"), ("pixel_values", "input", "x"))


class HubImages:
    """A set of ``datasets`` as (image, class number) by position.

    Args:
        source: a ``datasets.Dataset``.
        image: the column of images; without it one with a usual name, or the only one.
        label: the column of labels; without it one with a usual name.
        classes: the classes of the training examples, as ``number_labels`` takes them.
        rgb: whether images become RGB, as those of a folder do; otherwise items are as the set yields them.

    Attributes:
        targets: int64 [n].
        classes: the names of its ``ClassLabel``, or labels that are names, sorted; None where labels are numbers.
        class_to_idx: numbers by class name, or None.
        samples: path and class number of each example, where its images are files.

    Raises:
        InfluenceError: a column that does not exist, or that holds no labels.
    """

    def __init__(
        self,
        source: Any,
        image: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        *,
        rgb: bool = True,
    ) -> None:
        self._source, self._rgb = source, rgb
        kinds = {name: type(feature).__name__ for name, feature in source.features.items()}
        columns = list(source.column_names)
        pictures = tuple(name.casefold() for name in columns if kinds.get(name) == "Image")
        self._image = pick_column(columns, image, (IMAGE_NAMES[0], pictures, IMAGE_NAMES[1]), "image", "the data set")
        named = tuple(name.casefold() for name in columns if kinds.get(name) == "ClassLabel")
        label = pick_column(columns, label, (LABEL_NAMES, named), "label", "the data set")
        self.targets, names = _labels(source, label, classes)
        self.classes = None if names is None else list(names)
        self.class_to_idx = None if names is None else {word: number for number, word in enumerate(names)}
        files = _files(source, self._image)
        self.samples = None if files is None else list(zip(files, self.targets.tolist(), strict=True))

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read a row; any failure is the image's."""
        item = self._source[int(index)]
        names = [self._image, *(name for group in IMAGE_NAMES for name in group)]  # a transform may rename it
        image = next((item[name] for name in names if item.get(name) is not None), None)
        if image is None:
            raise ValueError(f"the row has no image: its columns are {', '.join(map(str, item))}")
        if self._rgb and isinstance(image, Image.Image):
            if lost := cut_off(image):
                raise ValueError(lost)
            image = image.convert("RGB")
        return image, int(self.targets[index])


def is_hub_set(source: Any) -> bool:
    """Say whether this is a data set of the ``datasets`` library, or several under their names."""
    library = any(kind.__module__.partition(".")[0] == "datasets" for kind in type(source).__mro__)
    return library and hasattr(source, "column_names")


def load_hub_set(name: str, split: str | None, args: dict[str, Any]) -> Any:
    """Load what the config names: a folder of ``save_to_disk``, a folder of images or files, or a name on the Hub.

    Args:
        name: the path, or the name.
        split: the split; of a set on the Hub also a part of one (``train[:1000]``).
        args: further arguments of ``datasets.load_dataset`` or ``load_from_disk``.

    Raises:
        InfluenceError: the library is missing or fails, or the split is not one of the set's.
    """
    library = _library()
    folder = Path(name)
    if folder.is_file():
        raise InfluenceError(f"{folder} is a file", "a table of paths or of images: csv:; huggingface: names a folder")
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            made = library.load_from_disk(name, **args)
        elif split is not None and re.search(r"[\[+]", split):
            return library.load_dataset(name, split=split, **args)
        else:
            made = library.load_dataset(name, **args)
    except (Exception, SystemExit) as error:
        here = "" if folder.exists() else f" (there is no folder {folder.absolute()} either)"
        raise InfluenceError(
            f"datasets cannot load {name!r}{here}: {describe(error)}",
            "is the name right? a folder is relative to the YAML file; a set of the Hub needs a network once",
        ) from error
    return choose_split(made, split, name)


def choose_split(made: Any, split: str | None, name: str) -> Any:
    """Choose a split of a ``DatasetDict``; anything else must be the split that is asked for.

    Raises:
        InfluenceError: there are several and none is named, or none of that name.
    """
    if isinstance(made, dict):
        if split is None and len(made) == 1:
            return next(iter(made.values()))
        if split is None:
            raise InfluenceError(
                f"{name} has the splits {', '.join(map(str, made))}", f"say which: split: {next(iter(made), 'train')}"
            )
        if split not in made:
            raise InfluenceError(f"{name} has no split {split!r}", did_you_mean(split, map(str, made)))
        return made[split]
    if split is not None and str(getattr(made, "split", None)) != split:
        raise InfluenceError(f"{name} is one data set without splits, so split: {split} has no meaning", "leave it out")
    return made


def _library() -> Any:
    library: Any = None
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise InfluenceError(f"importing datasets failed: {describe(error)}") from error
    if not hasattr(library, "load_dataset"):  # missing, or a folder of that name in the project
        raise InfluenceError("huggingface needs the package datasets, which is not installed", "pip install datasets")
    return library


def _plain(source: Any, column: str) -> Any:
    """Give one column, as it is stored: no transform of the user runs, and no other column is read."""
    return source.with_format(None).select_columns([column])


def _labels(source: Any, column: str, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Read the labels as class numbers, and the class names."""

    def at(row: int) -> str:
        return f"row {row}: "

    values = _plain(source, column)[:][column]
    none = next((row for row, value in enumerate(values) if value is None), None)
    if none is not None:
        raise InfluenceError(f"{at(none)}there is no {column!r}", "filter out the rows without a label")
    odd = next((row for row, value in enumerate(values) if not isinstance(value, str | int | float)), None)
    if odd is not None:
        what = "several labels" if isinstance(values[odd], list | tuple) else f"a {type(values[odd]).__name__}"
        raise InfluenceError(
            f"{at(odd)}{column!r} holds {what}, not one class an example",
            "influence explains classifiers with one class an example",
        )
    names = getattr(source.features[column], "names", None)
    if names:
        return np.array(values, dtype=np.int64), tuple(map(str, names))
    texts = [str(int(value)) if isinstance(value, bool) else str(value) for value in values]
    if all(isinstance(value, str) for value in values):
        return number_labels(texts, classes, at)
    return number_labels(texts, None, at)


def _files(source: Any, column: str) -> list[str] | None:
    """List the image files of a set that refers to them, as one of a folder does; None where it holds the images."""
    feature = source.features[column]
    if type(feature).__name__ != "Image":
        return None
    stored = _plain(source, column).cast_column(column, type(feature)(decode=False))
    first = stored[0][column] if len(stored) else None
    if not isinstance(first, dict) or first.get("bytes") is not None:
        return None
    paths = [(cell or {}).get("path") for cell in stored[:][column]]
    return [str(path) for path in paths] if all(path and Path(path).is_file() for path in paths) else None
