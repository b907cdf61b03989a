"""Large arrays: in memory, or in temporary files where memory is short; passes over them, block by block.

A file is mapped, so that the array behaves like any other. What a pass has touched stays in the memory of the process
until it is dropped (``MADV_DONTNEED``), which ``row_parts`` does after each block: the system keeps the pages as long
as it has room, and writes them to disk otherwise. The files have no name, so their space is free again when the process
ends, however it ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk

# Numbers of a block of outputs [rows, C]; rows of a block of activations, in memory and in files.
HELD, CHUNK, CHUNK_IN_FILES = 2**21, 8_192, 2_048
# Rows from all over a file that are read at once: the system may map 2 MB around each.
SCATTERED = 32
# The largest finite float16.
LARGEST = 65_504.0

_folder: Path | None = None
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


@contextmanager
def on_disk(folder: Path | None) -> Iterator[None]:
    """Have ``large`` make files in a folder for a while; in memory if it is None."""
    global _folder
    before, _folder = _folder, folder
    try:
        yield
    finally:
        _folder = before


def is_on_disk() -> bool:
    """Say whether ``large`` makes files now."""
    return _folder is not None


def scratch_folder(store: Path | None) -> Path:
    """Choose the folder of the temporary files: ``TMPDIR`` if it is set, otherwise that of the store.

    The system's own folder may be in memory.
    """
    named = os.environ.get("TMPDIR")
    if named or store is None:
        return Path(named or tempfile.gettempdir())
    return store.parent


def large(rows: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Make an array [rows, width] whose numbers are still undefined, on the CPU where it is a file.

    Raises:
        InfluenceError: the file cannot be made.
    """
    size = rows * width * dtype.itemsize
    if _folder is None or not size:
        return torch.empty(rows, width, dtype=dtype, device=device)
    try:
        with tempfile.TemporaryFile(dir=_folder, prefix="influence-") as file:
            disk.reserve(cast("BinaryIO", file), size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InfluenceError(
            f"{_folder}: a temporary file cannot be made there: {disk.failure(error, _folder / 'file', size)}",
            "TMPDIR=FOLDER in front of the command puts the temporary files elsewhere",
        ) from error
    _maps.add(memory)
    return torch.frombuffer(memory, dtype=dtype).view(rows, width)


def narrow() -> torch.dtype:
    """Give the type of kept activations: float32, or float16 in files."""
    return torch.float32 if _folder is None else torch.float16


def release() -> None:
    """Drop the pages of all files from the memory of this process; their content stays."""
    _advise("MADV_DONTNEED")


@contextmanager
def single_rows() -> Iterator[None]:
    """Have the system read nothing around what is read, for a while: rows come from all over."""
    _advise("MADV_RANDOM")
    try:
        yield
    finally:
        _advise("MADV_NORMAL")


def _advise(name: str) -> None:
    if hasattr(mmap, name):
        for memory in list(_maps):
            memory.madvise(getattr(mmap, name))


def row_parts(n: int, width: int) -> Iterator[slice]:
    """Divide n rows of so many numbers into parts of at most ``HELD`` numbers, or of a row."""
    return parts_of(n, max(1, HELD // max(1, width)))


def parts_of(n: int, step: int = 0) -> Iterator[slice]:
    """Divide n rows into parts of ``step`` rows (0: as fits); what was mapped for a part is dropped after it."""
    step = step or (CHUNK if _folder is None else CHUNK_IN_FILES)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
        if _maps:
            release()


def picked(values: Tensor, targets: Tensor) -> Tensor:
    """Give the number of each row's target: values [n, C] and targets int64 [n] to [n]."""
    one = torch.empty(len(values), dtype=values.dtype, device=values.device)
    for rows in row_parts(*values.shape):
        one[rows] = values[rows].gather(1, targets[rows, None])[:, 0]
    return one


def likeliest(values: Tensor) -> Tensor:
    """Give the column of the largest number of each row, int64 [n]; −1 for a row of NaN."""
    best = torch.empty(len(values), dtype=torch.int64, device=values.device)
    for rows in row_parts(*values.shape):
        part = values[rows]
        best[rows] = torch.where(part[:, 0].isnan(), -1, part.argmax(dim=1))
    return best


def chosen(values: Tensor, rows: Tensor) -> Tensor:
    """Copy some rows, int64 [m], of an array [n, w]."""
    some = large(len(rows), values.shape[1], values.dtype, values.device)
    for part in parts_of(len(rows), SCATTERED if is_on_disk() else 0):
        some[part] = values[rows[part]]
    return some


def log_softmax_(outputs: Tensor, temperature: float = 1.0) -> Tensor:
    """Turn outputs [n, C] into log softmax(temperature · outputs), in their place unless they are of half precision."""
    whole = outputs if outputs.dtype != torch.float16 else large(*outputs.shape)
    for rows in row_parts(*outputs.shape):
        whole[rows] = (temperature * outputs[rows].to(whole.dtype)).log_softmax(dim=1)
    return whole


def softmax(outputs: Tensor) -> Tensor:
    """Give softmax(outputs), [n, C]."""
    whole = large(*outputs.shape)
    for rows in row_parts(*outputs.shape):
        whole[rows] = outputs[rows].float().softmax(dim=1)
    return whole


def add_(total: Tensor | None, part: Tensor) -> Tensor:
    """Add an array to a total, in its place; give the array itself if it is the first."""
    if total is None:
        return part
    for rows in row_parts(*total.shape):
        total[rows] += part[rows]
    return total


def divide_(total: Tensor, count: int) -> Tensor:
    """Divide an array by a number, in its place."""
    for rows in row_parts(*total.shape):
        total[rows] /= count
    return total
