"""The gradient store: one HDF5 file of coordinates, a row a training example, with a flag and a checksum a block.

Everything is laid out and reserved when the file is made, under another name, and renamed when complete. After that
nothing but rows, checksums and flags is written, in place and in that order, so a kill at any instant leaves a file
that opens and has lost at most the block in hand. Any HDF5 tool can read it.

    coordinates  [padded n, k]  float32, or float16 with ``scales`` [padded n]
    losses [padded n], outputs [padded n, C], labels [padded n], indices [padded n]
    state        [padded n]     1 read, 2 skipped as unreadable, 0 padding
    flags, checksums, inputs  [blocks]   done; xxh3 of all the above; xxh3 of what went into the model
    spectrum [k], basis [p, k]  where the curvature has them
    summary [k + 1]  mean row and mean squared norm, once complete
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import xxhash

from influence_cli.errors import InfluenceError

FORMAT = "influence-store"
VERSION = 1
READ, SKIPPED = 1, 2
# What a scan reads at one time: blocks are grouped up to this, for long matrix products.
SCAN_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Layout:
    """The shape of a store.

    Attributes:
        n: training examples.
        k: numbers a row.
        classes: C, outputs of the model.
        block: rows a block.
        dtype: ``float32`` or ``float16`` (rows then carry a scale each).
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
        return slice(block * self.block, min(self.n, (block + 1) * self.block))

    def bytes(self) -> int:
        """Count the bytes of all rows (basis and spectrum come on top)."""
        return self.padded * (self.k * np.dtype(self.dtype).itemsize + 4 * self.classes + 4 + 8 + 8 + 1 + 4)


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

    def __init__(self, path: Path, file: h5py.File, header: Mapping[str, Any]) -> None:
        self.path = path
        self.layout = Layout(**header["layout"])
        self.fingerprint: dict[str, str] = header["fingerprint"]
        self.facts: dict[str, Any] = header["facts"]
        self._file = file

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Store:
        """Open a store and check its header; rows are checked as they are read."""
        try:
            file = h5py.File(path, "r+" if write else "r")
        except FileNotFoundError as error:
            raise InfluenceError(f"there is no store {path}", "influence gradients makes it") from error
        except BlockingIOError as error:
            raise InfluenceError(
                f"{path} is in use by another process", "wait until that command has finished"
            ) from error
        except OSError as error:
            raise InfluenceError(
                f"{path} is not a readable HDF5 file, or it is cut short",
                "influence gradients --overwrite makes it anew",
            ) from error
        try:
            return cls(path, file, _read_header(file, path))
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Store:
        """Give the open store."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self._file.close()

    def array(self, name: str) -> np.ndarray | None:
        """Read a whole side array (``spectrum``, ``basis``), its checksum verified; None where there is none."""
        if name not in self._file:
            return None
        values = np.asarray(self._file[name][()])
        if xxhash.xxh3_64_intdigest(np.ascontiguousarray(values).data) != int(self._file[name].attrs["xxh3"]):
            raise self._damaged(f"its {name}")
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
                self._file[name][where] = values
            self._file["inputs"][block] = np.uint64(rows.digest)
            self._file["checksums"][block] = np.uint64(_checksum(block, columns | fixed, rows.digest))
            self._file.flush()
            self._file["flags"][block] = 1
            self._file.flush()
        except OSError as error:
            raise InfluenceError(
                f"writing block {block} of {self.path} failed: {error}",
                "the blocks before it are kept; make room and run the same command again",
            ) from error

    def summary(self) -> np.ndarray | None:
        """Read what ``write_summary`` kept: float64 [k + 1]; None where that has not happened since the last write."""
        values = np.asarray(self._file["summary"][()])
        return values if int(self._file["summary_xxh3"][0]) == xxhash.xxh3_64_intdigest(values.data) else None

    def write_summary(self, values: np.ndarray) -> None:
        """Keep k + 1 numbers about all rows beside them."""
        self._file["summary"][...] = values
        self._file["summary_xxh3"][0] = np.uint64(xxhash.xxh3_64_intdigest(np.ascontiguousarray(values).data))
        self._file.flush()

    def clear(self, blocks: np.ndarray) -> None:
        """Mark blocks as not done, so that a fill computes them again."""
        flags = self._file["flags"][()]
        flags[blocks] = 0
        self._file["summary_xxh3"][0] = 0
        self._file["flags"][...] = flags
        self._file.flush()

    def damaged(self) -> np.ndarray:
        """Read every finished block and list those whose checksum does not fit."""
        digests, checksums = self.digests(), self._file["checksums"][()]
        found = []
        for block in np.flatnonzero(self.done()):
            where = slice(block * self.layout.block, (block + 1) * self.layout.block)
            columns = self._small_columns(where) | {"coordinates": np.asarray(self._file["coordinates"][where])}
            if _checksum(int(block), columns, int(digests[block])) != int(checksums[block]):
                found.append(block)
        return np.array(found, dtype=np.int64)

    def scan(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Read all coordinates once, in order, several blocks at a time, verifying each block's checksum.

        Yields:
            The rows' positions in the store, and their coordinates, float32 [b, k]. The array is reused: copy to keep.

        Raises:
            InfluenceError: a block is missing or damaged.
        """
        if not self.done().all():
            raise InfluenceError(f"{self.path} is not complete", "influence gradients finishes it")
        layout, coordinates = self.layout, self._file["coordinates"]
        digests, checksums = self.digests(), self._file["checksums"][()]
        size = layout.block
        group = max(1, SCAN_BYTES // max(1, layout.k * coordinates.dtype.itemsize * size))
        buffer = np.empty((group * size, layout.k), dtype=coordinates.dtype)
        # Read past HDF5, at the data's place in the file: no copy through its buffers. The layout is contiguous.
        with self.path.open("rb", buffering=0) as raw:
            raw.seek(coordinates.id.get_offset())
            for first in range(0, layout.blocks, group):
                last = min(layout.blocks, first + group)
                part = buffer[: (last - first) * size]
                if _read_into(raw, part) != part.nbytes:
                    raise self._damaged(f"its end, from block {first} on")
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

    def _encode(self, rows: Rows) -> dict[str, np.ndarray]:
        padding = self.layout.block - len(rows.coordinates)

        def pad(values: np.ndarray, dtype: str) -> np.ndarray:
            full = np.pad(values.astype(dtype), [(0, padding)] + [(0, 0)] * (values.ndim - 1))
            return np.ascontiguousarray(full)

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
        arrays: side arrays, such as ``spectrum`` and ``basis``.

    Raises:
        InfluenceError: the folder is missing or not writable, or the disk is too small.
    """
    need = layout.bytes() + sum(values.nbytes for values in arrays.values())
    check_space(path, need)
    part = path.with_name(path.name + ".part")
    try:
        with h5py.File(part, "w") as file:
            _lay_out(file, layout, fingerprint, facts, labels, indices, arrays)
        with part.open("r+b") as raw:
            # Reserve the blocks on disk now: a full disk is found here, not after an hour.
            with contextlib.suppress(AttributeError):
                os.posix_fallocate(raw.fileno(), 0, os.fstat(raw.fileno()).st_size)
            os.fsync(raw.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InfluenceError(
            f"{path} cannot be made: {error}", f"it needs {human_bytes(need)}; set gradients.store to another place"
        ) from error


def _checksum(block: int, columns: Mapping[str, np.ndarray], digest: int) -> int:
    state = xxhash.xxh3_64(f"{block}:{digest}".encode())
    for name in sorted(columns):
        state.update(columns[name].data)
    return state.intdigest()


def _read_into(raw: Any, part: np.ndarray) -> int:
    """Fill an array from a file; a single read call moves at most 2 GB."""
    view, filled = memoryview(part.data).cast("B"), 0
    while filled < len(view):
        count = raw.readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled


def check_space(path: Path, need: int) -> None:
    """Refuse a store that the disk cannot hold, before anything is written."""
    if not path.parent.is_dir():
        raise InfluenceError(f"{path}: there is no folder {path.parent}", "make it, or set gradients.store")
    import shutil

    free = shutil.disk_usage(path.parent).free
    if path.exists():
        free += path.stat().st_size
    if need > free:
        raise InfluenceError(
            f"{path} needs {human_bytes(need)}, the disk has {human_bytes(free)} free",
            "track fewer layers (gradients.layers), use store_dtype: float16, or set gradients.store to another disk",
        )


def human_bytes(count: float) -> str:
    """Write a number of bytes for people: ``1.9 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _lay_out(
    file: h5py.File,
    layout: Layout,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
    labels: np.ndarray,
    indices: np.ndarray,
    arrays: Mapping[str, np.ndarray],
) -> None:
    header = json.dumps(
        {"layout": asdict(layout), "fingerprint": dict(fingerprint), "facts": dict(facts)}, sort_keys=True
    )
    file.attrs["format"] = FORMAT
    file.attrs["version"] = VERSION
    file.create_dataset("header", data=np.frombuffer(header.encode(), dtype=np.uint8))
    file.attrs["header_xxh3"] = np.uint64(xxhash.xxh3_64_intdigest(header.encode()))
    _reserve(file, "flags", (layout.blocks,), "uint8", zero=True)
    _reserve(file, "checksums", (layout.blocks,), "uint64", zero=True)
    _reserve(file, "inputs", (layout.blocks,), "uint64", zero=True)
    for name, values in (("labels", labels), ("indices", indices)):
        _reserve(file, name, (layout.padded,), "int64", zero=True)
        file[name][: layout.n] = values
    _reserve(file, "summary", (layout.k + 1,), "float64", zero=True)
    _reserve(file, "summary_xxh3", (1,), "uint64", zero=True)
    _reserve(file, "losses", (layout.padded,), "float32")
    _reserve(file, "state", (layout.padded,), "uint8", zero=True)
    _reserve(file, "outputs", (layout.padded, layout.classes), "float32")
    if layout.dtype == "float16":
        _reserve(file, "scales", (layout.padded,), "float32")
    for name, values in arrays.items():
        values = np.ascontiguousarray(values)
        dataset = file.create_dataset(name, data=values)
        dataset.attrs["xxh3"] = np.uint64(xxhash.xxh3_64_intdigest(values.data))
    _reserve(file, "coordinates", (layout.padded, layout.k), layout.dtype)


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, *, zero: bool = False) -> None:
    """Add a contiguous data set whose place in the file is fixed now; large ones are not filled with zeros first."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if zero else h5py.h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plist)


def _read_header(file: h5py.File, path: Path) -> dict[str, Any]:
    again = "influence gradients --overwrite makes it anew"
    try:
        kind, version = file.attrs.get("format"), int(file.attrs.get("version", 0))
        text = file["header"][()].tobytes() if "header" in file else b""
        digest = int(file.attrs.get("header_xxh3", 0))
    except (OSError, ValueError, TypeError) as error:
        raise InfluenceError(f"{path} is damaged: its header cannot be read", again) from error
    if kind != FORMAT:
        raise InfluenceError(f"{path} is an HDF5 file, but no influence store", "set gradients.store to another name")
    if version > VERSION:
        raise InfluenceError(
            f"{path} is a store of version {version}, this influence reads up to {VERSION}", "update influence"
        )
    if xxhash.xxh3_64_intdigest(text) != digest:
        raise InfluenceError(f"{path} is damaged: the checksum of its header does not fit", again)
    header: dict[str, Any] = json.loads(text)
    layout = Layout(**header["layout"])
    for name, shape in {"coordinates": (layout.padded, layout.k), "flags": (layout.blocks,)}.items():
        if name not in file or file[name].shape != shape or file[name].id.get_offset() is None:
            raise InfluenceError(f"{path} is damaged: {name} is missing or has another shape", again)
    return header
