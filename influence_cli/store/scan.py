"""A scan: rows mapped from the file, verified, and worked on by several threads.

The file is mapped, not read. The checksum of a few blocks brings them into the processor's cache, where the products
then find them. Each thread does both for its own piece, and never waits for another thread.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import h5py
import numpy as np
import torch

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk
from influence_cli.store.encoding import checksum, decode
from influence_cli.store.layout import Layout

# Bytes of float32 rows (or one block, if that is larger): mapped at once, and verified and worked on at once, which
# must be small enough for the processor's cache.
PIECE_BYTES, PART_BYTES = 32 * 2**20, 4 * 2**20
# If rows are converted, parts of a block suffice, but products of few rows are slow: this many, within these bytes.
ROOM_ROWS, ROOM_BYTES = 128, 32 * 2**20

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """The place of a contiguous data set in the file.

    Attributes:
        start: byte of the first row.
        dtype: of its numbers.
        shape: of one row.
    """

    start: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Count the bytes of a row."""
        return self.dtype.itemsize * int(np.prod(self.shape))


def place_of(data: h5py.Dataset) -> Place:
    """Find a data set in its file; an empty one may be anywhere."""
    return Place(data.id.get_offset() or 0, data.dtype, data.shape[1:])


def mapped(raw: BinaryIO, place: Place, row: int, count: int, *, writable: bool = True) -> np.ndarray:
    """Map rows of a data set into memory, bypassing HDF5 and without a copy; the map ends with the array.

    Args:
        raw: the file.
        place: the data set.
        row: the first row.
        count: how many.
        writable: map copy-on-write, because torch accepts no read-only memory. The system may reserve memory for it.
    """
    size = count * place.row_bytes
    if not size:  # for mmap a length of 0 means the whole file
        return np.empty((count, *place.shape), dtype=place.dtype)
    start = place.start + row * place.row_bytes
    before = start % mmap.ALLOCATIONGRANULARITY
    pages = disk.mapped(raw, start - before, before + size, writable=writable)
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_HUGEPAGE"):
        # Reads ahead, and into pages of 2 MB: with pages of 4 kB, as read by posix_fadvise, mapping a row takes as long
        # as to multiply it with ten others. A kernel that has none refuses.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(pages, dtype=place.dtype, count=size // place.dtype.itemsize, offset=before)
    return values.reshape(count, *place.shape)


class Reader:
    """Reads and verifies the rows of one file of a store; threads may share it.

    Args:
        path: the file.
        first: the block of the store that its first one is.
        raw: the open file.
        layout: the shape of the rows in use.
        places: the places of the columns of its rows.
        digests: each block's hash of the model's inputs.
        checksums: what the blocks' checksums should be.
    """

    def __init__(
        self,
        path: Path,
        first: int,
        raw: BinaryIO,
        layout: Layout,
        places: Mapping[str, Place],
        digests: np.ndarray,
        checksums: np.ndarray,
    ) -> None:
        self.path = path
        self.blocks = range(first, first + layout.blocks)
        self._raw = raw
        self._layout = layout
        self._digests = digests.tolist()
        self._checksums = checksums.tolist()
        self._coordinates = places.get("coordinates")
        # Everything except the coordinates is small, and mapped once for all pieces.
        self._columns = {
            name: mapped(raw, place, 0, layout.padded, writable=False)
            for name, place in places.items()
            if name != "coordinates"
        }

    def digest(self, block: int) -> int:
        """Give the hash of the model's inputs for a block of the store."""
        return int(self._digests[block - self.blocks.start])

    def columns(self, block: int) -> dict[str, np.ndarray]:
        """Give what is stored of the rows of a block of the store, as it is in the file."""
        start = (block - self.blocks.start) * self._layout.block
        rows = slice(start, start + self._layout.block)
        columns = {name: values[rows] for name, values in self._columns.items()}
        if self._coordinates is not None:
            columns["coordinates"] = mapped(self._raw, self._coordinates, start, self._layout.block)
        return columns

    def parts(
        self, piece: range, room: Callable[[int], np.ndarray], *, whole: bool = False
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Verify the blocks of a piece, a few at a time, and give their positions and rows, float32 [b, k].

        Args:
            piece: the blocks of the store, all of them in this file.
            room: makes room for b rows that have to be converted.
            whole: verify all blocks before any rows are given.

        Raises:
            InfluenceError: a block is damaged.
        """
        ahead = self.blocks.start
        in_file = range(piece.start - ahead, piece.stop - ahead)
        rows, step = self._map(in_file), len(in_file) if whole else blocks_in(self._layout, PART_BYTES)
        first, before = in_file.start * self._layout.block, ahead * self._layout.block
        for start in range(in_file.start, in_file.stop, step):
            blocks = range(start, min(in_file.stop, start + step))
            for block in blocks:
                if not self._fits(block, rows, first):
                    raise damaged_block(self.path, block)
            where = self._layout.span(blocks)
            if "scales" not in self._columns:
                yield slice(before + where.start, before + where.stop), rows[where.start - first : where.stop - first]
                continue
            for some in self._converted(where):
                encoded = rows[some.start - first : some.stop - first]
                values = decode(encoded, self._columns["scales"][some], room(len(encoded)))
                yield slice(before + some.start, before + some.stop), values

    def fits(self, block: int) -> bool:
        """Say whether the checksum of a block of the store matches."""
        in_file = block - self.blocks.start
        return self._fits(in_file, self._map(range(in_file, in_file + 1)), in_file * self._layout.block)

    def _converted(self, where: slice) -> Iterator[slice]:
        """Cut rows evenly into parts that are converted at once."""
        count = where.stop - where.start
        step = -(-count // -(-count // most_rows(self._layout)))
        for start in range(where.start, where.stop, step):
            yield slice(start, min(where.stop, start + step))

    def _map(self, piece: range) -> np.ndarray:
        size = self._layout.block
        if self._coordinates is None:
            return np.empty((len(piece) * size, 0), dtype=np.float32)
        return mapped(self._raw, self._coordinates, piece.start * size, len(piece) * size)

    def _fits(self, block: int, rows: np.ndarray, first: int) -> bool:
        """Compare a block's checksum; ``rows`` are coordinates from row ``first`` on."""
        start, stop = block * self._layout.block, (block + 1) * self._layout.block
        columns = {name: values[start:stop] for name, values in self._columns.items()}
        if self._coordinates is not None:
            columns["coordinates"] = rows[start - first : stop - first]
        return checksum(block, columns, self._digests[block]) == int(self._checksums[block])


def damaged_block(path: Path, block: int) -> InfluenceError:
    """Name a block whose checksum does not match."""
    return InfluenceError(
        f"{path} is damaged: the checksum of block {block} does not match",
        "influence gradients --repair recomputes the damaged blocks",
    )


def most_rows(layout: Layout) -> int:
    """Count the most rows that are converted at once."""
    return min(layout.padded, max(_rows_in(layout, PART_BYTES), min(ROOM_ROWS, _rows_in(layout, ROOM_BYTES))))


def blocks_in(layout: Layout, size: int) -> int:
    """Count the blocks whose float32 rows fit a number of bytes; at least one."""
    return max(1, _rows_in(layout, size) // layout.block)


def _rows_in(layout: Layout, size: int) -> int:
    return max(1, size // (4 * max(1, layout.k)))


def pieces(
    readers: Sequence[Reader], layout: Layout, blocks: range, threads: int | None = None
) -> Iterator[tuple[Reader, range]]:
    """Group blocks into pieces of whole parts, each from one file.

    Args:
        readers: of all files of the store, in order of their rows.
        layout: of the store.
        blocks: the blocks that are wanted.
        threads: the threads that share them: pieces become small towards the end, so that all threads end together.
    """
    part, most = blocks_in(layout, PART_BYTES), blocks_in(layout, PIECE_BYTES)
    for reader in readers:
        start, end = max(blocks.start, reader.blocks.start), min(blocks.stop, reader.blocks.stop)
        while start < end:
            fair = most if threads is None else (blocks.stop - start) // (2 * threads)
            stop = min(end, start + max(1, min(most, fair) // part) * part)
            yield reader, range(start, stop)
            start = stop


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece], threads: int) -> Iterator[Result]:
    """Run ``work`` on every piece, on several threads, and give the results in order of the pieces.

    Inside, torch works with one thread and without autograd, so the result for a piece does not depend on the number of
    threads. Only a few pieces are started ahead of their turn. Any stop (an error of a piece, Ctrl-C, a caller who has
    enough) waits for the running pieces and leaves no thread behind.

    Args:
        work: called from other threads.
        pieces: taken as needed.
        threads: how many.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "scan", initializer=_alone)
    begun: deque[Future[Result]] = deque()
    try:
        for piece in pieces:
            begun.append(pool.submit(work, piece))
            if len(begun) > 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # Existing threads keep their setting; new ones would start with one.
        torch.set_num_threads(before)


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
