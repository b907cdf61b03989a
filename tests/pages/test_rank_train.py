"""The page of `rank --train I --report`: the training image, and the test images that it hurts and helps."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from tests.conftest import Command


def test_a_page_of_one_training_image(tiny: Path, influence: Command) -> None:
    words = ("rank", "--train", 3, "--top", 2, "--format", "jsonl")
    plain = influence(*words, cwd=tiny).out
    done = influence(*words, "--report", "what.html", cwd=tiny)
    assert done.out == plain
    assert "wrote what.html" in done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    page = (tiny / "what.html").read_text()
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    assert "Training image #3" in text
    # Harmful first, each card with its influence; the pictures are the training image and one per row.
    assert 0 < text.index("Hurts most") < text.index("Helps most")
    for row in rows:
        assert f"#{row['test']}: {row['test_label']}" in text
        assert f"{row['influence']:+.3g}" in text
    assert len(re.findall(r"<img[^>]*src=\"data:image", page)) == 1 + len(rows)
    assert "Influence by test class" in text


def test_what_a_page_of_one_training_image_cannot_show(tiny: Path, influence: Command) -> None:
    words = ("rank", "--train", 3, "--report", "a.html", "--attribution", "occlusion")
    assert "--train shows a training image" in influence(*words, cwd=tiny, code=2).err
    words = ("rank", "--train", 3, "--plot", "a.svg")
    assert "--train cannot be combined" in influence(*words, cwd=tiny, code=2).err
    assert not (tiny / "a.html").exists()
