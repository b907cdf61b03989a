"""stdin, stdout and stderr as they may be found: closed, full, without a reader, in another encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

from influence_cli.errors import InfluenceError

# Of a list on stdin; a path has at most 4,096.
LONGEST_LINE = 20_000


def open_missing() -> None:
    """Put the null device where a standard stream was closed (``>&-``).

    The next file to be opened would take its number, a store say, and what a library prints would be written into it.
    A closed stdout is opened for reading, so that writing rows to it is still an error; nothing is in a closed stdin,
    and what would be said on a closed stderr is lost.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "r"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (no path)


def discard_stdout() -> None:
    """Let the rest of stdout go nowhere: nobody takes it, and Python would complain once more on closing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def settle_stdout() -> None:
    """Write what a command that failed has left in stdout's buffer, or forget it where that is not possible."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            discard_stdout()


def stdin_lines() -> Iterator[str]:
    """Give the lines of stdin as UTF-8, whatever the locale; bytes that are not come out as file names have them.

    Raises:
        InfluenceError: a line that no list of files has, such as all of a device or of a file that is not text.
    """
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
