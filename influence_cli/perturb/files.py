"""The files of `influence perturb`: reads a change of an image, writes its signed map and attacked images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.data.images import file_input
from influence_cli.data.split import Split
from influence_cli.data.tables import load_npy
from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.perturb.eight_bit import PixelScale, sixteen_bits
from influence_cli.pictures import overlay, scaled, view
from influence_cli.runtime.outputs import open_output

MAPS = (".png", ".npy")
# A map of 28 × 28 is enlarged until its shorter side has this many pixels.
SIDE = 224


def read_change(path: Path, split: Split, x: Tensor, title: str) -> Tensor:
    """Read a change δ of a model input x [C, H, W].

    Args:
        path: ``.npy`` is δ itself, in the model's input space; an image file is the changed image, and δ what it
            becomes by the split's transform, minus x.
        split: the training examples.
        x: the input to change.
        title: names it in a message.

    Raises:
        InfluenceError: no such file, another shape, or numbers that are not finite.
    """
    if path.suffix.lower() != ".npy":
        return file_input(split, path)[0].double() - x.double()
    values = load_npy(path, f"--delta {path} cannot be read: it")
    if values.dtype.kind not in "iuf":
        raise InfluenceError(f"--delta {path} holds {values.dtype}, not real numbers")
    shape = list(x.shape)
    if list(values.shape) != shape:
        raise InfluenceError(
            f"--delta {path} has the shape {list(values.shape)}, but the input of {title} has {shape}",
            "δ is added to the transformed image: channels first, one number per input value",
        )
    if not np.isfinite(values).all():
        raise InfluenceError(f"--delta {path} has NaN or infinite numbers")
    return torch.from_numpy(values.astype(np.float64))


def check_map(path: Path | None) -> None:
    """Refuse a map with another suffix than `MAPS`, before any work."""
    if path is not None and path.suffix.lower() not in MAPS:
        raise InfluenceError(f"--map {path}: a map must be .png or .npy", did_you_mean(path.suffix.lower(), MAPS))


def check_image(x: Tensor, option: str) -> None:
    """Refuse to draw inputs that are not images."""
    if x.ndim != 3:
        raise InfluenceError(
            f"{option}: an input of the model has the shape {list(x.shape)}",
            "pixels are drawn for images [channels, height, width]; --map FILE.npy takes any shape",
        )


def draw_map(x: Tensor, slope: np.ndarray, scale: PixelScale | None) -> Image.Image:
    """Colour an image by the slope of its pixels, summed over channels.

    Args:
        x: [C, H, W], as the model takes it.
        slope: likewise, the estimated rise of the loss per unit.
        scale: converts it to per 8-bit level, because channels may differ; None sums without conversion.

    Returns:
        RGB, x in grey underneath: red where a lighter pixel raises the loss, blue where it lowers it.
    """
    steps = np.ones((1, 1, 1)) if scale is None else scale.step.numpy().reshape(-1, 1, 1)
    values = scaled((slope * steps).sum(axis=0))
    factor = max(1, -(-SIDE // min(x.shape[-2:])))
    picture = view(x.detach().cpu().numpy())
    large = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    return overlay(large, values.repeat(factor, axis=0).repeat(factor, axis=1))


def write_map(path: Path, x: Tensor, slope: np.ndarray, scale: PixelScale | None) -> None:
    """Write the signed map as a picture, or as float32 numbers [C, H, W] per unit of the input.

    Raises:
        InfluenceError: it cannot be written.
    """
    with open_output(path) as stream:
        if path.suffix.lower() == ".npy":
            np.save(stream.buffer, slope.astype(np.float32))
        else:
            draw_map(x, slope, scale).save(stream.buffer, format="PNG")


def write_image(folder: Path, name: str, scale: PixelScale, x: Tensor) -> list[Path]:
    """Write an input as float32 ``NAME.npy`` and, of an image of 1 or 3 channels, as 16-bit ``NAME.png``.

    Raises:
        InfluenceError: they cannot be written.
    """
    written = [folder / f"{name}.npy"]
    with open_output(written[0]) as stream:
        np.save(stream.buffer, x.detach().cpu().numpy())
    if x.ndim == 3 and len(x) in (1, 3):
        written.append(folder / f"{name}.png")
        with open_output(written[1]) as stream:
            write_png16(stream.buffer, sixteen_bits(scale, x))
    return written


_COLOUR_TYPES = {1: 0, 3: 2}


def write_png16(file: BinaryIO, pixels: np.ndarray) -> None:
    """Write uint16 pixels [H, W, C], C = 1 (grey) or 3 (RGB), without loss."""
    height, width, channels = pixels.shape
    # A PNG is big-endian, and every line starts with its filter: 0 means none.
    lines = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), lines], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 6)), (b"IEND", b"")]
    file.write(b"\x89PNG\r\n\x1a\n")
    for kind, data in parts:
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
