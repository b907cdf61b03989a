"""The checks before a store is opened: it is a store, undamaged except for its rows, and has what its header says.

The seal comes first, with the checksum of all HDF5 metadata. Then the header must match the data sets in place and
size: a checksum is not a signature, and data outside the file must not be read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash

from influence_cli.errors import InfluenceError
from influence_cli.runtime.locks import lock
from influence_cli.store.layout import (
    ANEW,
    FORMAT,
    LARGEST_SEAL,
    PER_BLOCK,
    SEAL_BYTES,
    VERSION,
    Layout,
    data_sets,
    digest,
    row_columns,
    side_arrays,
)

# A shard's name in the folder of the store: no other file is opened, whatever a header says.
SHARD = re.compile(r"[^/\\\0]+\.shards-[0-9a-f]{8}/\d{4,}\.h5")

# Seals and headers of files whose data sets match them.
_MATCHING: set[bytes] = set()


def open_file(path: Path, *, write: bool = False) -> tuple[BinaryIO, h5py.File, dict[str, Any]]:
    """Lock a store's file, check that it is a store and undamaged except for its rows, and open it.

    HDF5 opens it only for reading: its metadata is never written again.

    Returns:
        The raw file, which holds the lock, the HDF5 file, and the header, with the size of the sealed file as ``end``
        and what ``settled_line`` wrote behind it as ``settled``.

    Raises:
        InfluenceError: no such file, not a store, damaged, newer, not permitted, or in use by another process.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait for a writer
            raise InfluenceError(f"{path} is not a file", "set gradients.store to another place")
        raw = path.open("r+b" if write else "rb", buffering=0)
    except FileNotFoundError as error:
        raise InfluenceError(f"there is no store {path}", "influence gradients creates it") from error
    except PermissionError as error:
        hint = "copy it to a writable folder, and set gradients.store" if write else "check who owns the file"
        raise InfluenceError(f"{path}: permission denied{' to write' if write else ''}", hint) from error
    except OSError as error:
        raise InfluenceError(
            f"{path} cannot be opened{' for writing' if write else ''}: {error.strerror}",
            "check that its disk is mounted and writable, or set gradients.store to another place",
        ) from error
    try:
        lock(raw, path, alone=write)
        seal = _read_seal(raw)
        end = _check_seal(seal, path)
        # Without HDF5's own lock: ours is on the same file, and is of the same kind.
        file = h5py.File(path, "r", locking=False)
        return raw, file, _read_header(file, path, seal) | {"end": end, "settled": _read_settled(raw, end)}
    except OSError as error:
        raw.close()
        if error.errno is not None:  # of the system, and not of what the file holds
            raise InfluenceError(
                f"{path} cannot be read: {os.strerror(error.errno)}",
                "nothing was changed; check the disk or the network file system that it is on",
            ) from error
        raise InfluenceError(f"{path} is not a readable HDF5 file, or it is truncated", ANEW) from error
    except BaseException:
        raw.close()
        raise


def _read_seal(raw: BinaryIO) -> bytes:
    """Read the seal: three lines, padded; only the first bytes of a file without one."""
    seal = raw.read(SEAL_BYTES)
    while seal.startswith(FORMAT.encode()) and seal.count(b"\n") < 3 and len(seal) < LARGEST_SEAL:
        more = raw.read(len(seal))
        if not more:
            break
        seal += more
    return seal


def _read_settled(raw: BinaryIO, end: int) -> dict[str, str]:
    """Read what was written behind the file; nothing where that is not whole, as after a kill."""
    more = min(os.fstat(raw.fileno()).st_size - end, LARGEST_SEAL)
    if more <= 0:
        return {}
    raw.seek(end)
    body, _, rest = raw.read(more).partition(b"\n")
    settled = _object(body) if rest[:16] == xxhash.xxh3_64_hexdigest(body).encode() else {}
    return {name: part for name, part in settled.items() if isinstance(part, str)}


def settled_line(parts: Mapping[str, str]) -> bytes:
    """Write what ``open_file`` reads as ``settled``: it lies behind the sealed file, which stays as it is."""
    body = json.dumps(dict(parts), sort_keys=True).encode()
    return body + b"\n" + xxhash.xxh3_64_hexdigest(body).encode() + b"\n"


