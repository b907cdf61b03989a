"""Read the files that go with a data set: label overrides, exclusions, and the truth that scores a ranking.

All of them are ``.npy`` arrays or ``.csv`` tables with a header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence_cli.config.schema import DataConfig
from influence_cli.data.listed_images import ListedImages
from influence_cli.data.tables import (
    CLASS_NUMBER,
    LARGEST,
    NUMBER_COLUMNS,
    Table,
    _whole_number,
    load_npy,
    path_check,
    read_table,
)
from influence_cli.errors import InfluenceError, did_you_mean, quoted
from influence_cli.runtime.csv_cells import unguarded

LABEL_COLUMNS = ("true_label", "label", "new_label")


def class_number(name: str, classes: Sequence[str], where: str) -> int:
    """Find a class by its name, or by its number where no class has that name."""
    word = name.strip()
    # First as we write it (an apostrophe before what a spreadsheet reads as a formula), then as it stands.
    for given in (unguarded(name), name, unguarded(word), word):
        if given in classes:
            return list(classes).index(given)
    number = CLASS_NUMBER.fullmatch(word)
    if number is not None and number[1].isdecimal() and int(number[1]) < len(classes):
        return int(number[1])
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
    content = _read(path, where)
    if isinstance(content, Table):
        return np.unique(content.indices(content.column(NUMBER_COLUMNS), length, paths))
    if content.dtype == bool:
        return np.flatnonzero(_as_long_as(content, length, path, where))
    return np.unique(_within(_whole_numbers(content, path, where), length, path, where))


def read_labels(
    path: Path,
    labels: np.ndarray,
    classes: Sequence[str] | None,
    where: str,
    paths: Sequence[str] | None = None,
) -> np.ndarray:
    """Read labels that replace a data set's own.

    A ``.npy`` holds one class number per example; a ``.csv`` has either a column ``label`` with one row per example, or
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
    result = labels.copy()
    indices, given = given_labels(path, len(labels), classes, where, paths)
    result[indices] = given
    return known_labels(result, classes, path, where)


def given_labels(
    path: Path, length: int, classes: Sequence[str] | None, where: str, paths: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read which examples a file of ``read_labels`` gives a label, int64 [k], and the labels, int64 [k]."""
    content = _read(path, where)
    if isinstance(content, Table):
        texts = content.columns[content.column(LABEL_COLUMNS)]
        given = np.array([_label(text, classes, content.at(row)) for row, text in enumerate(texts)], dtype=np.int64)
        index_column = content.index_column()
        if index_column is not None:
            indices = content.indices(index_column, length, paths)
            _refuse_repeats(content, indices)
            return indices, given
        if len(given) == length:
            moved = path_check(content, paths)
            for row in range(length):
                moved(row, row)
    else:
        given = _whole_numbers(content, path, where)
    return np.arange(length), _as_long_as(given, length, path, where)


def read_numbers(path: Path, length: int, where: str, paths: Sequence[str] | None = None) -> list[str] | np.ndarray:
    """Read one number per example: a ``.npy``, a ``.txt`` of lines, or the column ``weight`` of a ``.csv``.

    A ``.csv`` has one row per example, or ``index,weight`` for each of them.

    Raises:
        InfluenceError: unreadable, or another number of them than examples.
    """
    given: list[str] | np.ndarray
    if path.suffix == ".txt":
        given = path.read_text().split()
    else:
        content = _read(path, where)
        given = content if not isinstance(content, Table) else content.columns[content.column(("weight", "weights"))]
        index_column = content.index_column() if isinstance(content, Table) else None
        if isinstance(content, Table) and index_column is not None:
            indices = content.indices(index_column, length, paths)
            _refuse_repeats(content, indices)
            given = [given[row] for row in np.argsort(indices).tolist()]
    if len(given) != length:
        raise InfluenceError(
            f"{where}: {path.name} has {len(given)} weights, but the data set has {length} examples",
            "give one number per training example, in the order of the data set",
        )
    return given


def read_weights(folder: Path, section: DataConfig, source: Any, where: str, paths: Sequence[str] | None) -> np.ndarray:
    """Read the weights of the training examples: a column of the list, or else a file beside the config.

    Args:
        folder: of the config.
        section: whose ``weights`` they are.
        source: the data set.
        where: the config's line.
        paths: of the examples, if they have any.

    Raises:
        InfluenceError: neither exists, or a weight is no finite number ≥ 0.
    """
    name = str(section.weights)
    column = source.column(name) if isinstance(source, ListedImages) else None
    if column is not None:
        return check_weights(column, where, f"column {name!r} of {section.csv}")
    path = folder / name
    if not path.is_file():
        columns = f"nor a column of {section.csv}" if isinstance(source, ListedImages) else "(.npy, .csv or .txt)"
        raise InfluenceError(
            f"{where}: train.weights is {name!r}: there is no such file {columns}",
            "give one number per training example, in the order of the data set",
        )
    return check_weights(read_numbers(path, len(source), where, paths), where, str(path.name))


def check_weights(given: Sequence[str] | np.ndarray, where: str, what: str) -> np.ndarray:
    """Give weights of examples as float64.

    Raises:
        InfluenceError: one of them is no finite number ≥ 0.
    """
    weights = np.empty(len(given))
    for place, value in enumerate(given):
        try:
            weights[place] = float(value)
        except (TypeError, ValueError):
            weights[place] = np.nan
        if not 0 <= weights[place] < np.inf:
            raise InfluenceError(
                f"{where}: the weight of training example {place} is {quoted(str(value))} in {what}",
                "weights are finite numbers ≥ 0: how often the example counts in training",
            )
    return weights


@dataclass(frozen=True)
class Truth:
    """What is known about the labels of a data set.

    Attributes:
        wrong: bool [length]: True where the given label is wrong.
        true: int64 [length], the true labels, or None where the file only says which are wrong.
    """

    wrong: np.ndarray
    true: np.ndarray | None


def read_truth(path: Path, labels: np.ndarray, classes: Sequence[str]) -> Truth:
    """Read which labels are wrong: the truth that ``--truth`` scores a ranking by.

    A ``.csv`` with a column ``index`` lists the wrong ones (all that it names, or, if it has ``true_label``,
    those whose true label differs from the given one); a file with one label per example has the true labels; a
    ``.npy`` of booleans is a mask, a shorter one of integers lists positions.
    """
    where = "--truth"
    content = _read(path, where)
    true: np.ndarray | None = None
    if isinstance(content, Table):
        if content.index_column() is None or "true_label" in content.columns:
            true = read_labels(path, labels, classes, where)
    elif content.dtype != bool and len(content) >= len(labels):
        true = known_labels(
            _as_long_as(_whole_numbers(content, path, where), len(labels), path, where), classes, path, where
        )
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


def known_labels(labels: np.ndarray, classes: Sequence[str] | None, path: Path, where: str) -> np.ndarray:
    """Refuse labels of a file that are numbers of no class, and give the others back."""
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


def _read(path: Path, where: str) -> np.ndarray | Table:
    if path.suffix == ".npy" and path.is_file():
        return load_npy(path, f"{where}: {path}").reshape(-1)
    if path.suffix != ".csv" and path.is_file():
        raise InfluenceError(f"{where}: {path} is neither .npy nor .csv")
    return read_table(path, where)


def _whole_numbers(values: np.ndarray, path: Path, where: str) -> np.ndarray:
    kind = values.dtype.kind
    if kind not in "biuf":
        raise InfluenceError(f"{where}: {path} holds {values.dtype}, not whole numbers")
    if kind == "f" and not (np.isfinite(values).all() and np.array_equal(values, np.floor(values))):
        raise InfluenceError(f"{where}: {path} holds numbers that are not whole")
    # Floats go through Python: near 2⁶³ a comparison in floats would accept one value too many.
    if kind in "uf" and len(values) and int(abs(values).max()) > LARGEST:
        raise InfluenceError(f"{where}: {path} holds numbers that are too large")
    return values.astype(np.int64)


def _as_long_as(values: np.ndarray, length: int, path: Path, where: str) -> np.ndarray:
    if len(values) != length:
        raise InfluenceError(
            f"{where}: {path} has {len(values)} labels, but the data set has {length} examples",
            "give one label per example, or a .csv with the columns 'index' and 'label'",
        )
    return values


def _within(indices: np.ndarray, length: int, path: Path, where: str) -> np.ndarray:
    outside = indices[(indices < 0) | (indices >= length)]
    if len(outside):
        raise InfluenceError(f"{where}: {path} names the index {outside[0]}; valid indices are 0 to {length - 1}")
    return indices
