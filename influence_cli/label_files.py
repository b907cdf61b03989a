"""Read the files that go with a data set: label overrides, exclusions, and the truth that scores a ranking.

All of them are ``.npy`` arrays or ``.csv`` tables with a header.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from influence_cli.errors import InfluenceError, describe, did_you_mean, quoted
from influence_cli.runtime.csv_cells import unguarded

NUMBER_COLUMNS = ("index", "indices")
LABEL_COLUMNS = ("true_label", "label", "new_label")
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Table:
    """A ``.csv``: its header, its columns, the line of each row, and what an error in it begins with."""

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
        """Find the first of some columns that is there."""
        for name in allowed:
            if name in self.columns:
                return name
        raise InfluenceError(
            f"{self.file} has the columns {', '.join(map(repr, self.columns))}",
            f"it needs one of: {', '.join(allowed)}",
        )

    def indices(self, name: str, length: int, paths: Sequence[str] | None = None) -> np.ndarray:
        """Read a column of positions in a data set; where its files are given, the column ``path`` has to agree."""
        moved = path_check(self, paths)
        found = []
        for row in range(len(self.lines)):
            found.append(self.index(name, row, length))
            moved(row, found[-1])
        return np.array(found, dtype=np.int64)

    def whole_number(self, name: str, row: int) -> int:
        """Read one cell that has to be a whole number."""
        return _whole_number(self.columns[name][row], self.at(row))

    def index(self, name: str, row: int, length: int, hint: str = "") -> int:
        """Read one position in a data set; ``hint`` is for one that it does not have."""
        index = self.whole_number(name, row)
        if not 0 <= index < length:
            raise InfluenceError(f"{self.at(row)}names the index {index}; the data set has 0 to {length - 1}", hint)
        return index


def class_number(name: str, classes: Sequence[str], where: str) -> int:
    """Find a class by its name, or by its number where no class has that name."""
    word = name.strip()
    # As we write it first (an apostrophe before what a spreadsheet would take for a formula), then as it stands.
    for given in (unguarded(name), name, unguarded(word), word):
        if given in classes:
            return list(classes).index(given)
    if re.fullmatch(r"\d{1,18}", word, re.ASCII) and int(word) < len(classes):
        return int(word)
    raise InfluenceError(f"{where}: there is no class {quoted(word)}", did_you_mean(word, classes))


def read_indices(path: Path, length: int, where: str, paths: Sequence[str] | None = None) -> np.ndarray:
    """Read positions of a data set: a ``.npy`` of integers or a mask, or the column ``index`` of a ``.csv``.

    Args:
        path: the file.
        length: of the data set.
        where: start of any error.
        paths: the files of the data set; a column ``path`` is checked against them.

    Returns:
        int64 [k], sorted, without repeats.

    Raises:
        InfluenceError: unreadable, not whole numbers, outside the data set, or of files that have moved since.
    """
    found = _read(path, where)
    if isinstance(found, Table):
        return np.unique(found.indices(found.column(NUMBER_COLUMNS), length, paths))
    if found.dtype == bool:
        return np.flatnonzero(_as_long_as(found, length, path, where))
    return np.unique(_within(_whole_numbers(found, path, where), length, path, where))


def read_labels(
    path: Path,
    labels: np.ndarray,
    classes: Sequence[str] | None,
    where: str,
    paths: Sequence[str] | None = None,
) -> np.ndarray:
    """Read labels that replace a data set's own.

    A ``.npy`` holds one class number an example; a ``.csv`` has either a column ``label`` with a row an example, or
    ``index,label`` for some of them. A label is a class name or number.

    Args:
        path: the file.
        labels: int64 [length], the data set's labels.
        classes: class names, or None where the data set has none.
        where: start of any error.
        paths: the files of the data set; a column ``path`` is checked against them.

    Returns:
        int64 [length].
    """
    found = _read(path, where)
    result = labels.copy()
    if isinstance(found, Table):
        texts = found.columns[found.column(LABEL_COLUMNS)]
        given = np.array([_label(text, classes, found.at(row)) for row, text in enumerate(texts)], dtype=np.int64)
        index_column = found.index_column()
        if index_column is not None:
            indices = found.indices(index_column, len(labels), paths)
            _refuse_repeats(found, indices)
            result[indices] = given
            return _known(result, classes, path, where)
        if len(given) == len(labels):
            moved = path_check(found, paths)
            for row in range(len(labels)):
                moved(row, row)
    else:
        given = _whole_numbers(found, path, where)
    result[:] = _as_long_as(given, len(labels), path, where)
    return _known(result, classes, path, where)


@dataclass(frozen=True)
class Truth:
    """What is known of the labels of a data set.

    Attributes:
        wrong: bool [length]: True where the given label is wrong.
        true: int64 [length], the true labels, or None where the file only says which are wrong.
    """

    wrong: np.ndarray
    true: np.ndarray | None


def read_truth(path: Path, labels: np.ndarray, classes: Sequence[str]) -> Truth:
    """Read which labels are wrong: the truth that ``--truth`` scores a ranking by.

    A ``.csv`` with a column ``index`` lists the wrong ones (all that it names, or, where it has ``true_label``,
    those whose true label differs from the given one); a file with one label an example is the true labels; a
    ``.npy`` of booleans is a mask, a shorter one of integers lists positions.
    """
    where = "--truth"
    found = _read(path, where)
    true: np.ndarray | None = None
    if isinstance(found, Table):
        if found.index_column() is None or "true_label" in found.columns:
            true = read_labels(path, labels, classes, where)
    elif found.dtype != bool and len(found) >= len(labels):
        true = _known(_as_long_as(_whole_numbers(found, path, where), len(labels), path, where), classes, path, where)
    if true is not None:
        return Truth(np.asarray(true != labels), true)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[read_indices(path, len(labels), where)] = True
    return Truth(wrong, None)


def _label(text: str, classes: Sequence[str] | None, where: str) -> int:
    if classes is not None:
        return class_number(text, classes, where.rstrip(": "))
    try:
        return _whole_number(text, where)
    except InfluenceError as error:
        raise InfluenceError(f"{where}{text!r} is not a class number, and the data set has no class names") from error


def _known(labels: np.ndarray, classes: Sequence[str] | None, path: Path, where: str) -> np.ndarray:
    if classes is not None and len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise InfluenceError(f"{where}: {path} has the label {wrong}, but there are {len(classes)} classes")
    return labels


def _refuse_repeats(table: Table, indices: np.ndarray) -> None:
    seen: set[int] = set()
    for row, index in enumerate(indices.tolist()):
        if index in seen:
            raise InfluenceError(f"{table.at(row)}names an index twice (such as {index})")
        seen.add(index)


def path_check(table: Table, paths: Sequence[str] | None) -> Callable[[int, int], None]:
    """Make the function that refuses a row and its position where another file is there now.

    Paths count from the folder that all files lie in, so that a project that is moved as a whole stays the same.
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
                f"{table.at(row)}index {index} is {paths[index]}, and was {cell}",
                "files were moved, added or removed since this was written: make it anew",
            )

    return check


