"""Read a file of torch.save with the restricted reader: the zip archive of today and the format before it.

The numbers of a file are mapped, not read: what is not used takes no memory.
"""

from __future__ import annotations

import io
import mmap
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from influence_cli.checkpoints.pickle_values import CONSTANTS, MAKERS, Storage, storage_dtype
from influence_cli.checkpoints.restricted_pickle import RestrictedUnpickler, Stand
from influence_cli.errors import InfluenceError, describe, human_bytes
from influence_cli.runtime import disk

# What torch writes first in its older format (torch/serialization.py).
_MAGIC = 0x1950A86A20F9469CFC6C
# Names of files in an archive that is more than weights, and what it is then.
_ARCHIVES = {
    "constants.pkl": "a TorchScript archive",
    "archive_format": "an archive of torch.export",
    "serialized_exported_program.json": "an archive of torch.export",
    "model.weights.h5": "a Keras model",
}
SAVE = "save one with torch.save(model.state_dict(), FILE)"


class ArchiveError(InfluenceError):
    """A file that is an archive of another kind.

    Attributes:
        kind: what it is.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def read_torch_file(path: Path, where: str) -> object:
    """Read what a file holds; nothing that it names is imported or called.

    Raises:
        ArchiveError: it is a TorchScript archive or the like.
        InfluenceError: it is damaged, compressed, or of another kind.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise ValueError("it is empty")
            # Writable, but what is written stays here.
            content = disk.mapped(file, 0, size, writable=True)
    except (OSError, ValueError) as error:
        raise InfluenceError(f"{where}: {path} is not a readable checkpoint: {describe(error)}", SAVE) from error
    return read_torch_bytes(content, path, where)


def read_torch_bytes(content: mmap.mmap | bytearray, path: Path, where: str) -> object:
    """Read what torch.save wrote into memory, or into a part of a file.

    Args:
        content: all of it, and nothing else.
        path: to name in errors.
        where: the start of errors.

    Raises:
        ArchiveError: it is a TorchScript archive or the like.
        InfluenceError: it is damaged, compressed, or of another kind.
    """
    try:
        if bytes(content[:4]) == b"PK\x03\x04":
            with zipfile.ZipFile(_File(content)) as archive:
                return _read_zip(archive, content, path, where)
        return _read_legacy(content)
    except InfluenceError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere in the reader
        left = disk.stand_in(bytes(content[:64]))
        if left is not None:
            raise InfluenceError(f"{where}: {path} is {left[0]}", left[1]) from error
        if isinstance(error, zipfile.BadZipFile):
            cut = "it is cut short, the end of the archive is missing or damaged"
            message = f"{where}: {path} is not a readable checkpoint: {cut}"
            raise InfluenceError(message, "copy or download it again") from error
        said = str(error) if type(error) is ValueError else describe(error)
        raise InfluenceError(f"{where}: {path} is not a readable checkpoint: {said[:160]}", SAVE) from error


class _File(io.BytesIO):
    """Reads memory as a file, without a copy of it; a length that a file only claims reserves nothing."""

    def __init__(self, content: mmap.mmap | bytearray) -> None:
        super().__init__()
        self._content, self._at = content, 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as many bytes as there are, at most ``size``."""
        end = len(self._content) if size is None or size < 0 else min(self._at + size, len(self._content))
        data = bytes(self._content[self._at : end])
        self._at += len(data)
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read to the end of the line."""
        del size
        return self.read(self._content.find(b"\n", self._at) + 1 - self._at)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a place."""
        self._at = max(0, offset + (0, self._at, len(self._content))[whence])
        return self._at

    def tell(self) -> int:
        """Give the place."""
        return self._at


def unpickle(file: IO[bytes], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read the next pickle of a file: plain values and tensors, and inert stand-ins for all else."""
    return RestrictedUnpickler(file, _WITH_BYTES, CONSTANTS, persistent).load()


def _of_bytes(data: Any) -> Any:
    """Read the storage of a tensor that was pickled without torch.save: the bytes of a file in the older format."""
    return _read_legacy(bytearray(data)) if isinstance(data, bytes) else Stand("torch.storage._load_from_bytes")


_WITH_BYTES = {**MAKERS, "torch.storage._load_from_bytes": _of_bytes}


