"""The gradient store: an HDF5 file with one row of coordinates per training example, a flag and checksum per block.

Everything is laid out and reserved when the file is made (store/layout.py). After that only rows, checksums and flags
are written, in place and in that order, so a kill at any instant leaves a file that opens and has lost at most the
current block. The rows may be in several such files (store/shards.py); they are read as one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any, TypeVar

import h5py
import numpy as np
import torch
import xxhash

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk
from influence_cli.store.encoding import checksum, encode, room_for
from influence_cli.store.header import open_file, settled_line
from influence_cli.store.layout import Layout, data_sets, side_arrays
from influence_cli.store.part import Part
from influence_cli.store.scan import Reader, damaged_block, in_order, mapped, most_rows, pieces, place_of
from influence_cli.store.shards import open_shards

READ, SKIPPED = 1, 2
# Columns that are written when the file is made.
FIXED_COLUMNS = ("labels", "indices")
# Rows of outputs read at once: with a thousand classes all of them would fill the memory.
OUTPUT_ROWS = 2**16

Result = TypeVar("Result")


@dataclass(frozen=True)
class Rows:
    """One block to be written to the store, not padded.

    Attributes:
        coordinates: float32 [b, k].
        losses: float32 [b].
        outputs: float32 [b, C].
        state: uint8 [b], READ or SKIPPED.
        digest: xxh3 of the model's inputs.
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

    def __init__(self, header: Mapping[str, Any], main: Part, parts: list[Part]) -> None:
        self.path = main.path
        self.layout = main.layout
        self.fingerprint: dict[str, str] = header["fingerprint"]
        self.facts: dict[str, Any] = header["facts"]
        # Parts of the fingerprint that have changed since, and were found to change no number.
        self.settled: dict[str, str] = header.get("settled", {})
        self._end: int = header.get("end", 0)
        # The files of rows other than the main file, and the blocks of each.
        self.shards = [(part.path, part.blocks) for part in parts if part is not main]
        self._main = main
        self._parts = parts

    @classmethod
    def open(cls, path: Path, *, write: bool = False, rows: bool = True) -> Store:
        """Open a store and check its header; rows are checked as they are read.

        Args:
            path: the file; the main one of a store in several files.
            write: open for writing, exclusively.
            rows: also open the shards; without them the store still has its curvature.
        """
        raw, file, header = open_file(path, write=write)
        main = Part(path, path.absolute(), raw, file, 0, Layout(**header["layout"]))
        if "shards" not in header:
            return cls(header, main, [main])
        try:
            return cls(header, main, open_shards(path, header, write=write) if rows else [])
        except BaseException:
            main.close()
            raise

    def __enter__(self) -> Store:
        """Give the open store."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close every file and release its lock; mapped parts stay valid."""
        for part in {id(part): part for part in (*self._parts, self._main)}.values():
            part.close()

    def names(self, prefix: str = "") -> list[str]:
        """List the side arrays whose names start with ``prefix``, sorted."""
        return [name for name in side_arrays(data_sets(self._main.file)) if name.startswith(prefix)]

    def array(self, name: str) -> np.ndarray | None:
        """Give a whole side array (``spectrum``, ``basis``) after verifying its checksum; None if there is none.

        It is the file itself, mapped copy-on-write, and outlives the store.
        """
        data = self._main.file.get(name)
        if not isinstance(data, h5py.Dataset) or "xxh3" not in data.attrs:
            return None
        place = place_of(data)
        values = mapped(self._main.raw, place, 0, len(data)) if data.shape else np.asarray(data[()])
        if xxhash.xxh3_64_intdigest(values.data) != int(data.attrs["xxh3"]):
            raise InfluenceError(
                f"{self.path} is damaged: the checksum of its {name} does not match",
                "it belongs to no block, so it cannot be repaired; influence gradients --overwrite rebuilds the store",
            )
        return values

    def column(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read ``losses``, ``outputs``, ``labels``, ``indices`` or ``state`` of all examples, or of a range of rows."""
        start, stop, _ = rows.indices(self.layout.n)
        columns: list[np.ndarray] = []
        for part in self._parts:
            first = part.first * self.layout.block
            wanted = range(part.layout.n)[max(0, start - first) : max(0, stop - first)]
            if wanted or not columns:
                columns.append(part.column(name, slice(wanted.start, wanted.stop)))
        return _joined(columns)

    def done(self) -> np.ndarray:
        """Say which blocks are complete: bool [blocks]."""
        return np.asarray(self._of_blocks("flags") == 1)

    def digests(self) -> np.ndarray:
        """Give each block's hash of the model's inputs: uint64 [blocks]."""
        return self._of_blocks("inputs")

    def checksums(self) -> np.ndarray:
        """Give each block's checksum: uint64 [blocks]."""
        return self._of_blocks("checksums")

    def write(self, block: int, rows: Rows) -> None:
        """Write a block: its rows, flushed, then its flag, flushed.

        Raises:
            InfluenceError: the disk is full or gone; finished blocks stay.
        """
        part = self._part(block)
        self._write(part, block - part.first, self._encode(part, rows), rows.digest)

    def copy(self, block: int, source: Store) -> None:
        """Copy a block of another store with the same rows, unchanged, after verifying its checksum.

        Raises:
            InfluenceError: it is damaged there; the disk is full or gone.
        """
        reader = source._part(block).reader()
        if not reader.fits(block):
            raise damaged_block(reader.path, block)
        columns = {name: values for name, values in reader.columns(block).items() if name not in FIXED_COLUMNS}
        self._write(self._part(block), block, columns, reader.digest(block))

    def summary(self) -> np.ndarray | None:
        """Read what ``write_summary`` kept: float64 [k + 1]; None if it has not been called since the last write."""
        file = self._main.file
        values = np.asarray(file["summary"][()])
        return values if int(file["summary_xxh3"][0]) == xxhash.xxh3_64_intdigest(values.data) else None

    def size(self) -> int:
        """Count the bytes of all files."""
        return sum(os.fstat(part.raw.fileno()).st_size for part in {self._main, *self._parts})

    def readable(self) -> int:
        """Count the examples that could be read."""
        return int((self.column("state") == READ).sum())

    def write_summary(self, values: np.ndarray) -> None:
        """Keep k + 1 summary numbers of all rows in the store."""
        values = np.ascontiguousarray(values, dtype=np.float64)
        with self._main.writing("the summary"):
            self._main.put("summary", 0, values)
            self._main.put("summary_xxh3", 0, np.uint64(xxhash.xxh3_64_intdigest(values.data)))
            disk.flush(self._main.raw)

    def settle(self, parts: Mapping[str, str]) -> None:
        """Keep parts of the fingerprint that differ from those in the header, but change no number.

        They lie behind the sealed file. A kill leaves a line without a valid checksum, which counts as none.
        """
        with self._main.writing("the hash of the code"):
            disk.write_at(self._main.raw, self._end, np.frombuffer(settled_line(parts), dtype=np.uint8))
            disk.flush(self._main.raw)

    def some_rows(self, rows: Sequence[int]) -> np.ndarray:
        """Read the coordinates of a few rows, after verifying their blocks: float32 [len(rows), k].

        Raises:
            InfluenceError: a block is damaged.
        """
        values = np.empty((len(rows), self.layout.k), dtype=np.float32)
        for place, row in enumerate(rows):
            block = int(row) // self.layout.block
            piece = range(block, block + 1)
            for where, part in self._part(block).reader().parts(piece, lambda count: room_for(count, self.layout.k)):
                if where.start <= row < where.stop:
                    values[place] = part[row - where.start]
        return values

    def write_labels(self, labels: np.ndarray, indices: np.ndarray) -> None:
        """Write labels and positions of all examples again, as they were when the store was made.

        A block's checksum covers them, so a new checksum must not cover damaged values.
        """
        for part in self._parts:
            rows = self.layout.span(part.blocks)
            with part.writing("the labels"):
                part.put("labels", 0, labels[rows])
                part.put("indices", 0, indices[rows])

    def clear(self, blocks: np.ndarray) -> None:
        """Mark blocks as not done, so that a fill computes them again."""
        with self._main.writing("the flags"):
            self._main.put("summary_xxh3", 0, np.uint64(0))
            disk.flush(self._main.raw)
        for part in self._parts:
            with part.writing("the flags"):
                for block in sorted(set(part.blocks).intersection(blocks.tolist())):
                    part.put("flags", block - part.first, np.uint8(0))
                disk.flush(part.raw)

    def damaged(self, blocks: np.ndarray | None = None) -> np.ndarray:
        """Read some finished blocks (default: all) and list those whose checksum does not match."""
        chosen = np.flatnonzero(self.done()) if blocks is None else blocks
        bad: list[int] = []
        for part in self._parts:
            held = sorted(set(part.blocks).intersection(chosen.tolist()))
            reader = part.reader() if held else None
            bad += [block for block in held if reader is not None and not reader.fits(block)]
        return np.array(bad, dtype=np.int64)

    def map(
        self,
        work: Callable[[slice, np.ndarray], Result],
        *,
        threads: int | None = None,
        blocks: Sequence[int] | None = None,
    ) -> Iterator[Result]:
        """Run ``work`` on all coordinates, piece by piece on several threads, after verifying each block's checksum.

        The rows are always cut in the same way, and inside ``work`` torch has one thread and no autograd. So a store
        gives the same results on the same CPU for any number of threads.

        Args:
            work: takes the rows' positions in the store and their coordinates, float32 [b, k], which hold until it
                returns. Several calls run at once, none in the calling thread.
            threads: how many; None for as many as torch uses.
            blocks: which ones: a range, or some separate blocks, each read by itself; None for all.

        Yields:
            What ``work`` returns, in order of the rows.

        Raises:
            InfluenceError: a block is missing or damaged.
        """
        self.require_complete()
        per_thread, threads = local(), threads or torch.get_num_threads()

        def room(count: int) -> np.ndarray:
            if not hasattr(per_thread, "rows"):  # made once per thread
                per_thread.rows = room_for(most_rows(self.layout), self.layout.k)
            return np.asarray(per_thread.rows[:count])

        def run(piece: tuple[Reader, range]) -> list[Result]:
            reader, blocks = piece
            return [work(where, rows) for where, rows in reader.parts(blocks, room)]

        for results in in_order(run, self._pieces(blocks, threads), threads):
            yield from results

    def scan(self, blocks: range | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Read coordinates once, in order, several blocks at a time, after verifying each block's checksum.

        Args:
            blocks: which; None for all.

        Yields:
            The rows' positions in the store, and their coordinates, float32 [b, k]: of a float32 store the file
            itself, mapped copy-on-write.

        Raises:
            InfluenceError: a block is missing or damaged.
        """
        self.require_complete()
        for reader, piece in self._pieces(blocks):
            yield from reader.parts(piece, lambda count: room_for(count, self.layout.k), whole=True)

    def require_complete(self) -> None:
        """Refuse a store that does not have all its blocks.

        Raises:
            InfluenceError: a block is missing.
        """
        if not self.done().all():
            raise InfluenceError(f"{self.path} is not complete", "influence gradients finishes it")

    def _pieces(self, blocks: Sequence[int] | None, threads: int | None = None) -> Iterator[tuple[Reader, range]]:
        wanted = range(self.layout.blocks) if blocks is None else blocks
        if isinstance(wanted, range):
            readers = [part.reader() for part in self._parts if part.blocks.start < wanted.stop > wanted.start]
            return pieces(readers, self.layout, wanted, threads)
        owners = {block: self._part(block) for block in wanted}
        opened = {part.path: part.reader() for part in owners.values()}
        return iter([(opened[owners[block].path], range(block, block + 1)) for block in wanted])

    def _part(self, block: int) -> Part:
        return next(part for part in self._parts if block in part.blocks)

    def _of_blocks(self, name: str) -> np.ndarray:
        return _joined([part.column(name, slice(part.layout.blocks)) for part in self._parts])

    def _write(self, part: Part, block: int, columns: Mapping[str, np.ndarray], digest: int) -> None:
        """Write a block of a file: its rows, flushed, then its flag, flushed."""
        where = slice(block * self.layout.block, (block + 1) * self.layout.block)
        with part.writing(f"block {block}"):
            fixed = {name: np.asarray(part.file[name][where]) for name in FIXED_COLUMNS}
            total = checksum(block, {**columns, **fixed}, digest)
            for name, values in columns.items():
                part.put(name, where.start, values)
            part.put("inputs", block, np.uint64(digest))
            part.put("checksums", block, np.uint64(total))
            disk.flush(part.raw)
            part.put("flags", block, np.uint8(1))
            disk.flush(part.raw)

    def _encode(self, part: Part, rows: Rows) -> dict[str, np.ndarray]:
        padding = self.layout.block - len(rows.coordinates)

        def pad(values: np.ndarray, name: str) -> np.ndarray:
            values = values.astype(part.places[name].dtype, copy=False)
            if padding:  # only for the last block: copying every block would cost as much as its checksum
                values = np.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
            return np.ascontiguousarray(values)

        columns = {"losses": rows.losses, "outputs": rows.outputs, "state": rows.state}
        if self.layout.k:
            columns |= encode(rows.coordinates, self.layout.dtype)
        return {name: pad(values, name) for name, values in columns.items()}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def predicted_classes(stores: Sequence[Store]) -> np.ndarray:
    """Give the class of largest mean probability per example, int64 [n]; outputs are read in parts.

    Args:
        stores: of the same examples, one per checkpoint.
    """
    classes = np.empty(stores[0].layout.n, dtype=np.int64)
    for start in range(0, len(classes), OUTPUT_ROWS):
        rows = slice(start, start + OUTPUT_ROWS)
        soft = [torch.from_numpy(store.column("outputs", rows)).softmax(dim=1) for store in stores]
        classes[rows] = torch.stack(soft).mean(dim=0).argmax(dim=1).numpy()
    return classes


def block_sums(rows: np.ndarray) -> np.ndarray:
    """Sum the rows of a block, and their squared norms: float64 [k + 1].

    In float32 within a block: the rounding of the rows is larger than that of adding a few hundred of them.
    """
    flat = rows.reshape(-1)
    return np.append(np.ones(len(rows), dtype=rows.dtype) @ rows, flat @ flat).astype(np.float64)
