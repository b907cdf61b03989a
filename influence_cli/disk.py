"""Every change that is made to a store or to an unfinished fit on disk, and what a disk that is full lacks.

Only the HDF5 library and safetensors write besides, both to a file of another name, which ``replace`` then puts in
place. A kill falls between two of these calls or into one of them: the tests stop the world at each.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from influence_cli.errors import InfluenceError, human_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_at(raw: BinaryIO, place: int, values: np.ndarray) -> None:
    """Write an array at a byte of an open, unbuffered file."""
    raw.seek(place)
    view = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    while len(view):  # a single call moves at most 2 GB
        view = view[raw.write(view) :]


def flush(raw: BinaryIO) -> None:
    """Wait until the disk holds what was written: what is written after it is never there without it."""
    getattr(os, "fdatasync", os.fsync)(raw.fileno())


def reserve(raw: BinaryIO, size: int) -> None:
    """Reserve so many bytes of a file now: a full disk is found here, not after an hour."""
    with contextlib.suppress(AttributeError):  # not on every system
        os.posix_fallocate(raw.fileno(), 0, size)


def replace(part: Path, path: Path) -> None:
    """Give a file that is complete and flushed its name, for good."""
    part.replace(path)
    with contextlib.suppress(OSError):  # not every system opens folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(path: Path) -> None:
    """Remove a file that is of no more use; where that is not allowed, it does no harm."""
    with contextlib.suppress(OSError):
        path.unlink()


def check_space(path: Path, need: int) -> None:
    """Refuse a store that the disk cannot hold, before anything is written."""
    if not path.parent.is_dir():
        raise InfluenceError(f"{path}: there is no folder {path.parent}", "make it, or set gradients.store")
    free = shutil.disk_usage(path.parent).free
    if need <= free:
        return
    hint = "track fewer layers (gradients.layers), use store_dtype: float16 or int8, or set gradients.store elsewhere"
    if path.exists() and need <= free + path.stat().st_size:
        hint = f"remove {path} first: an old store stays until the new one is whole; or set gradients.store elsewhere"
    raise InfluenceError(
        f"{path} needs {human_bytes(need)}, the disk has {human_bytes(free)} free: {human_bytes(need - free)} more "
        "are needed",
        hint,
    )


def failure(error: Exception, path: Path, size: int) -> str:
    """Say why a write failed and, of a full disk, how much space is missing.

    Args:
        error: what was raised; of safetensors, the system's number is in its text alone.
        path: what was written; it need not be there.
        size: bytes it has when it is whole.
    """
    number = error.errno if isinstance(error, OSError) else None
    number = number or next((full for full in FULL if f"os error {full})" in str(error)), None)
    if number is None:
        return str(error)
    reason = os.strerror(number)
    if number not in FULL:
        return reason
    held = free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        held = path.stat().st_blocks * 512
    if number == errno.EFBIG:
        held, free = _largest(), 0
    lacking = size - held - free
    if lacking > 0:
        return f"{reason}, {human_bytes(lacking)} more are needed"
    # A quota, or somebody made room just now.
    return f"{reason}, {human_bytes(size)} are needed in all"


def _largest() -> int:
    """Give the largest file that this process may write; 0 where it is the file system that has a limit."""
    try:
        import resource
    except ImportError:
        return 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit
