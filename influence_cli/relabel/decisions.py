"""Read a file of decisions, in which a person judges labels, and check it against the current data set.

A decision that no longer fits (another label, another file, an excluded example) is refused with its line, because it
was made about something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.data.file_sets import is_within
from influence_cli.data.label_files import class_number
from influence_cli.data.tables import Table, parts_above, read_table, same_end
from influence_cli.errors import InfluenceError, did_you_mean, near_path
from influence_cli.runtime.csv_cells import unguarded

if TYPE_CHECKING:
    from influence_cli.data.split import Split

DECISIONS = ("keep", "relabel", "drop", "unsure")
COLUMNS = ("index", "path", "label", "decision", "new_label")
# What influence review adds: who decided, and when. Nothing depends on them.
NOTED = ("who", "when")
NEEDED = ("index", "label", "decision")
# How many wrong lines are named.
NAMED = 5


@dataclass(frozen=True)
class Decision:
    """What should happen to one example.

    Attributes:
        index: its position in the data set.
        label: its class number when it was reviewed, which is still the current one unless the decision was applied.
        decision: one of `DECISIONS`.
        new_label: the class number of a relabel, otherwise None.
        line: the first line of the file that says so.
    """

    index: int
    label: int
    decision: str
    new_label: int | None
    line: int


@dataclass(frozen=True)
class Decisions:
    """A file of decisions that fits the data set.

    Attributes:
        rows: one per example, in the order of the file.
        with_paths: whether every line named its image as well as its position.
    """

    rows: tuple[Decision, ...]
    with_paths: bool

    def count(self, decision: str) -> int:
        """Count the examples with this decision."""
        return sum(row.decision == decision for row in self.rows)


def read_decisions(
    path: Path,
    split: Split,
    classes: Sequence[str],
    folder: Path,
    *,
    places: tuple[str, str] = ("", ""),
    applied: bool = False,
) -> Decisions:
    """Read and check a file of decisions; a file with any mistake is refused as a whole.

    The columns are ``index,path,label,decision,new_label``, in any order. ``path`` may be missing, and ``new_label``
    where nothing is relabelled. ``who`` and ``when`` may follow. The same line twice is not a mistake.

    Args:
        path: the ``.csv``.
        split: the examples, with their current labels.
        classes: class names by number.
        folder: relative paths of images are taken from it, or else from the current one.
        places: where the config names the labels and the exclusions, for messages.
        applied: whether a decision fits as well if the data set already is as it says.

    Raises:
        InfluenceError: at the first wrong line; its hint counts the others.
    """
    if path.suffix != ".csv":
        raise InfluenceError(f"{path}: decisions must be a .csv file", f"its first line is {','.join(COLUMNS)}")
    table = read_table(path)
    _check_header(table)
    check = _checker(table, split, classes, folder, places, applied=applied)
    decisions: dict[int, Decision] = {}
    mistakes: list[tuple[int, InfluenceError]] = []
    for row, line in enumerate(table.lines):
        try:
            decision = check(row)
            _refuse_conflict(table.at(row), decision, decisions.setdefault(decision.index, decision), classes)
        except InfluenceError as error:
            mistakes.append((line, error))
    if mistakes:
        raise _all_of(mistakes)
    paths = table.columns.get("path", [""] * len(table.lines))
    return Decisions(tuple(decisions.values()), all(cell.strip() for cell in paths))


def read_noted(path: Path) -> dict[int, tuple[str, str]]:
    """Read who decided and when, by line of the file; empty text where it does not say."""
    table = read_table(path)
    blank = [""] * len(table.lines)
    columns = [table.columns.get(name, blank) for name in NOTED]
    return {line: (unguarded(who), unguarded(when)) for line, who, when in zip(table.lines, *columns, strict=True)}


def _check_header(table: Table) -> None:
    where = f"{table.file}:1"
    shape = f"the columns are {','.join(COLUMNS)}"
    if len(table.header) == 1 and ";" in table.header[0]:
        raise InfluenceError(f"{where}: the columns are separated by semicolons", f"save it with commas; {shape}")
    for name in table.header:
        if name not in (*COLUMNS, *NOTED):
            raise InfluenceError(f"{where}: unknown column {name!r}", did_you_mean(name, COLUMNS))
        if table.header.count(name) > 1:
            raise InfluenceError(f"{where}: the column {name!r} appears twice", shape)
    for name in NEEDED:
        if name not in table.header:
            raise InfluenceError(f"{where}: the column {name!r} is missing", shape)


def _checker(
    table: Table, split: Split, classes: Sequence[str], folder: Path, places: tuple[str, str], *, applied: bool
) -> Callable[[int], Decision]:
    """Make the function that reads one row; each check comes before those that need it."""
    used = np.zeros(len(split.labels), dtype=bool)
    used[split.indices] = True
    columns = table.columns
    blank = [""] * len(table.lines)
    root = parts_above(split.paths) if split.paths else 0
    other = "training set? then without --on test" if split.name == "test" else "test set? then --on test"

    def check(row: int) -> Decision:
        at = table.at(row)
        index = table.index("index", row, len(split.labels), f"are these decisions about the {other}")
        word = columns["decision"][row].strip()
        if word not in DECISIONS:
            raise InfluenceError(f"{at}unknown decision {word!r}", did_you_mean(word, DECISIONS))
        label = class_number(columns["label"][row], classes, at.rstrip(": "))
        if not used[index] and not (applied and word == "drop"):
            raise InfluenceError(
                f"{at}index {index} is already excluded{_by(places[1])}",
                "remove the line; there is nothing left to decide",
            )
        _check_path(at, index, columns.get("path", blank)[row], split, folder, root)
        now = int(split.labels[index])
        new = columns.get("new_label", blank)[row]
        done = applied and word == "relabel" and new.strip() and class_number(new, classes, at.rstrip(": ")) == now
        if label != now and not done:
            raise InfluenceError(
                f"{at}stale: the label of index {index} is {classes[now]} now, but was {classes[label]} when reviewed",
                f"review it again, or remove the line{_by(places[0], '; labels come from ')}",
            )
        if word != "relabel":
            if new.strip():
                raise InfluenceError(
                    f"{at}new_label is {new.strip()!r}, but the decision is {word}", "only relabel has a new_label"
                )
            return Decision(index, label, word, None, table.lines[row])
        if not new.strip():
            raise InfluenceError(f"{at}relabel without a new_label", f"name a class: {did_you_mean('', classes)}")
        number = class_number(new, classes, at.rstrip(": "))
        if number == label:
            raise InfluenceError(f"{at}relabels index {index} from {classes[label]} to itself", "write keep instead")
        return Decision(index, label, word, number, table.lines[row])

    return check


def _check_path(at: str, index: int, cell: str, split: Split, folder: Path, root: int) -> None:
    """Refuse a row about a file that is not, or no longer, at this position of the data set.

    As in label files, moving a project as a whole changes nothing.
    """
    actual = split.path(index)
    if not cell.strip():
        return
    if actual is None:
        raise InfluenceError(f"{at}names the file {cell}, but this data set has no files", "is it of another data set?")
    given = [text for text in dict.fromkeys((cell, unguarded(cell), cell.strip())) if text]
    tried = [os.path.normpath(base / text) for text in given for base in (folder, Path.cwd())]
    same = {os.path.normpath(actual), _as_a_browser_writes(os.path.normpath(actual))}
    if not same & set(tried) and not any(_moved_along(text, actual, folder, root) for text in given):
        gone = not any(os.path.lexists(path) or is_within(path) for path in tried)
        raise InfluenceError(
            f"{at}stale: index {index} is {near_path(Path(actual))} now, but was {near_path(Path(given[0]))} when "
            f"reviewed{', which is gone' if gone else ''}",
            "images have been moved, added or removed since (or this is another data set): review them again",
        )
    if split.files is None and not os.path.lexists(actual):
        raise InfluenceError(f"{at}{near_path(Path(actual))} is gone", "the data set still lists it; remove the line")


def _moved_along(given: str, actual: str, folder: Path, root: int) -> bool:
    """Say whether a path is that of a file before its project was moved.

    The name of the set's own folder counts as well: training and test files often have the same names below it. If
    the path, or an end of it below the project's folder, is a file now, that file decides.
    """
    parts, top = PurePath(os.path.normpath(given)).parts, max(root - 1, 0)
    ends = (PurePath(os.path.normpath(text)).parts[top:] for text in (actual, _as_a_browser_writes(actual)))
    if not any(len(parts) >= len(end) and same_end(parts, end) for end in ends):
        return False
    places = [folder.joinpath(*parts[start:]) for start in range(1, len(parts))]
    there = next((place for place in (*places, folder / given) if os.path.lexists(place)), None)
    return there is None or _is_file(there, actual)


def _is_file(path: Path, actual: str) -> bool:
    return os.path.normpath(path) == os.path.normpath(actual) or (
        path.exists() and os.path.exists(actual) and os.path.samefile(path, actual)  # noqa: PTH110, PTH121
    )


def _as_a_browser_writes(path: str) -> str:
    """Spell a file name whose bytes are not UTF-8 as the page saves it: U+FFFD for each of them."""
    return re.sub("[\ud800-\udfff]", "\ufffd", path)


def _refuse_conflict(at: str, decision: Decision, earlier: Decision, classes: Sequence[str]) -> None:
    if (decision.decision, decision.new_label) != (earlier.decision, earlier.new_label):
        raise InfluenceError(
            f"{at}{told(decision, classes)} for index {decision.index}, but line {earlier.line} says "
            f"{told(earlier, classes)}",
            "keep only one of the two lines",
        )


def told(decision: Decision, classes: Sequence[str]) -> str:
    """Write a decision in a message: ``relabel to dog``."""
    return decision.decision + (f" to {classes[decision.new_label]}" if decision.new_label is not None else "")


def _by(place: str, before: str = " by ") -> str:
    return f"{before}{place}" if place else ""


def _all_of(mistakes: Sequence[tuple[int, InfluenceError]]) -> InfluenceError:
    """Report the first mistake, and how many other lines have one."""
    first = mistakes[0][1]
    if len(mistakes) == 1:
        return first
    lines = ", ".join(str(line) for line, _ in mistakes[:NAMED]) + (", …" if len(mistakes) > NAMED else "")
    return InfluenceError(first.message, f"{first.hint}; {len(mistakes):,} lines are wrong: {lines}".removeprefix("; "))
