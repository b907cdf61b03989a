"""Read what another tool wrote: features, a row per example in the order of the data set or by index or path, and class
probabilities, such as those of k-fold training or of a text-image model.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from influence_cli.data.split import Split
from influence_cli.data.tables import NUMBER_COLUMNS, load_npy, parts_above, same_end
from influence_cli.errors import InfluenceError, describe, require_extra
from influence_cli.evidence.features import Features, refuse_unusable

SUFFIXES = (".npy", ".npz", ".parquet", ".h5", ".hdf5")
# Usual names of the features where a file holds several arrays; of the paths.
USUAL, PATHS = ("features", "embeddings", "embedding", "feature"), ("path", "paths", "image_path", "file")
Arrays = dict[str, np.ndarray]
# Sums may differ from 1 by this much: probabilities are often written with few digits.
TOLERANCE = 1e-3


def read_features(path: Path, split: Split, where: str, name: str = "") -> Features:
    """Read features from a file.

    A ``.npy`` holds [length, d]. A ``.npz``, ``.h5`` or ``.parquet`` may also hold ``index`` or ``path``, which say
    whose row it is; otherwise the rows are in the order of the data set. In a Parquet file the features are a column of
    lists, or all columns of floats.

    Args:
        path: the file.
        split: the examples; excluded ones have a row too.
        where: start of any error: ``--features`` or the config's line.
        name: of the features; the file's without it.

    Raises:
        InfluenceError: no such file, another length, rows of no example, numbers that are none.
    """
    at = f"{where}: {path}"
    if path.suffix.lower() not in SUFFIXES:
        raise InfluenceError(f"{at} is no file of features", f"known: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InfluenceError(f"{where}: there is no file {path}")
    arrays = _arrays(path, at)
    names = [key for key, values in arrays.items() if values.ndim == 2]
    usual = [key for key in USUAL if key in names]
    if len(names) != 1 and not usual:
        held = ", ".join(f"{key} {list(values.shape)}" for key, values in arrays.items()) or "nothing"
        raise InfluenceError(
            f"{at} holds {held}, and it is not clear which are the features"
            if len(names) > 1
            else f"{at} holds {held}",
            "give one array [examples, numbers], a row per example, named features",
        )
    values = arrays[usual[0] if usual else names[0]]
    if values.dtype.kind not in "fiu" or not values.shape[1]:
        raise InfluenceError(f"{at} holds {values.dtype} {list(values.shape)}, not numbers of each example")
    positions = _positions(arrays, len(values), split, at)
    length = len(split.labels)
    if len(values) != length:
        hint = "give one row per example of the data set, excluded ones too"
        if len(values) == len(split):
            hint += "; this file has one per example in use"
        raise InfluenceError(
            f"{at} has {len(values):,} rows, but the {split.name} data set has {length:,} examples", hint
        )
    if positions is not None:
        ordered = np.empty(values.shape, dtype=np.float32)
        ordered[positions] = values
        values = ordered
    refuse_unusable(values, split, at, None if positions is None else np.argsort(positions))
    return Features(name or re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem), values)


def _arrays(path: Path, at: str) -> Arrays:
    """Read the arrays of a file, those of a .npy mapped."""
    kind = path.suffix.lower()
    if kind == ".npy":
        load_npy(path, at) if path.stat().st_size < 10**6 else None  # says what is wrong with a damaged one
        return {"features": _mapped(path, at)}
    if kind == ".parquet":
        return _of_parquet(path, at)
    try:
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        import h5py

        with h5py.File(path, "r") as file:
            sets = {key: item for key, item in file.items() if isinstance(item, h5py.Dataset)}
            return {key: _text_of(item[()]) for key, item in sets.items()}
    except Exception as error:  # NumPy lets Python's parser read headers, which may fail in any way
        raise InfluenceError(f"{at} is not a readable {kind} file: {describe(error)}") from error


def _mapped(path: Path, at: str) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray):
            raise ValueError("it holds several arrays")
    except Exception as error:  # as above
        raise InfluenceError(f"{at} is not a readable .npy file: {describe(error)}") from error
    return values


def _text_of(values: Any) -> np.ndarray:
    """Turn the bytes that HDF5 keeps text in to text."""
    array = np.asarray(values)
    if array.dtype.kind in "OS":
        array = np.array([cell.decode(errors="surrogateescape") if isinstance(cell, bytes) else cell for cell in array])
    return array


def _of_parquet(path: Path, at: str) -> Arrays:
    require_extra("pyarrow", "parquet", "features in a Parquet file")
    import pyarrow.parquet
    from pyarrow import types

    try:
        table = pyarrow.parquet.read_table(path, use_threads=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InfluenceError(f"{at} cannot be read as a Parquet file: {describe(error)}") from error
    arrays: Arrays = {}
    floats = [field.name for field in table.schema if types.is_floating(field.type)]
    for field in table.schema:
        column = table.column(field.name)
        if types.is_list(field.type) or types.is_large_list(field.type) or types.is_fixed_size_list(field.type):
            arrays[field.name] = _rows_of_lists(column, field.name, at)
        elif field.name in (*NUMBER_COLUMNS, *PATHS):
            arrays[field.name] = np.array(column.to_pylist())
    if not any(values.ndim == 2 for values in arrays.values()) and floats:
        arrays["features"] = np.stack([table.column(key).to_numpy() for key in floats], axis=1).astype(np.float32)
    return arrays


def _rows_of_lists(column: Any, name: str, at: str) -> np.ndarray:
    lengths = {len(cell) if cell is not None else 0 for cell in column}
    if len(lengths) != 1:
        odd = next(row for row, cell in enumerate(column) if cell is None or len(cell) != len(column[0]))
        raise InfluenceError(
            f"{at}: row {odd} of {name} has another length than row 0", "every row needs as many numbers"
        )
    flat = column.combine_chunks()
    flat = flat.flatten() if hasattr(flat, "flatten") else flat
    try:
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), lengths.pop())
    except (TypeError, ValueError) as error:
        raise InfluenceError(f"{at}: {name} does not hold lists of numbers: {describe(error)}") from error


def _positions(arrays: Arrays, count: int, split: Split, at: str) -> np.ndarray | None:
    """Find the position of each row in the data set by its index or its path; None where the file has neither."""
    index = next((arrays[key] for key in NUMBER_COLUMNS if key in arrays and arrays[key].ndim == 1), None)
    paths = next((arrays[key] for key in PATHS if key in arrays and arrays[key].ndim == 1), None)
    for key, column in (("index", index), ("path", paths)):
        if column is not None and len(column) != count:
            raise InfluenceError(f"{at} has {count:,} rows of features, but {len(column):,} of {key}")
    if index is None and paths is None:
        return None
    if index is None and split.paths is None:
        raise InfluenceError(
            f"{at} names its rows by paths, but the {split.name} examples are no files",
            "give index, a position per row",
        )
    if index is None:
        find = _finder(split.paths or ())
        positions = np.array([find(str(text)) for text in paths.tolist()] if paths is not None else [], dtype=np.int64)
        lost = np.flatnonzero(positions < 0)
        if len(lost) and paths is not None:
            raise InfluenceError(
                f"{at}: row {lost[0]}: {paths[lost[0]]} is no file of the {split.name} examples"
                + (f", and {len(lost) - 1:,} more rows are none" if len(lost) > 1 else "")
            )
    else:
        positions = _whole(index, len(split.labels), split, at)
        _refuse_moved(positions, paths, split, at)
    repeated = np.flatnonzero(np.bincount(positions, minlength=len(split.labels)) > 1)
    if len(repeated):
        rows = np.flatnonzero(positions == repeated[0])
        raise InfluenceError(f"{at}: rows {rows[0]} and {rows[1]} are both of {split.title(int(repeated[0]))}")
    return positions


def _whole(index: np.ndarray, length: int, split: Split, at: str) -> np.ndarray:
    values = index
    if index.dtype.kind not in "iu":
        values = np.full(len(index), -1.0)
        with suppress(ValueError, TypeError):
            values = index.astype(np.float64)
    wrong = np.flatnonzero(~((values >= 0) & (values < length) & (values == np.floor(values))))
    if len(wrong):
        raise InfluenceError(
            f"{at}: row {wrong[0]} has the index {index[wrong[0]]}; valid indices are 0 to {length - 1} of the "
            f"{split.name} examples"
        )
    return values.astype(np.int64)


def _refuse_moved(positions: np.ndarray, paths: np.ndarray | None, split: Split, at: str) -> None:
    """Refuse a row whose file is another than the one at its index now."""
    if paths is None or split.paths is None:
        return
    root = parts_above(split.paths)
    for row, (position, text) in enumerate(zip(positions.tolist(), map(str, paths.tolist()), strict=True)):
        now = split.paths[position]
        if text != now and not same_end(PurePath(text).parts, PurePath(now).parts[root:]):
            raise InfluenceError(
                f"{at}: row {row}: index {position} is now {now}, but was {text}",
                "files were moved, added or removed since this was written: write it again",
            )


def _finder(paths: Sequence[str]) -> Callable[[str], int]:
    """Make the function that finds a position by a path, which may start at another folder; −1 for none."""
    root = parts_above(paths)
    places = {PurePath(path).parts[root:]: position for position, path in enumerate(paths)}

    def find(text: str) -> int:
        parts = PurePath(text).parts
        return next((places[parts[cut:]] for cut in range(len(parts)) if parts[cut:] in places), -1)

    return find


def read_probabilities(path: Path, length: int, classes: Sequence[str], option: str = "--pred-probs") -> np.ndarray:
    """Read one row of class probabilities per example of a data set.

    A ``.npy`` holds [length, C]; a ``.csv`` has one column per class, named by the class or its number. Other columns
    are ignored.

    Args:
        path: the file.
        length: of the data set.
        classes: their names.
        option: start of any error.

    Returns:
        float64 [length, C], each row normalised.

    Raises:
        InfluenceError: the wrong shape, a number that is not a probability, rows that do not sum to 1.
    """
    where = f"{option}: {path}"
    if not path.is_file():
        raise InfluenceError(f"{option}: there is no file {path}")
    if path.suffix not in (".npy", ".csv"):
        raise InfluenceError(f"{where} is neither .npy nor .csv")
    values = (
        _probabilities_of_csv(path, classes, where) if path.suffix == ".csv" else _probabilities_of_npy(path, where)
    )
    if values.shape != (length, len(classes)):
        raise InfluenceError(
            f"{where} has the shape {list(values.shape)}, not [{length}, {len(classes)}]",
            "give one row per example of the data set, excluded ones too, and one column per class",
        )
    bad = np.flatnonzero(~((values >= 0) & (values <= 1 + TOLERANCE)).all(axis=1))
    if len(bad):
        raise InfluenceError(
            f"{where}: {len(bad):,} rows hold numbers outside [0, 1], the first is row {bad[0]}",
            "give probabilities, not logits",
        )
    sums = values.sum(axis=1)
    bad = np.flatnonzero(np.abs(sums - 1) > TOLERANCE)
    if len(bad):
        raise InfluenceError(
            f"{where}: {len(bad):,} rows do not sum to 1, the first is row {bad[0]} ({sums[bad[0]]:.4g})",
            "give the softmax of the outputs",
        )
    return np.asarray(values / sums[:, None])


def _probabilities_of_npy(path: Path, where: str) -> np.ndarray:
    values = load_npy(path, where)
    if values.dtype.kind not in "fiu":
        raise InfluenceError(f"{where} holds {values.dtype}, not numbers")
    return np.asarray(values, dtype=np.float64)


def _probabilities_of_csv(path: Path, classes: Sequence[str], where: str) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InfluenceError(f"{where} is not a readable .csv file: {describe(error)}") from error
    names = list(classes) if set(classes) <= set(header) else [str(number) for number in range(len(classes))]
    missing = [name for name in names if name not in header]
    if missing:
        raise InfluenceError(
            f"{where} has no column for {len(missing)} of {len(classes)} classes, such as {classes[0]!r}",
            "the first line names the classes",
        )
    places = [header.index(name) for name in names]
    try:
        return np.array([[float(row[place]) for place in places] for row in rows]).reshape(-1, len(classes))
    except (ValueError, IndexError) as error:
        raise InfluenceError(f"{where} is not a table of numbers: {describe(error)}") from error
