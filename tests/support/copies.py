"""Copies of a project: its images are hard links to the first ones, since writing 400 files takes half a second."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# By path: what an image held when it was first copied, and its times.
_KEPT: dict[str, tuple[bytes, os.stat_result]] = {}


@contextmanager
def copied(project: Path, to: Path) -> Iterator[Path]:
    """Copy a project for a test that may change any file of it; afterwards the first images are as they were.

    A test that writes into an image in place writes into the first one too, until the end of this context.

    Args:
        project: the folder of a project whose images are png files.
        to: the folder of the copy, which must not exist.
    """
    images: list[str] = []

    def copy(source: str, target: str) -> None:
        if not source.endswith(".png"):
            shutil.copy2(source, target)
            return
        if source not in _KEPT:
            _KEPT[source] = Path(source).read_bytes(), Path(source).stat()
        images.append(source)
        os.link(source, target)

    try:
        yield Path(shutil.copytree(project, to, copy_function=copy))
    finally:
        for path in map(Path, images):
            content, before = _KEPT[str(path)]
            if path.read_bytes() != content:  # whatever its size and times say
                path.write_bytes(content)
            path.chmod(before.st_mode)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
