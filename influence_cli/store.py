"""The gradient store: one HDF5 file of coordinates, a row a training example, with a flag and a checksum a block.

Everything is laid out and reserved when the file is made (store_file.py). After that nothing but rows, checksums and
flags is written, in place and in that order, so a kill at any instant leaves a file that opens and has lost at most
the block in hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import h5py
import numpy as np
import torch
import xxhash

from influence_cli import disk
from influence_cli.errors import InfluenceError
from influence_cli.locks import unlock
from influence_cli.store_file import Layout, row_columns, side_arrays
from influence_cli.store_open import open_file
from influence_cli.store_rows import checksum, encode, room_for
from influence_cli.store_scan import Reader, in_order, mapped, place_of

READ, SKIPPED = 1, 2

Result = TypeVar("Result")


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
        # One thread writes while another reads the user's data set, in whose folder it is then: for the whole process.
        self._absolute = path.absolute()
        self.layout = Layout(**header["layout"])
        self.fingerprint: dict[str, str] = header["fingerprint"]
        self.facts: dict[str, Any] = header["facts"]
        self._file = file
        self._raw = raw
        self._places = {name: place_of(file[name]) for name in row_columns(self.layout)}

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Store:
        """Open a store and check its header; rows are checked as they are read."""
        return cls(path, *open_file(path, write=write))

    def __enter__(self) -> Store:
        """Give the open store."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file, and give up its lock; what was mapped of it stays."""
        self._file.close()
        unlock(self._raw)
        self._raw.close()

    def names(self, prefix: str = "") -> list[str]:
        """List the side arrays whose names start with ``prefix``, sorted."""
        return [name for name in side_arrays(self._file) if name.startswith(prefix)]

    def array(self, name: str) -> np.ndarray | None:
        """Give a whole side array (``spectrum``, ``basis``), its checksum verified; None where there is none.

        It is the file itself, mapped copy-on-write, and outlives the store.
        """
        data = self._file.get(name)
        if not isinstance(data, h5py.Dataset) or "xxh3" not in data.attrs:
            return None
        place = place_of(data)
        values = mapped(self._raw, place, 0, len(data)) if data.shape else np.asarray(data[()])
        if xxhash.xxh3_64_intdigest(values.data) != int(data.attrs["xxh3"]):
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

    def checksums(self) -> np.ndarray:
        """Give each block's checksum: uint64 [blocks]."""
        return np.asarray(self._file["checksums"][()])

    def write(self, block: int, rows: Rows) -> None:
        """Write a block: its rows, flushed, then its flag, flushed.

        Raises:
            InfluenceError: the disk is full or gone; what is done so far stays.
        """
        where = slice(block * self.layout.block, (block + 1) * self.layout.block)
        columns = self._encode(rows)
        with self._writing(f"block {block}"):
            fixed = {name: np.asarray(self._file[name][where]) for name in ("labels", "indices")}
            total = checksum(block, columns | fixed, rows.digest)
            for name, values in columns.items():
                self._put(name, where.start, values)
            self._put("inputs", block, np.uint64(rows.digest))
            self._put("checksums", block, np.uint64(total))
            disk.flush(self._raw)
            self._put("flags", block, np.uint8(1))
            disk.flush(self._raw)

    def summary(self) -> np.ndarray | None:
        """Read what ``write_summary`` kept: float64 [k + 1]; None where that has not happened since the last write."""
        values = np.asarray(self._file["summary"][()])
        return values if int(self._file["summary_xxh3"][0]) == xxhash.xxh3_64_intdigest(values.data) else None

    def size(self) -> int:
        """Count the bytes of the file."""
        return os.fstat(self._raw.fileno()).st_size

    def readable(self) -> int:
        """Count the examples that could be read."""
        return int((self.column("state") == READ).sum())

    def write_summary(self, values: np.ndarray) -> None:
        """Keep k + 1 numbers about all rows beside them."""
        values = np.ascontiguousarray(values, dtype=np.float64)
        with self._writing("the summary"):
            self._put("summary", 0, values)
            self._put("summary_xxh3", 0, np.uint64(xxhash.xxh3_64_intdigest(values.data)))
            disk.flush(self._raw)

    def write_labels(self, labels: np.ndarray, indices: np.ndarray) -> None:
        """Write labels and positions of all examples again, as they were when the store was made.

        A block's checksum is made of what the file holds of them: damage must not get under a new one.
        """
        with self._writing("the labels"):
            self._put("labels", 0, labels)
            self._put("indices", 0, indices)

    def clear(self, blocks: np.ndarray) -> None:
        """Mark blocks as not done, so that a fill computes them again."""
        with self._writing("the flags"):
            self._put("summary_xxh3", 0, np.uint64(0))
            for block in blocks:
                self._put("flags", int(block), np.uint8(0))
            disk.flush(self._raw)

    def damaged(self, blocks: np.ndarray | None = None) -> np.ndarray:
        """Read some finished blocks (default: all) and list those whose checksum does not fit."""
        reader = self._reader()
        chosen = np.flatnonzero(self.done()) if blocks is None else blocks
        return np.array([block for block in chosen if not reader.fits(int(block))], dtype=np.int64)

    def map(
        self,
        work: Callable[[slice, np.ndarray], Result],
        *,
        threads: int | None = None,
        blocks: Sequence[int] | None = None,
    ) -> Iterator[Result]:
        """Run ``work`` on all coordinates, a piece at a time on several threads, each block's checksum verified first.

        The rows are always cut alike, and inside ``work`` torch has one thread and no autograd: a store gives the same
        results on the same CPU, whatever the number of threads.

        Args:
            work: takes the rows' positions in the store and their coordinates, float32 [b, k], which hold until it
                returns. Several calls run at one time, none in the calling thread.
            threads: how many; None for as many as torch uses.
            blocks: read these alone, each for itself; None for all.

        Yields:
            What ``work`` returns, in order of the rows.

        Raises:
            InfluenceError: a block is missing or damaged.
        """
        self.require_complete()
        reader, own = self._reader(), local()
        threads = threads or torch.get_num_threads()

        def room(count: int) -> np.ndarray:
            if not hasattr(own, "rows"):  # made once a thread
                own.rows = room_for(reader.most_rows(), self.layout.k)
            return np.asarray(own.rows[:count])

        def run(piece: range) -> list[Result]:
            return [work(where, rows) for where, rows in reader.parts(piece, room)]

        pieces = reader.pieces(threads) if blocks is None else (range(block, block + 1) for block in blocks)
        for results in in_order(run, pieces, threads):
            yield from results

    def scan(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Read all coordinates once, in order, several blocks at a time, each block's checksum verified first.

        Yields:
            The rows' positions in the store, and their coordinates, float32 [b, k]: of a float32 store the file
            itself, mapped copy-on-write.

        Raises:
            InfluenceError: a block is missing or damaged.
        """
        self.require_complete()
        reader = self._reader()
        for piece in reader.pieces():
            yield from reader.parts(piece, lambda count: room_for(count, self.layout.k), whole=True)

    def require_complete(self) -> None:
        """Refuse to give numbers of a store that has not all its blocks.

        Raises:
            InfluenceError: a block is missing.
        """
        if not self.done().all():
            raise InfluenceError(f"{self.path} is not complete", "influence gradients finishes it")

    def _reader(self) -> Reader:
        return Reader(self.path, self._raw, self.layout, self._places, self.digests(), self.checksums())

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Turn what a disk says into a message, and write only while the file is where others will look for it."""
        try:
            if not os.path.samestat(self._absolute.stat(), os.fstat(self._raw.fileno())):
                raise FileNotFoundError
            yield
        except FileNotFoundError as error:
            raise InfluenceError(
                f"{self.path} has gone while {what} was to be written: moved, removed, or its disk was unmounted",
                "the finished blocks are in it, wherever it is: put it back and run the same command again",
            ) from error
        except OSError as error:
            raise InfluenceError(
                f"writing {what} of {self.path} failed: {disk.failure(error, self._absolute, self.size())}",
                "the finished blocks are kept; make room and run the same command again",
            ) from error

    def _put(self, name: str, row: int, values: np.ndarray | np.generic) -> None:
        """Write values at their place in the file, past HDF5: it loses the error of a write that it has put off."""
        place = place_of(self._file[name])
        disk.write_at(self._raw, place.start + row * place.row_bytes, np.asarray(values, dtype=place.dtype))

    def _encode(self, rows: Rows) -> dict[str, np.ndarray]:
        padding = self.layout.block - len(rows.coordinates)

        def pad(values: np.ndarray, name: str) -> np.ndarray:
            values = values.astype(self._places[name].dtype, copy=False)
            if padding:  # only the last block: a copy of every block would cost as much as its checksum
                values = np.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
            return np.ascontiguousarray(values)

        columns = {"losses": rows.losses, "outputs": rows.outputs, "state": rows.state}
        if self.layout.k:
            columns |= encode(rows.coordinates, self.layout.dtype)
        return {name: pad(values, name) for name, values in columns.items()}


def block_sums(rows: np.ndarray) -> np.ndarray:
    """Sum the rows of a block, and their squared norms: float64 [k + 1].

    In float32 within a block: the rows' own rounding is larger than that of adding a few hundred of them.
    """
    flat = rows.reshape(-1)
    return np.append(np.ones(len(rows), dtype=rows.dtype) @ rows, flat @ flat).astype(np.float64)
