"""Odd looks among usual ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

from influence_cli.inspection.appearance import KINDS, looks_of, odd_looks


def usual(number: int) -> Image.Image:
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 255, (40, 40, 3)).astype(np.uint8))


def odd(*pictures: Image.Image) -> dict[str, list[int]]:
    every = [*pictures, *map(usual, range(40))]
    looks = np.array([looks_of(picture, exact=True) for picture in every], dtype=np.float32)
    result = odd_looks(looks, np.array([picture.mode for picture in every]))
    assert tuple(result) == KINDS
    return {kind: rows.tolist() for kind, (rows, _) in result.items() if len(rows)}


def test_what_is_usual_is_not_odd() -> None:
    assert odd() == {}


def test_each_kind_is_named() -> None:
    assert odd(Image.new("RGB", (40, 40), (90, 20, 60))) == {"blank": [0]}
    dark = Image.fromarray(np.asarray(usual(99)) // 8)
    assert odd(dark)["dark"] == [0]
    bright = Image.fromarray(255 - np.asarray(usual(99)) // 20)
    assert odd(bright)["bright"] == [0]
    slope = np.add.outer(np.linspace(0, 120, 40), np.linspace(0, 135, 40)).astype(np.uint8)
    assert odd(Image.fromarray(slope).convert("RGB"))["blurred"] == [0]
    assert odd(usual(5).resize((400, 400)))["odd size"] == [0]
    assert odd(usual(5).resize((100, 16)))["odd shape"] == [0]
    assert odd(usual(5).convert("L"))["odd mode"] == [0]
