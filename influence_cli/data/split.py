"""A data set as influence sees it: positions, labels, paths, and batches of transformed inputs.

The transform is separate from the data set, so that reports can show the raw image and an image file can go
through the same transform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, nullcontext, suppress
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
from influence_cli.runtime.disk import stand_in
from influence_cli.runtime.fence import item_modes, set_item_modes


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
        opened: files that this process read while it built the data set and the transform.
        item_labels: int64 [len(source)], the label that each item gives, in the source's own numbering and before
            overrides; None where nothing was read or listed.
        overridden: bool [len(source)], where ``labels`` of the config replaces it; None for nowhere.
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
    opened: tuple[Path, ...] = ()
    item_labels: np.ndarray | None = None
    overridden: np.ndarray | None = None
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
    modes = item_modes()
    try:
        with nullcontext() if split.folder is None else chdir(split.folder):
            item = split.source[index]
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # sys.exit() and exceptions of one's own kind too
        raise InfluenceError(f"{split.title(index)} cannot be read: {_reason(split, index, error)}") from error
    finally:
        set_item_modes(modes)
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


def _reason(split: Split, index: int, error: BaseException) -> str:
    """Say why an example cannot be read; of a file that holds something else, what that is and what gives the file."""
    path = split.path(index)
    with suppress(OSError, ValueError):
        with Path(path or "").open("rb") as file:
            left = stand_in(file.read(64))
        if left is not None:
            return f"it is {left[0]} ({left[1]})"
    return describe(error)


def label_number(split: Split, index: int, label: Any) -> int:
    """Read the label of an item as a class number.

    Raises:
        InfluenceError: naming the example, if it is several labels or no whole number.
    """
    if isinstance(label, np.ndarray | Tensor) and label.ndim:
        if len(label.reshape(-1)) != 1:
            raise InfluenceError(
                f"{split.where}: {split.title(index)} has {len(label.reshape(-1))} labels at once",
                "influence explains classifiers with one class an example: give the class number instead of a vector",
            )
        label = label.reshape(-1)[0]
    try:
        number = int(label)
        if number != label or abs(number) >= 2**63:
            raise ValueError("not a whole number that fits")
    except (TypeError, ValueError, OverflowError) as error:
        raise InfluenceError(
            f"{split.where}: {split.title(index)} has the label {label!r}, not a class number ({describe(error)})"
        ) from error
    return number


def label_conflict(split: Split, index: int, label: Any) -> InfluenceError | None:
    """Compare the label that comes with an image with the one that the work counts on.

    Every pass over the data calls it: the labels are known before it, from a list or an earlier reading.

    Returns:
        The error that names the example and both labels; None where they agree, where the config replaces the label,
        or where the item has no class number.
    """
    if split.item_labels is None or (split.overridden is not None and split.overridden[index]):
        return None
    expected = int(split.item_labels[index])
    try:
        given = label_number(split, index, label)
    except InfluenceError:
        return None
    if given == expected:
        return None
    return InfluenceError(
        f"{split.where}: {split.title(index)} comes with the label {named_label(split, given)}, but the data set says "
        f"{named_label(split, expected)}",
        "its list of labels (.targets) and its items have to agree, and an item has to give the same label each time; "
        f"{split.name}.labels: FILE, with a label per example, says which is right",
    )


def named_label(split: Split, number: int) -> str:
    """Write a label in the source's own numbering: ``2 (cat)``."""
    names = split.source_classes or split.classes or ()
    return f"{number} ({names[number]})" if 0 <= number < len(names) and names[number] != str(number) else str(number)


def to_input(split: Split, image: Any, title: str) -> Tensor:
    """Put a raw image through the split's transform.

    Raises:
        InfluenceError: the transform fails, or what comes out is not a tensor of numbers that a model takes.
    """
    # The data set's own numbers may be meant; a transform or a model that changes them in place must not.
    if isinstance(image, Tensor | np.ndarray):
        image = copy.copy(image) if isinstance(image, np.ndarray) else image.detach().clone()
    elif isinstance(image, Image.Image) and split.paths is None:
        image = image.copy()
    if split.transform is not None:
        modes = item_modes()
        try:
            image = split.transform(image)
        except Exception as error:
            raise InfluenceError(
                f"{split.where}: the transform fails on {title}: {describe(error)}", _mode_advice(image)
            ) from error
        finally:
            set_item_modes(modes)
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


def spread(split: Split, count: int) -> np.ndarray:
    """Choose examples over all classes and over the whole set, always the same ones.

    Data sets are sorted by class, so the first examples say nothing about the others.

    Args:
        split: the examples.
        count: how many; fewer if there are no more.

    Returns:
        int64, rising positions in the data set. Each class has its fair share, evenly spaced from its first example to
        its last; of more classes than ``count`` an even choice has one example each.
    """
    if len(split.indices) <= count:
        return split.indices
    labels = split.labels[split.indices]
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    if len(sizes) > count:
        chosen = np.linspace(0, len(sizes) - 1, count).astype(np.int64)
        rows = starts[chosen] + sizes[chosen] // 2
    else:
        picked, left = [], count
        for number, of in enumerate(np.argsort(sizes, kind="stable")):  # what small classes leave goes to the others
            share = min(int(sizes[of]), left // (len(sizes) - number))
            left -= share
            picked.append(starts[of] + np.linspace(0, sizes[of] - 1, share).astype(np.int64))
        rows = np.concatenate(picked)
    return np.asarray(np.sort(split.indices[order[rows]]))
