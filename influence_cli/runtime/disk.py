"""Every change that a command makes on disk, and how much space a full disk lacks.

Only libraries and the writers of results write elsewhere: to a file with another name, which ``flush`` and ``replace``
then put in place. A kill comes between two of these calls or inside one of them; the tests stop at each.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from influence_cli.errors import InfluenceError, human_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a file system says that cannot do this: flush, or map a file into memory. It is no damage, and nothing is lost.
CANNOT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


def write_at(raw: BinaryIO, place: int, values: np.ndarray) -> None:
    """Write an array at a byte of an open, unbuffered file."""
    raw.seek(place)
    _write(raw, memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data))


def append(raw: BinaryIO, data: bytes) -> None:
    """Write bytes at the end of an unbuffered file that is open for appending."""
    _write(raw, memoryview(data))


def _write(raw: BinaryIO, view: memoryview) -> None:
    while len(view):  # a single call moves at most 2 GB
        view = view[raw.write(view) :]


def cut(raw: BinaryIO, size: int) -> None:
    """Truncate an open file to a number of bytes."""
    raw.truncate(size)


def flush(file: IO[Any]) -> None:
    """Wait until the disk holds what was written; later writes are then never on disk without it."""
    file.flush()
    try:
        getattr(os, "fdatasync", os.fsync)(file.fileno())
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def mapped(raw: IO[bytes], start: int, size: int, *, writable: bool) -> mmap.mmap | bytearray:
    """Map a part of a file into memory, or read it where the file system maps none.

    Args:
        raw: the file.
        start: its first byte, a multiple of ``mmap.ALLOCATIONGRANULARITY``.
        size: bytes, more than none.
        writable: whether the copy in memory may be changed; the file never is.
    """
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    try:
        return mmap.mmap(raw.fileno(), size, access=access, offset=start)
    except OSError as error:
        if error.errno not in (*CANNOT, errno.ENODEV):
            raise
    content, at = bytearray(size), 0
    # Not from the file's own place: several threads read one file.
    while at < size and (piece := os.pread(raw.fileno(), min(size - at, 2**26), start + at)):
        content[at : at + len(piece)] = piece
        at += len(piece)
    if at < size:
        raise ValueError(f"the file ends after {start + at} bytes")
    return content


def flush_names(folder: Path) -> None:
    """Wait until the disk holds the names in a folder: a file can be on disk without having a name."""
    with contextlib.suppress(OSError):  # not every system opens folders
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def reserve(raw: BinaryIO, size: int) -> None:
    """Reserve the bytes of a file now, so that a full disk is found here and not after an hour."""
    try:
        os.posix_fallocate(raw.fileno(), 0, size)
    except AttributeError:  # not on every system
        return
    except OSError as error:
        if error.errno in FULL:
            raise
        # The file system cannot reserve: a full disk is then told by the write that it stops.
        if os.fstat(raw.fileno()).st_size < size:
            os.truncate(raw.fileno(), size)


def replace(part: Path, path: Path) -> None:
    """Give a complete, flushed file its name, durably."""
    part.replace(path)
    flush_names(path.parent)


def part_of(path: Path) -> Path:
    """Name the file that becomes this one when it is complete."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Have a file written that is there complete or not at all, in the place of what was there.

    At the end of the block what it wrote is flushed and gets its name; if anything fails, it is removed.

    Args:
        path: the file.

    Yields:
        The name under which the block writes it, and closes it.
    """
    part = part_of(path)
    try:
        yield part
        with part.open("r+b") as file:
            flush(file)
        replace(part, path)
    except BaseException:
        remove(part)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes to a file that is there complete or not at all, in the place of what was there."""
    with whole(path) as part, part.open("wb", buffering=0) as raw:
        append(raw, data)


def copy(source: Path, target: Path) -> None:
    """Copy a file, times included where the file system takes them, and flush the copy."""
    shutil.copyfile(source, target)
    with contextlib.suppress(OSError):
        shutil.copystat(source, target)
    with target.open("rb") as file:
        flush(file)


def link(source: str, target: str) -> None:
    """Give a file a second name, durably; never a name that is taken."""
    os.link(source, target, follow_symlinks=False)
    flush_names(Path(target).parent)


def rename(source: str, target: str) -> None:
    """Rename a file, durably."""
    os.rename(source, target)  # noqa: PTH104 (paths of a log, as they stand)
    flush_names(Path(target).parent)
    flush_names(Path(source).parent)


def unlink(path: str | Path) -> None:
    """Remove a name, durably."""
    os.unlink(path)  # noqa: PTH108
    flush_names(Path(path).parent)


def remove(path: Path) -> None:
    """Remove a file that is no longer needed; a failure is harmless and ignored."""
    with contextlib.suppress(OSError):
        path.unlink()


def missing_folders(path: Path) -> list[Path]:
    """List the missing folders of a path, topmost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()][::-1]


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, durably."""
    for folder in missing_folders(path):
        folder.mkdir(exist_ok=True)  # another process may make it too
        flush_names(folder.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder that is empty."""
    path.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a folder and its content when no longer needed; a failure is harmless and ignored."""
    shutil.rmtree(path, ignore_errors=True)


def check_space(path: Path, need: int) -> None:
    """Refuse a store that the disk cannot hold, before anything is written."""
    if not path.parent.is_dir():
        raise InfluenceError(f"{path}: there is no folder {path.parent}", "create it, or set gradients.store")
    free = shutil.disk_usage(path.parent).free
    if need <= free:
        return
    hint = "track fewer layers (gradients.layers), use store_dtype: float16 or int8, or set gradients.store elsewhere"
    if path.exists() and need <= free + path.stat().st_size:
        hint = f"remove {path} first: it is kept until the new one is complete; or set gradients.store elsewhere"
    raise InfluenceError(
        f"{path} needs {human_bytes(need)}, but the disk has {human_bytes(free)} free: "
        f"{human_bytes(need - free)} more is needed",
        hint,
    )


def stand_in(head: bytes) -> tuple[str, str] | None:
    """Say what a clone or a download has left in place of a file, by its first bytes.

    Args:
        head: the first bytes of the file, some 64 of them.

    Returns:
        What it is, and what gives the file itself; None for anything else.
    """
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "a pointer of Git LFS, not the file itself", "fetch it: git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "a web page, not the file itself",
            "download it again: the link leads to a page, such as one for logging in",
        )
    return None


def failure(error: Exception, path: Path, size: int) -> str:
    """Say why a write failed and, for a full disk, how much space is missing.

    Args:
        error: what was raised; safetensors has the system's number only in its text.
        path: what was written; it may be missing.
        size: its bytes when complete.
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
        return f"{reason}, {human_bytes(lacking)} more is needed"
    # A quota, or space was freed just now.
    return f"{reason}, {human_bytes(size)} is needed in total"


def _largest() -> int:
    """Give the largest file that this process may write; 0 if the limit is the file system's."""
    try:
        import resource
    except ImportError:
        return 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit
