"""What lies in a folder at every moment when a kill can come: recorded under a command, to be put back one by one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from influence_cli.runtime import disk

# A file's bytes; None for a folder; of a file that has two names, its first one in the place of the second.
State = dict[str, bytes | str | None]
STORE = ("influence.h5*",)
# What writes into an open file by itself is seen in the midst of that; the others change names, or nothing.
INTO = ("write_at", "append")
ROUND = ("cut", "flush", "flush_names", "reserve", "replace", "copy", "link", "rename", "unlink", "remove")
FOLDERS = ("make_folder", "remove_folder")
# What a change of names comes down to, whoever makes it.
CALLS = ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")
# Files that libraries write, in any order, before they get their names.
BEGUN = (".part", "influence-part", "influence-old")


@dataclass
class Moments:
    """What lay in a folder at every moment that a kill can come.

    Attributes:
        folder: that is watched.
        patterns: of what counts in it.
        done: counts the work that is finished.
        found: the files, and the work that was finished then; the latest of equal ones.
    """

    folder: Path
    patterns: tuple[str, ...]
    done: Callable[[], int]
    found: dict[tuple[tuple[str, bytes | str | None], ...], int] = field(default_factory=dict)
    _last: State = field(default_factory=dict)

    def tried(self) -> list[tuple[tuple[tuple[str, bytes | str | None], ...], int]]:
        """Give the moments that a test tries: every second one, all of them in `make test-slow`."""
        every = 1 if os.environ.get("INFLUENCE_TEST_EXAMPLES") == "more" else 2
        moments = list(self.found.items())
        return moments[::every] if len(moments) > 12 else moments

    def paths(self) -> list[Path]:
        """List the files and folders that count, but for the lock: a folder before what is in it."""
        found = {path for pattern in self.patterns for path in self.folder.glob(pattern) if path.suffix != ".lock"}
        return sorted(found)

    def read(self) -> State:
        """Read all that counts."""
        state: State = {}
        first: dict[int, str] = {}
        for path in self.paths():
            name = str(path.relative_to(self.folder))
            if path.is_dir():
                state[name] = None
            elif (known := first.setdefault(path.stat().st_ino, name)) != name:
                state[name] = known
            else:
                state[name] = path.read_bytes()
        return state

    def put(self, state: tuple[tuple[str, bytes | str | None], ...]) -> None:
        """Make the folder what it was at a moment."""
        for path in reversed(self.paths()):
            path.rmdir() if path.is_dir() else path.unlink()
        for name, content in state:
            path = self.folder / name
            if content is None:
                path.mkdir()
            elif isinstance(content, str):
                path.hardlink_to(self.folder / content)
            else:
                path.write_bytes(content)

    def look(self) -> None:
        """Note the state of now; what a library has written since the last look was half there at some moment."""
        now = self.read()
        for name, content in now.items():
            if isinstance(content, bytes) and content != self._last.get(name) and any(word in name for word in BEGUN):
                self._note(now | {name: content[: len(content) // 2]})
        self._note(now)
        self._last = now

    def _note(self, state: State) -> None:
        self.found[tuple(sorted(state.items()))] = self.done()


def watch(
    monkeypatch: pytest.MonkeyPatch, folder: Path, done: Callable[[], int], patterns: tuple[str, ...] = STORE
) -> Moments:
    """Put a layer between the program and the disk that looks before, in the midst of and after every change.

    A name in the folder that is changed past ``influence_cli.runtime.disk`` is an error.
    """
    moments, inside = Moments(folder, patterns, done), threading.local()
    write_at, append = disk.write_at, disk.append

    def halves(raw: BinaryIO, place: int, values: np.ndarray) -> None:
        view = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        half = len(view) // 2
        moments.look()
        write_at(raw, place, view[:half])
        moments.look()
        write_at(raw, place + half, view[half:])
        moments.look()

    def appended_halves(raw: BinaryIO, data: bytes) -> None:
        moments.look()
        append(raw, data[: len(data) // 2])
        moments.look()
        append(raw, data[len(data) // 2 :])
        moments.look()

    def around(name: str) -> Callable[..., None]:
        change = getattr(disk, name)

        def do(*args: Any) -> None:
            moments.look()
            inside.here = True
            try:
                change(*args)
            finally:
                inside.here = False
            moments.look()

        return do

    def guarded(name: str) -> Callable[..., None]:
        call = getattr(os, name)

        def do(path: Any, *args: Any, **more: Any) -> None:
            own = isinstance(path, str | Path) and any(Path(path).match(f"{folder}/{pattern}") for pattern in patterns)
            if own and not str(path).endswith(".lock"):
                assert getattr(inside, "here", False), f"os.{name}({path}) is not made by influence_cli.runtime.disk"
                moments.look()
            call(path, *args, **more)

        return do

    monkeypatch.setattr(disk, "write_at", halves)
    monkeypatch.setattr(disk, "append", appended_halves)
    for name in (*ROUND, *FOLDERS):
        monkeypatch.setattr(disk, name, around(name))
    for name in CALLS:
        monkeypatch.setattr(os, name, guarded(name))
    return moments
