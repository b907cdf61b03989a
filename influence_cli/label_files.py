"""Read the files that go with a data set: label overrides, exclusions, and the truth that scores a ranking.

All of them are ``.npy`` arrays or ``.csv`` tables with a header.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.user_code import describe

NUMBER_COLUMNS = ("index", "indices")
LABEL_COLUMNS = ("true_label", "label", "new_label")


def class_number(name: str, classes: Sequence[str], where: str) -> int:
    """Find a class by its name, or by its number where no class has that name."""
    if name in classes:
        return list(classes).index(name)
    if name.isascii() and name.isdigit() and int(name) < len(classes):
        return int(name)
    raise InfluenceError(f"{where}: there is no class {name!r}", did_you_mean(name, classes))


def read_indices(path: Path, length: int, where: str) -> np.ndarray:
    """Read positions of a data set: a ``.npy`` of integers, or the column ``index`` of a ``.csv``.

    Returns:
        int64 [k], sorted, without repeats.

    Raises:
        InfluenceError: unreadable, not whole numbers, or outside the data set.
    """
    table = _read(path, where)
    if isinstance(table, dict):
        column = _column(table, NUMBER_COLUMNS, path, where)
        indices = _whole_numbers(table[column], path, where)
    else:
        indices = _whole_numbers(table, path, where)
    return np.unique(_within(indices, length, path, where))


def read_labels(path: Path, labels: np.ndarray, classes: Sequence[str] | None, where: str) -> np.ndarray:
    """Read labels that replace a data set's own.

    A ``.npy`` holds one class number an example; a ``.csv`` has either a column ``label`` with a row an example, or
    ``index,label`` for some of them. A label is a class name or number.

    Args:
        path: the file.
        labels: int64 [length], the data set's labels.
        classes: class names, or None where the data set has none.
        where: start of any error.

    Returns:
        int64 [length].
    """
    table = _read(path, where)
    result = labels.copy()
    if not isinstance(table, dict):
        given = _whole_numbers(table, path, where)
        if len(given) != len(labels):
            raise InfluenceError(f"{where}: {path} has {len(given)} labels, the data set {len(labels)} examples")
        result[:] = given
    else:
        column = _column(table, LABEL_COLUMNS, path, where)
        numbers = np.array([_label(text, classes, f"{where}: {path}") for text in table[column]], dtype=np.int64)
        index_column = next((name for name in NUMBER_COLUMNS if name in table), None)
        if index_column is None:
            if len(numbers) != len(labels):
                raise InfluenceError(
                    f"{where}: {path} has {len(numbers)} labels, the data set {len(labels)} examples",
                    "give a row an example, or a column 'index' beside 'label'",
                )
            result[:] = numbers
        else:
            indices = _within(_whole_numbers(table[index_column], path, where), len(labels), path, where)
            if len(np.unique(indices)) != len(indices):
                repeated = int(indices[np.flatnonzero(np.diff(np.sort(indices)) == 0)[0]])
                raise InfluenceError(f"{where}: {path} names an index twice (such as {repeated})")
            result[indices] = numbers
    if classes is not None and len(result) and (result.min() < 0 or result.max() >= len(classes)):
        wrong = int(result.min()) if result.min() < 0 else int(result.max())
        raise InfluenceError(f"{where}: {path} has the label {wrong}, but there are {len(classes)} classes")
    return result


def read_truth(path: Path, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Read which labels are wrong: the truth that ``--truth`` scores a ranking by.

    A ``.csv`` with a column ``index`` lists the wrong ones (all that it names, or, where it has ``true_label``,
    those whose true label differs from the given one); a file with one label an example is the true labels; a
    shorter ``.npy`` lists positions.

    Returns:
        bool [length]: True where the given label is wrong.
    """
    where = "--truth"
    table = _read(path, where)
    wrong = np.zeros(len(labels), dtype=bool)
    if isinstance(table, dict):
        if any(name in table for name in NUMBER_COLUMNS) and "true_label" not in table:
            wrong[read_indices(path, len(labels), where)] = True
            return wrong
        return np.asarray(read_labels(path, labels, classes, where) != labels)
    numbers = _whole_numbers(table, path, where)
    if len(numbers) == len(labels):
        return np.asarray(numbers != labels)
    wrong[_within(numbers, len(labels), path, where)] = True
    return wrong


def _label(text: str, classes: Sequence[str] | None, where: str) -> int:
    if classes is not None:
        return class_number(text, classes, where)
    try:
        return int(text)
    except ValueError as error:
        raise InfluenceError(f"{where}: {text!r} is not a class number, and the data set has no class names") from error


def _read(path: Path, where: str) -> np.ndarray | dict[str, list[str]]:
    if not path.is_file():
        raise InfluenceError(f"{where}: there is no file {path}")
    if path.suffix == ".npy":
        try:
            return np.asarray(np.load(path, allow_pickle=False)).reshape(-1)
        except (OSError, ValueError, EOFError) as error:
            raise InfluenceError(f"{where}: {path} is not a readable .npy file: {describe(error)}") from error
    if path.suffix != ".csv":
        raise InfluenceError(f"{where}: {path} is neither .npy nor .csv")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InfluenceError(f"{where}: {path} is not a readable .csv file: {describe(error)}") from error
    if not rows:
        raise InfluenceError(f"{where}: {path} is empty", "the first line names the columns: index,label")
    header = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise InfluenceError(f"{where}: {path}:{number}: {len(row)} fields, the header has {len(header)}")
    return {name: [row[position].strip() for row in rows[1:] if row] for position, name in enumerate(header)}


def _column(table: dict[str, list[str]], allowed: Sequence[str], path: Path, where: str) -> str:
    for name in allowed:
        if name in table:
            return name
    raise InfluenceError(
        f"{where}: {path} has the columns {', '.join(map(repr, table))}", f"it needs one of: {', '.join(allowed)}"
    )


def _whole_numbers(values: np.ndarray | Sequence[str], path: Path, where: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    try:
        floats = array.astype(np.float64)
        whole = floats.astype(np.int64)
    except (ValueError, OverflowError) as error:
        raise InfluenceError(
            f"{where}: {path} holds something that is not a whole number: {describe(error)}"
        ) from error
    if not np.array_equal(floats, whole):
        raise InfluenceError(f"{where}: {path} holds numbers that are not whole")
    return whole


def _within(indices: np.ndarray, length: int, path: Path, where: str) -> np.ndarray:
    outside = indices[(indices < 0) | (indices >= length)]
    if len(outside):
        raise InfluenceError(f"{where}: {path} names the index {outside[0]}; the data set has 0 to {length - 1}")
    return indices
