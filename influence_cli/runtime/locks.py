"""Who may write: the lock that HDF5 itself takes on a store, and one for whoever is making or filling it.

Both end with the process. On a file system without locks, everything works without them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk


def lock(raw: BinaryIO, path: Path, *, alone: bool, who: str = "another process") -> None:
    """Take the lock of an open file: shared for reading, alone for writing.

    Args:
        raw: the file.
        path: the store that a message names.
        alone: for writing.
        who: the holder, if it is taken.

    Raises:
        InfluenceError: it is taken.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(raw, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InfluenceError(f"{path} is in use by {who}", "wait until that command has finished") from error
    except OSError as error:
        # Some network file systems have no locks; HDF5 then works without as well.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def unlock(raw: BinaryIO) -> None:
    """Release the lock now: mapped parts of the file would otherwise keep it."""
    if sys.platform == "win32":
        return
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(raw, fcntl.LOCK_UN)


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
