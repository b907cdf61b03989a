"""Label overrides, exclusions and truths are read from .csv and .npy, and a mistake in one names its file and line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_cli.data.label_files import class_number, read_indices, read_labels, read_truth
from influence_cli.errors import InfluenceError
from tests.conftest import shared

WHERE = "influence.yaml:9"
CLASSES = ("cat", "dog", "owl")
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a text as .csv, anything else as .npy, and give the path."""

    def to_file(content: Any) -> Path:
        if isinstance(content, str | bytes):
            path = tmp_path / "file.csv"
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            path = tmp_path / "file.npy"
            np.save(path, np.asarray(content))
        return path

    return to_file


Write = Callable[[Any], Path]


def refused(action: Callable[[], object]) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        action()
    assert "\n" not in caught.value.message
    return caught.value


# Class names


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("cat", CLASSES, 0),
        ("owl", CLASSES, 2),
        ("1", CLASSES, 1),
        ("01", CLASSES, 1),
        ("1.0", CLASSES, 1),
        ("2", ("2", "1", "0"), 0),
        ("0 - zero", ("0 - zero", "1 - one"), 0),
    ],
)
def test_a_class_is_found_by_name_and_else_by_number(name: str, classes: tuple[str, ...], expected: int) -> None:
    assert class_number(name, classes, WHERE) == expected


@pytest.mark.parametrize("name", ["3", "-1", "1.5", "3.0", "-0", "", "Cat", "²", "٣", "9" * 30])
def test_what_is_no_class_is_refused(name: str) -> None:
    error = refused(lambda: class_number(name, CLASSES, WHERE))
    assert error.message == f"{WHERE}: there is no class {name!r}"
    assert "known: cat, dog, owl" in error.hint


def test_a_misspelt_class_gets_the_nearest_one() -> None:
    assert "did you mean 'dog'?" in refused(lambda: class_number("dgo", CLASSES, WHERE)).hint


# Indices


INDICES = [
    ([4, 0, 2], [0, 2, 4]),
    ([3, 3, 1], [1, 3]),
    (np.array([[4], [0]]), [0, 4]),
    (np.array([5, 1], dtype=np.uint8), [1, 5]),
    (np.array([5, 1], dtype=np.int16), [1, 5]),
    (np.array([2.0, 1.0]), [1, 2]),
    (np.array(3), [3]),
    (np.array([], dtype=np.int64), []),
    (np.array([]), []),
    ("index\n4\n0\n2\n", [0, 2, 4]),
    ("indices\n4\n0\n", [0, 4]),
    ("index\n", []),
    ("index\n4\n\n0\n\n", [0, 4]),
    ("path,index,label\na.png,4,cat\nb.png,0,dog\n", [0, 4]),
    (" index , note \n 4 , a \n 0,b", [0, 4]),
    ("index\r\n4\r\n0\r\n", [0, 4]),
    (b"\xef\xbb\xbfindex\n4\n0\n", [0, 4]),
    ('index,note\n4,"a, b"\n0,"two\nlines"\n', [0, 4]),
    ("index\n4.0\n0\n", [0, 4]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), INDICES)
def test_indices_are_read_sorted_and_without_repeats(write: Write, content: Any, expected: list[int]) -> None:
    found = read_indices(write(content), 6, WHERE)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(indices=st.lists(st.integers(0, 10**15), max_size=30))
