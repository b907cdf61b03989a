"""The gradient store: one HDF5 file of coordinates, a row a training example, with a flag and a checksum a block.

Everything is laid out and reserved when the file is made (store_file.py). After that nothing but rows, checksums and
flags is written, in place and in that order, so a kill at any instant leaves a file that opens and has lost at most
the block in hand.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash

from influence_cli.errors import InfluenceError
from influence_cli.store_file import Layout, open_file

READ, SKIPPED = 1, 2
# What a scan reads at one time: blocks are grouped up to this, for long matrix products.
SCAN_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Rows:
    """One block on its way into the store, not padded.

    Attributes:
        coordinates: float32 [b, k].
        losses: float32 [b].
        outputs: float32 [b, C].
        state: uint8 [b], READ or SKIPPED.
        digest: xxh3 of what went into the model.
    """

    coordinates: np.ndarray
    losses: np.ndarray
    outputs: np.ndarray
    state: np.ndarray
    digest: int


class Store:
    """An open store; use it as a context manager.

    Raises:
        InfluenceError: from ``open``: no such file, not a store, damaged, newer, or in use by another process.
    """

    def __init__(self, path: Path, raw: BinaryIO, file: h5py.File, header: Mapping[str, Any]) -> None:
        self.path = path
        self.layout = Layout(**header["layout"])
        self.fingerprint: dict[str, str] = header["fingerprint"]
        self.facts: dict[str, Any] = header["facts"]
        self._file = file
        self._raw = raw

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Store:
        """Open a store and check its header; rows are checked as they are read."""
        return cls(path, *open_file(path, write=write))

    def __enter__(self) -> Store:
        """Give the open store."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file, and give up its lock."""
        self._file.close()
        self._raw.close()

    def array(self, name: str) -> np.ndarray | None:
        """Read a whole side array (``spectrum``, ``basis``), its checksum verified; None where there is none."""
        if name not in self._file:
            return None
        values = np.asarray(self._file[name][()])
        if xxhash.xxh3_64_intdigest(np.ascontiguousarray(values).data) != int(self._file[name].attrs["xxh3"]):
            raise InfluenceError(
                f"{self.path} is damaged: the checksum of its {name} does not fit",
                "it belongs to no block that could be repaired; influence gradients --overwrite makes the store anew",
            )
        return values

    def column(self, name: str) -> np.ndarray:
        """Read ``losses``, ``outputs``, ``labels``, ``indices`` or ``state`` of all examples."""
        return np.asarray(self._file[name][: self.layout.n])

    def done(self) -> np.ndarray:
        """Say which blocks are complete: bool [blocks]."""
        return np.asarray(self._file["flags"][()] == 1)

    def digests(self) -> np.ndarray:
        """Give each block's hash of what went into the model: uint64 [blocks]."""
        return np.asarray(self._file["inputs"][()])

    def write(self, block: int, rows: Rows) -> None:
        """Write a block: rows first, flushed, its flag after.

        Raises:
            InfluenceError: the disk is full or gone; what is done so far stays.
        """
        where = slice(block * self.layout.block, (block + 1) * self.layout.block)
        columns = self._encode(rows)
        fixed = {name: np.asarray(self._file[name][where]) for name in ("labels", "indices")}
        try:
            for name, values in columns.items():
                self._put(name, where.start, values)
            self._put("inputs", block, np.uint64(rows.digest))
            self._put("checksums", block, np.uint64(_checksum(block, columns | fixed, rows.digest)))
            self._put("flags", block, np.uint8(1))
        except OSError as error:
            raise InfluenceError(
                f"writing block {block} of {self.path} failed: {error}",
                "the blocks before it are kept; make room and run the same command again",
            ) from error

    def summary(self) -> np.ndarray | None:
        """Read what ``write_summary`` kept: float64 [k + 1]; None where that has not happened since the last write."""
        values = np.asarray(self._file["summary"][()])
        return values if int(self._file["summary_xxh3"][0]) == xxhash.xxh3_64_intdigest(values.data) else None

    def readable(self) -> int:
        """Count the examples that could be read."""
        return int((self.column("state") == READ).sum())

    def write_summary(self, values: np.ndarray) -> None:
        """Keep k + 1 numbers about all rows beside them."""
        values = np.ascontiguousarray(values, dtype=np.float64)
        self._put("summary", 0, values)
        self._put("summary_xxh3", 0, np.uint64(xxhash.xxh3_64_intdigest(values.data)))

    def write_labels(self, labels: np.ndarray, indices: np.ndarray) -> None:
        """Write labels and positions of all examples again, as they were when the store was made."""
        self._put("labels", 0, labels)
        self._put("indices", 0, indices)

    def clear(self, blocks: np.ndarray) -> None:
        """Mark blocks as not done, so that a fill computes them again."""
        self._put("summary_xxh3", 0, np.uint64(0))
        for block in blocks:
            self._put("flags", int(block), np.uint8(0))

    def damaged(self, blocks: np.ndarray | None = None) -> np.ndarray:
        """Read some finished blocks (default: all) and list those whose checksum does not fit."""
        digests, checksums = self.digests(), self._file["checksums"][()]
        found = []
        for block in np.flatnonzero(self.done()) if blocks is None else blocks:
            where = slice(block * self.layout.block, (block + 1) * self.layout.block)
            columns = self._small_columns(where) | {"coordinates": np.asarray(self._file["coordinates"][where])}
            if _checksum(int(block), columns, int(digests[block])) != int(checksums[block]):
                found.append(block)
        return np.array(found, dtype=np.int64)

    def scan(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Read all coordinates once, in order, several blocks at a time, verifying each block's checksum.

        Yields:
            The rows' positions in the store, and their coordinates, float32 [b, k]: the file itself, mapped
            copy-on-write.

        Raises:
            InfluenceError: a block is missing or damaged.
        """
        if not self.done().all():
            raise InfluenceError(f"{self.path} is not complete", "influence gradients finishes it")
        layout, coordinates = self.layout, self._file["coordinates"]
        digests, checksums = self.digests(), self._file["checksums"][()]
        size = layout.block
        group = max(1, SCAN_BYTES // max(1, layout.k * coordinates.dtype.itemsize * size))
        for first in range(0, layout.blocks, group):
            last = min(layout.blocks, first + group)
            part = self._map("coordinates", first * size, (last - first) * size)
            columns = self._small_columns(slice(first * size, last * size)) | {"coordinates": part}
            for block in range(first, last):
                inside = slice((block - first) * size, (block - first + 1) * size)
                own = {name: values[inside] for name, values in columns.items()}
                if _checksum(block, own, int(digests[block])) != int(checksums[block]):
                    raise self._damaged(f"block {block}")
            rows = slice(first * size, min(layout.n, last * size))
            kept = part[: rows.stop - rows.start]
            if "scales" in columns:
                yield rows, kept.astype(np.float32) * columns["scales"][: len(kept), None]
            else:
                yield rows, kept

    def _map(self, name: str, row: int, count: int) -> np.ndarray:
        """Map rows of a data set into memory, past HDF5 and without a copy: its layout is contiguous.

        Copy-on-write, because torch takes no read-only memory; and a piece at a time, which commits no memory.
        """
        data = self._file[name]
        row_bytes = data.dtype.itemsize * int(np.prod(data.shape[1:]))
        start = data.id.get_offset() + row * row_bytes
        if hasattr(os, "posix_fadvise"):  # have the disk read on while this piece is worked on
            os.posix_fadvise(self._raw.fileno(), start, 2 * count * row_bytes, os.POSIX_FADV_WILLNEED)
        before = start % mmap.ALLOCATIONGRANULARITY
        piece = mmap.mmap(
            self._raw.fileno(), before + count * row_bytes, access=mmap.ACCESS_COPY, offset=start - before
        )
        values = np.frombuffer(piece, dtype=data.dtype, count=count * row_bytes // data.dtype.itemsize, offset=before)
        return values.reshape(count, *data.shape[1:])

    def _put(self, name: str, row: int, values: np.ndarray | np.generic) -> None:
        """Write values at their place in the file, past HDF5: it loses the error of a write that it has put off."""
        data = self._file[name]
        self._raw.seek(data.id.get_offset() + row * data.dtype.itemsize * int(np.prod(data.shape[1:])))
        view = memoryview(np.ascontiguousarray(values, dtype=data.dtype).reshape(-1).view(np.uint8).data)
        while len(view):  # a single call moves at most 2 GB
            view = view[self._raw.write(view) :]

    def _encode(self, rows: Rows) -> dict[str, np.ndarray]:
        padding = self.layout.block - len(rows.coordinates)

        def pad(values: np.ndarray, dtype: str) -> np.ndarray:
            values = values.astype(dtype, copy=False)
            if padding:  # only the last block: a copy of every block would cost as much as its checksum
                values = np.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
            return np.ascontiguousarray(values)

        columns = {
            "losses": pad(rows.losses, "float32"),
            "outputs": pad(rows.outputs, "float32"),
            "state": pad(rows.state, "uint8"),
        }
        coordinates = rows.coordinates
        if self.layout.dtype == "float16":
            # A scale a row keeps large and small gradients alike within float16's range.
            scales = np.abs(coordinates).max(axis=1)
            scales[scales == 0] = 1
            columns["scales"] = pad(scales, "float32")
            coordinates = coordinates / scales[:, None]
        columns["coordinates"] = pad(coordinates, self.layout.dtype)
        return columns

    def _small_columns(self, where: slice) -> dict[str, np.ndarray]:
        names = ["losses", "outputs", "state", "labels", "indices"]
        if self.layout.dtype == "float16":
            names.append("scales")
        return {name: np.asarray(self._file[name][where]) for name in names}

    def _damaged(self, what: str) -> InfluenceError:
        return InfluenceError(
            f"{self.path} is damaged: the checksum of {what} does not fit",
            "influence gradients --repair computes the damaged blocks again",
        )


def block_sums(rows: np.ndarray) -> np.ndarray:
    """Sum the rows of a block, and their squared norms: float64 [k + 1].

    In float32 within a block: the rows' own rounding is larger than that of adding a few hundred of them.
    """
    flat = rows.reshape(-1)
    return np.append(np.ones(len(rows), dtype=rows.dtype) @ rows, flat @ flat).astype(np.float64)


def _checksum(block: int, columns: Mapping[str, np.ndarray], digest: int) -> int:
    state = xxhash.xxh3_64(f"{block}:{digest}".encode())
    for name in sorted(columns):
        state.update(columns[name].data)
    return state.intdigest()
