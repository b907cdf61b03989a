"""A data set as influence sees it: positions, labels, paths, and batches of transformed inputs.

The transform is separate from the data set, so that reports can show the raw image and an image file can go
through the same transform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.data.file_sets import DataFiles
from influence_cli.data.image_files import lost_depth
from influence_cli.data.tables import LABEL_NAMES
from influence_cli.errors import InfluenceError, describe


@dataclass(frozen=True)
class ClassOutputs:
    """What ``train.classes`` says, one of three forms; the training examples decide how it is read.

    Attributes:
        by_name: output of each class name.
        by_label: the same by label number, if all names are numbers: for a data set that has no such class names.
        names: names of each output; a name may be written in several ways.
        replaces: whether these names replace those of the data set, whose labels are output numbers then.
        where: ``influence.yaml:12``.
    """

    by_name: Mapping[str, int]
    by_label: Mapping[int, int]
    names: Mapping[int, tuple[str, ...]]
    where: str
    replaces: bool = False


@dataclass(frozen=True)
class Split:
    """The training or the test examples, in the order that the data set yields them.

    Attributes:
        name: ``train`` or ``test``, for messages.
        source: the user's data set; item ``i`` is (image, label).
        transform: raw image to model input; None where the source yields inputs already.
        labels: int64 [len(source)], after overrides; −1 where unknown.
        indices: int64 [n], the positions in use (all except excluded ones), ascending.
        paths: one file per position, or a stand-in for it (``train.parquet#17``), or None.
        classes: class names by number, or None where the source has none.
        mapping: the source's ``class_to_idx``, or None.
        where: ``influence.yaml:12``, the section's line.
        transform_text: the transform as written in the config; its own repr lacks some arguments.
        folder: the current folder while an item is read, so that a source's relative paths work; None for no change.
        files: the files with the examples, if several are in one file.
        source_classes: class names in the source's own numbering, whatever ``train.classes`` says.
        class_outputs: the model's output of each of the source's own labels, where ``train.classes`` says it.
        given_classes: how the training examples read that.
        weights: how often each example counts in the training objective, float64 [len(source)]; None for once.
    """

    name: str
    source: Any
    transform: Callable[[Any], Any] | None
    labels: np.ndarray
    indices: np.ndarray
    paths: Sequence[str] | None
    classes: tuple[str, ...] | None
    mapping: dict[str, int] | None
    where: str
    transform_text: str = ""
    folder: Path | None = None
    files: DataFiles | None = None
    source_classes: tuple[str, ...] | None = None
    class_outputs: dict[int, int] | None = None
    given_classes: ClassOutputs | None = None
    weights: np.ndarray | None = None

    @cached_property
    def slots(self) -> np.ndarray | None:
        """Give the place of each example's weight among the different weights, from 1 on; None without weights."""
        return None if self.weights is None else 1 + np.unique(self.weights, return_inverse=True)[1]

    @property
    def is_unlabelled(self) -> bool:
        """Say whether every example in use has the label −1, as hidden test labels have."""
        return bool((self.labels[self.indices] == -1).all())

    def __len__(self) -> int:
        """Count the examples in use."""
        return len(self.indices)

    def path(self, index: int) -> str | None:
        """Name the file of the example at this position of the data set, if it has one."""
        return self.paths[index] if self.paths is not None else None

    def title(self, index: int) -> str:
        """Name an example in a message: ``training example 17 (data/train/cat/3.png)``."""
        kind = "training" if self.name == "train" else self.name
        path = self.path(index)
        return f"{kind} example {index}" + (f" ({path})" if path else "")


def refuse_unlabelled(split: Split, instead: str = "") -> None:
    """Refuse a split without labels where they are needed.

    Args:
        split: the examples.
        instead: what can be done without labels, for the hint.
    """
    if split.is_unlabelled:
        raise InfluenceError(
            f"{split.where}: the {split.name} examples have no labels (all are −1)",
            f"{instead}{split.name}.labels names a file of labels",
        )


def raw_item(split: Split, index: int) -> tuple[Any, Any]:
    """Read (image, label) as the user's data set yields it; any failure names the example."""
    try:
        with nullcontext() if split.folder is None else chdir(split.folder):
            item = split.source[index]
    except Exception as error:
        raise InfluenceError(f"{split.title(index)} cannot be read: {describe(error)}") from error
    if isinstance(item, dict):
        image = next((item[key] for key in ("image", "img", "pixel_values", "input", "x") if key in item), None)
        label = next((item[key] for key in ("label", "labels", "target", "y") if key in item), None)
        named = [key for key in LABEL_NAMES if key in item]
        label = item[named[0]] if label is None and len(named) == 1 else label
    elif isinstance(item, tuple | list) and len(item) >= 2:
        image, label = item[0], item[1]
    else:
        image = label = None
    if image is None or label is None:
        raise InfluenceError(
            f"{split.where}: {split.title(index)} is a {type(item).__name__}, not (image, label)",
            "the data set must yield (image, label), or a dict with 'image' and 'label'",
        )
    path = split.path(index) if split.files is None and isinstance(image, Image.Image) else None
    if path and (lost := lost_depth(path, image)):
        raise InfluenceError(f"{split.title(index)} cannot be read: {lost}")
    return image, label


def to_input(split: Split, image: Any, title: str) -> Tensor:
    """Put a raw image through the split's transform.

    Raises:
        InfluenceError: the transform fails, or what comes out is not a tensor of numbers that a model takes.
    """
    if split.transform is not None:
        try:
            image = split.transform(image)
        except Exception as error:
            raise InfluenceError(
                f"{split.where}: the transform fails on {title}: {describe(error)}", _mode_advice(image)
            ) from error
    advice = "add to the transform: [ToImage, {ToDtype: {dtype: float32, scale: true}}]"
    if isinstance(image, np.ndarray):
        try:
            # A copy in torch's own layout: torch accepts no negative strides, other byte orders or read-only memory.
            image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise InfluenceError(f"{split.where}: {title} is an array of {image.dtype}, not of numbers") from error
    if callable(image) and not isinstance(image, Tensor):
        raise InfluenceError(
            f"{split.where}: the transform makes a {type(image).__name__} of {title}, which is a transform itself",
            "a function with one required argument is taken for the transform; to call it first, give its arguments: "
            "transform: {factory: NAME, args: {…}}",
        )
    if not isinstance(image, Tensor):
        raise InfluenceError(f"{split.where}: {title} is a {type(image).__name__}, not a tensor", advice)
    if image.dtype in (torch.uint8, torch.bool):
        raise InfluenceError(f"{split.where}: {title} is a tensor of {image.dtype}, not of float32", advice)
    tensor = image.detach().as_subclass(Tensor)
    return tensor.float() if tensor.dtype in (torch.float64, torch.float16, torch.bfloat16) else tensor


def _mode_advice(image: Any) -> str:
    """Say what may be wrong with an image that a transform does not take."""
    if not isinstance(image, Image.Image) or image.mode == "RGB":
        return ""
    return f"the image is of mode {image.mode}; many transforms take RGB only, which a step before makes: [RGB, …]"


def rows_of(indices: np.ndarray, positions: np.ndarray | Sequence[int]) -> np.ndarray:
    """Give the rows of examples among those in use, or among some of them.

    Args:
        indices: int64 [n], rising, the position of each row.
        positions: [k] of the examples; each has to be one of ``indices``.

    Returns:
        int64 [k].
    """
    return np.searchsorted(indices, positions)


def row_of(indices: np.ndarray, position: int) -> int | None:
    """Give the row of one example, as ``rows_of`` does; None where it is not among them."""
    row = int(rows_of(indices, [position])[0])
    return row if row < len(indices) and indices[row] == position else None


def take(split: Split, indices: np.ndarray) -> Split:
    """Restrict a split to some positions (they keep their numbers)."""
    return replace(split, indices=np.asarray(indices, dtype=np.int64))
