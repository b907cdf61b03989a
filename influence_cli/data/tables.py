"""Read a CSV, TSV or NumPy file with one row per example, and its columns; a row that does not fit is named."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from influence_cli.errors import InfluenceError, describe, did_you_mean, quoted
from influence_cli.runtime.csv_cells import unguarded

NUMBER_COLUMNS = ("index", "indices")

LARGEST = 2**63 - 1
# A class number as text; pandas writes 1.0 where a column has gaps.
CLASS_NUMBER = re.compile(r"([+-]?\d{1,18})(?:\.0*)?", re.ASCII)
# Usual names of a column of labels; of two of them the config has to name one.
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "target",
    "targets",
    "category",
    "class_name",
    "fine_label",
    "coarse_label",
    "cls",
    "species",
)


@dataclass(frozen=True)
class Table:
    """A ``.csv``: its header, its columns, the line of each row, and the start of its errors."""

    header: tuple[str, ...]
    columns: dict[str, list[str]]
    lines: list[int]
    file: str

    def at(self, row: int) -> str:
        """Name a row's line: ``influence.yaml:9: labels.csv:3: ``."""
        return f"{self.file}:{self.lines[row]}: "

    def index_column(self) -> str | None:
        """Find the column of positions, if there is one."""
        return next((name for name in NUMBER_COLUMNS if name in self.columns), None)

    def column(self, allowed: Sequence[str]) -> str:
        """Find the first of some columns that exists."""
        for name in allowed:
            if name in self.columns:
                return name
        raise InfluenceError(
            f"{self.file} has the columns {', '.join(map(repr, self.columns))}",
            f"it needs one of: {', '.join(allowed)}",
        )

    def indices(self, name: str, length: int, paths: Sequence[str] | None = None) -> np.ndarray:
        """Read a column of positions in a data set; if its files are given, the column ``path`` must agree."""
        moved = path_check(self, paths)
        positions = []
        for row in range(len(self.lines)):
            positions.append(self.index(name, row, length))
            moved(row, positions[-1])
        return np.array(positions, dtype=np.int64)

    def whole_number(self, name: str, row: int) -> int:
        """Read one cell that has to be a whole number."""
        return _whole_number(self.columns[name][row], self.at(row))

    def index(self, name: str, row: int, length: int, hint: str = "") -> int:
        """Read one position in a data set; ``hint`` is for a position outside of it."""
        index = self.whole_number(name, row)
        if not 0 <= index < length:
            raise InfluenceError(f"{self.at(row)}names the index {index}; valid indices are 0 to {length - 1}", hint)
        return index


def path_check(table: Table, paths: Sequence[str] | None) -> Callable[[int, int], None]:
    """Make the function that refuses a row if another file is at its position now.

    Paths are relative to the common folder of all files, so moving a project as a whole changes nothing.
    """
    if paths is None or "path" not in table.columns:
        return lambda _row, _index: None
    root = parts_above(paths)
    column = table.columns["path"]

    def check(row: int, index: int) -> None:
        cell = column[row]
        if not cell or cell == paths[index]:  # nearly always, and quick
            return
        now = PurePath(paths[index]).parts[root:]
        if not any(same_end(PurePath(text).parts, now) for text in (cell, cell.strip(), unguarded(cell))):
            raise InfluenceError(
                f"{table.at(row)}index {index} is now {paths[index]}, but was {cell}",
                "files were moved, added or removed since this was written: write it again",
            )

    return check


def parts_above(paths: Sequence[str]) -> int:
    """Count the parts of the common folder of all files."""
    return len(PurePath(os.path.commonpath([os.path.dirname(path) for path in paths])).parts)  # noqa: PTH120


def same_end(given: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Say whether the shorter of two paths is the end of the other."""
    length = min(len(given), len(now))
    return length > 0 and given[-length:] == now[-length:]


def load_npy(path: Path, what: str) -> np.ndarray:
    """Read a ``.npy`` after checking that the file has all its numbers: its header may claim any shape.

    Raises:
        InfluenceError: starting with ``what``; not an array, of Python objects, truncated.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray):  # an archive of several
            raise ValueError("it holds several arrays")
        return np.array(values)
    except Exception as error:  # NumPy lets Python's parser read the header, which may fail in any way
        raise InfluenceError(f"{what} is not a readable .npy file: {describe(error)}") from error


