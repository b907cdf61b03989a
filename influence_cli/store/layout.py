"""A store on disk: its data sets, and how the file is made.

An HDF5 file that any HDF5 tool can read, made under another name and renamed when complete:

    coordinates  [padded n, k]  float32, or float16 or int8 with ``scales`` [padded n]; not there if k = 0
    losses [padded n], outputs [padded n, C], labels [padded n], indices [padded n]
    state        [padded n]     1 read, 2 skipped as unreadable, 0 padding
    flags, checksums, inputs  [blocks]   done; xxh3 of all the above; xxh3 of what went into the model
    spectrum [k], basis [p, k]  where the curvature has them, and any other side array
    summary [k + 1]  mean row and mean squared norm, once complete
    header       JSON: layout, fingerprint, facts

No data set ever moves or changes its type, so the HDF5 metadata stays the same. Its checksum is in the seal, in front
of the HDF5 file (its user block), and is verified before HDF5 reads a byte: a flipped bit there would otherwise give
wrong numbers or a crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk
from influence_cli.runtime.locks import lock

FORMAT = "influence-store"
VERSION = 1
# Room for the seal: for a store with some hundred data sets, and the most.
SEAL_BYTES, LARGEST_SEAL = 4096, 2**24
# Large coordinates start at a page of 2 MB, so that they can be mapped in such pages.
MANY_BYTES, HUGE_PAGE = 32 * 2**20, 2 * 2**20
# Most bytes of HDF5 itself, per store and per side array: names, places, the space up to the next array.
FIRST_BYTES, OWN_BYTES = 2**15, 1024
ANEW = "influence gradients --overwrite rebuilds it"
# What a store has in addition to the columns of its rows.
PER_BLOCK = {"flags": "uint8", "checksums": "uint64", "inputs": "uint64"}
FIXED = ("header", *PER_BLOCK, "summary", "summary_xxh3")


@dataclass(frozen=True)
class Layout:
    """The shape of a store.

    Attributes:
        n: training examples.
        k: numbers per row; 0 for a store without coordinates.
        classes: C, outputs of the model.
        block: rows a block.
        dtype: ``float32``, or ``float16`` or ``int8`` (rows then carry a scale each).
    """

    n: int
    k: int
    classes: int
    block: int
    dtype: str = "float32"

    @property
    def blocks(self) -> int:
        """Count the blocks, the last one padded."""
        return -(-self.n // self.block)

    @property
    def padded(self) -> int:
        """Count the rows, padding included."""
        return self.blocks * self.block

    def rows(self, block: int) -> slice:
        """Give a block's rows, without padding."""
        return self.span(range(block, block + 1))

    def span(self, blocks: range) -> slice:
        """Give the rows of blocks one after another, without padding."""
        return slice(blocks.start * self.block, min(self.n, blocks.stop * self.block))

    def bytes(self) -> int:
        """Count the bytes of all rows (basis and spectrum come on top)."""
        return self.padded * (self.k * np.dtype(self.dtype).itemsize + 4 * self.classes + 4 + 8 + 8 + 1 + 4)


def row_columns(layout: Layout) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name what is stored per row, with its shape and type."""
    columns: dict[str, tuple[tuple[int, ...], str]] = {
        "labels": ((), "int64"),
        "indices": ((), "int64"),
        "losses": ((), "float32"),
        "state": ((), "uint8"),
        "outputs": ((layout.classes,), "float32"),
    }
    if layout.k and layout.dtype != "float32":
        columns["scales"] = ((), "float32")
    if layout.k:
        columns["coordinates"] = ((layout.k,), layout.dtype)
    return columns


def side_arrays(data: Mapping[str, h5py.Dataset]) -> list[str]:
    """List the side arrays among the data sets of a file by name."""
    return sorted(name for name, one in data.items() if name != "header" and h5py.h5a.exists(one.id, b"xxh3"))


def create(
    path: Path,
    layout: Layout,
    *,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
    labels: np.ndarray,
    indices: np.ndarray,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Make a store with every byte reserved and no block done, replacing what was at ``path``.

    Args:
        path: the file; it appears only when complete.
        layout: the shape.
        fingerprint: what the store belongs to, part by part.
        facts: anything else that later commands need to know, JSON-able.
        labels: int64 [n].
        indices: int64 [n], positions in the data set.
        arrays: side arrays by name, such as ``spectrum`` and ``basis``; a ``/`` in a name makes groups.

    Raises:
        ValueError: a side array has a reserved name.
        InfluenceError: the folder is missing or not writable, or the disk is too small.
    """
    reserved = {*FIXED, *row_columns(layout), "scales", "coordinates"}
    taken = [name for name in arrays if name.split("/")[0] in reserved]
    if taken:
        raise ValueError(f"side arrays cannot be called {', '.join(taken)}")
    header = {"layout": asdict(layout), "fingerprint": dict(fingerprint), "facts": dict(facts)}
    need = layout.bytes() + side_bytes(arrays)
    make_whole(path, need, lambda part: _lay_out(part, layout, encoded(header), labels, indices, arrays))


def encoded(header: Mapping[str, Any]) -> bytes:
    """Write a header as it lies in the file."""
    return json.dumps(header, sort_keys=True).encode()


