"""A scan: rows mapped from the file, verified, and worked on by several threads.

The file is mapped, not read. The checksum of a few blocks brings them into the processor's cache, where the maths then
finds them; each thread does both for a piece of its own, and waits for no other.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import h5py
import numpy as np
import torch

from influence_cli.errors import InfluenceError
from influence_cli.store_file import Layout
from influence_cli.store_rows import checksum, decode

# Bytes of float32 rows, if a block is not larger: what is mapped at one time, and what of it is verified and worked on
# at one time, small enough for the processor's cache.
PIECE_BYTES, PART_BYTES = 32 * 2**20, 4 * 2**20
# Where rows are converted, a part of a block will do, but a product of few rows is slow: so many, within these bytes.
ROOM_ROWS, ROOM_BYTES = 128, 32 * 2**20

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """Where a contiguous data set lies in the file.

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
    """Find a data set in its file; what has no bytes lies anywhere."""
    return Place(data.id.get_offset() or 0, data.dtype, data.shape[1:])


def mapped(raw: BinaryIO, place: Place, row: int, count: int, *, writable: bool = True) -> np.ndarray:
    """Map rows of a data set into memory, past HDF5 and without a copy; the map ends with the array.

    Args:
        raw: the file.
        place: the data set.
        row: the first row.
        count: how many.
        writable: map copy-on-write, for torch takes no read-only memory. The system may hold memory ready for it.
    """
    size = count * place.row_bytes
    if not size:  # mmap takes a length of 0 for the whole file
        return np.empty((count, *place.shape), dtype=place.dtype)
    start = place.start + row * place.row_bytes
    before = start % mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    pages = mmap.mmap(raw.fileno(), before + size, access=access, offset=start - before)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Reads ahead, and into pages of 2 MB: with pages of 4 kB, which posix_fadvise reads, to map a row takes as long
        # as to multiply it with ten others. A kernel that has none refuses.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(pages, dtype=place.dtype, count=size // place.dtype.itemsize, offset=before)
    return values.reshape(count, *place.shape)


class Reader:
    """Reads and verifies the rows of a store; threads may share it.

    Args:
        path: the store.
        raw: its open file.
        layout: its shape.
        places: where the columns of its rows lie.
        digests: each block's hash of what went into the model.
        checksums: what the blocks' checksums should be.
    """

    def __init__(
        self,
        path: Path,
        raw: BinaryIO,
        layout: Layout,
        places: Mapping[str, Place],
        digests: np.ndarray,
        checksums: np.ndarray,
    ) -> None:
        self.path = path
        self._raw = raw
        self._layout = layout
        self._digests = digests.tolist()
        self._checksums = checksums.tolist()
        self._coordinates = places.get("coordinates")
        # All but the coordinates is small, and mapped once for all pieces.
        self._columns = {
            name: mapped(raw, place, 0, layout.padded, writable=False)
            for name, place in places.items()
            if name != "coordinates"
        }

    def pieces(self, threads: int | None = None) -> Iterator[range]:
        """Group the blocks into pieces, of whole parts.

        Args:
            threads: that share them: the pieces become small towards the end, so that all threads end about together.
        """
        part, most = self._blocks_in(PART_BYTES), self._blocks_in(PIECE_BYTES)
        start, total = 0, self._layout.blocks
        while start < total:
            fair = most if threads is None else (total - start) // (2 * threads)
            stop = start + max(1, min(most, fair) // part) * part
            yield range(start, min(total, stop))
            start = stop

    def parts(
        self, piece: range, room: Callable[[int], np.ndarray], *, whole: bool = False
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Verify the blocks of a piece, a few at a time, and give their positions and rows, float32 [b, k].

        Args:
            piece: the blocks.
            room: makes room for b rows that have to be converted.
            whole: verify all blocks before any rows are given.

        Raises:
            InfluenceError: a block is damaged.
        """
        rows, step = self._map(piece), len(piece) if whole else self._blocks_in(PART_BYTES)
        first = piece.start * self._layout.block
        for start in range(piece.start, piece.stop, step):
            blocks = range(start, min(piece.stop, start + step))
            for block in blocks:
                if not self._fits(block, rows, first):
                    raise InfluenceError(
                        f"{self.path} is damaged: the checksum of block {block} does not fit",
                        "influence gradients --repair computes the damaged blocks again",
                    )
            where = slice(blocks.start * self._layout.block, min(self._layout.n, blocks.stop * self._layout.block))
            if "scales" not in self._columns:
                yield where, rows[where.start - first : where.stop - first]
                continue
            for some in self._converted(where):
                encoded = rows[some.start - first : some.stop - first]
                yield some, decode(encoded, self._columns["scales"][some], room(len(encoded)))

    def fits(self, block: int) -> bool:
        """Say whether a block's checksum fits."""
        return self._fits(block, self._map(range(block, block + 1)), block * self._layout.block)

    def most_rows(self) -> int:
        """Count the rows that are converted at one time, at most."""
        return min(self._layout.padded, max(self._rows_in(PART_BYTES), min(ROOM_ROWS, self._rows_in(ROOM_BYTES))))

    def _converted(self, where: slice) -> Iterator[slice]:
        """Cut rows into what is converted at one time, evenly."""
        count = where.stop - where.start
        step = -(-count // -(-count // self.most_rows()))
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

    def _rows_in(self, size: int) -> int:
        return max(1, size // (4 * max(1, self._layout.k)))

    def _blocks_in(self, size: int) -> int:
        return max(1, self._rows_in(size) // self._layout.block)


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece], threads: int) -> Iterator[Result]:
    """Run ``work`` on every piece, on several threads, and give the results in order of the pieces.

    Inside, torch works with one thread and without autograd: then the result for a piece does not depend on how many
    threads there are. Only a few pieces are begun before their turn. Whatever stops it (an error of a piece, Ctrl-C, a
    caller who has enough) waits for the pieces in hand and leaves no thread behind.

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
        # Threads of this one have kept theirs; new ones would begin with one.
        torch.set_num_threads(before)


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
