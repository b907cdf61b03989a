"""A data set whose class and file names hold HTML, quotes, line breaks, emoji, right-to-left text and formulas."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command, Visit, run_influence

NAMES = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)",
    'quote" comma, semi;',
    "line\nbreak\ttab",
    "=cmd|' calc'!A1",
    "emoji 🐜 é",
    "עברית",
    "\u202eright to left",
    "'=guarded",
    "\x1b[31mred",
)


@pytest.fixture(scope="module")
def hostile(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project with its ten classes renamed, and the first file of each with them."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("hostile") / "project"))
    for part in ("train", "test"):
        for old, new in zip(sorted(path for path in (folder / part).iterdir()), NAMES, strict=True):
            old.rename(folder / part / new)
            first = min((folder / part / new).iterdir())
            first.rename(first.with_name(f"{new}.png"))
        # A name that is not UTF-8, among the files whose labels will be decided.
        for number, path in enumerate(sorted((folder / part / NAMES[0]).iterdir())):
            os.rename(path, os.fsencode(path.parent) + f"/{number:02d}".encode() + b"\xff.png")  # noqa: PTH104
    return folder


def test_rows_of_every_format_keep_the_names(hostile: Path, influence: Command, tmp_path: Path) -> None:
    exact = [json.loads(line) for line in influence("mislabels", "--all", cwd=hostile).out.splitlines()]
    assert {row["label"] for row in exact} == set(NAMES)
    influence("mislabels", "--all", "-o", tmp_path / "rows.csv", cwd=hostile)
    with (tmp_path / "rows.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(exact)
    for row, own in zip(rows, exact, strict=True):
        assert row["path"] == own["path"]
        assert row["label"] == (f"'{own['label']}" if re.match("'*=", own["label"]) else own["label"])
    # Nothing that a spreadsheet would take for a formula, in any cell of text.
    assert not any(re.match(r"[=+@\t\r]", value) for row in rows for value in row.values())


def test_the_terminal_gets_no_control_character(hostile: Path) -> None:
    done = run_influence("mislabels", "--top", "300", "--format", "table", cwd=hostile)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", done.stdout + done.stderr)
    assert "\\x1b[31mred" in done.stdout
    assert "line\\nbreak\\ttab" in done.stdout


def test_the_pages_show_the_names_as_text(
    hostile: Path,
    influence: Command,
    visit: Visit,
    tmp_path: Path,
) -> None:
    for words in (("mislabels", "--top", 200), ("rank", "0:3")):
        report = tmp_path / "page.html"
        influence(*words, "--report", report, "-o", tmp_path / "rows.csv", cwd=hostile)
        opened = visit(report)
        assert opened.tab.title().startswith("influence ")
        assert opened.tab.locator("img[src='x']").count() == 0
        assert "<script>alert(1)" in opened.tab.locator("main").inner_text()
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", opened.tab.locator("main").inner_text())


@pytest.mark.slow
def test_decisions_go_from_the_page_to_new_labels(
    hostile: Path,
    influence: Command,
    visit: Visit,
    tmp_path: Path,
) -> None:
    report, rows = tmp_path / "page.html", tmp_path / "rows.json"
    influence("mislabels", "--top", 40, "--report", report, "-o", rows, cwd=hostile)
    opened = visit(report)
    changed = {
        row["index"]: row["suggested"] for row in json.loads(rows.read_text()) if row["suggested"] != row["label"]
    }
    assert len(changed) > 10
    assert any("\udcff" in str(row["path"]) for row in json.loads(rows.read_text()) if row["index"] in changed)
    for index in changed:
        opened.card(index).locator('button[data-do="relabel"]').click()
    (tmp_path / "decisions.csv").write_text(opened.export(), encoding="utf-8", newline="")
    labels = tmp_path / "labels.csv"
    influence("relabel", tmp_path / "decisions.csv", "--labels", labels, "--exclude", tmp_path / "out.csv", cwd=hostile)
    again = influence("mislabels", "--all", "-s", f"train.labels={labels}", cwd=hostile).out
    found = {row["index"]: row["label"] for row in map(json.loads, again.splitlines())}
    assert {index: found[index] for index in changed} == changed
