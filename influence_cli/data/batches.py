"""Read examples in batches, with or without loader processes; an unreadable one is named or skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from influence_cli.data.split import Split, label_conflict, raw_item, to_input
from influence_cli.errors import InfluenceError, describe
from influence_cli.runtime import work
from influence_cli.runtime.memory import available_bytes

# A target of a weighted training example is label + SLOT · place of its weight (model/sample_weights.py).
SLOT = 2**32
# Share of the free memory for inputs that are read again and again.
HELD_SHARE = 0.5


@dataclass(frozen=True)
class Batch:
    """Some examples, ready for the model.

    Attributes:
        inputs: [b, …] on the CPU.
        targets: int64 [b]: labels, with the place of a weight where the training examples have weights.
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

    @property
    def labels(self) -> Tensor:
        """Give the labels: int64 [b]."""
        return self.targets % SLOT if bool((self.targets >= SLOT).any()) else self.targets

    def digest(self) -> int:
        """Hash inputs, labels and positions (xxh3, 64 bits), to detect that the data of a store has changed."""
        state = xxhash.xxh3_64(self.indices.tobytes())
        state.update(self.targets.numpy().tobytes())
        state.update(np.ascontiguousarray(self.inputs.numpy()).data)
        return state.intdigest()


class _Reader(torch.utils.data.Dataset[Any]):
    """Item i is (input, index), or the reason why it cannot be read: nothing is raised inside a worker.

    An item whose label is not the one that the work counts on gives that error.
    """

    def __init__(self, split: Split, indices: np.ndarray) -> None:
        self.split = split
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor | None, int, str | InfluenceError]:
        index = int(self.indices[position])
        try:
            image, label = raw_item(self.split, index)
            conflict = label_conflict(self.split, index, label)
            if conflict is not None:
                return None, index, conflict
            return to_input(self.split, image, self.split.title(index)), index, ""
        except InfluenceError as error:
            return None, index, error.message


@dataclass(frozen=True)
class Loading:
    """Which processes read the examples; the results are the same either way.

    Attributes:
        workers: loader processes; 0 reads in this one, between two batches.
        ahead: examples that each of them keeps ready.
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
        size: examples per batch.
        loading: loader processes; none for two batches or fewer.
        timeout: seconds allowed per batch; 0 for no limit.

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
                # Code that the config names by file could not be imported in a fresh process.
                multiprocessing_context="fork" if workers else None,
                timeout=timeout if workers else 0,
            )
        )
    except OSError as error:
        raise InfluenceError(
            f"{split.where}: cannot start {workers} loader processes: {describe(error)}",
            "check the process limit (ulimit -u) and free memory; finished work is kept",
        ) from error
    for read in _watched(split, indices, size, loader):
        batch = _collate(split, read)
        batch = replace(batch, inputs=batch.inputs.pin_memory()) if loading.pin and workers and len(batch) else batch
        with computing(split, batch):
            yield batch


def computing(split: Split, batch: Batch) -> AbstractContextManager[None]:
    """Say that the examples of a batch are in work, for the name of the one on which the user's code fails."""
    return work.examples(partial(_title, split, batch))


def _title(split: Split, batch: Batch) -> str:
    """Name the example of a batch on which the user's code fails; the batch, where none fails by itself."""
    for row in range(len(batch)):
        if work.fails_alone(batch.inputs[row : row + 1], batch.targets[row : row + 1]):
            return split.title(int(batch.indices[row]))
    first = split.title(int(batch.indices[0])) if len(batch) else "no example"
    return first if len(batch) < 2 else f"one of {len(batch):,} examples from {first} on"


def _watched(split: Split, indices: np.ndarray, size: int, loader: Iterator[_Read]) -> Iterator[_Read]:
    """Name a loader process that has died (out of memory, a crash in a decoder), and what it may have been reading."""
    at = 0
    while True:
        try:
            read = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            # The cause names the signal, if torch received one.
            text = f"{error.__cause__ or ''}. {error}"
            if "DataLoader timed out" in text:
                raise InfluenceError(f"{split.where}: the loader processes stopped responding") from error
            died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)([^.]*)", text)
            if died is None:
                raise
            raise InfluenceError(
                f"{split.where}: the loader process {died[1]}{died[2]}, during or after the {size} examples from "
                f"{split.title(int(indices[at]))} on",
                "was memory full, or does one of those images crash its decoder? finished work is kept",
            ) from error
        yield read
        at = min(at + size, len(indices) - 1)


