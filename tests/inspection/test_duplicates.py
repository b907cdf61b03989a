"""`influence duplicates` on a project with planted copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command


@pytest.fixture
def copied(tiny: Path) -> Path:
    """Copy a training image into another class, and one into the test set."""
    shutil.copy(tiny / "train/a/000.png", tiny / "train/b/900.png")
    shutil.copy(tiny / "train/c/002.png", tiny / "test/c/900.png")
    shutil.copy(tiny / "train/c/005.png", tiny / "train/c/901.png")
    return tiny


def rows_of(text: str) -> dict[str, list[dict[str, object]]]:
    kinds: dict[str, list[dict[str, object]]] = {}
    for row in map(json.loads, text.splitlines()):
        kinds.setdefault(str(row["kind"]), []).append(row)
    return kinds


def test_groups_are_those_that_were_planted(influence: Command, copied: Path) -> None:
    done = influence("duplicates", "--report", "page.html", cwd=copied)
    kinds = rows_of(done.out)
    assert {kind: [str(row["path"])[-13:] for row in rows] for kind, rows in kinds.items()} == {
        "across splits": ["train/c/002.png"[-13:], "test/c/900.png"[-13:]],
        "different labels": ["train/a/000.png"[-13:], "train/b/900.png"[-13:]],
        "same label": ["train/c/005.png"[-13:], "train/c/901.png"[-13:]],
    }
    assert all(row["exact"] and row["similarity"] == 1 for rows in kinds.values() for row in rows)
    assert "3 groups of copies" in done.err
    assert "1 labelled test image is in the training set as well" in done.err
    page = (copied / "page.html").read_text()
    assert "Across splits" in page
    assert "Different labels" in page


def test_the_exclusion_file_keeps_one_of_each_and_ends_the_leak(influence: Command, copied: Path) -> None:
    influence("duplicates", "--exclude", "copies.csv", cwd=copied)
    listed = (copied / "copies.csv").read_text().splitlines()[1:]
    assert sorted(line[-15:] for line in listed) == ["train/b/900.png", "train/c/002.png", "train/c/901.png"]
    again = influence("duplicates", "-s", "train.exclude=copies.csv", "--fail-above", "0", cwd=copied)
    assert again.out == ""
    assert "no copies among" in again.err


def test_an_existing_exclusion_file_stays(influence: Command, copied: Path) -> None:
    (copied / "copies.csv").write_text("index\n1\n")
    assert "exists already" in influence("duplicates", "--exclude", "copies.csv", cwd=copied, code=2).err
    assert (copied / "copies.csv").read_text() == "index\n1\n"
    assert "must be .csv" in influence("duplicates", "--exclude", "copies.txt", cwd=copied, code=2).err


def test_fail_above_counts_groups(influence: Command, copied: Path) -> None:
    assert "more than --fail-above 2 allows" in influence("duplicates", "--fail-above", "2", cwd=copied, code=1).err
    influence("duplicates", "--fail-above", "3", cwd=copied)


def test_the_facts_of_the_run_have_the_leak(influence: Command, copied: Path) -> None:
    influence("duplicates", "-o", "copies.jsonl", cwd=copied)
    record = json.loads((copied / "copies.jsonl.run.json").read_text())["duplicates"]
    assert (record["groups"], record["across_splits"], record["superfluous"]) == (3, 1, 3)
    assert len(record["leak"]["test_examples"]) == 1


def test_a_broken_image_is_an_error_and_can_be_skipped(influence: Command, copied: Path) -> None:
    (copied / "train/a/003.png").write_bytes(b"no image")
    assert "003.png" in influence("duplicates", cwd=copied, code=2).err
    assert "skipped" in influence("duplicates", "--skip-unreadable", cwd=copied).err
