"""The page of `mislabels` holds as many suspects with all their pictures as its size allows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from influence_cli.pages import mislabels
from influence_cli.report.html import Card, CardRow, Desk, Neighbour, Page, Review, Section, write_page

LONG = 'a class "of" a & long <name>' * 3


def card(index: int) -> Card:
    neighbours = tuple(
        Neighbour("data:image/jpeg;base64," + "b" * 2_000, f"near {index}", LONG, True) for _ in range(5)
    )
    facts = (("index", str(index)), ("path", f"/data/{LONG}/{index}.jpg"))
    review = Review(index, f"/data/{LONG}/{index}.jpg", LONG, LONG)
    image = "data:image/jpeg;base64," + "a" * 12_000
    return Card(
        image, f"example {index}, labelled {LONG}", f"{index}. {LONG}", facts, "suspect", LONG, neighbours, review
    )


@pytest.mark.parametrize("size", [1_000_000, 3_000_000])
def test_no_card_is_without_its_pictures(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mislabels, "_card", lambda result, split, classes, row, number: card(number))
    result: Any = SimpleNamespace(order=np.arange(1_000))
    split: Any = None
    cards = mislabels._cards_that_fit(result, split, (LONG,), 1_000, size - mislabels.REST)
    sections = (Section("Labels", None, (CardRow("", "", cards),)),)
    page = Page("t", "s", (), None, sections, None, (), (), (), "c", "", Desk("k", "train", 1_000, (LONG,)))
    written = write_page(page, tmp_path / "page.html", size)
    text = (tmp_path / "page.html").read_text()
    assert written <= size
    assert written > 0.6 * size
    assert text.count("aaaa" * 3_000) == len(cards)
    assert text.count("bbbb" * 500) == 5 * len(cards)
    assert "shown without" not in text


def test_a_page_too_small_for_one_still_has_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mislabels, "_card", lambda result, split, classes, row, number: card(number))
    result: Any = SimpleNamespace(order=np.arange(9))
    split: Any = None
    assert len(mislabels._cards_that_fit(result, split, (LONG,), 9, 10)) == 1
