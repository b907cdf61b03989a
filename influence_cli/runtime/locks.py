"""Every lock: of a store that is open, of whoever is making or filling one, of a log, of one retraining among many.

All end with the process, in whatever way. Where a system or a file system has no locks, everything works without them.

The package filelock cannot do this: it locks the whole of a file that it opens itself, for one process alone. Here the
readers of an open store share the lock that HDF5 takes too, a log is its own lock file, and each retraining is one byte
of a file.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None

# A byte that nobody claims.
NOBODY = 2**40


def _keep_silent(_: str) -> None:
    """Say nothing: only a command has somebody to tell."""


# Takes a line about a lock that cannot be had; a command prints it with -v.
tell: Callable[[str], None] = _keep_silent


def hold(raw: BinaryIO) -> bool:
    """Say whether locks hold where an open file is: some systems and network file systems have none."""
    if _fcntl is None:
        return False
    try:
        _fcntl.lockf(raw, _fcntl.LOCK_EX | _fcntl.LOCK_NB, 1, NOBODY)
        _fcntl.lockf(raw, _fcntl.LOCK_UN, 1, NOBODY)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return True


def take(raw: BinaryIO, *, alone: bool) -> bool:
    """Take the lock of an open file, which it keeps until it is closed.

    Args:
        raw: the file.
        alone: for writing; readers share it.

    Returns:
        Whether it was free; true where the file system has no locks, or fails to say: a lock is a courtesy.
    """
    if _fcntl is None:
        return True
    try:
        _fcntl.flock(raw, (_fcntl.LOCK_EX if alone else _fcntl.LOCK_SH) | _fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _go_on(raw, error)
    return True


def take_byte(raw: BinaryIO, place: int, *, wait: bool) -> bool:
    """Take the lock of one byte of an open file, alone among processes; the file need not have it.

    Args:
        raw: the file.
        place: of the byte.
        wait: until it is free.

    Returns:
        Whether it was free.
    """
    if _fcntl is None:
        return True
    try:
        _fcntl.lockf(raw, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB), 1, place)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _go_on(raw, error)
    return True


def _go_on(raw: BinaryIO, error: OSError) -> None:
    tell(f"{raw.name} is used without a lock ({error.strerror}): nothing keeps two commands from writing to it")


def give_byte(raw: BinaryIO, place: int) -> None:
    """Give up the lock of one byte."""
    if _fcntl is not None:
        with contextlib.suppress(OSError):  # it was not had, then
            _fcntl.lockf(raw, _fcntl.LOCK_UN, 1, place)


def lock(raw: BinaryIO, path: Path, *, alone: bool, who: str = "another process") -> None:
    """Take the lock of an open store: shared for reading, alone for writing.

    Args:
        raw: the file.
        path: the store that a message names.
        alone: for writing.
        who: the holder, if it is taken.

    Raises:
        InfluenceError: it is taken.
    """
    if not take(raw, alone=alone):
        raise InfluenceError(f"{path} is in use by {who}", "wait until that command has finished")


def unlock(raw: BinaryIO) -> None:
    """Release the lock now: mapped parts of the file would otherwise keep it."""
    if _fcntl is not None:
        with contextlib.suppress(OSError):
            _fcntl.flock(raw, _fcntl.LOCK_UN)


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Be the only process that makes, fills or repairs a store, starting before its curvature is fitted.

    The store's own lock only says that it is open now; two that start together would both fit the curvature.

    Raises:
        InfluenceError: another process is working on it, or the folder is not writable.
    """
    file = path.with_name(path.name + ".lock")
    raw = _claimed(file, path)
    try:
        with contextlib.suppress(OSError):  # on a full disk a store with all its bytes reserved can still be filled
            disk.cut(raw, 0)
            disk.append(raw, f"{os.getpid()}\n".encode())
        yield
    finally:
        disk.remove(file)
        raw.close()


def is_claimed(path: Path) -> bool:
    """Say whether a process makes or fills a store, as far as this host can see; network file systems lag."""
    file = path.with_name(path.name + ".lock")
    for _ in range(20):
        if file.exists():
            return True
        time.sleep(0.5)
    return False


def _claimed(file: Path, path: Path) -> BinaryIO:
    while True:
        try:
            raw = file.open("a+b", buffering=0)
        except FileNotFoundError as error:
            raise InfluenceError(
                f"{path}: there is no folder {path.parent}", "create it, or set gradients.store"
            ) from error
        except OSError as error:
            raise InfluenceError(
                f"{path} cannot be created or finished: its folder is not writable ({error.strerror})",
                "make the folder writable, or set gradients.store to another place",
            ) from error
        try:
            raw.seek(0)
            number = raw.read(20).decode("ascii", "replace").strip()
            lock(raw, path, alone=True, who=f"process {number}" if number.isdigit() else "another process")
            # The previous holder may have removed the file after it was opened here: the lock then protects nothing.
            if os.path.samestat(os.fstat(raw.fileno()), file.stat()):
                return raw
        except FileNotFoundError:
            pass
        except BaseException:
            raw.close()
            raise
        raw.close()
