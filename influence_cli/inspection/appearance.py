"""How an image looks: blank, dark, bright, blurred, of odd size or shape.

Measures and thresholds are those of cleanvision 0.3.7 (issue_managers/image_property.py and
image_property_issue_manager.py, Apache-2.0), written with numpy and Pillow: the package itself opens every file again
and brings ImageHash, PyWavelets, tabulate and matplotlib. What is common in a data set is its style and no issue of
single images: an image has to be unusual in the set too. Of the edges the border is left out, which is no edge.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

# What is measured: width and height in pixels; brightness of the pixels (mean, 5th and 99th percentile), in [0, 1];
# standard deviation of the grey values, of 255; sharpness and spread of the histogram; whether it has colours.
LOOKS = ("width", "height", "brightness", "low", "high", "contrast", "sharpness", "spread", "colour")
# cleanvision's thresholds. Dark: the 99th percentile of brightness is below; bright: 1 − the 5th is below.
DARK, BRIGHT = 0.32, 0.05
# Blurred: 1 − exp(−sharpness/100) is below, and the histogram's spread in the same form is no more than SPREAD.
BLURRED, SPREAD, SCALE = 0.29, 0.18, 0.01
# Odd shape: the shorter side is a smaller part of the longer one. Odd size: so many quartile distances beyond.
ASPECT, QUARTILES = 0.35, 3.0
# Ours. Blank: the grey values deviate less; unusual: so many deviations (1.48 × the median deviation) off the median.
BLANK, DEVIATIONS = 2.0, 3.0
# Ours. Longest side for sharpness (cleanvision's MAX_RESOLUTION_FOR_BLURRY_DETECTION is 64).
LONGEST = 64
# Ours. Colour or grey, or a file's mode, is odd where so many of the others agree on another.
AGREE = 0.95

KINDS = ("blank", "dark", "bright", "blurred", "odd size", "odd shape", "odd mode")


def looks_of(picture: Image.Image, *, exact: bool) -> list[float]:
    """Measure a picture of mode L or RGB, in the order of ``LOOKS``.

    Args:
        picture: the image.
        exact: whether its brightness is that of the image; NaN for what depends on it otherwise.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    if pixels.ndim == 3:
        weighted = 0.241 * pixels[..., 0] ** 2 + 0.691 * pixels[..., 1] ** 2 + 0.068 * pixels[..., 2] ** 2
        bright = np.sqrt(weighted) / 255
        colour = float(np.abs(pixels - pixels[..., :1]).max() > 0)
    else:
        bright, colour = pixels / 255, 0.0
    low, high = np.percentile(bright, [5, 99])
    grey = picture.convert("L")
    contrast = float(np.asarray(grey, dtype=np.float32).std())
    if max(grey.size) > LONGEST:
        ratio = max(grey.size) / LONGEST
        grey = grey.resize((max(1, int(grey.width // ratio)), max(1, int(grey.height // ratio))))
    edges = np.asarray(grey.filter(ImageFilter.FIND_EDGES), dtype=np.float32)
    inner = edges[1:-1, 1:-1] if min(edges.shape) > 2 else edges  # the filter leaves the border as it is
    sharpness = float(inner.std())
    light = (float(bright.mean()), float(low), float(high)) if exact else (np.nan,) * 3
    return [picture.width, picture.height, *light, contrast, sharpness, float(np.std(grey.histogram())), colour]


def odd_looks(looks: np.ndarray, modes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Find the images that look odd, by kind.

    Args:
        looks: float32 [n, len(LOOKS)].
        modes: str [n], the mode of each file; empty where there is none.

    Returns:
        For each of ``KINDS`` the rows, the oddest first, int64 [m], and the value that makes them odd, [m].
    """
    column = dict(zip(LOOKS, looks.astype(np.float64).T, strict=True))
    blank = column["contrast"] < BLANK
    shape = np.minimum(column["width"] / column["height"], column["height"] / column["width"])
    blur = 1 - np.exp(-SCALE * column["sharpness"])
    spread = 1 - np.exp(-SCALE * column["spread"])
    relative = np.log(np.maximum(column["sharpness"], 1e-3) / np.maximum(column["contrast"], 1e-3))
    flags = {
        "blank": (blank, column["contrast"], 1),
        "dark": (~blank & (column["high"] < DARK) & _unusual(column["high"], below=True), column["high"], 1),
        "bright": (~blank & (column["low"] > 1 - BRIGHT) & _unusual(column["low"], below=False), column["low"], -1),
        "blurred": (~blank & (blur < BLURRED) & (spread <= SPREAD) & _unusual(relative, below=True), relative, 1),
        "odd size": _odd_sizes(np.sqrt(column["width"] * column["height"])),
        "odd shape": ((shape < ASPECT) & _unusual(shape, below=True), shape, 1),
    }
    odd = {}
    for kind, (flagged, values, sign) in flags.items():
        rows = np.flatnonzero(flagged)
        rows = rows[np.argsort(sign * values[rows], kind="stable")]
        odd[kind] = rows, values[rows]
    odd["odd mode"] = _odd_modes(column["colour"], modes)
    return odd


def _unusual(values: np.ndarray, *, below: bool) -> np.ndarray:
    """Mark values far below (or above) the median of the set; NaN is not."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    middle = np.median(known)
    limit = DEVIATIONS * 1.4826 * np.median(np.abs(known - middle))
    off = middle - values if below else values - middle
    return np.asarray(off > max(limit, 1e-9))


def _odd_sizes(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mark the sizes, √(width·height), that lie outside of quartiles ∓ ``QUARTILES`` times their distance."""
    low, high = np.percentile(sizes, [25, 75]) if len(sizes) else (0.0, 0.0)
    reach = QUARTILES * (high - low)
    flagged = (sizes < low - reach - 1e-6) | (sizes > high + reach + 1e-6)
    return flagged, np.abs(np.log(np.maximum(sizes, 1e-6) / max(float(low + high) / 2, 1e-6))), -1


def _odd_modes(colour: np.ndarray, modes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find grey pictures among coloured ones and the like, and files of another mode than nearly all others."""
    flagged = np.zeros(len(colour), dtype=bool)
    for values in (colour, modes):
        names, at, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(names) > 1 and counts.max() >= AGREE * len(values):
            flagged |= at != counts.argmax()
    rows = np.flatnonzero(flagged)
    return rows, colour[rows]
