"""What is known of an image without looking at what it shows: light, size, shape, file, folder, date."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from influence_cli.data.split import Split
from influence_cli.inspection.appearance import LOOKS
from influence_cli.inspection.pictures import Pictures

# Looks that count as properties; what is made of width and height comes in addition.
OF_LOOKS = ("brightness", "contrast", "sharpness", "colour")
# The EXIF tags of the date of a photograph: DateTimeOriginal (in the Exif part, 0x8769), DateTime.
EXIF_PART, ORIGINAL, CHANGED = 0x8769, 0x9003, 0x0132
# A part of the paths with more values names single images. Of a part, so many values that hold their class's name make
# it the place where the label is written, which is no shortcut.
VALUES, NAMING = 200, 0.5


@dataclass(frozen=True)
class Properties:
    """Properties of the images of a split.

    Attributes:
        numbers: float64 [n] by name; NaN where it is not known.
        words: str [n] by name; empty where it is not known.
        modes: str [n], the mode of each file; empty where the image is no file.
    """

    numbers: dict[str, np.ndarray]
    words: dict[str, np.ndarray]
    modes: np.ndarray


def properties_of(split: Split, pictures: Pictures, classes: Sequence[str]) -> Properties:
    """Gather the properties of images that have been read. Of files the head alone is opened.

    Args:
        split: the examples.
        pictures: read with their looks.
        classes: names by number, by which parts of paths are recognised that are the label.
    """
    looks = dict(zip(LOOKS, pictures.looks.astype(np.float64).T, strict=True))
    numbers = {name: looks[name] for name in OF_LOOKS}
    numbers["size"] = np.sqrt(looks["width"] * looks["height"])
    numbers["aspect"] = looks["width"] / looks["height"]
    paths = [split.path(int(index)) if split.files is None else None for index in pictures.indices]
    heads = [_head(path) for path in paths]
    modes = np.array([head[0] for head in heads], dtype=str)
    numbers["bytes"] = np.array([head[1] for head in heads])
    numbers["date"] = np.array([head[2] for head in heads])
    words = {"mode": modes} | _parts(paths, split.labels[pictures.indices], classes)
    return Properties(
        {name: values for name, values in numbers.items() if _varies(values[np.isfinite(values)])},
        {name: values for name, values in words.items() if _varies(values)},
        modes,
    )


def _varies(values: np.ndarray) -> bool:
    return len(values) > 0 and bool((values != values[0]).any())


def _head(path: str | None) -> tuple[str, float, float]:
    """Give mode, bytes and day (since 1970) of an image file; the date that the camera wrote, or the file's."""
    if path is None:
        return "", np.nan, np.nan
    try:
        state = Path(path).stat()
        with Image.open(path) as image:
            tags = image.getexif()
            written = tags.get_ifd(EXIF_PART).get(ORIGINAL) or tags.get(CHANGED)
            return image.mode, float(state.st_size), _day(written, state.st_mtime)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return "", np.nan, np.nan


def _day(written: object, changed: float) -> float:
    try:
        seconds = time.mktime(time.strptime(str(written).strip("\0 "), "%Y:%m:%d %H:%M:%S"))
    except (ValueError, OverflowError):
        seconds = changed
    return float(seconds // 86_400)


def _parts(paths: Sequence[str | None], labels: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Give the parts of the paths that may tell something: folders, the letters a name begins with, its suffix."""
    if not paths or any(path is None for path in paths):
        return {}
    split = [Path(str(path)) for path in paths]
    depth = min(len(path.parts) for path in split) - 1
    columns = {f"folder {level + 1}": [path.parts[-2 - level] for path in split] for level in range(min(depth, 4))}
    columns["name"] = [re.split(r"[\d_\-. ]", path.stem, maxsplit=1)[0] for path in split]
    columns["suffix"] = [path.suffix for path in split]
    parts = {}
    for name, values in columns.items():
        texts = np.array(values, dtype=str)
        if len(np.unique(texts)) <= VALUES and not _names_the_class(texts, labels, classes):
            parts[f"path: {name}"] = texts
    return parts


def _names_the_class(values: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> bool:
    pairs, counts = np.unique(np.stack([values, labels.astype(str)]), axis=1, return_counts=True)
    naming = [int(label) >= 0 and classes[int(label)].casefold() in value.casefold() for value, label in pairs.T]
    if counts[naming].sum() >= NAMING * len(values):
        return True
    # Folders with names of their own, one per class (WordNet's numbers).
    values_of = [set(values[labels == label]) for label in np.unique(labels)]
    return (
        len(values_of) > 1 and all(len(one) == 1 for one in values_of) and len(set.union(*values_of)) == len(values_of)
    )