def test_csv_and_npy_give_the_same_indices(tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
    folder = tmp_path_factory.mktemp("indices")
    (folder / "a.csv").write_text("\n".join(["index", *map(str, indices)]))
    np.save(folder / "a.npy", np.array(indices, dtype=np.int64))
    for path in (folder / "a.csv", folder / "a.npy"):
        assert read_indices(path, 10**15 + 1, WHERE).tolist() == sorted(set(indices))


BAD_INDICES = [
    ([6], "names the index 6; valid indices are 0 to 5"),
    ([0, -1], "names the index -1; valid indices are 0 to 5"),
    ([0.5], "holds numbers that are not whole"),
    (["a"], "holds <U1, not whole numbers"),
    ([np.nan, 1.0], "whole"),
    ([np.inf], "whole"),
    ([1e300], "file.npy"),
    ([1 + 2j], "file.npy"),
    (np.array([(1, 2)], dtype=[("a", int), ("b", int)]), "file.npy"),
    ("index\n6\n", "names the index 6; valid indices are 0 to 5"),
    ("index\n0\n-1\n", "names the index -1; valid indices are 0 to 5"),
    ("index\n0.5\n", "0.5 is not a whole number"),
    ("index\nnan\n", "whole"),
    ("index\n99999999999999999999\n", "file.csv"),
    ("index\ncat\n", "not a whole number"),
    ("index\n''\n", "not a whole number"),
    ("label\n0\n", "has the columns 'label'"),
    ("Index,b\n0,1\n", "has the columns 'Index', 'b'"),
    ("4\n0\n", "has the columns '4'"),
    ("", "is empty"),
    ("index,label\n0,cat\n1\n", "file.csv:3: 1 fields, but the header has 2"),
    ("index,label\n0,cat\n\n\n1,a,b\n", "file.csv:5: 3 fields, but the header has 2"),
    (b"index\n\xff\xfe\n", "is not a readable .csv file"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_INDICES)
def test_indices_that_are_wrong_are_refused_with_the_file(write: Write, content: Any, message: str) -> None:
    path = write(content)
    error = refused(lambda: read_indices(path, 6, WHERE))
    assert error.message.startswith(f"{WHERE}: {path}")
    assert message in error.message


def test_a_mask_is_never_taken_for_the_indices_0_and_1(write: Write) -> None:
    path = write(np.array([False, False, False, True, False, True]))
    with suppress(InfluenceError):
        assert read_indices(path, 6, WHERE).tolist() == [3, 5]


# Files


@pytest.mark.parametrize("name", ["labels.txt", "labels", "labels.json", "labels.npz"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("index\n0\n")
    assert refused(lambda: read_indices(path, 6, WHERE)).message == f"{WHERE}: {path} is neither .npy nor .csv"


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name in ("missing.csv", "missing.npy", "folder.csv"):
        message = refused(lambda name=name: read_indices(tmp_path / name, 6, WHERE)).message
        assert message == f"{WHERE}: there is no file {tmp_path / name}"


def test_a_damaged_npy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npy"
    np.save(path, np.arange(6))
    content = path.read_bytes()
    for bad in (b"", b"hello", content[:40], content[:-9], b"\x93NUMPY\x01\x00"):
        path.write_bytes(bad)
        error = refused(lambda: read_indices(path, 6, WHERE))
        assert error.message.startswith(f"{WHERE}: {path} is not a readable .npy file")


def test_objects_in_a_npy_are_not_unpickled(tmp_path: Path) -> None:
    marker, path = tmp_path / "owned", tmp_path / "file.npy"

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (marker,)

    np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
    assert "is not a readable .npy file" in refused(lambda: read_indices(path, 6, WHERE)).message
    assert not marker.exists()


# Labels


GIVEN = [
    ([2, 2, 2, 1, 1, 0], [2, 2, 2, 1, 1, 0]),
    (np.array([2, 2, 2, 1, 1, 0], dtype=np.uint8), [2, 2, 2, 1, 1, 0]),
    (np.array([2.0, 2, 2, 1, 1, 0]), [2, 2, 2, 1, 1, 0]),
    (np.array([[2], [2], [2], [1], [1], [0]]), [2, 2, 2, 1, 1, 0]),
    ("label\nowl\nowl\nowl\ndog\ndog\ncat\n", [2, 2, 2, 1, 1, 0]),
    ("label\n2\nowl\n2\n1\n1\n0\n", [2, 2, 2, 1, 1, 0]),
    ("true_label\nowl\nowl\nowl\ndog\ndog\ncat\n", [2, 2, 2, 1, 1, 0]),
    ("path,label\na,owl\nb,owl\nc,owl\nd,dog\ne,dog\nf,cat\n", [2, 2, 2, 1, 1, 0]),
    ("index,label\n5,cat\n0,owl\n", [2, 1, 2, 0, 1, 0]),
    ("indices,label\n5,0\n", [0, 1, 2, 0, 1, 0]),
    ("label,path,index\ncat,f.png,5\n", [0, 1, 2, 0, 1, 0]),
    ("index,new_label\n3,dog\n", [0, 1, 2, 1, 1, 2]),
    ("index,label\n", [0, 1, 2, 0, 1, 2]),
    (" index , label \n 5 , cat \n", [0, 1, 2, 0, 1, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), GIVEN)
def test_labels_replace_the_data_sets_own(write: Write, content: Any, expected: list[int]) -> None:
    labels = LABELS.copy()
    found = read_labels(write(content), labels, CLASSES, WHERE)
    assert found.tolist() == expected
    assert found.dtype == np.int64
    assert labels.tolist() == LABELS.tolist()


def test_class_names_with_commas_and_spaces_are_read(write: Write) -> None:
    classes = ("red, blue", "light green", '"q"')
    path = write('index,label\n0,"red, blue"\n1, light green \n2,"""q"""\n')
    assert read_labels(path, np.array([1, 2, 0]), classes, WHERE).tolist() == [0, 1, 2]


def test_without_class_names_labels_are_numbers(write: Write) -> None:
    path = write("index,label\n0,7\n")
    assert read_labels(path, LABELS, None, WHERE).tolist() == [7, 1, 2, 0, 1, 2]
    error = refused(lambda: read_labels(write("index,label\n0,cat\n"), LABELS, None, WHERE))
    assert "'cat' is not a class number, and the data set has no class names" in error.message


BAD_LABELS = [
    ([0, 1], "has 2 labels, but the data set has 6 examples"),
    (np.eye(3)[LABELS], "has 18 labels, but the data set has 6 examples"),
    ([0, 1, 2, 0, 1, 3], "has the label 3, but there are 3 classes"),
    ([0, 1, 2, 0, 1, -1], "has the label -1, but there are 3 classes"),
    ([0, 1, 2, 0, 1, 0.5], "holds numbers that are not whole"),
    ([0, 1, 2, 0, 1, np.nan], "whole"),
    (["cat"] * 6, "holds <U3, not whole numbers"),
    ("label\ncat\n", "has 1 labels, but the data set has 6 examples"),
    ("index\n0\n", "has the columns 'index'"),
    ("index,label\n6,cat\n", "names the index 6; valid indices are 0 to 5"),
    ("index,label\n0,cat\n1,dog\n0,dog\n", "names an index twice (such as 0)"),
    ("index,label\n0,cta\n", "there is no class 'cta'"),
    ("index,label\n0,\n", "there is no class ''"),
    ("index,label\n0,3\n", "there is no class '3'"),
    ("index,label\nx,cat\n", "not a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_LABELS)
def test_labels_that_are_wrong_are_refused_with_the_file(write: Write, content: Any, message: str) -> None:
    path = write(content)
    error = refused(lambda: read_labels(path, LABELS, CLASSES, WHERE))
    assert error.message.startswith(f"{WHERE}: {path}")
    assert message in error.message


def test_a_number_too_large_for_a_label_is_refused(write: Write) -> None:
    path = write("index,label\n0,99999999999999999999\n")
    assert str(path) in refused(lambda: read_labels(path, LABELS, None, WHERE)).message


def test_a_whole_number_is_not_rounded_by_a_float(write: Write) -> None:
    """Past 2⁵³ a float is the neighbour of most whole numbers."""
    numbers = [2**53 + 1, 2**63 - 1, -(2**53) - 1]
    path = write("label\n" + "".join(f"{number}\n" for number in numbers))
    assert read_labels(path, np.zeros(3, dtype=np.int64), None, WHERE).tolist() == numbers


LINES = [
    ("index,label\n0,cat\n1,cta\n", 3),
    ("index,label\n0,cat\n\n\n1,cta\n", 5),
    ("index,label,note\n0,cat,\"two\nlines\"\n1,cta,\n", 4),
    ("index,label\n0,cat\n1,dog\n6,dog\n", 4),
    ("index,label\n0,cat\nx,dog\n", 3),
    ("index,label\n0,cat\n1.5,dog\n", 3),
    ("index,label\n0,cat\n1,dog\n2,owl\n1,owl\n", 5),
    ("index,label\n0,cat\n1,dog,owl\n", 3),
    ("index,label,note\n0,cat,\"two\nlines\"\n1\n", 4),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line"), LINES)
def test_a_mistake_in_a_csv_names_its_line(write: Write, content: str, line: int) -> None:
    path = write(content)
    assert f"{path}:{line}: " in refused(lambda: read_labels(path, LABELS, CLASSES, WHERE)).message


# Truth


TRUTH = [
    ("index\n1\n4\n", [1, 4]),
    ("indices\n4\n", [4]),
    ("index\n", []),
    ("index,note\n1,blurred\n4,crop\n", [1, 4]),
    ("index,label\n1,dog\n4,cat\n", [1, 4]),
    ("index,true_label\n1,dog\n4,cat\n5,owl\n0,2\n", [0, 4]),
    ("index,label,true_label\n1,dog,dog\n4,dog,cat\n", [4]),
    ("true_label\ncat\ncat\nowl\ncat\ndog\ndog\n", [1, 5]),
    ("label\n0\n1\n2\n0\n1\n1\n", [5]),
    ([0, 0, 2, 0, 1, 1], [1, 5]),
    (np.array([0, 0, 2, 0, 1, 1], dtype=np.uint8), [1, 5]),
    (np.array([[0.0], [0], [2], [0], [1], [1]]), [1, 5]),
    (LABELS, []),
    ([5, 1], [1, 5]),
    (np.array([4], dtype=np.uint16), [4]),
    (np.array([], dtype=np.int64), []),
]  # fmt: skip


@pytest.mark.parametrize(("content", "wrong"), TRUTH)
def test_truth_says_which_labels_are_wrong(write: Write, content: Any, wrong: list[int]) -> None:
    found = read_truth(write(content), LABELS, CLASSES).wrong
    assert found.dtype == bool
    assert found.shape == (6,)
    assert np.flatnonzero(found).tolist() == wrong


BAD_TRUTH = [
    ("index\n6\n", "names the index 6"),
    ("index,true_label\n0,cta\n", "there is no class 'cta'"),
    ("note\nx\n", "has the columns 'note'"),
    ("true_label\ncat\n", "has 1 labels, but the data set has 6 examples"),
    ([7], "names the index 7"),
    ([-1], "names the index -1"),
    ([0.5, 1.5], "not whole"),
    ("", "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_TRUTH)
def test_a_truth_that_is_wrong_is_refused(write: Write, content: Any, message: str) -> None:
    path = write(content)
    error = refused(lambda: read_truth(path, LABELS, CLASSES))
    assert error.message.startswith(f"--truth: {path}")
    assert message in error.message


@pytest.mark.parametrize("content", [[0, 1, 2, 0, 1, 2, 0], np.eye(3)[LABELS], np.zeros(60, dtype=np.uint8)])
def test_a_truth_longer_than_the_data_set_is_refused(write: Write, content: Sequence[int]) -> None:
    # It is the truth of another set, or one column a class: never a list of positions.
    path = write(content)
    assert str(path) in refused(lambda: read_truth(path, LABELS, CLASSES)).message


def test_a_mask_of_the_wrong_labels_is_never_taken_for_class_numbers(write: Write) -> None:
    path = write(np.array([False, False, False, True, False, True]))
    with suppress(InfluenceError):
        assert np.flatnonzero(read_truth(path, LABELS, CLASSES).wrong).tolist() == [3, 5]


@pytest.mark.parametrize(("noisy", "percent"), [("aggre", 9.01), ("random1", 17.23), ("worse", 40.21)])
def test_the_noise_of_real_label_files_is_the_published_one(noisy: str, percent: float) -> None:
    folder = shared("cifar10n")
    classes = [str(number) for number in range(10)]
    clean = read_labels(folder / "clean.npy", np.full(50_000, -1), classes, WHERE)
    wrong = read_truth(folder / f"{noisy}.npy", clean, classes).wrong
    assert round(100 * wrong.mean(), 2) == percent


PATHS = tuple(f"/data/{name}/{number}.png" for name in CLASSES for number in range(2))


@pytest.mark.parametrize(
    ("path", "moved"),
    [
        ("/data/cat/0.png", False),
        ("/elsewhere/data/cat/0.png", False),
        ("cat/0.png", False),
        ("0.png", False),
        ("", False),
        ("/data/cat/1.png", True),
        ("/data/dog/0.png", True),
        ("dog/0.png", True),
    ],
)
def test_positions_of_other_files_are_refused(write: Write, path: str, moved: bool) -> None:
    reads: list[tuple[Callable[[], Any], int]] = [
        (lambda: read_indices(write(f"index,path\n5,\n0,{path}\n"), 6, WHERE, PATHS), 3),
        (lambda: read_labels(write(f"path,index,label\n{path},0,owl\n"), LABELS, CLASSES, WHERE, PATHS), 2),
        (lambda: read_labels(write(f"path,label\n{path},owl\n" + ",cat\n" * 5), LABELS, CLASSES, WHERE, PATHS), 2),
    ]
    for read, line in reads:
        if not moved:
            read()
            continue
        error = refused(read)
        assert f"file.csv:{line}: index 0 is now /data/cat/0.png, but was {path}" in error.message
        assert "write it again" in error.hint
