"""A data set as influence sees it: positions, labels, paths, and batches of transformed inputs.

The transform is kept apart from the data set, so that the raw image is at hand for reports and an image file can go
through the same transform.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from influence_cli.data_files import DataFiles
from influence_cli.errors import InfluenceError, describe
from influence_cli.image_files import cut_off, lost_depth, open_image


@dataclass(frozen=True)
class Split:
    """The training or the test examples, in the order that the data set yields them.

    Attributes:
        name: ``train`` or ``test``, for messages.
        source: the user's data set; item ``i`` is (image, label).
        transform: raw image to model input; None where the source yields inputs already.
        labels: int64 [len(source)], after overrides; −1 where unknown.
        indices: int64 [n], the positions in use (all but the excluded), rising.
        paths: a file a position, or what stands for it (``train.parquet#17``), or None.
        classes: class names by number, or None where the source has none.
        mapping: the source's ``class_to_idx``, or None.
        where: ``influence.yaml:12``, the section's line.
        transform_text: the transform as the config has it; what it prints of itself lacks some arguments.
        folder: current while an item is read, so that a source's relative paths work; None leaves it alone.
        files: where the examples lie, if not in a file each.
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


@dataclass(frozen=True)
class Batch:
    """Some examples, ready for the model.

    Attributes:
        inputs: [b, …] on the CPU.
        targets: int64 [b].
        indices: int64 [b], positions in the data set.
        unreadable: position and reason of the examples that could not be read (not among the others).
    """

    inputs: Tensor
    targets: Tensor
    indices: np.ndarray
    unreadable: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        """Count the examples that could be read."""
        return len(self.indices)

    def digest(self) -> int:
        """Hash inputs, labels and positions (xxh3, 64 bits): has the data changed under a store?"""
        state = xxhash.xxh3_64(self.indices.tobytes())
        state.update(self.targets.numpy().tobytes())
        state.update(np.ascontiguousarray(self.inputs.numpy()).data)
        return state.intdigest()


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
    elif isinstance(item, tuple | list) and len(item) >= 2:
        image, label = item[0], item[1]
    else:
        image = label = None
    if image is None or label is None:
        raise InfluenceError(
            f"{split.where}: {split.title(index)} is a {type(item).__name__}, not (image, label)",
            "let the data set yield (image, label), or a dict with 'image' and 'label'",
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
            raise InfluenceError(f"{split.where}: the transform fails on {title}: {describe(error)}") from error
    advice = "add to the transform: [ToImage, {ToDtype: {dtype: float32, scale: true}}]"
    if isinstance(image, np.ndarray):
        try:
            # A copy in torch's own layout: it takes no negative strides, no other byte order, no read-only memory.
            image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise InfluenceError(f"{split.where}: {title} is an array of {image.dtype}, not of numbers") from error
    if not isinstance(image, Tensor):
        raise InfluenceError(f"{split.where}: {title} is a {type(image).__name__}, not a tensor", advice)
    if image.dtype in (torch.uint8, torch.bool):
        raise InfluenceError(f"{split.where}: {title} is a tensor of {image.dtype}, not of float32", advice)
    tensor = image.detach().as_subclass(Tensor)
    return tensor.float() if tensor.dtype in (torch.float64, torch.float16, torch.bfloat16) else tensor


class _Reader(torch.utils.data.Dataset[Any]):
    """Item i is (input, index), or the reason why it cannot be read: nothing is raised inside a worker."""

    def __init__(self, split: Split, indices: np.ndarray) -> None:
        self.split = split
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor | None, int, str]:
        index = int(self.indices[position])
        try:
            image, _ = raw_item(self.split, index)
            return to_input(self.split, image, self.split.title(index)), index, ""
        except InfluenceError as error:
            return None, index, error.message


@dataclass(frozen=True)
class Loading:
    """Who reads the examples; what comes out is the same.

    Attributes:
        workers: loader processes; 0 reads in this one, between two batches.
        ahead: examples that each of them has ready.
        pin: whether inputs come in pinned pages, which go to a CUDA device while it computes.
    """

    workers: int = 0
    ahead: int = 1024
    pin: bool = False


ALONE = Loading()


def read_batches(
    split: Split, indices: np.ndarray, size: int, loading: Loading = ALONE, timeout: float = 0
) -> Iterator[Batch]:
    """Read examples in batches, in the given order, the last one shorter.

    Args:
        split: where from.
        indices: positions in the data set.
        size: examples a batch.
        loading: loader processes; of two batches or fewer there are none.
        timeout: seconds that one may take for a batch; 0 for any.

    Raises:
        InfluenceError: two shapes, or a loader process cannot be started, or has died.
    """
    workers = loading.workers if len(indices) > 2 * size else 0
    try:
        loader: Iterator[_Read] = iter(
            torch.utils.data.DataLoader(
                _Reader(split, indices),
                batch_size=size,
                num_workers=workers,
                collate_fn=_join,
                prefetch_factor=max(1, loading.ahead // size) if workers else None,
                # What the config names by file could not be imported in a process that starts afresh.
                multiprocessing_context="fork" if workers else None,
                timeout=timeout if workers else 0,
            )
        )
    except OSError as error:
        raise InfluenceError(
            f"{split.where}: {workers} loader processes cannot be started: {describe(error)}",
            "are there too many processes (ulimit -u), or too little memory? what is done is kept",
        ) from error
    for read in _watched(split, indices, size, loader):
        batch = _collate(split, read)
        yield replace(batch, inputs=batch.inputs.pin_memory()) if loading.pin and workers and len(batch) else batch


def _watched(split: Split, indices: np.ndarray, size: int, loader: Iterator[_Read]) -> Iterator[_Read]:
    """Name a loader process that has died (out of memory, a crash in a decoder), and what it may have been reading."""
    at = 0
    while True:
        try:
            read = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            # The cause knows the signal, where torch was told of one.
            text = f"{error.__cause__ or ''}. {error}"
            if "DataLoader timed out" in text:
                raise InfluenceError(f"{split.where}: the loader processes hang") from error
            died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)([^.]*)", text)
            if died is None:
                raise
            raise InfluenceError(
                f"{split.where}: the loader process {died[1]}{died[2]}, in or after the {size} examples from "
                f"{split.title(int(indices[at]))} on",
                "was the memory full, or does one of those images crash its reader? what is done is kept",
            ) from error
        yield read
        at = min(at + size, len(indices) - 1)


@dataclass(frozen=True)
class _Read:
    """What a loader process hands over: one tensor, for each is a file of its own on the way.

    Attributes:
        inputs: [b, …], those of the first one's shape.
        indices: positions of all that could be read.
        unreadable: position and reason of the others.
        odd: position and shape of the first one of another shape.
    """

    inputs: Tensor
    indices: list[int]
    unreadable: tuple[tuple[int, str], ...]
    odd: tuple[int, list[int]] | None


def _join(items: Sequence[tuple[Tensor | None, int, str]]) -> _Read:
    unreadable = tuple((index, reason) for tensor, index, reason in items if tensor is None)
    good = [(tensor, index) for tensor, index, _ in items if tensor is not None]
    if not good:
        return _Read(torch.empty(0), [], unreadable, None)
    shape = good[0][0].shape
    odd = next(((index, list(tensor.shape)) for tensor, index in good if tensor.shape != shape), None)
    inputs = torch.stack([tensor for tensor, _ in good if tensor.shape == shape])
    return _Read(inputs, [index for _, index in good], unreadable, odd)


def _collate(split: Split, read: _Read) -> Batch:
    if read.odd is not None:
        index, shape = read.odd
        raise InfluenceError(
            f"{split.where}: {split.title(index)} has the shape {shape}, {split.title(read.indices[0])} "
            f"has {list(read.inputs.shape[1:])}",
            "one shape is needed: add {Resize: {size: [224, 224]}} to the transform",
        )
    indices = np.array(read.indices, dtype=np.int64)
    return Batch(read.inputs, torch.from_numpy(split.labels[indices]), indices, read.unreadable)


def refuse_unreadable(batch: Batch) -> None:
    """Stop at the first example that cannot be read."""
    if batch.unreadable:
        raise InfluenceError(
            batch.unreadable[0][1],
            "mend or remove it, list it under exclude, or pass --skip-unreadable to go on without it",
        )


def readable_batches(
    split: Split,
    indices: np.ndarray,
    size: int,
    loading: Loading = ALONE,
    *,
    skip: bool,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Batch]:
    """Read examples in batches, none empty.

    Args:
        split: where from.
        indices: positions in the data set.
        size: examples a batch.
        loading: loader processes.
        skip: go on without examples that cannot be read; otherwise the first of them is an error.
        tell: takes a line for each that is skipped.
    """
    for batch in read_batches(split, indices, size, loading):
        if not skip:
            refuse_unreadable(batch)
        for _, reason in batch.unreadable:
            tell(f"skipped: {reason}")
        if len(batch):
            yield batch


def take(split: Split, indices: np.ndarray) -> Split:
    """Restrict a split to some positions (they keep their numbers)."""
    return replace(split, indices=np.asarray(indices, dtype=np.int64))


def raw_image(split: Split, index: int) -> Image.Image | None:
    """Give the picture of an example for a report; None where the data set yields nothing like one."""
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
        array = array.astype(np.float64)
        finite = array[np.isfinite(array)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        array = np.nan_to_num(array, nan=low, posinf=high, neginf=low)
        array = ((array - low) / (high - low or 1.0) * 255).astype(np.uint8)
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
                f"{path}: the {split.name} data set yields tensors, so an image file has no known way into the model",
                f"give {split.name}.transform in the YAML file",
            )
    elif image.mode != example.mode:
        if (lost := cut_off(image)) and not example.mode.startswith(("I", "F")):
            raise InfluenceError(f"{path} cannot be read: {lost}")
        try:
            image = image.convert(example.mode)
        except ValueError as error:
            raise InfluenceError(
                f"{path} is an image of mode {image.mode}, the {split.name} images are {example.mode}: "
                f"{describe(error)}",
                "save it as an RGB or grey image",
            ) from error
    tensor = to_input(split, image, str(path))
    expected = to_input(split, example, split.title(int(split.indices[0]))).shape
    if tensor.shape != expected:
        raise InfluenceError(
            f"{path} becomes an input of shape {list(tensor.shape)}, the {split.name} examples are {list(expected)}",
            "add {Resize: {size: [height, width]}} to the transform, or resize the file",
        )
    return tensor, image


def labelled_inputs(split: Split) -> Iterator[tuple[Tensor, int]]:
    """Give (input, label) pairs of all examples in use, as a training loop takes them."""
    for batch in readable_batches(split, split.indices, 256, skip=False):
        yield from zip(batch.inputs, batch.targets.tolist(), strict=True)
