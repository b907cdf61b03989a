"""Test examples that are training examples as well, against a comparison of every pair of decoded images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from influence_cli.precompute import overlap
from tests.conftest import Command, edit


def shared(tiny: Path) -> list[tuple[int, int]]:
    """Put training images among the test images under other names, formats and labels; give all equal pairs."""
    train = sorted((tiny / "train").glob("*/*"))
    for number, (at, where) in enumerate(((3, "a/new0.png"), (9, "b/new1.bmp"), (20, "a/new2.png"))):
        assert number < 3
        Image.open(train[at]).save(tiny / "test" / where)
    pixels = [
        [np.asarray(Image.open(path).convert("RGB")) for path in sorted((tiny / part).glob("*/*"))]
        for part in ("test", "train")
    ]
    return [
        (i, j) for i, one in enumerate(pixels[0]) for j, other in enumerate(pixels[1]) if np.array_equal(one, other)
    ]


@pytest.mark.parametrize("way", ["pixels", "files", "nothing"])
def test_check_counts_them_and_names_a_pair(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    pairs = shared(tiny)
    assert len(pairs) == 3
    if way != "pixels":
        monkeypatch.setattr(overlap, "READING", -1.0)
        # The same bytes under another name; the pixels of the two others are in files of other bytes.
        copy = sorted((tiny / "train").glob("*/*"))[pairs[0][1]]
        sorted((tiny / "test").glob("*/*"))[pairs[0][0]].write_bytes(copy.read_bytes())
    if way == "nothing":
        (tiny / "model.py").write_text(
            (tiny / "model.py").read_text()
            + "\n\ndef listed(root):\n    from torchvision.datasets import ImageFolder\n"
            "    return [pair for pair in ImageFolder(root)]\n"
        )
        edit(tiny, "dataset: torchvision.datasets.ImageFolder", "dataset: ./model.py:listed")
    done = influence("check", "--format", "json", cwd=tiny)
    (row,) = [row for row in json.loads(done.out) if row["item"] == "test examples among the training examples"]
    if way == "nothing":
        assert row["value"] is None
        assert "as well" not in done.err
        return
    assert row["unit"] == f"by their {way}"
    named = re.search(r"test example (\d+) \S+ is training example (\d+) ", done.err)
    assert named is not None
    assert (int(named[1]), int(named[2])) in pairs
    if way == "pixels":
        assert row["value"] == len(pairs)
        assert "3 of 9 test examples are training examples as well, by their pixels" in done.err
        folders = [[path.parent.name for path in sorted((tiny / part).glob("*/*"))] for part in ("test", "train")]
        (odd,) = [(i, j) for i, j in pairs if folders[0][i] != folders[1][j]]
        assert "1 of them has another label there" in done.err
        assert f"is labelled {folders[0][odd[0]]}, and {folders[1][odd[1]]} as training example {odd[1]}" in done.err


def test_rank_says_so_of_the_examples_that_it_explains(influence: Command, tiny: Path) -> None:
    pairs = dict(shared(tiny))
    done = influence("rank", "0:9", "--top", 1, "-o", "rows.json", cwd=tiny)
    assert "3 of 9 test examples are training examples as well, by their pixels" in done.err
    named = re.search(r"test example (\d+) \S+ is training example (\d+) ", done.err)
    assert named is not None
    assert pairs[int(named[1])] == int(named[2])
    facts = json.loads((tiny / "rows.json.run.json").read_text())
    assert any("3 of 9 test examples are training examples" in line for line in facts["warnings"])
    new = next(index for index in range(9) if index not in pairs)
    assert "as well" not in influence("rank", new, "--top", 1, cwd=tiny).err
    file = sorted((tiny / "test").glob("*/*"))[next(iter(pairs))]
    done = influence("rank", file, "--top", 1, cwd=tiny)
    assert f"is training example {next(iter(pairs.values()))} (" in done.err


def test_sets_that_share_nothing_say_nothing(influence: Command, tiny: Path) -> None:
    assert "as well" not in influence("check", cwd=tiny).err
    assert "as well" not in influence("rank", "0:6", "--top", 1, cwd=tiny).err
