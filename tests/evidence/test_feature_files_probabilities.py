"""Probabilities from elsewhere: read, or refused with what is wrong and how often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_cli.errors import InfluenceError
from influence_cli.evidence.feature_files import read_probabilities

CLASSES = ("cat", "dog", "owl")
GOOD = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])


def saved(folder: Path, values: np.ndarray) -> Path:
    np.save(folder / "p.npy", values)
    return folder / "p.npy"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_an_array_is_read_and_normalised(tmp_path: Path, dtype: type) -> None:
    found = read_probabilities(saved(tmp_path, GOOD.astype(dtype)), 4, CLASSES)
    assert found == pytest.approx(GOOD, abs=1e-3)
    assert found.sum(axis=1) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("header", ["owl,note,cat,dog", "2,note,0,1"])
def test_a_table_is_read_by_its_names(tmp_path: Path, header: str) -> None:
    rows = "".join(f"{owl},x,{cat},{dog}\n" for cat, dog, owl in GOOD)
    (tmp_path / "p.csv").write_text(f"{header}\n{rows}")
    assert read_probabilities(tmp_path / "p.csv", 4, CLASSES) == pytest.approx(GOOD)


BAD = [
    (GOOD[:3], "has the shape [3, 3], not [4, 3]"),
    (GOOD[:, :2], "has the shape [4, 2], not [4, 3]"),
    (GOOD.ravel(), "has the shape [12], not [4, 3]"),
    (GOOD * np.array([[1], [2], [1], [1]]), "1 rows hold numbers outside [0, 1], the first is row 1"),
    (GOOD * np.array([[1], [1], [0.5], [0.5]]), "2 rows do not sum to 1, the first is row 2 (0.5)"),
    (np.where(GOOD == 1, np.nan, GOOD), "1 rows hold numbers outside [0, 1], the first is row 2"),
    (np.array(["a"]), "holds <U1, not numbers"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_what_is_wrong_is_named_with_a_count(tmp_path: Path, values: np.ndarray, message: str) -> None:
    path = saved(tmp_path, values)
    with pytest.raises(InfluenceError) as error:
        read_probabilities(path, 4, CLASSES)
    assert str(path) in error.value.message
    assert message in error.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,dog\n1,0\n", "no column for 3 of 3 classes"),
        ("cat,dog,owl\n1,0,x\n", "not a table of numbers"),
        ("", "no column"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InfluenceError, match=message):
        read_probabilities(tmp_path / "p.csv", 1, CLASSES)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("1")
    (tmp_path / "p.npy").write_text("1")
    for name, message in (("p.txt", "neither .npy nor .csv"), ("none.npy", "no file"), ("p.npy", "not a readable")):
        with pytest.raises(InfluenceError, match=message):
            read_probabilities(tmp_path / name, 1, CLASSES)
