"""selection: every form of TEST gives the examples it names, in order, and every mistake says what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.influence.test_selection import Selected, select_tests
from tests.conftest import Command

CLASSES = ("cat", "dog", "7")
LENGTH = 10
LABELS = np.arange(LENGTH) % 3
EXCLUDED = (4, 9)


def ten_examples(exclude: Iterable[int] = ()) -> Split:
    indices = np.setdiff1d(np.arange(LENGTH), list(exclude))
    return Split("test", range(LENGTH), None, LABELS, indices, None, CLASSES, None, "influence.yaml:9")


def wrong() -> np.ndarray:
    return np.array([2, 3, 8])


def chosen(*words: str, split: Split | None = None, lines: Iterable[str] = ()) -> list[Selected]:
    return select_tests(words, ten_examples() if split is None else split, CLASSES, wrong, lines)


def positions(*words: str, split: Split | None = None, lines: Iterable[str] = ()) -> list[int | None]:
    found = chosen(*words, split=split, lines=lines)
    assert all(item.file is None and item.index is not None and item.label == LABELS[item.index] for item in found)
    return [item.index for item in found]


def refused(*words: str, split: Split | None = None, lines: Iterable[str] = ()) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        chosen(*words, split=split, lines=lines)
    return caught.value


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("0", [0]),
        ("9", [9]),
        ("007", [7]),
        ("2:5", [2, 3, 4]),
        ("0:1", [0]),
        (":3", [0, 1, 2]),
        ("7:", [7, 8, 9]),
        (":", list(range(10))),
        ("0:10", list(range(10))),
        ("misclassified", [2, 3, 8]),
    ],
)
def test_a_word_selects_the_positions_that_it_names(word: str, expected: list[int]) -> None:
    assert positions(word) == expected


def test_words_keep_their_order_and_repeats() -> None:
    assert positions("5", "0:2", "misclassified", "5", "1") == [5, 0, 1, 2, 3, 8, 5, 1]


@pytest.mark.parametrize("word", ["10", "99999999999999999999999999"])
def test_a_position_outside_the_set_is_refused_with_the_range(word: str) -> None:
    assert refused(word).message == f"there is no test example {word}; valid indices are 0 to 9"


@pytest.mark.parametrize("word", ["0:11", "5:5", "6:2", "10:", ":0", "99999999999999999999:"])
def test_a_slice_that_is_empty_or_outside_is_refused_with_the_range(word: str) -> None:
    assert refused(word).message == f"the slice {word} is empty or out of range; valid indices are 0 to 9"


@pytest.mark.parametrize(
    "word", ["-1", "-3:", ":-1", "-3:-1", "0:8:2", "1.5", "1e3", "٣", "1:٣", "", " 3", "3,4", "None"]
)
def test_what_is_no_form_of_test_is_refused_with_the_forms(word: str, tmp_path: Path) -> None:
    error = refused(word)
    assert repr(word) in error.message
    for form in ("an index", "a slice a:b", "an image file", "misclassified", "- for a list on stdin"):
        assert form in error.hint


def test_an_excluded_position_is_refused_by_name_and_left_out_of_slices() -> None:
    split = ten_examples(EXCLUDED)
    assert refused("4", split=split).message == "test example 4 is excluded (test.exclude)"
    assert refused("9", split=split).message == "test example 9 is excluded (test.exclude)"
    assert positions("3:6", split=split) == [3, 5]
    assert positions("8:", split=split) == [8]
    assert refused("9:10", split=split).message == "no test example is selected by 9:10"


def test_a_file_has_no_position_and_no_label(tmp_path: Path) -> None:
    picture = tmp_path / "3.png"
    picture.touch()
    assert chosen(str(picture)) == [Selected(None, picture, None)]


def test_a_file_that_is_named_like_a_position_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "3").touch()
    monkeypatch.chdir(tmp_path)
    assert positions("3") == [3]
    assert chosen("./3") == [Selected(None, Path("3"), None)]


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    assert refused(str(tmp_path)).message == f"{str(tmp_path)!r} is a folder"
    missing = str(tmp_path / "nothing.png")
    assert refused(missing).message == f"{missing!r}: no such file or index"


@pytest.mark.parametrize("word", ["x" * 300, "x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(word: str) -> None:
    assert ": no such file or index" in refused(word).message


def test_lines_select_as_words_do(tmp_path: Path) -> None:
    picture = tmp_path / "a b.png"
    picture.touch()
    lines = ["3\n", "\n", "  \n", "0:2\r\n", f"{picture}\n", "misclassified\n", "9"]
    found = chosen("-", lines=lines)
    assert [item.index for item in found] == [3, 0, 1, None, 2, 3, 8, 9]
    assert found[3] == Selected(None, picture, None)


@pytest.mark.parametrize(("label", "number"), [("cat", 0), ("dog", 1), ("1", 1), ("7", 2), ("2", 2)])
def test_a_label_after_a_tab_replaces_the_data_sets_own(tmp_path: Path, label: str, number: int) -> None:
    """A label is a class name, or a number where no class is named so: 7 is the third class here."""
    picture = tmp_path / "a.png"
    picture.touch()
    lines = [f"{picture}\t{label}\n", f"5\t{label}\n", f"6:8\t{label}\r\n", f"misclassified\t{label}"]
    found = chosen("-", lines=lines)
    assert [item.index for item in found] == [None, 5, 6, 7, 2, 3, 8]
    assert {item.label for item in found} == {number}


def test_an_empty_label_after_a_tab_leaves_the_data_sets_own() -> None:
    assert positions("-", lines=["4\t\n"]) == [4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("10", "stdin:3: there is no test example 10; valid indices are 0 to 9"),
        ("5:5", "stdin:3: the slice 5:5 is empty or out of range; valid indices are 0 to 9"),
        ("nothing.png", "stdin:3: 'nothing.png': no such file or index"),
        ("-", "stdin:3: '-': no such file or index"),
        ("3\tbird", "stdin:3: there is no class 'bird'"),
        ("3\t3", "stdin:3: there is no class '3'"),
        ("3\tcat\tdog", "stdin:3: there is no class 'cat\\tdog'"),
        ("4", "stdin:3: test example 4 is excluded (test.exclude)"),
    ],
)
def test_a_mistake_in_a_list_names_its_line(line: str, message: str) -> None:
    assert refused("-", split=ten_examples(EXCLUDED), lines=["1\n", "\n", f"{line}\n", "99\n"]).message == message


def test_a_class_that_does_not_exist_comes_with_the_known_ones() -> None:
    assert refused("-", lines=["3\tdgo"]).hint == "did you mean 'dog'? known: 7, cat, dog"


@pytest.mark.parametrize("lines", [[], ["\n", " \n"]])
def test_an_empty_list_is_refused(lines: list[str]) -> None:
    assert refused("-", lines=lines).message == "no test example is selected by -"


def test_nothing_misclassified_is_refused() -> None:
    with pytest.raises(InfluenceError, match="no test example is selected by misclassified"):
        select_tests(["misclassified"], ten_examples(), CLASSES, lambda: np.empty(0, dtype=np.int64))


def test_stdin_is_left_alone_without_a_dash_and_the_model_where_it_is_not_asked() -> None:
    def unread() -> Iterable[str]:
        pytest.fail("stdin was read")
        yield ""

    def unasked() -> np.ndarray:
        pytest.fail("the model was asked")

    assert [item.index for item in select_tests(["1", "2:4"], ten_examples(), CLASSES, unasked, unread())] == [1, 2, 3]


@pytest.mark.parametrize("word", ["3", "1:2", "misclassified"])
def test_without_a_test_set_only_files_are_left(tmp_path: Path, word: str) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    assert select_tests([str(picture)], None, CLASSES, wrong) == [Selected(None, picture, None)]
    with pytest.raises(InfluenceError) as caught:
        select_tests([word], None, CLASSES, wrong)
    assert caught.value.message == f"{word} selects test examples, but the config has no test data set"
    assert "test: {dataset: …, args: {…}}" in caught.value.hint


def test_the_command_takes_words_lines_and_labels(influence: Command, project: Path) -> None:
    """From end to end: what is selected is what is ranked, a label after a tab is whose loss is explained."""
    done = influence("rank", "-", 2, "78:", "--top", 1, cwd=project, stdin="5\n5\tDress\n")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["test"] for row in rows] == [5, 5, 5, 5, 2, 2, 78, 78, 79, 79]
    assert rows[0]["test_label"] == "Bag"
    assert rows[2]["test_label"] == "Dress"
    assert rows[0]["influence"] != rows[2]["influence"]


def test_a_negative_position_on_the_command_line_is_an_error(influence: Command, project: Path) -> None:
    assert influence("rank", "-1", cwd=project, code=2).out == ""
    done = influence("rank", "--", "-3:", cwd=project, code=2)
    assert "error: '-3:': no such file or index" in done.err
