"""Properties of files: parts of paths, dates, heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from influence_cli.inspection.properties import _head, _names_the_class, _parts


def test_the_folder_that_holds_the_label_is_no_property() -> None:
    paths = [f"set/{'cat' if n % 2 else 'dog'}/{'left' if n % 3 else 'right'}_{n}.png" for n in range(30)]
    labels = np.array([n % 2 for n in range(30)])
    parts = _parts(paths, labels, ("dog", "cat"))
    assert set(parts) == {"path: folder 2", "path: name", "path: suffix"}
    assert set(parts["path: name"].tolist()) == {"left", "right"}


def test_a_folder_per_class_of_another_name_holds_the_label_too() -> None:
    labels = np.array([0, 1, 2] * 10)
    assert _names_the_class(np.array(["n01", "n02", "n03"])[labels], labels, ("tench", "goldfish", "shark"))
    assert not _names_the_class(np.array(["a", "b", "b"])[labels], labels, ("tench", "goldfish", "shark"))


def test_the_date_is_that_of_the_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0132] = "1970:01:11 12:00:00"
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    mode, count, day = _head(str(tmp_path / "a.jpg"))
    assert (mode, count) == ("L", float((tmp_path / "a.jpg").stat().st_size))
    assert day in (9.0, 10.0)
    assert _head(str(tmp_path / "none.jpg"))[0] == ""
