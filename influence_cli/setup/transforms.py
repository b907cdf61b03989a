"""The transforms that a model may have been trained with: what the file says, and the two or three usual ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence_cli.setup.guesses import ModelGuess, TransformGuess

# Up to this side, images that all have one size are usually taken as they are.
SMALL = 96
# Share of the resized image that the usual crop keeps: 224 of 256.
CROP = 0.875
# Tried where a model takes none of the usual sizes.
OTHER_SIZES = (32, 64, 28, 96, 128, 160, 192, 256, 299, 384, 48, 16, 8)
SIZES = ("image_size", "img_size", "input_size", "crop_size", "size", "resolution")


@dataclass(frozen=True)
class Geometry:
    """How images get to the size of the input.

    Attributes:
        resize: the shorter side, (height, width), or None to leave the size as it is.
        crop: side of the square in the middle, or None.
        interpolation: torchvision's name of the interpolation; empty for the default.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    interpolation: str = ""

    @property
    def name(self) -> str:
        """Say it in words."""
        if self.resize is None:
            return "size as it is"
        size = self.resize if isinstance(self.resize, int) else "×".join(map(str, self.resize))
        return f"Resize {size}" + (f", CenterCrop {self.crop}" if self.crop else "")


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation that an input is divided by; empty for [0, 1] as it is."""

    name: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


PLAIN = Normalisation("values in [0, 1]")
HALF = Normalisation("mean and std 0.5", (0.5,), (0.5,))
IMAGENET = Normalisation("ImageNet's mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Normalisation("CIFAR-10's mean and std", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
MNIST = Normalisation("MNIST's mean and std", (0.1307,), (0.3081,))


@dataclass(frozen=True)
class Pictures:
    """What a few images of the data have in common.

    Attributes:
        sizes: (height, width), each that occurs.
        modes: Pillow's modes, each that occurs; empty where the images are arrays or tensors.
    """

    sizes: frozenset[tuple[int, int]]
    modes: frozenset[str]

    @property
    def one_size(self) -> tuple[int, int] | None:
        """Give the size of all of them, or None."""
        return next(iter(self.sizes)) if len(self.sizes) == 1 else None


def transform_of(
    geometry: Geometry, norm: Normalisation, channels: int, why: str = "", *, mixed: bool = False
) -> TransformGuess:
    """Write a transform as steps of torchvision.transforms.v2.

    Args:
        geometry: resize and crop.
        norm: mean and std; a single one stands for every channel.
        channels: of the model's input, 1 or 3.
        why: what says so.
        mixed: whether some images have another number of channels than 3.
    """
    steps: list[Any] = []
    if channels == 1:
        steps.append({"Grayscale": {"num_output_channels": 1}})
    elif mixed:
        steps.append("RGB")
    if geometry.resize is not None:
        size = geometry.resize if isinstance(geometry.resize, int) else list(geometry.resize)
        mode = {"interpolation": geometry.interpolation} if geometry.interpolation else {}
        steps.append({"Resize": {"size": size, **mode}})
    if geometry.crop is not None:
        steps.append({"CenterCrop": {"size": geometry.crop}})
    steps += ["ToImage", {"ToDtype": {"dtype": "float32", "scale": True}}]
    if norm.mean:
        mean, std = (list(values) * (channels if len(values) == 1 else 1) for values in (norm.mean, norm.std))
        steps.append({"Normalize": {"mean": mean, "std": std}})
    return TransformGuess(steps, f"{geometry.name}, {norm.name}", why)


def plausible(model: ModelGuess, settings: Mapping[str, Any], pictures: Pictures) -> list[list[TransformGuess]]:
    """List the usual transforms for a model and images, the likeliest first.

    Args:
        model: its channels, sizes and crops.
        settings: options of the run, which may name a size, a mean and a std.
        pictures: of the data.

    Returns:
        A list for each geometry, one transform for each normalisation in it.
    """
    return [_with_all(geometry, model, settings, pictures) for geometry in _geometries(model, settings, pictures)]


def last_resort(model: ModelGuess, pictures: Pictures) -> list[list[TransformGuess]]:
    """List transforms to other sizes, for a model that takes none of the usual ones."""
    return [_with_all(Geometry((size, size)), model, {}, pictures) for size in OTHER_SIZES]


def _with_all(
    geometry: Geometry, model: ModelGuess, settings: Mapping[str, Any], pictures: Pictures
) -> list[TransformGuess]:
    channels = model.channels or (1 if pictures.modes == {"L"} else 3)
    mixed = bool(pictures.modes) and pictures.modes != {"RGB"}
    norms = _normalisations(settings, channels, pictures)
    return [transform_of(geometry, norm, channels, mixed=mixed) for norm in norms]


def _geometries(model: ModelGuess, settings: Mapping[str, Any], pictures: Pictures) -> list[Geometry]:
    size = pictures.one_size
    wanted = [side for side in (_side(settings),) if side]
    geometries: list[Geometry] = []
    for height, width in (*model.sizes, *((side, side) for side in wanted)):
        if size == (height, width):
            geometries.append(Geometry())
        geometries.append(Geometry((height, width)))
        if height == width:
            geometries.append(Geometry(round(height / CROP), height))
    if not model.sizes and size is not None and max(size) <= SMALL:
        geometries.append(Geometry())
    if not model.sizes:
        geometries += [Geometry(resize, crop) for resize, crop in model.crops]
        geometries += [Geometry(256, 224), Geometry((224, 224))]
    if size is not None:  # to the size that they have
        geometries = [geometry for geometry in geometries if geometry.resize != size]
    return list(dict.fromkeys(geometries))[:3]


def _side(settings: Mapping[str, Any]) -> int | None:
    for key in SIZES:
        value = settings.get(key)
        if isinstance(value, list | tuple) and value:
            value = value[-1]
        if type(value) is int and 8 <= value <= 2048:
            return value
    return None


def _normalisations(settings: Mapping[str, Any], channels: int, pictures: Pictures) -> list[Normalisation]:
    mean, std = (_numbers(settings.get(key), channels) for key in ("mean", "std"))
    named = [Normalisation("the mean and std that the checkpoint names", mean, std)] if mean and std else []
    size = pictures.one_size
    if channels == 1:
        usual = [PLAIN, HALF, *([MNIST] if size == (28, 28) else [])]
    else:
        usual = [IMAGENET, PLAIN, HALF, *([CIFAR] if size == (32, 32) else [])]
    return named + [norm for norm in usual if not named or norm.mean != mean]


def _numbers(value: object, channels: int) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != channels:
        return ()
    if not all(isinstance(item, int | float) and math.isfinite(item) for item in value):
        return ()
    return tuple(float(item) for item in value)