def _check_seal(seal: bytes, path: Path) -> int:
    """Check the seal, and what it covers; give the size of the sealed file."""
    kind, _, rest = seal.partition(b"\n")
    name, _, version = kind.partition(b" ")
    if name != FORMAT.encode():
        body, _, checksum = rest.partition(b"\n")
        if checksum[:16] == xxhash.xxh3_64_hexdigest(body).encode():
            raise InfluenceError(f"{path} is damaged: its first bytes have changed", ANEW)
        if h5py.is_hdf5(path):
            raise InfluenceError(
                f"{path} is an HDF5 file, but not an influence store", "set gradients.store to another name"
            )
        raise InfluenceError(f"{path} is not a readable HDF5 file, or it is truncated", ANEW)
    if version.isdigit() and int(version) > VERSION:
        raise InfluenceError(
            f"{path} is a store of version {int(version)}, but this influence reads up to {VERSION}", "update influence"
        )
    if len(seal) < SEAL_BYTES:
        raise InfluenceError(f"{path} is not a readable HDF5 file, or it is truncated", ANEW)
    body, _, rest = rest.partition(b"\n")
    if version != str(VERSION).encode() or rest.rstrip(b"\0") != xxhash.xxh3_64_hexdigest(body).encode() + b"\n":
        raise InfluenceError(f"{path} is damaged: its first {len(seal)} bytes have changed", ANEW)
    sealed, size = _object(body), path.stat().st_size
    ranges = sealed.get("metadata")
    if not isinstance(sealed.get("bytes"), int) or not isinstance(ranges, list) or not _rise(ranges, sealed["bytes"]):
        raise InfluenceError(f"{path} is damaged: its seal does not match", ANEW)
    if size < sealed["bytes"]:
        raise InfluenceError(f"{path} is not a readable HDF5 file, or it is truncated", ANEW)
    if digest(path, ranges) != sealed.get("xxh3"):
        raise InfluenceError(f"{path} is damaged: the HDF5 metadata of its data sets has changed", ANEW)
    return int(sealed["bytes"])


def _object(text: bytes) -> dict[str, Any]:
    """Read a JSON object; an empty one for anything else, since a matching checksum is easily forged."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _rise(ranges: list[Any], size: int) -> bool:
    """Say whether these parts lie in a file of this size, one after another: they are read into memory."""
    at = 0
    for part in ranges:
        if not (isinstance(part, list) and len(part) == 2 and all(type(place) is int for place in part)):
            return False
        start, stop = part
        if not at <= start <= stop <= size:
            return False
        at = stop
    return True


def _read_header(file: h5py.File, path: Path, seal: bytes) -> dict[str, Any]:
    """Read the header, and check that the file has what it says: anybody can write matching checksums.

    A command opens its store a dozen times. The seal has the checksum of all HDF5 metadata, so the second check is made
    once per process for the same seal and header.
    """
    wrong = InfluenceError(f"{path} is damaged: its header and its data sets do not match", ANEW)
    try:
        size = path.stat().st_size
        stored = file["header"]
        if not _inside(stored, size) or stored.dtype != np.uint8:
            raise wrong
        text = stored[()].tobytes()
        if xxhash.xxh3_64_intdigest(text) != int(stored.attrs["xxh3"]):
            raise InfluenceError(f"{path} is damaged: the checksum of its header does not match", ANEW)
        header = _object(text)
        if seal + text not in _MATCHING:
            if not _matches(header, data_sets(file), size):
                raise wrong
            _MATCHING.add(seal + text)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise wrong from error
    return header


def _matches(header: dict[str, Any], data: Mapping[str, h5py.Dataset], file_size: int) -> bool:
    """Say whether a file has the data sets that its header describes, each in one piece within the file."""
    layout = Layout(**header["layout"])
    if not (isinstance(header["fingerprint"], dict) and isinstance(header["facts"], dict) and _possible(layout)):
        return False
    expected = [
        *((name, dtype, (layout.padded, *shape)) for name, (shape, dtype) in row_columns(layout).items()),
        *((name, dtype, (layout.blocks,)) for name, dtype in PER_BLOCK.items()),
    ]
    if "shards" in header:  # rows and blocks belong to the shards, and are checked there
        expected = []
        if not check_shards(header["shards"], layout.blocks):
            return False
    for name, dtype, shape in (
        *expected,
        ("summary", "float64", (layout.k + 1,)),
        ("summary_xxh3", "uint64", (1,)),
    ):
        if data[name].shape != shape or data[name].dtype != dtype or not _inside(data[name], file_size):
            return False
    return all(data[name].dtype.kind in "biuf" and _inside(data[name], file_size) for name in side_arrays(data))


def check_shards(shards: Any, blocks: int) -> bool:
    """Say whether shards are in a folder next to their store, and hold every block once, in order."""
    at = 0
    for shard in shards if isinstance(shards, list) else []:
        file, first, count, header = (shard[key] for key in ("file", "first", "blocks", "header"))
        if not (isinstance(file, str) and SHARD.fullmatch(file) and isinstance(header, str)):
            return False
        if not (type(first) is type(count) is int and first == at and count > 0):
            return False
        at += count
    return at == blocks


def _possible(layout: Layout) -> bool:
    counts = (layout.n, layout.k, layout.classes, layout.block)
    return (
        all(type(count) is int and 0 <= count < 2**48 for count in counts)
        and min(layout.n, layout.block) > 0
        and layout.dtype in ("float32", "float16", "int8")
    )


def _inside(data: h5py.Dataset, file_size: int) -> bool:
    """Say whether a data set is in one piece in the file, so that it can be mapped and is never larger when read."""
    plist, size = data.id.get_create_plist(), data.id.get_storage_size()
    if plist.get_layout() in (h5py.h5d.CHUNKED, h5py.h5d.VIRTUAL) or plist.get_external_count() or size != data.nbytes:
        return False
    return not size or (data.id.get_offset() or file_size) + size <= file_size