def side_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Bound the bytes of side arrays and of HDF5 itself."""
    return sum(values.nbytes + OWN_BYTES for values in arrays.values()) + FIRST_BYTES


def make_whole(path: Path, need: int, lay_out: Callable[[Path], None]) -> None:
    """Make a store's file under another name, seal it, and put it in its place, replacing what was there.

    Args:
        path: the file; it appears only when complete.
        need: the most bytes that it takes.
        lay_out: writes the HDF5 file to the path that it is given, its user block left free.

    Raises:
        InfluenceError: the folder is missing or not writable, or the disk is too small.
    """
    disk.check_space(path, need)
    part = disk.part_of(path)
    try:
        with part.open("a+b") as raw:
            lock(raw, path, alone=True)
            # HDF5 prints a traceback for every failed write on a full disk, so it starts only if there is room.
            disk.reserve(raw, need)
            lay_out(part)
            with part.open("r+b", buffering=0) as whole:
                disk.reserve(whole, part.stat().st_size)
                _seal(whole, part)
                disk.flush(whole)
            _replace(part, path)
    except InfluenceError:
        raise
    except OSError as error:
        disk.remove(part)
        raise InfluenceError(
            f"{path} cannot be created: {disk.failure(error, part, need)}",
            "free disk space, or set gradients.store to another place; finished work is kept",
        ) from error
    except BaseException:
        disk.remove(part)
        raise


def _replace(part: Path, path: Path) -> None:
    """Replace a store with a complete file, unless another process has the store open."""
    if path.exists():
        with path.open("rb") as old:
            try:
                lock(old, path, alone=True)
            except InfluenceError:
                disk.remove(part)
                raise
    disk.replace(part, path)


def _lay_out(
    path: Path,
    layout: Layout,
    header: bytes,
    labels: np.ndarray,
    indices: np.ndarray,
    arrays: Mapping[str, np.ndarray],
) -> None:
    columns = row_columns(layout)
    size = layout.padded * layout.k * np.dtype(layout.dtype).itemsize
    # HDF5 counts bytes from the end of the user block, so that must end at a large page for data sets to start at one.
    align, room = (HUGE_PAGE, HUGE_PAGE) if size >= MANY_BYTES else (64, SEAL_BYTES)
    room = max(room, seal_size(len(FIXED) + len(columns) + len(arrays)))
    with h5py.File(path, "w", userblock_size=room, alignment_threshold=1, alignment_interval=64, locking=False) as file:
        for name, dtype in PER_BLOCK.items():
            _reserve(file, name, (layout.blocks,), dtype, zero=True)
        lay_out_rest(file, layout, header, arrays)
        for name, (shape, dtype) in columns.items():
            if name != "coordinates":
                _reserve(file, name, (layout.padded, *shape), dtype, zero=name in ("labels", "indices", "state"))
        file["labels"][: layout.n] = labels
        file["indices"][: layout.n] = indices
    if layout.k:
        with h5py.File(
            path, "r+", alignment_threshold=min(size, MANY_BYTES), alignment_interval=align, locking=False
        ) as file:
            _reserve(file, "coordinates", (layout.padded, layout.k), layout.dtype)


def lay_out_rest(file: h5py.File, layout: Layout, header: bytes, arrays: Mapping[str, np.ndarray]) -> None:
    """Lay out everything except rows and blocks: the header, the side arrays, room for the summary."""
    _add(file, "header", np.frombuffer(header, dtype=np.uint8))
    file.attrs["format"] = FORMAT
    file.attrs["version"] = VERSION
    _reserve(file, "summary", (layout.k + 1,), "float64", zero=True)
    _reserve(file, "summary_xxh3", (1,), "uint64", zero=True)
    for name, values in sorted(arrays.items()):  # the same file for any order of the arrays
        _add(file, name, np.asarray(values, order="C"))


def data_sets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Give the data sets of all groups by name.

    A command opens a store many times, and these functions of h5py take half the time of visititems.
    """
    names: list[bytes] = []
    h5py.h5o.visit(file.id, names.append)
    opened = {name.decode(): h5py.h5o.open(file.id, name) for name in names}
    return {name: h5py.Dataset(item) for name, item in opened.items() if isinstance(item, h5py.h5d.DatasetID)}


def _add(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Add a data set that never changes, with its checksum."""
    dataset = file.create_dataset(name, data=values)
    dataset.attrs["xxh3"] = np.uint64(xxhash.xxh3_64_intdigest(values.data))


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, *, zero: bool = False) -> None:
    """Add a contiguous data set whose place in the file is fixed now; large ones are not filled with zeros first."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if zero else h5py.h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plist)


def seal_size(count: int) -> int:
    """Bound the seal of a file by its number of data sets: a power of two, as HDF5 requires."""
    return int(2 ** (256 + 32 * (count + 1)).bit_length())


def _seal(raw: BinaryIO, path: Path) -> None:
    """Write the checksum of everything that is neither rows nor side arrays in front of the HDF5 file."""
    with h5py.File(path, "r", locking=False) as file:
        room = at = file.userblock_size
        data = [data.id for data in data_sets(file).values() if not data.is_virtual]
        extents = sorted((item.get_offset(), item.get_storage_size()) for item in data if item.get_storage_size())
    ranges = []
    for start, size in [*extents, (path.stat().st_size, 0)]:
        if start > at:
            ranges.append((at, start))
        at = start + size
    body = json.dumps({"bytes": path.stat().st_size, "metadata": ranges, "xxh3": digest(path, ranges)})
    text = f"{FORMAT} {VERSION}\n{body}\n{xxhash.xxh3_64_hexdigest(body.encode())}\n".encode()
    if len(text) > room:
        raise ValueError(f"the seal has {len(text)} bytes, its room {room}")
    disk.write_at(raw, 0, np.frombuffer(text.ljust(room, b"\0"), dtype=np.uint8))


def digest(path: Path, ranges: Sequence[Sequence[int]]) -> str:
    """Hash some parts of a file (xxh3)."""
    state = xxhash.xxh3_64()
    with path.open("rb") as raw:
        for start, stop in ranges:
            raw.seek(start)
            state.update(raw.read(stop - start))
    return state.hexdigest()