@dataclass(frozen=True)
class _Read:
    """What a loader process passes on: a single tensor, because each one needs its own file on the way.

    Attributes:
        inputs: [b, …], those with the shape of the first one.
        indices: positions of all that could be read.
        unreadable: position and reason of the others.
        odd: position and shape of the first one of another shape.
        conflict: why the first one with another label than expected stops the work.
    """

    inputs: Tensor
    indices: list[int]
    unreadable: tuple[tuple[int, str], ...]
    odd: tuple[int, list[int]] | None
    conflict: InfluenceError | None = None


def _join(items: Sequence[tuple[Tensor | None, int, str | InfluenceError]]) -> _Read:
    conflict = next((reason for _, _, reason in items if isinstance(reason, InfluenceError)), None)
    unreadable = tuple((index, reason) for tensor, index, reason in items if tensor is None and isinstance(reason, str))
    good = [(tensor, index) for tensor, index, _ in items if tensor is not None]
    if not good or conflict is not None:
        return _Read(torch.empty(0), [], unreadable, None, conflict)
    shape = good[0][0].shape
    odd = next(((index, list(tensor.shape)) for tensor, index in good if tensor.shape != shape), None)
    inputs = torch.stack([tensor for tensor, _ in good if tensor.shape == shape])
    return _Read(inputs, [index for _, index in good], unreadable, odd)


def _collate(split: Split, read: _Read) -> Batch:
    if read.conflict is not None:
        raise read.conflict
    if read.odd is not None:
        index, shape = read.odd
        first = list(read.inputs.shape[1:])
        channels = len(shape) == len(first) and shape[1:] == first[1:]
        raise InfluenceError(
            f"{split.where}: {split.title(index)} has the shape {shape}, but "
            f"{split.title(read.indices[0])} has {first}",
            "all inputs need as many channels: add RGB as the first step of the transform"
            if channels
            else "all inputs need one shape: add {Resize: {size: [224, 224]}} to the transform",
        )
    indices = np.array(read.indices, dtype=np.int64)
    targets = split.labels[indices] if split.slots is None else split.labels[indices] + SLOT * split.slots[indices]
    return Batch(read.inputs, torch.from_numpy(targets), indices, read.unreadable)


def refuse_unreadable(batch: Batch) -> None:
    """Stop at the first example that cannot be read."""
    if batch.unreadable:
        raise InfluenceError(
            batch.unreadable[0][1],
            "fix or remove it, list it under exclude, or pass --skip-unreadable to continue without it",
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
    """Read examples in batches that are never empty.

    Args:
        split: where from.
        indices: positions in the data set.
        size: examples per batch.
        loading: loader processes.
        skip: continue without unreadable examples; otherwise the first of them is an error.
        tell: takes one line per skipped example.
    """
    for batch in read_batches(split, indices, size, loading):
        if not skip:
            refuse_unreadable(batch)
        for _, reason in batch.unreadable:
            tell(f"skipped: {reason}")
        if len(batch):
            yield batch


def fits_memory(split: Split, dtype: torch.dtype | None = None) -> bool:
    """Say whether all inputs of a split may be held, for work that reads them again and again.

    Args:
        split: of which one input is read.
        dtype: in which they are held; None for their own.
    """
    image, _ = raw_item(split, int(split.indices[0]))
    one = to_input(split, image, split.title(int(split.indices[0])))
    size = one.element_size() if dtype is None else dtype.itemsize
    return one.numel() * size * len(split) <= HELD_SHARE * available_bytes(torch.device("cpu"))


def labelled_inputs(split: Split) -> Iterator[tuple[Tensor, int]]:
    """Give (input, label) pairs of all examples in use, as a training loop takes them."""
    for batch in readable_batches(split, split.indices, 256, skip=False):
        yield from zip(batch.inputs, batch.labels.tolist(), strict=True)
