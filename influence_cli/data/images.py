"""One image, raw for people and transformed for the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.data.image_files import cut_off, open_image
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError, describe
from influence_cli.pictures import stretched


def raw_image(split: Split, index: int) -> Image.Image | None:
    """Give the picture of an example for a report; None if the data set yields no picture."""
    image, _ = raw_item(split, index)
    return as_picture(image)


def as_picture(image: Any) -> Image.Image | None:
    """Turn what a data set yields (PIL image, array, tensor) into a picture, if it looks like one."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
    array = image.numpy() if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        return None
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] != 3:
        return None
    if array.dtype != np.uint8:
        array = stretched(array).astype(np.uint8)
    return Image.fromarray(array)


def file_input(split: Split, path: Path) -> tuple[Tensor, Image.Image]:
    """Read an image file as the split's own images are read: same mode, same transform.

    Returns:
        The model input, and the picture for a report.
    """
    image = open_image(path)
    example, _ = raw_item(split, int(split.indices[0]))
    if not isinstance(example, Image.Image):
        if split.transform is None:
            raise InfluenceError(
                f"{path}: the {split.name} data set yields tensors, so an image file cannot become a model input",
                f"give {split.name}.transform in the YAML file",
            )
    elif image.mode != example.mode:
        if (lost := cut_off(image)) and not example.mode.startswith(("I", "F")):
            raise InfluenceError(f"{path} cannot be read: {lost}")
        try:
            image = image.convert(example.mode)
        except ValueError as error:
            raise InfluenceError(
                f"{path} is an image of mode {image.mode}, but the {split.name} images are {example.mode}: "
                f"{describe(error)}",
                "save it as an RGB or grey image",
            ) from error
    tensor = to_input(split, image, str(path))
    expected = to_input(split, example, split.title(int(split.indices[0]))).shape
    if tensor.shape != expected:
        raise InfluenceError(
            f"{path} becomes an input of shape {list(tensor.shape)}, but the {split.name} examples have "
            f"{list(expected)}",
            "add {Resize: {size: [height, width]}} to the transform, or resize the file",
        )
    return tensor, image
