"""Write the demo project: 5,000 + 1,000 images of Fashion-MNIST as an ImageFolder, some in a wrong class folder."""

from __future__ import annotations

import csv
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from influence_cli.errors import InfluenceError, describe

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot")
TRAIN = 5000
COLUMNS = 100


def write_project(
    folder: Path, *, flipped: float = 0.1, seed: int = 0, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, int]:
    """Write images, truth.csv, model.py and influence.yaml into a new folder.

    Args:
        folder: must not exist, or be empty.
        flipped: share of the training images moved to a random wrong class folder.
        seed: chooses which images, and where to.
        progress: called with (written, all) images.

    Returns:
        Counts: ``train``, ``test``, ``moved``.

    Raises:
        InfluenceError: the folder is not empty or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InfluenceError(f"{folder} exists and is not an empty folder", "choose a new one: influence demo DIR")
    images, labels = read_images()
    generator = np.random.default_rng(seed)
    moved = np.sort(generator.choice(TRAIN, round(flipped * TRAIN), replace=False))
    given = labels.copy()
    given[moved] = (labels[moved] + generator.integers(1, len(CLASSES), len(moved))) % len(CLASSES)
    # File numbers are drawn over the whole set, so that a name says nothing about the class.
    numbers = np.concatenate([generator.permutation(TRAIN), TRAIN + generator.permutation(len(labels) - TRAIN)])
    try:
        paths = _write_images(folder, images, given, numbers, progress)
        _write_truth(folder, paths[:TRAIN], labels, given, moved)
        package = files("influence_cli.demo")
        (folder / "LICENSE.fashion-mnist").write_bytes(package.joinpath("LICENSE.fashion-mnist").read_bytes())
        (folder / "model.py").write_bytes(package.joinpath("project_model.py").read_bytes())
        # The config is written last: a half-written project has none.
        (folder / "influence.yaml").write_bytes(package.joinpath("project_influence.yaml").read_bytes())
    except OSError as error:
        raise InfluenceError(f"{folder} cannot be written: {describe(error)}") from error
    return {"train": TRAIN, "test": len(labels) - TRAIN, "moved": len(moved)}


def read_images() -> tuple[np.ndarray, np.ndarray]:
    """Read the shipped images: uint8 [6000, 28, 28] and labels [6000], training images first."""
    package = files("influence_cli.demo")
    with package.joinpath("fashion_mnist.png").open("rb") as file:
        mosaic = np.asarray(Image.open(file).convert("L"))
    with package.joinpath("fashion_mnist.npz").open("rb") as file, np.load(file) as archive:
        labels = archive["labels"].astype(np.int64)
    tiles = mosaic.reshape(-1, 28, COLUMNS, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    return tiles, labels


def _write_images(
    folder: Path, images: np.ndarray, given: np.ndarray, numbers: np.ndarray, progress: Callable[[int, int], None]
) -> list[Path]:
    for part in ("train", "test"):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
    paths = []
    for position, image in enumerate(images):
        part = "train" if position < TRAIN else "test"
        path = Path(part) / CLASSES[given[position]] / f"{numbers[position]:05d}.png"
        Image.fromarray(image).save(folder / path)
        paths.append(path)
        if position % 100 == 99:
            progress(position + 1, len(images))
    return paths


def _write_truth(folder: Path, paths: list[Path], labels: np.ndarray, given: np.ndarray, moved: np.ndarray) -> None:
    # ImageFolder sorts by class folder, then by file name.
    order = {path: index for index, path in enumerate(sorted(paths, key=lambda path: (path.parent.name, path.name)))}
    rows = sorted((order[paths[i]], str(paths[i]), CLASSES[given[i]], CLASSES[labels[i]]) for i in moved)
    with (folder / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("index", "path", "label", "true_label"))
        writer.writerows(rows)
