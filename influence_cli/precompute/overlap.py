"""Which test examples are training examples as well? Their loss says little of images that the model has not seen.

Two examples are the same if their decoded pixels are, whatever their files are called. All of both sets are compared
where reading them takes seconds; otherwise files of the same size are, by their bytes. For a few test examples the
outputs in a store say which training examples to read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from influence_cli.data.split import Split, raw_item, spread
from influence_cli.errors import InfluenceError
from influence_cli.store.store import OUTPUT_ROWS, Store

# Seconds for reading both sets, examples that this is measured by, and output rows that may be equal by chance.
READING, MEASURED, CHANCE = 5.0, 8, 4
# Outputs of the same input agree to this share of their size, whatever batch it was in.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Overlap:
    """Test examples that are training examples as well.

    Attributes:
        pairs: int64 [k, 2], positions of a test example and of the first training example that is the same.
        compared: ``pixels``, ``files`` or ``nothing``: what of them was.
    """

    pairs: np.ndarray
    compared: str

    def warning(self, train: Split, test: Split, among: str, classes: Sequence[str]) -> str:
        """Say how many there are, name one pair, and one whose labels differ; empty if there are none.

        Args:
            train: training examples.
            test: test examples.
            among: how many test examples were looked at: ``6 test examples``.
            classes: names by number.
        """
        if not len(self.pairs):
            return ""
        one, other = (int(index) for index in self.pairs[0])
        labels = test.labels[self.pairs[:, 0]], train.labels[self.pairs[:, 1]]
        differ = np.flatnonzero((labels[0] != labels[1]) & (labels[0] >= 0))
        are = "is a training example" if len(self.pairs) == 1 else "are training examples"
        text = (
            f"{len(self.pairs):,} of {among} {are} as well, by their {self.compared}: {test.title(one)} is "
            f"{train.title(other)}; results on them say little of new images, and test.exclude: FILE leaves them out"
        )
        if len(differ):
            at = int(differ[0])
            named = [classes[int(values[at])] for values in labels]
            text += (
                f"; {len(differ):,} of them {'has' if len(differ) == 1 else 'have'} another label there: "
                f"{test.title(int(self.pairs[at, 0]))} is labelled {named[0]}, and {named[1]} as training example "
                f"{int(self.pairs[at, 1])}"
            )
        return text


def find_overlap(train: Split, test: Split, *, full: bool) -> Overlap:
    """Compare all test examples with all training examples.

    Args:
        train: training examples.
        test: test examples.
        full: read both sets however long it takes.
    """
    if full or _seconds(train) + _seconds(test) <= READING:
        return Overlap(_pairs(_by_pixels(test), _by_pixels(train)), "pixels")
    if train.paths is None or test.paths is None or train.files is not None or test.files is not None:
        return Overlap(np.empty((0, 2), dtype=np.int64), "nothing")
    sizes = [_sizes(split) for split in (test, train)]
    shared = np.intersect1d(sizes[0][sizes[0] >= 0], sizes[1])
    chosen = [(split, split.indices[np.isin(size, shared)]) for split, size in zip((test, train), sizes, strict=True)]
    return Overlap(_pairs(*(_by_bytes(split, indices) for split, indices in chosen)), "files")


def copies_in_store(path: Path, train: Split, images: Sequence[Any], outputs: Tensor) -> list[int | None]:
    """Find the training example that each of a few raw images is.

    Args:
        path: a complete store.
        train: its training examples.
        images: as a data set yields them.
        outputs: the model's outputs on them [m, C], on the CPU.

    Returns:
        A position of the data set for each, or None.
    """
    copies: list[int | None] = [None] * len(images)
    hashes = [pixel_hash(image) for image in images]
    given = outputs.numpy().astype(np.float32)
    reads = CHANCE * len(images)
    with Store.open(path) as store:
        indices = store.column("indices")
        for start in range(0, len(indices), OUTPUT_ROWS):
            rows = store.column("outputs", slice(start, start + OUTPUT_ROWS))
            order = np.argsort(rows[:, 0])
            slack = ROUNDING * (1 + np.abs(given).max(axis=1))
            firsts = np.searchsorted(rows[order, 0], given[:, 0] - slack)
            lasts = np.searchsorted(rows[order, 0], given[:, 0] + slack, side="right")
            for at, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
                near = order[first:last]
                near = np.sort(near[(np.abs(rows[near] - given[at]) <= slack[at]).all(axis=1)])
                for row in near:
                    if copies[at] is not None or hashes[at] is None or reads == 0:
                        break
                    reads -= 1
                    index = int(indices[start + row])
                    if _hash_of(train, index) == hashes[at]:
                        copies[at] = index
    return copies


def pixel_hash(image: Any) -> str | None:
    """Hash a raw image by its decoded pixels; None for what is no picture and no array."""
    if isinstance(image, Image.Image):
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        head, data = f"{image.mode} {image.size}", image.tobytes()
        return xxhash.xxh3_128_hexdigest(head.encode() + data)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
        return xxhash.xxh3_128_hexdigest(
            f"{image.dtype} {image.shape}".encode() + np.ascontiguousarray(image).tobytes()
        )
    return None


def _hash_of(split: Split, index: int) -> str | None:
    """Hash an example; None if it cannot be read: the pass that needs it names it."""
    try:
        return pixel_hash(raw_item(split, index)[0])
    except InfluenceError:
        return None


def _seconds(split: Split) -> float:
    chosen, started = spread(split, MEASURED), time.perf_counter()
    for index in chosen:
        _hash_of(split, int(index))
    return (time.perf_counter() - started) / len(chosen) * len(split)


def _by_pixels(split: Split) -> Iterator[tuple[int, str | None]]:
    return ((index, _hash_of(split, index)) for index in split.indices.tolist())


def _sizes(split: Split) -> np.ndarray:
    """Give the size of each file in use, int64 [n]; −1 for one that is not there."""
    sizes = np.full(len(split), -1, dtype=np.int64)
    for row, index in enumerate(split.indices.tolist()):
        try:
            sizes[row] = Path(split.path(index) or "").stat().st_size
        except OSError:
            continue
    return sizes


def _by_bytes(split: Split, indices: np.ndarray) -> Iterator[tuple[int, str | None]]:
    for index in indices.tolist():
        try:
            yield index, xxhash.xxh3_128_hexdigest(Path(split.path(index) or "").read_bytes())
        except OSError:
            yield index, None


def _pairs(test: Iterator[tuple[int, str | None]], train: Iterator[tuple[int, str | None]]) -> np.ndarray:
    """Pair each test example with the first training example of the same hash, int64 [k, 2]."""
    first: dict[str, int] = {}
    for index, name in train:
        if name is not None:
            first.setdefault(name, index)
    pairs = [(index, first[name]) for index, name in test if name is not None and name in first]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
