"""From a model's input back to 8-bit pixels: the size of one level, and what rounding to 8 bits hides.

A level k of channel c is the input black[c] + k · step[c]. Both follow from the transform: what turns bytes into
floats (``ToDtype`` with ``scale``) and what ``Normalize`` makes of them. Any other step after that makes them unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.data.split import Split, raw_item
from influence_cli.errors import InfluenceError

# A 16-bit level is 1/257 of an 8-bit level: up to this distance, a value written in 16 bits still rounds to its level.
HIDDEN = 0.5 - 1 / 257
# How far outside black and white float32 rounding can leave a pixel, in levels.
ROUNDING = 0.05
# Steps that keep the scale of float pixels, before Normalize; Pad and Grayscale only mix levels.
_NEUTRAL = ("Resize", "CenterCrop", "Pad", "Grayscale", "RGB", "ToPureTensor", "Identity", "ToImage")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
ADVICE = "give the size of one 8-bit level in the model's input: --pixel-step 1/255, or one per channel (also --black)"


@dataclass(frozen=True)
class PixelScale:
    """The places of the 8-bit levels in the model's input.

    Attributes:
        step: the size of one level, float64 [C] or [1].
        black: the input of level 0, likewise.
    """

    step: Tensor
    black: Tensor

    def levels(self, x: Tensor) -> Tensor:
        """Turn an input [C, …] into levels, 0 black and 255 white: float64."""
        return (x.detach().cpu().double() - _along(self.black, x)) / _along(self.step, x)

    def inputs(self, levels: Tensor) -> Tensor:
        """Turn levels [C, …] into an input: float32."""
        return (_along(self.black, levels) + levels * _along(self.step, levels)).float()


@dataclass(frozen=True)
class Ball:
    """The images that rounding to 8 bits cannot tell from one image.

    Attributes:
        scale: of its pixels.
        low: the smallest levels [C, …], float64, not below black.
        high: the largest, not above white.
    """

    scale: PixelScale
    low: Tensor
    high: Tensor

    def clamp(self, x: Tensor) -> Tensor:
        """Move an input [C, …] to the nearest one in the ball."""
        return self.scale.inputs(self.scale.levels(x).clamp(self.low, self.high))

    def stepped(self, x: Tensor, sign: Tensor, size: float) -> Tensor:
        """Move every pixel by ``size`` levels in the direction of ``sign``, and back into the ball."""
        moved = self.scale.levels(x) + size * sign.detach().cpu().double().sign()
        return self.scale.inputs(moved.clamp(self.low, self.high))

    def corner(self, x: Tensor, sign: Tensor) -> Tensor:
        """Move every pixel as far as allowed in the direction of ``sign``; it stays where that is 0."""
        sign = sign.detach().cpu()
        levels = torch.where(sign > 0, self.high, torch.where(sign < 0, self.low, self.scale.levels(x)))
        return self.scale.inputs(levels.clamp(self.low, self.high))

    def gain(self, x: Tensor, slope: Tensor) -> float:
        """Give the most that a slope [C, …] in the input can gain from x within the ball: that of `corner`."""
        levels, slope = self.scale.levels(x), slope.detach().cpu().double()
        room = torch.where(slope > 0, self.high - levels, levels - self.low)
        return float((slope.abs() * _along(self.scale.step, slope) * room).sum())


def ball(scale: PixelScale, x: Tensor, title: str) -> Ball:
    """Give the ball around an input: each pixel within `HIDDEN` of its 8-bit level, between black and white.

    Args:
        scale: of the input.
        x: [C, …].
        title: names the example in a message.

    Raises:
        InfluenceError: pixels lie outside black and white, so the scale is another one.
    """
    if len(scale.step) not in (1, len(x)):
        raise InfluenceError(
            f"--pixel-step has {len(scale.step)} numbers, but {title} has {len(x)} channels",
            "give one, or one per channel",
        )
    levels = scale.levels(x)
    least, most = float(levels.min()), float(levels.max())
    if not (least >= -ROUNDING and most <= 255 + ROUNDING):
        raise InfluenceError(
            f"{title} has pixels from {least:.4g} to {most:.4g} in 8-bit levels, not within 0 to 255", ADVICE
        )
    centre = levels.round().clamp(0, 255)
    return Ball(scale, (centre - HIDDEN).clamp_min(0), (centre + HIDDEN).clamp_max(255))


def pixel_scale(split: Split) -> PixelScale:
    """Find the scale of a split's inputs from its transform.

    Raises:
        InfluenceError: no step turns bytes into floats, or a later step may change their scale.
    """
    if not _is_eight_bit(raw_item(split, int(split.indices[0]))[0]):
        raise InfluenceError(
            f"{split.where}: the size of an 8-bit level is unknown: the data set does not yield 8-bit images", ADVICE
        )
    step, black = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    floats = normalised = False
    for part in _steps(split.transform):
        name = type(part).__name__
        if not floats:
            converts, scales = _converts(part, name)
            if converts:
                floats, step = True, step / 255 if scales else step
            elif name == "Normalize":
                raise _unknown(split, name)
        elif name == "Normalize":
            mean, std = (torch.as_tensor(values, dtype=torch.float64).reshape(-1) for values in (part.mean, part.std))
            step, black, normalised = step / std, (black - mean) / std, True
        elif name not in _NEUTRAL or (normalised and name in ("Grayscale", "RGB")):
            raise _unknown(split, name)
    if not floats:
        raise InfluenceError(f"{split.where}: the size of an 8-bit level is unknown: no step makes floats", ADVICE)
    return PixelScale(step, black)


def given_scale(step: str, black: str | None) -> PixelScale:
    """Read --pixel-step and --black: a number or a fraction, or one per channel with commas.

    Raises:
        InfluenceError: not numbers, a step that is not above 0, or two lists of different length.
    """
    steps = _numbers(step, "--pixel-step")
    blacks = _numbers(black, "--black") if black is not None else [0.0] * len(steps)
    if len(blacks) == 1:
        blacks = blacks * len(steps)
    if len(blacks) != len(steps):
        raise InfluenceError(
            f"--black has {len(blacks)} numbers, but --pixel-step has {len(steps)}", "give as many of each"
        )
    if min(steps) <= 0:
        raise InfluenceError(f"--pixel-step {step}: a level must be larger than 0", "such as 1/255")
    return PixelScale(torch.tensor(steps, dtype=torch.float64), torch.tensor(blacks, dtype=torch.float64))


def sixteen_bits(scale: PixelScale, x: Tensor) -> np.ndarray:
    """Turn an input [C, H, W] into 16-bit pixels [H, W, C]: level 255 is 65,535, level k is 257 k."""
    levels = (scale.levels(x) * 257).round().clamp(0, 65535).numpy().astype(np.uint16)
    return np.ascontiguousarray(np.moveaxis(levels, 0, -1))


def _numbers(text: str, option: str) -> list[float]:
    numbers = []
    for part in text.split(","):
        above, _, below = part.partition("/")
        try:
            value = float(above) / (float(below) if below else 1.0)
        except (ValueError, ZeroDivisionError):
            value = float("nan")
        if not np.isfinite(value):
            raise InfluenceError(
                f"{option} {text}: {part!r} is not a number", "such as 1/255, or one per channel: 0.1,0.2,0.1"
            )
        numbers.append(value)
    return numbers


def _is_eight_bit(image: Any) -> bool:
    if isinstance(image, Image.Image):
        return image.mode in _MODES
    if isinstance(image, Tensor):
        return image.dtype == torch.uint8
    return isinstance(image, np.ndarray) and image.dtype == np.uint8


def _steps(transform: Any) -> Sequence[Any]:
    return () if transform is None else tuple(getattr(transform, "transforms", (transform,)))


def _converts(part: Any, name: str) -> tuple[bool, bool]:
    """Say whether a step turns bytes into floats, and whether it divides by 255."""
    if name in ("ToTensor", "MaybeToTensor"):
        return True, True
    dtype = getattr(part, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return False, False
    return True, name == "ConvertImageDtype" or bool(getattr(part, "scale", False))


def _unknown(split: Split, name: str) -> InfluenceError:
    return InfluenceError(
        f"{split.where}: the size of an 8-bit level is unknown: the step {name} of the transform may change it", ADVICE
    )


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 1))