def parts_above(paths: Sequence[str]) -> int:
    """Count the parts of the folder that all files lie in."""
    return len(PurePath(os.path.commonpath([os.path.dirname(path) for path in paths])).parts)  # noqa: PTH120


def same_end(given: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Say whether the shorter of two paths is the end of the other."""
    length = min(len(given), len(now))
    return length > 0 and given[-length:] == now[-length:]


def _read(path: Path, where: str) -> np.ndarray | Table:
    if path.suffix == ".npy" and path.is_file():
        return load_npy(path, f"{where}: {path}").reshape(-1)
    if path.suffix != ".csv" and path.is_file():
        raise InfluenceError(f"{where}: {path} is neither .npy nor .csv")
    return read_table(path, where)


def load_npy(path: Path, what: str) -> np.ndarray:
    """Read a ``.npy`` of numbers that the file really has: its header may say any shape.

    Raises:
        InfluenceError: starting with ``what``; not an array, of Python objects, cut short.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray):  # an archive of several
            raise ValueError("it holds several arrays")
        return np.array(values)
    except Exception as error:  # NumPy lets Python's parser read the header, which may fail in any way
        raise InfluenceError(f"{what} is not a readable .npy file: {describe(error)}") from error


def read_table(path: Path, where: str = "") -> Table:
    """Read a ``.csv`` with a header, its cells as they stand.

    Args:
        path: the file.
        where: start of any error; where empty, the file alone.

    Returns:
        The table, blank lines left out. Names of files and classes may have bytes that are not UTF-8.

    Raises:
        InfluenceError: unreadable, empty, or a line with another number of fields than the header.
    """
    before = f"{where}: " if where else ""
    if not path.is_file():
        raise InfluenceError(f"{before}there is no file {path}")
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file)
            line = 1
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
    except (OSError, csv.Error) as error:
        raise InfluenceError(f"{before}{path} is not a readable .csv file: {describe(error)}") from error
    if not rows:
        raise InfluenceError(f"{before}{path} is empty", "the first line names the columns: index,label")
    header = tuple(name.strip() for name in rows.pop(0))
    for row, line in zip(rows, lines[1:], strict=True):
        if len(row) != len(header):
            raise InfluenceError(f"{before}{path}:{line}: {len(row)} fields, the header has {len(header)}")
    columns = {name: [row[position] for row in rows] for position, name in enumerate(header)}
    for text in (*header, *(text for name in NUMBER_COLUMNS for text in columns.get(name, ()))):
        if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
            raise InfluenceError(f"{before}{path} is not a readable .csv file: it is not UTF-8")
    return Table(header, columns, lines[1:], f"{before}{path}")


