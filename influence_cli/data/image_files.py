"""Image files and folders that may be hostile: limits on their size, and what is lost in conversion to 8 bits."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from influence_cli.errors import InfluenceError, counted, describe, did_you_mean, near_path

# Pillow warns about an image of more than MAX_IMAGE_PIXELS (89 million) pixels, and decodes up to twice as many.
# Set once per process: changing filters around every image would show each warning of a data set again.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# PostScript is a program: Pillow would pass it to Ghostscript, whatever the file is called.
EpsImagePlugin.gs_binary = False

# First bytes of formats that may have more than 8 bits in a single channel: TIFF, PGM, PFM, JPEG 2000.
DEEP = (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+", b"P5", b"P2", b"Pf", b"\0\0\0\x0cjP", b"\xffO\xffQ")

# What torchvision's folder data sets list, and pictures that they skip.
LISTED_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
SPLITS = ("train", "training", "val", "valid", "validation", "eval", "test", "testing")
OTHER_SUFFIXES = frozenset((".jfif", ".jpe", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".gif", ".apng", ".dib"))


def open_image(path: Path) -> Image.Image:
    """Decode an image file fully, so that a truncated one is found here; only the first frame of an animation.

    Raises:
        InfluenceError: no such file, or not an image that can be decoded.
    """
    if not path.is_file():
        raise InfluenceError(
            f"{path}: there is no such file", "TEST is an index, a slice a:b, an image file, misclassified or -"
        )
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise InfluenceError(f"{path} cannot be decoded as an image: {describe(error)}") from error


def decode_rgb(content: bytes) -> Image.Image:
    """Decode an image from memory as torchvision's ImageFolder does from a file: its first frame, in RGB.

    Raises:
        Exception: a decoder's own; a ValueError where RGB would lose what it holds.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"these {len(content):,} bytes are not an image of a known format") from None
    with image:
        if lost := cut_off(image):
            raise ValueError(lost)
        return image.convert("RGB")


def lost_depth(path: str, image: Image.Image) -> str:
    """Say what a data set has lost by reading a file of 16-bit, integer or float values as bytes.

    Pillow clips such values at 255: a 16-bit image comes out white. If the data set has scaled them, nothing is lost.

    Args:
        path: the file.
        image: what the data set made of it.

    Returns:
        A line, or nothing.
    """
    if image.mode.startswith(("I", "F")):
        return ""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (for every example of every pass)
            head = file.read(26)
        if not (head[24:26] == b"\x10\0" if head.startswith(b"\x89PNG") else head.startswith(DEEP)):
            return ""
        with Image.open(path) as stored:
            lost = cut_off(stored)
            same = bool(lost) and stored.size == image.size and stored.convert(image.mode).tobytes() == image.tobytes()
    except (OSError, SyntaxError, ValueError):
        return ""
    return lost if same else ""


def cut_off(image: Image.Image) -> str:
    """Say what an image loses if it is converted to bytes; empty if all its values fit."""
    if not image.mode.startswith(("I", "F")):
        return ""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low >= 0 and high <= 255 and (values.dtype.kind in "iu" or np.array_equal(values, np.floor(values))):
        return ""
    return (
        f"its values ({low:g} to {high:g}) do not fit in 8 bits and would be clipped to 0 to 255: save it with 8 bits, "
        "or use a data set that scales it"
    )


@dataclass
class Strays:
    """What lies in the class folders of a data set and is no class or no image of it.

    Attributes:
        hidden: class folders whose names begin with a dot, such as ``.ipynb_checkpoints``.
        copies: files in hidden folders inside of classes.
        notes: files that begin with ``._``: macOS keeps its notes there.
        skipped: pictures that a folder data set does not list, by suffix; an empty one for files without.
    """

    hidden: list[str] = field(default_factory=list)
    copies: int = 0
    notes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def look_through(root: Path, where: str) -> Strays:
    """Look at the names in class folders; refuse links that lead to a folder twice.

    Args:
        root: the folder of class folders.
        where: start of any error.

    Raises:
        InfluenceError: naming a link, for a loop would list its images endlessly.
    """
    strays = Strays()
    try:
        classes = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return strays  # the data set reports it itself
    for name in classes:
        if os.path.basename(name).startswith("."):  # noqa: PTH119
            strays.hidden.append(os.path.basename(name))  # noqa: PTH119
            continue
        seen: set[tuple[int, int]] = set()
        waiting = [(name, False)]
        while waiting:
            folder, hidden = waiting.pop()
            try:
                status = os.stat(folder)  # noqa: PTH116
                entries = list(os.scandir(folder))
            except OSError:
                continue  # the data set reports it itself
            if (status.st_dev, status.st_ino) in seen:
                raise InfluenceError(
                    f"{where}: {folder} leads back to {os.path.realpath(folder)}: its images would be listed "
                    "twice or endlessly",
                    "remove the link",
                )
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                if _is_folder(entry):
                    waiting.append((entry.path, hidden or entry.name.startswith(".")))
                else:
                    _count(entry.name, strays, hidden=hidden)
    return strays


def refuse_no_classes(root: Path, where: str) -> None:
    """Refuse a folder that is not one of class folders.

    Raises:
        InfluenceError: there is no such folder, or its folders are splits.
    """
    if not root.is_dir():
        beside = [entry.name for entry in root.parent.iterdir() if entry.is_dir()] if root.parent.is_dir() else []
        raise InfluenceError(
            f"{where}: there is no folder {root}",
            did_you_mean(root.name, beside) if beside else "a path is relative to the folder of the YAML file",
        )
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InfluenceError(
            f"{where}: {near_path(root)} has no folders of classes",
            "images that are not in a folder for each class need a table of their labels: csv:",
        )
    if len(names) > 1 and all(name.casefold() in SPLITS for name in names):
        raise InfluenceError(
            f"{where}: {near_path(root)} has the folders {', '.join(names)}, which are splits and no classes",
            f"name one of them: folder: {near_path(root / names[0])}",
        )


def _count(name: str, strays: Strays, *, hidden: bool) -> None:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    listed = suffix in LISTED_SUFFIXES
    if hidden:
        strays.copies += listed
    elif name.startswith("._"):
        strays.notes += listed
    elif suffix in OTHER_SUFFIXES or (not suffix and not name.startswith(".")):
        strays.skipped[suffix] += 1


@cache
def without_strays(factory: Any, base: Any) -> Any:
    """Make the kind of a folder data set that leaves out hidden folders and notes of macOS.

    Args:
        factory: torchvision's ``DatasetFolder`` or a subclass; one that looks for classes or files by itself stays.
        base: ``DatasetFolder``.
    """
    if factory.find_classes is not base.find_classes or factory.make_dataset is not base.make_dataset:
        return factory

    def find_classes(self: Any, directory: Any) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in base.find_classes(self, directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(
        directory: Any, class_to_idx: Any, extensions: Any = None, is_valid_file: Any = None, allow_empty: Any = None
    ) -> Any:
        start = len(os.path.expanduser(directory))  # noqa: PTH111
        suffixes = (extensions,) if isinstance(extensions, str) else tuple(extensions or ())

        def valid(path: str) -> bool:
            listed = path.lower().endswith(suffixes) if is_valid_file is None else bool(is_valid_file(path))
            return listed and not _is_stray(path[start:])

        try:
            return base.make_dataset(directory, class_to_idx, None, valid, bool(allow_empty))
        except FileNotFoundError as error:
            known = f" Supported extensions are: {', '.join(suffixes)}" if suffixes else ""
            raise FileNotFoundError(f"{str(error).strip()}{known}") from error

    methods = {"find_classes": find_classes, "make_dataset": staticmethod(make_dataset)}
    return type(factory.__name__, (factory,), methods)


def _is_stray(path: str) -> bool:
    """Say whether a file below the folder of classes is a note of macOS, or in a hidden folder."""
    if f"{os.sep}." not in path:  # nearly always, and quick
        return False
    *folders, name = Path(path).parts
    return name.startswith("._") or any(folder.startswith(".") for folder in folders)


def stray_remarks(strays: Strays, folder: str, classes: Sequence[str], files: Iterable[str]) -> list[str]:
    """Say in a line each what lies in class folders and is no class or no image.

    Args:
        strays: from ``look_through``.
        folder: that was looked through.
        classes: that the data set has; hidden ones among them count.
        files: that the data set lists.

    Returns:
        Lines; none if everything that lies there is a class or an image.
    """
    if not (strays.hidden or strays.copies or strays.notes or strays.skipped):
        return []
    listed, lines, root = Strays(), [], str(near_path(Path(folder)))
    for path in files:
        above, name = os.path.split(path)
        _count(name, listed, hidden=f"{os.sep}." in above[len(folder) :])
    for counts in (False, True):
        folders = [name for name in strays.hidden if (name in classes) == counts]
        if folders:
            end = (
                "which counts as a class: delete it"
                if counts
                else "which is no class and is left out: delete it (a model that was trained with it has one more "
                "output, and later numbers for the classes after it)"
            )
            lines.append(f"{root} has the hidden folder{'s' * (len(folders) > 1)} {', '.join(folders[:6])}, {end}")
    for count, used, what in (
        (strays.copies, listed.copies, "in hidden folders of classes"),
        (strays.notes, listed.notes, "that begin with ._"),
    ):
        if count:
            end = "which count as images: delete them" if used else "which are left out: delete them"
            lines.append(f"{root} has {counted(count, 'file')} {what}, {end}")
    skipped = strays.skipped - listed.skipped
    if skipped:
        kinds = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in sorted(skipped.items()))
        lines.append(
            f"{root} has {counted(skipped.total(), 'file')} that a folder data set does not list, by suffix: "
            f"{kinds}; if the checkpoint was trained on them too, name all images in a table (csv:)"
        )
    return lines


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
