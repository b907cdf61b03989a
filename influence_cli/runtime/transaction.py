"""Several files that appear together or not at all: each is complete next to its place before the first is renamed.

The planned changes are recorded before the first one, and the record is removed after the last. If a kill comes between
the two, the next run finds the record and rolls the changes back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from influence_cli.runtime import disk
from influence_cli.runtime.outputs import check_output, unwritable


@dataclass(frozen=True)
class NewFile:
    """A file to be written.

    Attributes:
        path: where it is to appear.
        write: writes the whole of it to the path it is given, which has the same suffix.
        verify: reads it back from there; raises if it is not what was meant.
    """

    path: Path
    write: Callable[[Path], None]
    verify: Callable[[Path], None] = lambda _: None


def write_together(files: Sequence[NewFile]) -> None:
    """Write files so that a failure, or a kill followed by ``take_back``, leaves each of them as it was.

    All are first written and verified next to their places, under hidden names, and only then renamed; if a rename
    fails, those before it are rolled back. A link is kept: its target is replaced.

    Raises:
        InfluenceError: one cannot be written or read back.
    """
    for file in files:
        check_output(file.path)
    targets = [_target(file.path) for file in files]
    try:
        for file, target in zip(files, targets, strict=True):
            part = _beside(target, "part")
            try:
                file.write(part)
                with part.open("rb") as stream:
                    disk.flush(stream)
                if target.exists():
                    disk.copy(target, _beside(target, "old"))
            except OSError as error:
                raise unwritable(file.path, error) from error
            file.verify(part)
        _rename(files, targets)
    finally:
        _clear(targets)


def take_back(paths: Sequence[Path]) -> bool:
    """Roll back files left half-written by an interrupted run, and remove the leftovers next to them.

    Args:
        paths: of the files, in the order in which they are written.

    Returns:
        Whether anything was changed.
    """
    targets = [_target(path) for path in paths]
    changed = _undo(targets[0])
    _clear(targets)
    return changed


def _rename(files: Sequence[NewFile], targets: Sequence[Path]) -> None:
    # The content identifies our file later: a file that somebody else has put there since is left alone.
    changes = [
        {"file": str(target), "new": _hash(_beside(target, "part")), "was": target.exists()} for target in targets
    ]
    done = 0
    try:
        disk.write_whole(_note(targets[0]), json.dumps(changes).encode())
        for target in targets:
            disk.replace(_beside(target, "part"), target)
            done += 1
    except BaseException as error:
        _undo(targets[0])
        if isinstance(error, OSError):
            raise unwritable(files[done].path, error) from error
        raise
    disk.unlink(_note(targets[0]))


def _undo(first: Path) -> bool:
    """Roll back the changes recorded next to the first of the files, and remove the record."""
    note, changed = _note(first), False
    if not note.exists():
        return False
    for change in json.loads(note.read_text()):
        target = Path(change["file"])
        old = _beside(target, "old")
        if not target.exists() or _hash(target) != change["new"]:
            continue
        if not change["was"]:
            disk.unlink(target)
        elif old.exists():
            disk.replace(old, target)
        changed = True
    disk.unlink(note)
    return changed


def _clear(targets: Sequence[Path]) -> None:
    if _note(targets[0]).exists():
        return  # the files next to them are still needed
    for target in targets:
        for word in ("part", "old"):
            if (path := _beside(target, word)).exists():
                disk.remove(path)


def _hash(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _note(first: Path) -> Path:
    return first.with_name(f".{first.stem}.influence-changes.json")


def _beside(target: Path, word: str) -> Path:
    return target.with_name(f".{target.stem}.influence-{word}{target.suffix}")