def _read_zip(archive: zipfile.ZipFile, content: mmap.mmap | bytearray, path: Path, where: str) -> Any:
    parts = {part.filename: part for part in archive.infolist()}
    names = {name.rpartition("/")[2]: name for name in parts}
    for name, kind in _ARCHIVES.items():
        if name in names:
            raise ArchiveError(kind)
    # torch never compresses, but an archive that somebody packed could be a thousand times as large as its file.
    whole = sum(part.file_size for part in parts.values())
    if whole > len(content):
        raise InfluenceError(
            f"{where}: {path} is compressed, {human_bytes(whole)} in a file of {human_bytes(len(content))}; nothing "
            "was read",
            SAVE,
        )
    if "data.pkl" not in names:
        raise ValueError("a zip archive that torch.save did not write")
    root = names["data.pkl"].removesuffix("data.pkl")
    swapped = f"{root}byteorder" in parts and archive.read(f"{root}byteorder").decode() != sys.byteorder
    storages: dict[str, torch.UntypedStorage] = {}

    def persistent(pid: Any) -> Storage:
        _storage, kind, key, _location, count = pid
        dtype = storage_dtype(kind)
        if key not in storages:
            part = parts[f"{root}data/{key}"]
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1:
                raise ValueError("a compressed or encrypted storage")
            # The header of a part: 30 bytes, its name and what is added, whose lengths stand at 26 and 28.
            head = part.header_offset
            lengths = content[head + 26 : head + 30]
            start = head + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            storages[key] = _mapped(content, start, part.file_size)
            if swapped and dtype is not None:
                storages[key] = _swapped(storages[key], dtype)
        if type(count) is not int or count * (dtype or torch.uint8).itemsize > storages[key].nbytes():
            raise ValueError("a storage that is shorter than it says")
        return Storage(storages[key], dtype)

    return unpickle(io.BytesIO(archive.read(names["data.pkl"])), persistent)


def _swapped(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.UntypedStorage:
    """Turn the bytes of each number round."""
    numbers = torch.empty(0, dtype=torch.uint8).set_(storage).reshape(-1, _word(dtype))
    return numbers.flip(1).contiguous().untyped_storage()


def _word(dtype: torch.dtype) -> int:
    return dtype.itemsize // (2 if dtype.is_complex else 1)


def _mapped(content: mmap.mmap | bytearray, start: int, size: int) -> torch.UntypedStorage:
    """Give a part of the file as a storage."""
    if start < 0 or size < 0 or start + size > len(content):
        raise ValueError("it ends before its numbers do")
    if size == 0:
        return torch.empty(0, dtype=torch.uint8).untyped_storage()
    made = torch.frombuffer(content, dtype=torch.uint8, count=size, offset=start)
    # The largest number has 16 bytes; torch aligns them all, other writers need not.
    return (made if made.data_ptr() % 16 == 0 else made.clone()).untyped_storage()


def _read_legacy(content: mmap.mmap | bytearray) -> Any:
    """Read the older format: four pickles, the names of the storages, then each one's length and numbers."""
    file = _File(content)
    first = unpickle(file)
    if type(first) is not int:
        return first  # a pickle that torch.save did not write
    if first != _MAGIC:
        raise ValueError("it holds a number")
    unpickle(file)
    system = unpickle(file)
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise ValueError("it was written on a machine of the other byte order")
    start = file.tell()
    # The storages lie after the pickle that needs them: read it once for their dtypes, and again with them.
    dtypes: dict[str, torch.dtype] = {}

    def note(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[0] == "storage":
            dtypes[pid[2]] = storage_dtype(pid[1]) or torch.uint8
        return None

    unpickle(file, note)
    keys = unpickle(file)
    place, storages = file.tell(), {}
    for key in keys:
        count = int.from_bytes(content[place : place + 8], "little", signed=True)
        size = count * dtypes[key].itemsize
        storages[key] = _mapped(content, place + 8, size)
        place += 8 + size
    file.seek(start)

    def persistent(pid: Any) -> Any:
        if pid[0] == "module":  # a class and its source
            return pid[1]
        _storage, _kind, key, _location, _count, view = pid
        whole = storages[key]
        if view is None:
            return Storage(whole, dtypes[key])
        _key, offset, count = view
        begin, end = (number * dtypes[key].itemsize for number in (offset, offset + count))
        if not 0 <= begin <= end <= whole.nbytes():
            raise ValueError("a storage that is shorter than it says")
        return Storage(whole[begin:end], dtypes[key])

    with warnings.catch_warnings():
        return unpickle(file, persistent)
