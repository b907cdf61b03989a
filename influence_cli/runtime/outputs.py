"""Output files of a command: checked before the work, written completely or not at all, never equal to its inputs."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from influence_cli.errors import InfluenceError, near_path
from influence_cli.runtime import disk, stdout


@contextmanager
def open_output(output: Path | None) -> Iterator[TextIO]:
    """Open stdout, or a file that appears under its name only when it is complete.

    The file is written as ``FILE.part`` next to it, flushed and renamed at the end, and removed if the block fails.
    Devices and named pipes are written in place. A link is kept: its target is replaced.

    Args:
        output: the file, or None for stdout.

    Yields:
        A UTF-8 text stream with ``\\n`` line ends; names that are not UTF-8 come out as their own bytes. Its ``buffer``
        takes bytes instead.

    Raises:
        InfluenceError: it cannot be written.
    """
    if output is None:
        stream = _stdout()
        yield stream
        try:
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise unwritable("stdout", error) from error
        return
    check_output(output)
    in_place = output.exists() and not output.is_file()
    target = Path(os.path.realpath(output))
    in_block = False
    try:
        with nullcontext(output) if in_place else disk.whole(target) as part:
            stream = part.open("w", encoding="utf-8", errors="surrogateescape", newline="\n")
            try:
                in_block = True
                yield stream
                in_block = False
            except BaseException:
                with suppress(OSError):
                    stream.close()
                raise
            stream.close()
    except BrokenPipeError:
        raise
    except OSError as error:
        if in_block:  # rows are made while they are written: it may be about a file that is read
            raise
        raise unwritable(output, error) from error


def check_output(output: Path) -> None:
    """Refuse a file that cannot be written; call it before long work, not only after it.

    Args:
        output: the file to be written.

    Raises:
        InfluenceError: it is a folder, its folder is missing, or one of the two is not writable.
    """
    folder = output.parent
    try:
        if output.is_dir():
            raise InfluenceError(f"{output} is a folder", "name a file in it")
        if output.exists() and not output.is_file():
            return
        if not folder.exists():
            raise InfluenceError(
                f"{output} cannot be written: there is no folder {folder}", f"mkdir -p {shlex.quote(str(folder))}"
            )
        if not folder.is_dir():
            raise InfluenceError(f"{output} cannot be written: {folder} is a file, not a folder")
        for path in (folder, output):
            if path.exists() and not os.access(path, os.W_OK):
                raise InfluenceError(f"{output} cannot be written: no permission to write {path}")
    except OSError as error:
        raise unwritable(output, error) from error


def run_file(path: Path) -> Path:
    """Name the file next to a result with the facts of the run that wrote it."""
    return path.with_name(path.name + ".run.json")


def refuse_clashes(
    used: Sequence[tuple[Path, str]], rows: Path | None, written: Sequence[tuple[Path, str]] = ()
) -> None:
    """Refuse to write a file that is in use, or two files with one name; ``--force`` does not override this.

    Args:
        used: files that stay as they are, each with what it is called.
        rows: the file of ``-o``; its ``.run.json`` is written too.
        written: the other files, likewise.
    """
    seen = {os.path.realpath(path): what for path, what in used}
    if rows is not None:
        written = ((rows, "the file of -o"), (run_file(rows), "the run file of -o"), *written)
    for path, what in written:
        real = os.path.realpath(path)
        if real in seen:
            raise InfluenceError(
                f"{near_path(path)} would be both {seen[real]} and {what}", "give them different names"
            )
        seen[real] = what


def _stdout() -> TextIO:
    stream = stdout.rows()
    if isinstance(stream, io.TextIOWrapper):
        if stream.isatty():
            # Its encoding is the terminal's; missing characters are escaped and never raise.
            stream.reconfigure(errors="backslashreplace")
        else:
            stream.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    return stream


def unwritable(output: object, error: OSError) -> InfluenceError:
    """Make the error for an output that cannot be written."""
    return InfluenceError(f"{output} cannot be written: {error.strerror or error}")