def _whole_number(text: str, where: str) -> int:
    text = text.strip()
    try:
        number = float(text)
    except ValueError as error:
        raise InfluenceError(f"{where}{text!r} is not a whole number") from error
    if not number.is_integer():
        raise InfluenceError(f"{where}{text} is not whole")
    # Not through float where it need not be: past 2⁵³ that would be another number.
    whole = int(text) if text.lstrip("+-").isdecimal() else int(number)
    if abs(whole) > LARGEST:
        raise InfluenceError(f"{where}{text} is too large")
    return whole


def _whole_numbers(values: np.ndarray, path: Path, where: str) -> np.ndarray:
    kind = values.dtype.kind
    if kind not in "biuf":
        raise InfluenceError(f"{where}: {path} holds {values.dtype}, which is not a whole number")
    if kind == "f" and not (np.isfinite(values).all() and np.array_equal(values, np.floor(values))):
        raise InfluenceError(f"{where}: {path} holds numbers that are not whole")
    # Floats go through Python: near 2⁶³ a comparison in floats would let one too many pass.
    if kind in "uf" and len(values) and int(abs(values).max()) > LARGEST:
        raise InfluenceError(f"{where}: {path} holds numbers that are too large")
    return values.astype(np.int64)


def _as_long_as(values: np.ndarray, length: int, path: Path, where: str) -> np.ndarray:
    if len(values) != length:
        raise InfluenceError(
            f"{where}: {path} has {len(values)} labels, the data set {length} examples",
            "give one an example, or a .csv with a column 'index' beside 'label'",
        )
    return values


def _within(indices: np.ndarray, length: int, path: Path, where: str) -> np.ndarray:
    outside = indices[(indices < 0) | (indices >= length)]
    if len(outside):
        raise InfluenceError(f"{where}: {path} names the index {outside[0]}; the data set has 0 to {length - 1}")
    return indices
