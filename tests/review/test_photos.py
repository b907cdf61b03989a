"""Pictures by number: thumbnails that are kept, photos drawn anew, images that vanish."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from influence_cli.errors import InfluenceError
from influence_cli.review.photos import Photos
from tests.support.desk_project import ledger_of
from tests.support.relabel_project import make


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    make(tmp_path, ("ant", "bee"), ("a.png", "b.png"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3)).astype(np.uint8))
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "SECRET")
    image.save(tmp_path / "data" / "train" / "ant" / "a.png", pnginfo=note)
    ledger = ledger_of(tmp_path)
    ledger.close()
    return Photos(ledger.split, tmp_path / "kept", "key")


def size(data: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(data)).size


def test_a_thumbnail_has_320_pixels_and_a_photo_all_of_them(photos: Photos) -> None:
    data, kind = photos.thumbnail(0)
    assert (size(data), kind) == ((320, 213), "image/jpeg")
    assert size(photos.photo(0)[0]) == (900, 600)
    assert b"SECRET" not in photos.photo(0)[0]
    assert size(photos.thumbnail(1)[0]) == (2, 2)


def test_a_thumbnail_is_kept_until_its_file_changes(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    first = photos.thumbnail(1)
    with monkeypatch.context() as patch:
        patch.setattr("influence_cli.review.photos.raw_image", lambda *_: pytest.fail("read again"))
        assert photos.thumbnail(1) == first
    path = Path(str(photos.split.path(1)))
    Image.new("RGB", (3, 3), "red").save(path)
    os.utime(path, ns=(1, 1))
    assert size(photos.thumbnail(1)[0]) == (3, 3)


def test_an_image_that_vanishes_is_said_to_be_gone_and_the_others_stay(photos: Photos) -> None:
    photos.thumbnail(1)
    Path(str(photos.split.path(1))).unlink()
    for read in (photos.thumbnail, photos.photo):
        with pytest.raises(InfluenceError):
            read(1)
    assert photos.thumbnail(2)


@pytest.mark.parametrize("index", [-1, 4])
def test_there_is_no_picture_of_another_number(photos: Photos, index: int) -> None:
    for read in (photos.thumbnail, photos.photo):
        with pytest.raises(InfluenceError, match="there is no example"):
            read(index)


def test_a_folder_that_cannot_be_written_costs_only_time(photos: Photos) -> None:
    photos.folder.write_text("a file")
    assert photos.thumbnail(0)[0]
