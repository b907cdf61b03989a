"""Whose code raised an exception that nobody expected: the user's, this package's, or a library's."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import influence_cli
from influence_cli.config.source_code import is_installed
from influence_cli.errors import describe, near_path
from influence_cli.runtime.work import where_it_stopped

PACKAGE = Path(influence_cli.__file__).resolve().parent
DEBUG = "INFLUENCE_DEBUG=1 shows the traceback"


@dataclass(frozen=True)
class Raised:
    """The frame that an exception is put down to.

    Attributes:
        file: its file, for people.
        line: in it.
        function: in it.
        library: the package that raised it when that frame called it; empty if the frame did.
        by_user: whether it is the user's code.
    """

    file: str
    line: int
    function: str
    library: str
    by_user: bool


def raised_by(error: BaseException) -> Raised | None:
    """Find the innermost frame of the user's code or of this package; None where there is neither."""
    library = ""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        if name.startswith("<"):
            continue
        file = Path(name).resolve()
        function = frame.f_code.co_name
        if file.is_relative_to(PACKAGE):
            return Raised(str(file.relative_to(PACKAGE.parent)), line, function, library, by_user=False)
        if not is_installed(file):
            return Raised(str(near_path(file)), line, function, library, by_user=True)
        library = library or _package(file)
    return None


def _package(file: Path) -> str:
    """Name the package of an installed file, or Python itself."""
    for at, part in enumerate(file.parts):
        if part in ("site-packages", "dist-packages"):
            return Path(file.parts[at + 1]).stem
    return "Python"


def explain(error: BaseException, command: str) -> tuple[str, str]:
    """Say in one line what stopped a command, at which example and part of the work, and whose code it was.

    Args:
        error: which nobody expected.
        command: such as ``rank``.

    Returns:
        The message, and as a hint what to do: where to mend it, or where to report it.
    """
    example, part = where_it_stopped(error)
    stopped = f"{f' at {example}' if example else ''}{f', during {part}' if part else ''}"
    raised = raised_by(error)
    if raised is not None and raised.by_user:
        through = f" in {raised.library}," if raised.library else ""
        where = f"{raised.file}:{raised.line}"
        message = (
            f"{command}: your code failed with {describe(error)} ({where},{through} in {raised.function}){stopped}"
        )
        instead = ", or list the example under exclude" if example else ""
        return message, f"mend {where}{instead}; {DEBUG}"
    where = "" if raised is None else f" ({raised.file}:{raised.line}, in {raised.function})"
    whose = f"{raised.library}, called by influence" if raised is not None and raised.library else "influence itself"
    message = f"{command}: unexpected error in {whose}{where}: {describe(error)}{stopped}"
    return message, f"none of your code raised it: please report it {_reports()}, with this line; {DEBUG}"


def _reports() -> str:
    """Say where a report belongs: the page that the package names, if it names one."""
    try:
        urls = metadata("influence-cli").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    pages = [url.partition(",")[2].strip() for url in urls if "issue" in url.lower() or "bug" in url.lower()]
    return f"at {pages[0]}" if pages else f"on the issue page of influence (this is {influence_cli.__version__})"
