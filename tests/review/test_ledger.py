"""The file of decisions: whole at any moment, as relabel reads it, and never of another data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_cli.config.load import load_config
from influence_cli.errors import InfluenceError
from influence_cli.relabel.labels import apply_decisions
from influence_cli.review.ledger import Conflict
from tests.support.desk_project import decided, ledger_of
from tests.support.relabel_project import CLASSES, decide, make

FREE = ("", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def test_a_decision_is_on_disk_when_change_returns_and_relabel_reads_it(folder: Path) -> None:
    ledger = ledger_of(folder)
    ledger.change([(0, FREE, ("relabel", CLASSES[1])), (5, FREE, ("drop", ""))])
    ledger.change([(3, FREE, ("keep", ""))])
    rows = decided(folder)
    assert [(row["index"], row["decision"]) for row in rows] == [("0", "relabel"), ("3", "keep"), ("5", "drop")]
    assert all(row["who"] and row["when"].endswith("Z") for row in rows)
    result = apply_decisions(load_config(folder / "influence.yaml", ()), folder / "decisions.csv")
    assert result.labels[0] == 1
    assert result.exclude.tolist() == [5]
    ledger.close()


def test_what_was_decided_comes_back_with_who_and_when(folder: Path) -> None:
    first = ledger_of(folder)
    first.change([(0, FREE, ("relabel", CLASSES[1])), (4, FREE, ("unsure", ""))])
    first.close()
    again = ledger_of(folder)
    assert again.rows == first.rows
    again.change([(4, ("unsure", ""), ("", ""))])
    assert [row["index"] for row in decided(folder)] == ["0"]
    again.close()


def test_the_page_s_own_export_is_read_and_goes_on(folder: Path) -> None:
    decide(folder, (2, "keep"), (7, "relabel", CLASSES[3]))
    ledger = ledger_of(folder)
    assert [(index, row.word, row.who) for index, row in ledger.rows.items()] == [
        (2, ("keep", ""), ""),
        (7, ("relabel", CLASSES[3]), ""),
    ]
    ledger.change([(8, FREE, ("keep", ""))])
    assert [(row["index"], bool(row["who"])) for row in decided(folder)] == [("2", False), ("7", False), ("8", True)]
    ledger.close()


def test_a_second_server_only_reads_and_sees_the_first_one_s_decisions(folder: Path) -> None:
    first, second = ledger_of(folder), ledger_of(folder)
    assert (first.writes, second.writes) == (True, False)
    first.change([(1, FREE, ("keep", ""))])
    assert set(second.state()[1]) == {1}
    with pytest.raises(InfluenceError, match="only reads"):
        second.change([(2, FREE, ("keep", ""))])
    first.close()
    third = ledger_of(folder)
    assert third.writes
    third.close()


def test_a_tab_that_has_not_seen_a_decision_does_not_overwrite_it(folder: Path) -> None:
    ledger = ledger_of(folder)
    ledger.change([(1, FREE, ("keep", ""))])
    with pytest.raises(Conflict):
        ledger.change([(0, FREE, ("keep", "")), (1, FREE, ("drop", ""))])
    assert [row["index"] for row in decided(folder)] == ["1"]  # all or none
    ledger.close()


def test_a_file_that_somebody_edits_meanwhile_is_read_again(folder: Path) -> None:
    ledger = ledger_of(folder)
    ledger.change([(1, FREE, ("keep", ""))])
    decide(folder, (1, "drop"), (2, "keep"))
    with pytest.raises(Conflict):
        ledger.change([(1, ("keep", ""), ("unsure", ""))])
    ledger.change([(3, FREE, ("keep", ""))])
    assert [(row["index"], row["decision"]) for row in decided(folder)] == [("1", "drop"), ("2", "keep"), ("3", "keep")]
    ledger.close()


def test_decisions_of_another_set_are_refused_with_their_line_and_left_alone(folder: Path) -> None:
    path = folder / "decisions.csv"
    text = "index,path,label,decision,new_label\n0,,nothing like it,keep,\n"
    path.write_text(text)
    with pytest.raises(InfluenceError, match=r"decisions\.csv:2"):
        ledger_of(folder)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("index", "after"),
    [
        (0, ("destroy", "")),
        (0, ("relabel", "")),
        (0, ("relabel", "nothing")),
        (0, ("relabel", CLASSES[0])),
        (0, ("keep", CLASSES[1])),
        (-1, ("keep", "")),
        (10_000, ("keep", "")),
    ],
)
def test_what_relabel_would_refuse_is_not_written(folder: Path, index: int, after: tuple[str, str]) -> None:
    ledger = ledger_of(folder)
    with pytest.raises(InfluenceError):
        ledger.change([(index, FREE, after)])
    assert not (folder / "decisions.csv").exists()
    ledger.close()
