"""`influence issues` on a project with planted issues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Command


@pytest.fixture
def faulty(tiny: Path) -> Path:
    """Plant a broken image, a blank one, a large one, a copy, and a leak."""
    (tiny / "train/a/003.png").write_bytes(b"no image")
    Image.new("L", (8, 8), 60).save(tiny / "train/b/900.png")
    with Image.open(tiny / "train/c/002.png") as image:
        image.resize((8, 8)).save(tiny / "test/c/900.png")
    shutil.copy(tiny / "train/c/005.png", tiny / "train/c/901.png")
    return tiny


def test_the_table_counts_every_kind(influence: Command, faulty: Path) -> None:
    done = influence("issues", "--report", "page.html", "-o", "kinds.jsonl", cwd=faulty)
    rows = {row["kind"]: row for row in map(json.loads, (faulty / "kinds.jsonl").read_text().splitlines())}
    assert (rows["broken"]["train"], rows["broken"]["test"]) == (1, 0)
    assert "003.png" in rows["broken"]["worst"]
    assert (rows["blank"]["train"], rows["duplicate"]["train"], rows["leak"]["test"]) == (1, 1, 1)
    assert rows["leak"]["train"] is None
    assert rows["duplicate"]["next"] == "influence duplicates --exclude copies.csv"
    assert "kinds of issues" in done.err
    record = json.loads((faulty / "kinds.jsonl.run.json").read_text())["kinds"]
    assert record["broken"] == {"train": 1, "test": 0}
    page = (faulty / "page.html").read_text()
    assert "Kinds of issues" in page
    assert "Labels by properties of the files" in page


def test_a_kind_lists_its_images(influence: Command, faulty: Path) -> None:
    (row,) = map(json.loads, influence("issues", "--kind", "blank", cwd=faulty).out.splitlines())
    assert row["path"].endswith("train/b/900.png")
    assert row["label"] == "b"
    assert "there is no such kind" in influence("issues", "--kind", "blanc", cwd=faulty, code=2).err


def test_without_a_test_set_its_counts_are_unknown(influence: Command, faulty: Path) -> None:
    text = (faulty / "influence.yaml").read_text()
    start = text.index("test:")
    (faulty / "influence.yaml").write_text(text[:start] + text[text.index("gradients:") :])
    rows = map(json.loads, influence("issues", cwd=faulty).out.splitlines())
    assert all(row["test"] is None for row in rows)
