"""stdout for the rows of a command alone: what else prints, such as the user's data set or a library, is on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# The stream for rows while a command works.
_kept: list[TextIO] = []


class _Aside:
    """Stands for stdout, and writes to stderr; what cannot be written is lost, as the command's own messages are."""

    def __init__(self, stderr: TextIO) -> None:
        # Not the present one: a program may have put stdout in its place.
        self.stderr = stderr

    def write(self, text: str) -> int:
        """Write a text."""
        with suppress(OSError, ValueError):
            self.stderr.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write some lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is in the buffer."""
        with suppress(OSError, ValueError):
            self.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stderr, name)


@contextmanager
def rows_apart() -> Iterator[None]:
    """Keep stdout for ``rows()``: what prints while the block runs, by name or by number, goes to stderr."""
    if _kept:  # a command inside another one
        yield
        return
    stdout, stderr = sys.stdout, sys.stderr
    by_number = _number(stdout) == 1
    saved = os.dup(1) if by_number else -1
    rows = _reopened(stdout, saved) if by_number and stdout.writable() else stdout
    if by_number:
        with suppress(OSError):
            stdout.flush()
        os.dup2(2, 1)
    _kept.append(rows)
    sys.stdout = _Aside(stderr)
    try:
        yield
    finally:
        _kept.clear()
        sys.stdout = stdout
        if by_number:
            _restore(stdout, saved)
        if rows is not stdout:
            with suppress(OSError):
                rows.close()
        elif by_number:
            os.close(saved)


def end_rows() -> None:
    """Send to stderr what is printed from here to the end of the program: at exit, by destructors, by threads."""
    if _number(sys.stdout) == 1:
        with suppress(OSError):
            os.dup2(2, 1)


def rows() -> TextIO:
    """Give the stream for rows: stdout as it was when the command began."""
    return _kept[0] if _kept else sys.stdout


def _number(stream: TextIO) -> int:
    """Give the number of a stream; −1 for one of Python alone."""
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return -1


def _reopened(stream: TextIO, number: int) -> TextIO:
    """Open a stream of another number that writes as this one does, under its name."""
    opened = open(  # noqa: SIM115 (no path, and closed by the caller)
        number, "w", buffering=1 if stream.isatty() else -1, encoding=stream.encoding, errors=stream.errors
    )
    opened.buffer.raw.name = stream.name  # type: ignore[attr-defined]
    return opened


def _restore(stdout: TextIO, saved: int) -> None:
    """Give stdout its number back, once all buffers of others are written."""
    with suppress(OSError, ValueError):
        stdout.flush()
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).fflush(None)  # that of printf in C
    os.dup2(saved, 1)
