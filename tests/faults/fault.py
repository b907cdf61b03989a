"""A planted fault: one line of the package, changed, and the tests that have to notice.

A fault is found by its text, not by its file: it has to occur once in the whole package, wherever it lies. Its tests
are named by their functions, each of which exists once in the suite. So neither moving code nor moving tests touches a
fault; rewriting the line does, and then ``test_faults.py`` says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# What the package is written in: code, and the pages' templates, scripts and styles.
SUFFIXES = (".py", ".j2", ".js", ".css")


@dataclass(frozen=True)
class Fault:
    """A one-line fault.

    Attributes:
        name: such as ``influence-sign``.
        file: where the line lay when the fault was written, for readers; the line is searched in the whole package.
        old: a piece of code that occurs once in the package, best without the names of modules in it.
        new: what takes its place.
        why: what goes wrong with it.
        tests: names of test functions, each of which has to exist once; one of them at least has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


class DoesNotApplyError(Exception):
    """The line, or a test that should notice, is not there exactly once."""


@cache
def _texts(folder: Path, pattern: str) -> tuple[tuple[Path, str], ...]:
    paths = sorted(path for path in folder.rglob(pattern) if path.suffix in SUFFIXES)
    return tuple((path, path.read_text(encoding="utf-8")) for path in paths)


def place_of(fault: Fault, code: Path) -> Path:
    """Find the file of the package that a fault changes.

    Args:
        fault: the fault.
        code: the checkout: it holds ``influence_cli``.

    Raises:
        DoesNotApplyError: the line is not there, or several times.
    """
    places = [(path, text.count(fault.old)) for path, text in _texts(code / "influence_cli", "*") if fault.old in text]
    if [count for _, count in places] != [1]:
        found = ", ".join(f"{path.relative_to(code)} ({count})" for path, count in places) or "nowhere"
        raise DoesNotApplyError(f"{fault.name}: {fault.old!r} has to be there once: {found}")
    return places[0][0]


def nodes_of(fault: Fault, code: Path) -> tuple[str, ...]:
    """Name the tests of a fault as pytest does, from the checkout: ``tests/test_scores.py::test_…``.

    Raises:
        DoesNotApplyError: a test function is not there, or several times.
    """
    nodes = []
    for name in fault.tests:
        head = re.compile(rf"^def {re.escape(name)}\(", re.MULTILINE)
        places = [path for path, text in _texts(code / "tests", "test_*.py") if head.search(text)]
        if len(places) != 1:
            raise DoesNotApplyError(f"{fault.name}: {len(places)} test functions are called {name}")
        nodes.append(f"{places[0].relative_to(code).as_posix()}::{name}")
    return tuple(nodes)


def planted(fault: Fault, text: str) -> str:
    """Give the text of a file with the fault in it."""
    return text.replace(fault.old, fault.new)
