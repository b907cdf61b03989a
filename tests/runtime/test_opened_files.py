"""Files that code opens are noted while somebody looks, and only then."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from influence_cli.runtime import opened_files
from influence_cli.runtime.opened_files import noting_opened, stamps


def test_only_what_is_read_inside_the_block_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("before", "text", "low", "after"):
        (tmp_path / name).write_text(name)
    np.save("array.npy", np.zeros(3))
    Path("before").read_text()
    with noting_opened() as opened:
        Path("text").read_text()
        np.load("array.npy")
        os.close(os.open(b"low", os.O_RDONLY))
        Path("cache").write_text("written here")
        Path("cache").read_text()
    Path("after").read_text()
    assert opened.files() == tuple(tmp_path / name for name in ("array.npy", "low", "text"))


def test_two_blocks_note_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    with noting_opened() as outer:
        (tmp_path / "one").read_text()
        with noting_opened() as inner:
            (tmp_path / "two").read_text()
    assert inner.files() == (tmp_path / "two",)
    assert outer.files() == (tmp_path / "one", tmp_path / "two")


def test_small_files_are_known_by_content_large_ones_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("1,2")
    before = stamps([file, tmp_path / "gone"], tmp_path)
    assert list(before) == ["labels.csv"]
    os.utime(file, (1, 1))
    assert stamps([file], tmp_path) == before
    file.write_text("1,3")
    assert stamps([file], tmp_path) != before
    monkeypatch.setattr(opened_files, "WHOLE_BYTES", 1)
    before = stamps([file], tmp_path)
    os.utime(file, (2, 2))
    assert stamps([file], tmp_path) != before


def test_many_files_are_described_together(tmp_path: Path) -> None:
    files = [tmp_path / f"{number:03d}" for number in range(70)]
    for file in files:
        file.write_text(file.name)
    (name,) = before = stamps(files, tmp_path)
    assert name == "70 files"
    files[30].write_text("other")
    assert stamps(files, tmp_path) != before