def read_table(path: Path, where: str = "") -> Table:
    """Read a ``.csv`` or ``.tsv`` with a header, its cells as they stand.

    Args:
        path: the file.
        where: start of any error; if empty, only the file is named.

    Returns:
        The table, blank lines left out. Names of files and classes may have bytes that are not UTF-8.

    Raises:
        InfluenceError: unreadable, empty, or a line with another number of fields than the header.
    """
    before = f"{where}: " if where else ""
    if not path.is_file():
        raise InfluenceError(f"{before}there is no file {path}")
    kind = ".tsv" if path.suffix.lower() == ".tsv" else ".csv"
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",")
            line = 1
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
    except (OSError, csv.Error) as error:
        raise InfluenceError(f"{before}{path} is not a readable {kind} file: {describe(error)}") from error
    if not rows:
        raise InfluenceError(f"{before}{path} is empty", "the first line names the columns: index,label")
    header = tuple(name.strip() for name in rows.pop(0))
    for row, line in zip(rows, lines[1:], strict=True):
        if len(row) != len(header):
            raise InfluenceError(f"{before}{path}:{line}: {len(row)} fields, but the header has {len(header)}")
    columns = {name: [row[position] for row in rows] for position, name in enumerate(header)}
    for text in (*header, *(text for name in NUMBER_COLUMNS for text in columns.get(name, ()))):
        if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
            raise InfluenceError(f"{before}{path} is not a readable {kind} file: it is not UTF-8")
    return Table(header, columns, lines[1:], f"{before}{path}")


def pick_column(columns: Iterable[str], given: str | None, usual: Sequence[Sequence[str]], key: str, where: str) -> str:
    """Find a column by the name that the config gives, otherwise by its usual names.

    Args:
        columns: all that there are.
        given: the config's, or None.
        usual: groups of names in small letters; a later group counts where none of an earlier one is there.
        key: of the config, such as ``label``.
        where: start of any error, such as ``list.csv``.

    Raises:
        InfluenceError: no such column, none with a usual name, or several.
    """
    names = list(columns)
    if given is not None:
        if given not in names:
            raise InfluenceError(f"{where} has no column {given!r}", did_you_mean(given, names))
        return given
    for group in usual:
        hits = [name for name in names if name.casefold() in group]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise InfluenceError(
                f"{where} has the columns {' and '.join(map(repr, hits))}, and each could be the {key}",
                "name one: " + ", or ".join(f"{key}: {name}" for name in hits),
            )
    raise InfluenceError(
        f"{where} has no column with a usual name of the {key}",
        f"name it: {key}: COLUMN; the columns are {', '.join(names[:12])}{', …' if len(names) > 12 else ''}",
    )


def number_labels(
    texts: Sequence[str], known: Sequence[str] | None, at: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Turn a column of labels into class numbers: whole numbers stay, names are numbered in sorted order.

    Args:
        texts: one label per example.
        known: the classes of the training examples, whose numbers count; empty where they are numbers only; None where
            these are the training examples.
        at: names the place of an example, such as ``list.csv:3: ``.

    Returns:
        int64 [n], and the class names, None where labels are numbers.

    Raises:
        InfluenceError: an example without a label, numbers beside names, or a class that ``known`` lacks.
    """
    words = [text.strip() for text in texts]
    if "" in words:
        rest = words.count("") - 1
        raise InfluenceError(
            f"{at(words.index(''))}there is no label" + (f", and {rest:,} more rows have none" if rest else ""),
            "give it one, or remove the row",
        )
    whole = {word: CLASS_NUMBER.fullmatch(word) for word in dict.fromkeys(words)}
    if known:
        odd = next((word for word in whole if word not in known), None)
        if odd is not None:
            raise InfluenceError(
                f"{at(words.index(odd))}{quoted(odd, 40)} is not a class of the training examples",
                did_you_mean(odd, known),
            )
        numbers = {name: number for number, name in enumerate(known)}
        return np.array([numbers[word] for word in words], dtype=np.int64), tuple(known)
    if all(whole.values()):
        values = {word: int(match[1]) for word, match in whole.items() if match}
        return np.array([values[word] for word in words], dtype=np.int64), None
    name = next(word for word, match in whole.items() if not match)
    if any(whole.values()):
        number = next(word for word, match in whole.items() if match)
        raise InfluenceError(
            f"{at(words.index(name))}the label is {quoted(name, 40)}, but {at(words.index(number)).strip(': ')} has "
            f"the number {number}",
            "labels are all class numbers, or all names",
        )
    if all(map(_is_number, whole)):
        raise InfluenceError(f"{at(words.index(name))}the label {name} is not a whole number")
    if known is not None:
        raise InfluenceError(
            f"{at(words.index(name))}the label is {quoted(name, 40)}, but the training examples have class numbers "
            "without names",
            "give both sets names, or both numbers",
        )
    names = sorted(whole)
    numbers = {word: number for number, word in enumerate(names)}
    return np.array([numbers[word] for word in words], dtype=np.int64), tuple(names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole_number(text: str, where: str) -> int:
    text = text.strip()
    try:
        number = float(text)
    except ValueError as error:
        raise InfluenceError(f"{where}{text!r} is not a whole number") from error
    if not number.is_integer():
        raise InfluenceError(f"{where}{text} is not a whole number")
    # Not through float unless needed: past 2⁵³ that would give another number.
    whole = int(text) if text.lstrip("+-").isdecimal() else int(number)
    if abs(whole) > LARGEST:
        raise InfluenceError(f"{where}{text} is too large")
    return whole
