"""The one exception that a user sees, and how messages name words, files, sizes and packages that are missing."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

# What can move a cursor, break a line, change the reading direction or is not a character: controls, line and
# paragraph separators, marks of direction, lone surrogates (bytes of a file name that are not UTF-8).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class InfluenceError(Exception):
    """A user's mistake or a limit, told in one line, with the next step in a second.

    The command line prints ``error: MESSAGE`` and ``  HINT`` on stderr and exits with 2.

    Args:
        message: where it happened, what was given, what is wrong with it.
        hint: the next step; empty where the message already says it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # The default drops the hint when a worker process sends the error back.
        return (type(self), (self.message, self.hint))

    def _render_traceback_(self) -> list[str]:
        """Show the lines of the command line in a notebook, which asks for them in the place of a traceback."""
        return [f"error: {self.message}", *([f"  {self.hint}"] if self.hint else [])]


class Stopped(KeyboardInterrupt):
    """Ctrl-C after some work was finished: carries the line that says what was kept."""


def printable(text: str, keep: str = "") -> str:
    """Escape what can move a cursor, break a line or turn the reading direction.

    Args:
        text: any string, such as a file name with bytes that are not UTF-8.
        keep: characters to leave as they are.

    Returns:
        The text with ``\\n``, ``\\x1b``, ``\\u202e`` and the like spelt out; a stray byte of a file name as ``\\xff``.
    """

    def spell(match: re.Match[str]) -> str:
        letter = match.group()
        if letter in keep:
            return letter
        if "\udc80" <= letter <= "\udcff":
            return f"\\x{ord(letter) - 0xDC00:02x}"
        return letter.encode("unicode_escape", "surrogatepass").decode("ascii")

    return _UNSAFE.sub(spell, text)


def one_line(text: str, longest: int = 1000) -> str:
    """Turn any text into one printable line; of a longer text only its beginning and end are shown."""
    shown = printable(text)
    if len(shown) <= longest:
        return shown
    half = (longest - 3) // 2
    return f"{shown[:half]} … {shown[-half:]}"


def quoted(text: str, longest: int = 120) -> str:
    """Quote what was given, printable and not longer than a line should be.

    Args:
        text: any string, such as a line of a file that is not text at all.
        longest: how many of its characters are shown.
    """
    shown = f"'{printable(text[:longest])}'"
    return shown if len(text) <= longest else f"{shown}… ({len(text):,} characters)"


def require_extra(module: str, extra: str, what: str) -> None:
    """Refuse what needs a package that is not installed; call it before long work.

    Args:
        module: the package, looked up but not imported.
        extra: the extra of this package that names it.
        what: what needs it, such as ``--plot``.

    Raises:
        InfluenceError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise InfluenceError(f"{what} needs {module}, which is not installed", f"pip install 'influence-cli[{extra}]'")


def human_bytes(count: float) -> str:
    """Write a number of bytes for people: ``1.9 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def few(names: Sequence[str], shown: int = 4) -> str:
    """List the first names: ``conv1.weight, conv1.bias, …``."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


def counted(count: int, word: str) -> str:
    """Write a number of things: ``1 file``, ``1,200 files``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def near_path(path: Path) -> Path:
    """Name a file as a person would type it: relative to the current folder if it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def typed_path(path: Path) -> str:
    """Spell a file for a command to be typed: relative to the current folder, quoted."""
    return shlex.quote(os.path.relpath(path))


def did_you_mean(given: str, known: Iterable[str], *, listed: int = 12) -> str:
    """Name the nearest known word and list what is allowed.

    Args:
        given: the word that was not understood.
        known: every word that would have been.
        listed: how many of them to list at most.

    Returns:
        One line such as ``did you mean 'damping'? known: damping, matrix, method``.
    """
    words = sorted(set(known))
    # A word of two letters with one wrong letter still counts as near.
    near = difflib.get_close_matches(given, words, n=1, cutoff=0.5 if len(given) <= 3 else 0.6)
    shown = ", ".join(words[:listed]) + (f", … ({len(words)} in all)" if len(words) > listed else "")
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}known: {shown}"


def describe(error: BaseException) -> str:
    """Describe an exception from other code in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception of other code whose own text fails
        text = ""
    if len(text) > 300:
        text = text[:297] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
