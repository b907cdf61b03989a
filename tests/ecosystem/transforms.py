"""Transforms as the libraries make them: what stands in the config, and the library's own call on a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

Apply = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Transform:
    """A transform.

    Attributes:
        library: where it comes from.
        kind: what of it.
        lines: ``train.transform`` in YAML.
        make: writes what it needs into a project, and gives the library's own call: an RGB picture to an input.
    """

    library: str
    kind: str
    lines: str
    make: Callable[[Path], Apply]


def _list(folder: Path) -> Apply:
    return v2.Compose(
        [v2.Resize([32, 32]), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    )


def _timm(folder: Path) -> Apply:
    from timm.data import create_transform

    return create_transform(
        input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], crop_pct=1.0, interpolation="bicubic"
    )


def _weights(folder: Path) -> Apply:
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=36)


def _processor(folder: Path) -> Apply:
    from transformers import AutoImageProcessor, ViTImageProcessor

    saved = folder / "processor"
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    ).save_pretrained(saved)
    processor = AutoImageProcessor.from_pretrained(saved)
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]


ALBUMENTATIONS = """
import albumentations as A
from albumentations.pytorch import ToTensorV2


def evaluation():
    return A.Compose([A.Resize(32, 32), A.Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), ToTensorV2()])
"""


def _albumentations(folder: Path) -> Apply:
    (folder / "augment.py").write_text(ALBUMENTATIONS)
    scope: dict[str, Any] = {}
    exec(ALBUMENTATIONS, scope)  # our text above
    whole = scope["evaluation"]()
    return lambda image: whole(image=np.asarray(image))["image"]  # type: ignore[no-any-return]


OWN = """
import torch
import numpy as np


def evaluation(image):
    pixels = np.asarray(image.resize((32, 32))).transpose(2, 0, 1)
    return torch.tensor(pixels).float() / 127.5 - 1
"""


def _own(folder: Path) -> Apply:
    (folder / "own.py").write_text(OWN)
    scope: dict[str, Any] = {}
    exec(OWN, scope)  # our text above
    return scope["evaluation"]  # type: ignore[no-any-return]


LIST = Transform(
    "torchvision", "a list of `transforms.v2`",
    "[{Resize: {size: [32, 32]}}, ToImage, {ToDtype: {dtype: float32, scale: true}}, "
    "{Normalize: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}]",
    _list,
)  # fmt: skip
TIMM = Transform(
    "timm", "`create_transform`",
    "{factory: timm.data.create_transform, args: {input_size: [3, 32, 32], mean: [0.5, 0.5, 0.5], "
    "std: [0.5, 0.5, 0.5], crop_pct: 1.0, interpolation: bicubic}}",
    _timm,
)  # fmt: skip
WEIGHTS = Transform(
    "torchvision", "`transforms` of weights",
    "{factory: torchvision.models.ResNet18_Weights.DEFAULT.transforms, args: {crop_size: 32, resize_size: 36}}",
    _weights,
)  # fmt: skip
PROCESSOR = Transform("transformers", "a folder of an `AutoImageProcessor`", "{processor: processor}", _processor)
ALBUMENT = Transform(
    "albumentations", "`Compose`, from a function of one's own", "./augment.py:evaluation", _albumentations
)
OWN_FUNCTION = Transform("any", "a function of one's own", "./own.py:evaluation", _own)
