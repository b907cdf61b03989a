"""Read class probabilities that another tool wrote, such as those of k-fold training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from influence_cli.data.tables import load_npy
from influence_cli.errors import InfluenceError, describe

# Sums may differ from 1 by this much: probabilities are often written with few digits.
TOLERANCE = 1e-3


def read_probabilities(path: Path, length: int, classes: Sequence[str]) -> np.ndarray:
    """Read one row of class probabilities per example of a data set.

    A ``.npy`` holds [length, C]; a ``.csv`` has one column per class, named by the class or its number. Other columns
    are ignored.

    Returns:
        float64 [length, C], each row normalised.

    Raises:
        InfluenceError: the wrong shape, a number that is not a probability, rows that do not sum to 1.
    """
    where = f"--pred-probs: {path}"
    if not path.is_file():
        raise InfluenceError(f"--pred-probs: there is no file {path}")
    if path.suffix not in (".npy", ".csv"):
        raise InfluenceError(f"{where} is neither .npy nor .csv")
    values = _read_csv(path, classes, where) if path.suffix == ".csv" else _read_npy(path, where)
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


def _read_npy(path: Path, where: str) -> np.ndarray:
    values = load_npy(path, where)
    if values.dtype.kind not in "fiu":
        raise InfluenceError(f"{where} holds {values.dtype}, not numbers")
    return np.asarray(values, dtype=np.float64)


def _read_csv(path: Path, classes: Sequence[str], where: str) -> np.ndarray:
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
