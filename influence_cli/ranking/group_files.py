"""Which group each training example belongs to: its class, or a column of a metadata file that matches the data.

A metadata file is a ``.csv`` with a header and one row per training example. ``index`` (its position) or ``path`` (its
file) names the example; every other column can group them. A file that does not match is refused with the counts: sums
over some of the examples, or over the wrong ones, would look like an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from influence_cli.data.split import Split
from influence_cli.data.tables import Table, parts_above, path_check, read_table
from influence_cli.errors import InfluenceError, counted, did_you_mean, quoted
from influence_cli.runtime.csv_cells import unguarded

BY_CLASS, BLANK = "class", "(blank)"
NAMING = ("index", "indices", "path")
# From this many groups on, an average of two examples per group is too few.
MANY = 20


@dataclass(frozen=True)
class Grouping:
    """The groups of the training examples in use.

    Attributes:
        by: ``class``, or the column.
        names: of the groups.
        members: int64 [n], the group of each example in use.
    """

    by: str
    names: tuple[str, ...]
    members: np.ndarray


def group_by_class(split: Split, classes: Sequence[str]) -> Grouping:
    """Group the training examples by their labels; a class without examples is not a group."""
    labels, members = np.unique(split.labels[split.indices], return_inverse=True)
    return Grouping(BY_CLASS, tuple(classes[number] for number in labels.tolist()), members.astype(np.int64))


def read_groups(path: Path, by: str | None, split: Split) -> Grouping:
    """Group the training examples by a column of a metadata file.

    Rows of examples that are left out (``train.exclude``) may be there or not; every example in use has one row.

    Args:
        path: the ``.csv``.
        by: the column; None if the file has only one choice.
        split: the training examples.

    Raises:
        InfluenceError: no such column, rows that do not match the examples, or no distinct groups.
    """
    where = "--metadata"
    if path.suffix.lower() != ".csv" and path.is_file():
        raise InfluenceError(
            f"{where}: {path} is not a .csv", "give a header with index or path, then one row per example"
        )
    table = read_table(path, where)
    column = _column(table, by)
    positions = _positions(table, split)
    _check_lines_up(table, positions, split)
    texts = np.array([unguarded(cell).strip() or BLANK for cell in table.columns[column]], dtype=object)
    row_of = np.full(len(split.labels), -1)
    row_of[positions] = np.arange(len(positions))
    cells = texts[row_of[split.indices]].astype(str)
    names, members = np.unique(cells, return_inverse=True)
    _check_groups(names, cells, f"--by {column}: {table.file.partition(': ')[2]}")
    return Grouping(column, tuple(names.tolist()), members.astype(np.int64))


def _column(table: Table, by: str | None) -> str:
    """Find the column to group by."""
    for name in table.header:
        if table.header.count(name) > 1:
            raise InfluenceError(f"{table.file}: the column {name!r} appears twice")
    others = [name for name in table.header if name not in NAMING]
    if table.index_column() is None and "path" not in table.columns:
        raise InfluenceError(
            f"{table.file} has the columns {', '.join(map(repr, table.header))}: none of them names the example",
            "add a column index (its position, from 0) or path (its file)",
        )
    if by is None:
        if len(others) == 1:
            return others[0]
        raise InfluenceError(
            f"{table.file}: --by must name the column to group by",
            f"there {'are' if others else 'is'}: " + (", ".join(others) or "none besides those that name the example"),
        )
    if by not in others:
        raise InfluenceError(f"--by {by}: {table.file.partition(': ')[2]} has no such column", did_you_mean(by, others))
    return by


def _positions(table: Table, split: Split) -> np.ndarray:
    """Find the position of each row: −1 for no example of the data set, −2 if its path matches several files."""
    index = table.index_column()
    if index is not None:
        check, length = path_check(table, split.paths), len(split.labels)
        positions = []
        for row in range(len(table.lines)):
            position = table.whole_number(index, row)
            inside = 0 <= position < length
            if inside:
                check(row, position)
            positions.append(position if inside else -1)
        return np.array(positions, dtype=np.int64)
    if split.paths is None:
        raise InfluenceError(
            f"{table.file} names examples by path, but this data set has no files", "add a column index, from 0"
        )
    look_up = _PathIndex(split.paths)
    return np.array([look_up.find(cell) for cell in table.columns["path"]], dtype=np.int64)


class _PathIndex:
    """Finds a file of the data set by a path from elsewhere: absolute, or from any folder above it.

    The name of the set's own folder counts if it is given: training and test files often have the same names below it.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        top = max(parts_above(paths) - 1, 0)
        self._whole: dict[tuple[str, ...], int] = {}
        self._ends: dict[tuple[str, ...], int] = {}
        for position, path in enumerate(paths):
            parts = PurePath(path).parts[top:]
            self._whole[parts] = position
            for start in range(1, len(parts)):
                end = parts[start:]
                self._ends[end] = -2 if end in self._ends else position
        self._longest = max(map(len, self._whole))

    def find(self, cell: str) -> int:
        """Give the position of the file, −1 for none, −2 if several end in this path."""
        for text in dict.fromkeys((cell, cell.strip(), unguarded(cell.strip()))):
            parts = PurePath(text).parts
            for length in range(min(len(parts), self._longest), 0, -1):
                if (position := self._whole.get(parts[-length:])) is not None:
                    return position
            if (position := self._ends.get(parts)) is not None:
                return position
        return -1


def _check_lines_up(table: Table, positions: np.ndarray, split: Split) -> None:
    """Refuse rows that are not exactly one per example in use, with all counts."""
    known = positions[positions >= 0]
    often = np.bincount(known, minlength=len(split.labels))
    missing, double = split.indices[often[split.indices] == 0], np.flatnonzero(often > 1)
    unknown, vague = np.flatnonzero(positions == -1), np.flatnonzero(positions == -2)
    if not len(missing) + len(double) + len(unknown) + len(vague):
        return
    name = "path" if table.index_column() is None else str(table.index_column())

    def row(at: int) -> str:
        return f"line {table.lines[at]}: {quoted(table.columns[name][at], 60)}"

    parts = [
        f"{len(missing):,} missing" + (f" (such as {split.title(int(missing[0]))})" if len(missing) else ""),
        f"{len(unknown):,} unknown" + (f" (such as {row(int(unknown[0]))})" if len(unknown) else ""),
        f"{len(double):,} listed twice" + (f" (such as {split.title(int(double[0]))})" if len(double) else ""),
    ]
    if len(vague):
        parts.append(f"{len(vague):,} that match several files (such as {row(int(vague[0]))})")
    raise InfluenceError(
        f"{table.file} does not match the training set: {counted(len(positions), 'row')}, "
        f"{counted(len(split), 'example')} in use; {', '.join(parts)}",
        "write one row per training example, with its index (from 0) or its path",
    )


def _check_groups(names: np.ndarray, values: np.ndarray, where: str) -> None:
    """Refuse a column that makes a single group, or nearly as many groups as examples."""
    if len(names) < 2:
        raise InfluenceError(f"{where} has the value {quoted(names[0], 40)} for every example", "use another column")
    if len(names) > max(MANY, len(values) / 2):
        kind = "numbers" if all(_numbers(names)) else "values"
        raise InfluenceError(
            f"{where} has {len(names):,} different {kind} for {len(values):,} examples: too many groups",
            "merge them first, such as into ranges; influence rank scores single examples",
        )


def _numbers(texts: np.ndarray) -> Iterator[bool]:
    for text in texts:
        try:
            float(text)
        except ValueError:
            yield False
        else:
            yield True
