"""stdin, stdout and stderr in every state: closed, full, without a reader, in another encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

from influence_cli.errors import InfluenceError
from influence_cli.runtime import distributed

# For a list on stdin; a path has at most 4,096 characters.
LONGEST_LINE = 20_000


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
