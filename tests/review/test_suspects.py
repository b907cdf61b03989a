"""Suspects of a result: its rows, its neighbours, and the refusal of a result about other data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from influence_cli.errors import InfluenceError
from influence_cli.review.suspects import Suspect, read_suspects
from tests.support.desk_project import ledger_of, make_desk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_desk(tmp_path)


def read(folder: Path, on: str = "train") -> tuple[Suspect, ...]:
    ledger = ledger_of(folder)
    ledger.close()
    return read_suspects(folder / "suspects.csv", ledger.split, ledger.classes, on)


def test_rows_and_neighbours_come_back_as_they_were(folder: Path) -> None:
    suspects = read(folder)
    assert [suspect.review.index for suspect in suspects] == list(reversed(range(24)))
    assert suspects[0].review.label == "עברית"
    assert suspects[0].review.suggested == "-minus"
    assert suspects[0].neighbours == (0, 1)
    assert ("suggested", "-minus (90%)") in suspects[0].facts


def test_without_a_run_file_there_are_no_neighbours(folder: Path) -> None:
    (folder / "suspects.csv.run.json").unlink()
    assert all(suspect.neighbours == () for suspect in read(folder))


def test_neighbours_that_the_data_set_does_not_have_are_left_out(folder: Path) -> None:
    run = folder / "suspects.csv.run.json"
    run.write_text('{"command": ["influence", "mislabels"], "neighbours": {"23": "2 99999 x -1", "y": "1"}}')
    assert read(folder)[0].neighbours == (2,)


def test_a_result_whose_data_set_has_changed_is_refused(folder: Path) -> None:
    path = folder / "suspects.csv"
    path.write_text(path.read_text().replace(",plain,", ",עברית,"))
    with pytest.raises(InfluenceError, match=re.escape("the data set has changed since")) as caught:
        read(folder)
    assert "4 rows of 24 differ" in caught.value.message
    assert "influence mislabels --all -o" in caught.value.hint


def test_an_image_that_was_added_moves_the_others(folder: Path) -> None:
    source = folder / "data" / "train" / "-minus" / "=1+1.png"
    (source.parent / "#first.png").write_bytes(source.read_bytes())
    with pytest.raises(InfluenceError, match="in the data set: the data set has changed since"):
        read(folder)


def test_a_result_of_the_test_labels_needs_on_test(folder: Path) -> None:
    run = folder / "suspects.csv.run.json"
    run.write_text(run.read_text().replace('"mislabels"]', '"mislabels", "--on", "test"]'))
    with pytest.raises(InfluenceError) as caught:
        read(folder)
    assert caught.value.hint == "add --on test"
