"""Which files a piece of code opens for reading, so that a change of one of them can be noticed later.

Python tells an audit hook of every ``open`` and ``os.open`` of this process. A hook cannot be removed, so there is one,
which does nothing outside ``noting_opened``. What a library opens in C (HDF5, Arrow, LMDB) and what other processes
open is not seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

# Up to this size a file is recognised by its content, up to so much in all; beyond, by its size and time of change.
WHOLE_BYTES, ALL_BYTES = 64 * 2**20, 256 * 2**20
# More files than this are described together.
LISTED = 64
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

_noting: list[Opened] = []
_hooked: list[bool] = []


class Opened:
    """The files that were opened while somebody looked.

    Attributes:
        read: paths of those that were opened for reading.
        written: paths of those that were opened for writing, such as a cache.
    """

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()

    def files(self) -> tuple[Path, ...]:
        """List what was only read, sorted."""
        return tuple(Path(name) for name in sorted(self.read - self.written))


@contextmanager
def noting_opened() -> Iterator[Opened]:
    """Note the files that this process opens while the block runs."""
    if not _hooked:
        _hooked.append(True)
        sys.addaudithook(_hook)
    opened = Opened()
    _noting.append(opened)
    try:
        yield opened
    finally:
        _noting.remove(opened)


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if not _noting or event != "open":
        return
    path, mode, flags = given
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str | os.PathLike):
        return  # a number: what it stands for was opened before
    name = os.path.abspath(path)  # noqa: PTH100 (called for every file, and follows no link)
    writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
    for opened in _noting:
        (opened.written if writes else opened.read).add(name)


def stamps(files: Sequence[Path], folder: Path) -> dict[str, str]:
    """Describe files so that a change shows: by content, or where they are large by size and time of change.

    Args:
        files: each of them once.
        folder: names are relative to it.

    Returns:
        Description by name; of more than 64 files one of all of them. A file that is gone is left out.
    """
    described: dict[str, str] = {}
    read = 0
    for file in files:
        try:
            status = file.stat()
            whole = status.st_size <= WHOLE_BYTES and read + status.st_size <= ALL_BYTES and len(files) <= LISTED
            read += status.st_size if whole else 0
            said = xxhash.xxh3_64_hexdigest(file.read_bytes()) if whole else f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            continue
        described[os.path.relpath(file, folder)] = said
    if len(described) <= LISTED:
        return described
    text = "\n".join(f"{name}\0{said}" for name, said in sorted(described.items()))
    return {f"{len(described):,} files": xxhash.xxh3_64_hexdigest(text.encode(errors="surrogateescape"))}
