"""Image files and folders that may be hostile: limits on their size, and what is lost in conversion to 8 bits."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from influence_cli.errors import InfluenceError, describe

# Pillow warns about an image of more than MAX_IMAGE_PIXELS (89 million) pixels, and decodes up to twice as many.
# Set once per process: changing filters around every image would show each warning of a data set again.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# PostScript is a program: Pillow would pass it to Ghostscript, whatever the file is called.
EpsImagePlugin.gs_binary = False

# First bytes of formats that may have more than 8 bits in a single channel: TIFF, PGM, PFM, JPEG 2000.
DEEP = (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+", b"P5", b"P2", b"Pf", b"\0\0\0\x0cjP", b"\xffO\xffQ")


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


def refuse_folder_loops(root: Path, where: str) -> None:
    """Refuse class folders with links that lead to a folder twice: a loop would list its images endlessly.

    Raises:
        InfluenceError: naming the link.
    """
    try:
        classes = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return  # the data set reports it itself
    for name in classes:
        seen: set[tuple[int, int]] = set()
        waiting = [name]
        while waiting:
            folder = waiting.pop()
            try:
                status = os.stat(folder)  # noqa: PTH116
                entries = list(os.scandir(folder))
            except OSError:
                continue
            if (status.st_dev, status.st_ino) in seen:
                raise InfluenceError(
                    f"{where}: {folder} leads back to {os.path.realpath(folder)}: its images would be listed "
                    "twice or endlessly",
                    "remove the link",
                )
            seen.add((status.st_dev, status.st_ino))
            waiting += [entry.path for entry in entries if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
