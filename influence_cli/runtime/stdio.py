"""stdin, stdout and stderr in every state: closed, full, without a reader, in another encoding.

While a command works, stdout is for its rows alone: ``rows_apart`` keeps it aside, and whatever else prints, such as a
data set of the user's or a library that it loads, prints on stderr.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from influence_cli.errors import InfluenceError
from influence_cli.runtime import distributed

# For a list on stdin; a path has at most 4,096 characters.
LONGEST_LINE = 20_000
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
    sys.stdout = _Aside(stderr)  # type: ignore[assignment]
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


def open_missing() -> None:
    """Open the null device for a standard stream that was closed (``>&-``).

    Otherwise the next opened file, such as a store, would take its number, and library output would be written into it.
    A closed stdout is opened for reading, so that writing rows to it is still an error; a closed stdin is empty, and
    messages to a closed stderr are lost.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "r"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (no path)


def discard_stdout() -> None:
    """Discard the rest of stdout: nobody reads it, and Python would complain again on closing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def settle_stdout() -> None:
    """Write what a failed command left in stdout's buffer, or discard it if that is not possible."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            discard_stdout()


def stdin_lines() -> Iterator[str]:
    """Give the lines of stdin as UTF-8 in any locale; other bytes are decoded as in file names.

    Several processes of one host have the same stdin, and each line goes to whichever reads first. So the first process
    of a job reads all of them, for all: every process has to ask, at the same point of its work.

    Raises:
        InfluenceError: a line too long for a list of files, such as that of a device or a binary file.
    """
    if distributed.size() == 1:
        yield from _read_lines()
    else:
        yield from distributed.from_first(lambda: list(_read_lines()))


def _read_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    number = 0
    while line := sys.stdin.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise InfluenceError(
                f"stdin:{number}: a line of more than {LONGEST_LINE:,} characters",
                "stdin must be a list of test examples",
            )
        yield line
