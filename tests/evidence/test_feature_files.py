"""Features from files: every format in every order, and what is refused, by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_cli.config.load import load_config
from influence_cli.data.split import Split, take
from influence_cli.errors import InfluenceError
from influence_cli.evidence.feature_files import read_features
from influence_cli.model.task import load_tasks

Write = Callable[[Path], Path]
VALUES = np.random.default_rng(0).normal(size=(320, 6)).astype(np.float32)
ORDER = np.random.default_rng(1).permutation(320)


@pytest.fixture(scope="module")
def split(trained: Path) -> Split:
    return load_tasks(load_config(trained / "influence.yaml"))[0].train


def npy(folder: Path, values: np.ndarray = VALUES) -> Path:
    np.save(folder / "f.npy", values)
    return folder / "f.npy"


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "f.npz", **arrays)
    return folder / "f.npz"


def h5(folder: Path, **arrays: object) -> Path:
    with h5py.File(folder / "f.h5", "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return folder / "f.h5"


def parquet(folder: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), folder / "f.parquet")
    return folder / "f.parquet"


def paths_of(split: Split, cut: int = 0) -> list[str]:
    return ["/".join(Path(path).parts[cut:]) for path in np.array(split.paths)[ORDER]]


@pytest.mark.parametrize(
    "write",
    [
        npy,
        lambda folder: npy(folder, VALUES.astype(np.float64)),
        lambda folder: npz(folder, anything=VALUES),
        lambda folder: npz(folder, features=VALUES, other=VALUES[:, :2]),
        lambda folder: npz(folder, embeddings=VALUES[ORDER], index=ORDER),
        lambda folder: h5(folder, features=VALUES),
        lambda folder: h5(folder, features=VALUES[ORDER], index=ORDER),
        lambda folder: parquet(folder, embedding=VALUES.tolist()),
        lambda folder: parquet(folder, embedding=VALUES[ORDER].tolist(), index=ORDER),
        lambda folder: parquet(
            folder, index=ORDER, **{f"f{column}": VALUES[ORDER, column] for column in range(VALUES.shape[1])}
        ),
    ],
)
def test_every_format_gives_the_same_rows(split: Split, tmp_path: Path, write: Write) -> None:
    features = read_features(write(tmp_path), split, "--features")
    assert features.name == "f"
    assert features.rows(split.indices).numpy() == pytest.approx(VALUES)


@pytest.mark.parametrize("cut", [0, 5, -2])
@pytest.mark.parametrize("kind", ["h5", "parquet", "npz"])
def test_paths_say_whose_row_it_is_from_whatever_folder(split: Split, tmp_path: Path, kind: str, cut: int) -> None:
    paths = paths_of(split, cut)
    path = {
        "h5": lambda: h5(tmp_path, features=VALUES[ORDER], path=paths),
        "parquet": lambda: parquet(tmp_path, features=VALUES[ORDER].tolist(), path=paths),
        "npz": lambda: npz(tmp_path, features=VALUES[ORDER], path=np.array(paths)),
    }[kind]()
    assert read_features(path, split, "--features").rows(split.indices).numpy() == pytest.approx(VALUES)


def changed(at: tuple[int, ...], value: float) -> np.ndarray:
    values = VALUES.copy()
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: npy(f, VALUES[:300]), "has 300 rows, but the train data set has 320 examples"),
        (lambda f: npy(f, VALUES[0]), "holds features [6]"),
        (lambda f: npy(f, np.full((320, 2), "x")), "not numbers of each example"),
        (lambda f: npy(f, VALUES[:, :0]), "not numbers of each example"),
        (lambda f: npy(f, changed((17, 2), np.nan)), "row 17 (training example 17 ("),
        (lambda f: npy(f, np.where(np.arange(320)[:, None] % 100 == 7, np.inf, VALUES)), "and so do 3 more rows"),
        (lambda f: npz(f, features=changed((17, 2), np.nan), index=ORDER), f"row 17 (training example {ORDER[17]} ("),
        (lambda f: npy(f, np.ones((320, 3))), "the features of all examples are the same"),
        (lambda f: npz(f, a=VALUES, b=VALUES), "it is not clear which are the features"),
        (lambda f: npz(f, a=VALUES[0]), "holds a [6]"),
        (lambda f: npz(f, features=VALUES, index=ORDER[:5]), "has 320 rows of features, but 5 of index"),
        (lambda f: npz(f, features=VALUES, index=np.where(ORDER == 5, 6, ORDER)), "are both of training example 6"),
        (lambda f: npz(f, features=VALUES, index=np.where(ORDER == 5, 320, ORDER)), "has the index 320; valid indices"),
        (lambda f: npz(f, features=VALUES, index=ORDER + 0.5), "valid indices are 0 to 319"),
        (lambda f: npz(f, features=VALUES, index=np.array(["x"] * 320)), "row 0 has the index x"),
        (lambda f: npz(f, features=VALUES, path=np.array(["x.png"] * 320)), "and 319 more rows are none"),
        (lambda f: parquet(f, note=["x"] * 320), "holds nothing"),
        (lambda f: parquet(f, features=[[1.0]] * 319 + [[1.0, 2.0]]), "row 319 of features has another length"),
        (lambda f: parquet(f, features=[["a"]] * 320), "not numbers of each example"),
    ],
)
def test_what_does_not_fit_is_named(split: Split, tmp_path: Path, write: Write, message: str) -> None:
    path = write(tmp_path)
    with pytest.raises(InfluenceError) as error:
        read_features(path, split, "--features")
    assert error.value.message.startswith(f"--features: {path}")
    assert message in error.value.message


def test_a_row_per_example_in_use_is_told_from_one_per_example(split: Split, tmp_path: Path) -> None:
    some = take(split, split.indices[:300])
    with pytest.raises(InfluenceError) as error:
        read_features(npy(tmp_path, VALUES[:300]), some, "--features")
    assert "this file has one per example in use" in (error.value.hint or "")
    # Rows of excluded examples may be anything.
    assert (
        read_features(npy(tmp_path, changed((310, 0), np.nan)), some, "--features").rows(some.indices).isfinite().all()
    )


def test_files_that_moved_since_are_noticed(split: Split, tmp_path: Path) -> None:
    paths = paths_of(split)
    paths[3], paths[4] = paths[4], paths[3]
    with pytest.raises(InfluenceError) as error:
        read_features(npz(tmp_path, features=VALUES[ORDER], index=ORDER, path=np.array(paths)), split, "--features")
    assert f"row 3: index {ORDER[3]} is now {split.paths[ORDER[3]]}, but was {paths[3]}" in error.value.message


def test_paths_mean_nothing_for_examples_that_are_no_files(split: Split, tmp_path: Path) -> None:
    bare = replace(split, paths=None)
    with pytest.raises(InfluenceError) as error:
        read_features(npz(tmp_path, features=VALUES, path=np.array(paths_of(split))), bare, "--features")
    assert "the train examples are no files" in error.value.message


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".h5"])
@pytest.mark.parametrize("content", [b"", b"not what the suffix says", None])
def test_damaged_and_missing_files_are_refused(
    split: Split, tmp_path: Path, suffix: str, content: bytes | None
) -> None:
    path = tmp_path / f"f{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InfluenceError) as error:
        read_features(path, split, "--features")
    assert str(path) in error.value.message


def test_features_that_are_never_negative_count_by_their_roots(split: Split, tmp_path: Path) -> None:
    features = read_features(npy(tmp_path, VALUES**2), split, "--features")
    assert features.rows(ORDER).numpy() == pytest.approx(np.abs(VALUES[ORDER]), abs=1e-6)
    assert features.values == pytest.approx(VALUES**2)


def test_an_array_of_objects_is_not_unpickled(split: Split, tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.array([{}] * 320, dtype=object))
    with pytest.raises(InfluenceError):
        read_features(tmp_path / "f.npy", split, "--features")


def test_another_kind_of_file_names_the_known_ones(split: Split, tmp_path: Path) -> None:
    with pytest.raises(InfluenceError) as error:
        read_features(tmp_path / "f.csv", split, "evidence")
    assert error.value.hint == "known: .npy, .npz, .parquet, .h5, .hdf5"
