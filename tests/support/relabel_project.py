"""A small ImageFolder with names that are hard on files, and decisions about it; no model is needed."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

CONFIG = """
model: {factory: ./nothing.py:build, checkpoint: missing.pt}
train: {dataset: torchvision.datasets.ImageFolder, args: {root: data/train}}
test: {dataset: torchvision.datasets.ImageFolder, args: {root: data/test}}
"""
CLASSES = ("-minus", "=SUM(A1)", 'a "quoted", one', "emoji 🦉", "plain", "עברית")
NAMES = ("=1+1.png", "a\nb.png", 'q"u,ote.png', "ö🦉.png")
HEADER = ("index", "path", "label", "decision", "new_label")


def make(folder: Path, classes: tuple[str, ...] = CLASSES, names: tuple[str, ...] = NAMES) -> Path:
    """Write images, each of one colour of its own, and a config; the checkpoint that it names is not there."""
    number = 0
    for part in ("train", "test"):
        for label in classes:
            (folder / "data" / part / label).mkdir(parents=True)
            for name in names:
                number += 1
                Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / "data" / part / label / name)
    (folder / "influence.yaml").write_text(CONFIG)
    return folder


def listing(folder: Path, part: str = "train") -> list[tuple[str, str]]:
    """List (path, class) of the examples in the order of the data set."""
    from torchvision.datasets import ImageFolder

    data = ImageFolder(folder / "data" / part)
    return [(path, data.classes[label]) for path, label in data.samples]


def decide(folder: Path, *decided: tuple[object, ...], name: str = "decisions.csv", part: str = "train") -> Path:
    """Write decisions (index, decision, new_label), with the paths and labels of now."""
    known = listing(folder, part)
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for index, decision, *new in decided:
            writer.writerow((index, *known[int(str(index))], decision, *(new or [""])))
    return folder / name


def tree(folder: Path) -> dict[str, bytes | None]:
    """Give every file and folder of the data with its bytes."""
    data = folder / "data"
    return {
        str(path.relative_to(data)): path.read_bytes() if path.is_file() else None for path in sorted(data.rglob("*"))
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a .csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
