"""Where the public data sets of the tests and benchmarks lie; run as a program, it downloads what torchvision has.

    .venv/bin/python bench/public_data.py [build/data]
    .venv/bin/python bench/public_data.py --unpack mnist build/mnist

A set is a folder of its name in ../shared/data beside the checkout, where there is such a folder, or in the folder
that INFLUENCE_DATA names, or in build/data, where `make data` puts it; the first that has it counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[1]
DOWNLOADED = CHECKOUT / "build" / "data"
# Tiles of a mosaic of CIFAR-10, and their side.
TILES, SIDE = 100, 32
# Sets that torchvision downloads, and for the others where they come from.
FROM_TORCHVISION = ("mnist", "fashion-mnist", "cifar10", "usps")
ELSEWHERE = {
    "cifar10n": "github.com/UCSC-REAL/cifar-10-100n: clean, aggre, random1, random2, random3 and worse as .npy",
    "cifar10h": "github.com/jcpeterson/cifar-10h: counts.npy",
    "label_errors": "github.com/cleanlab/label-errors: the reviews of the MNIST and CIFAR-10 test sets",
    "tiny_imagenet10": "ten classes of Tiny ImageNet as train/CLASS and val/CLASS folders",
    "hymenoptera": "the ants and bees of PyTorch's tutorial on transfer learning, as train/CLASS and val/CLASS folders",
    "pacs": "five classes of PACS as photo/CLASS and sketch/CLASS folders",
    "weights": "github.com/akamaster/pytorch_resnet_cifar10: resnet20-12fca82f.th",
}


def places() -> list[Path]:
    """List the folders that a set may be in."""
    named = os.environ.get("INFLUENCE_DATA")
    found = [CHECKOUT.parent / "shared" / "data", *([Path(named).expanduser().resolve()] if named else []), DOWNLOADED]
    return [place for place in found if place.is_dir()]


def find(name: str) -> Path | None:
    """Give the folder of a set, or None where there is none."""
    return next((place / name for place in places() if (place / name).is_dir()), None)


def how_to_get(name: str) -> str:
    """Say that a set is not there, and how to get it."""
    if name in FROM_TORCHVISION:
        return f"the data set {name} is not here: `make data` downloads it, or INFLUENCE_DATA names a folder with it"
    return f"the data set {name} is not here: put {ELSEWHERE[name]} into FOLDER/{name}, and set INFLUENCE_DATA=FOLDER"


def need(name: str, inside: Path | None = None) -> Path:
    """Give the folder of a set, that in another folder where one is given, or end the program."""
    if inside is not None:
        return inside / name
    if (folder := find(name)) is None:
        sys.exit(f"error: {how_to_get(name)}")
    return folder


def unpack(name: str, root: Path) -> None:
    """Make a root for torchvision's MNIST or FashionMNIST: of the files that are here, or of downloaded ones."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    raw = root / kind.__name__ / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    if (folder := find(name)) is not None:
        for path in (folder / kind.__name__ / "raw").glob("*.gz"):
            if not (raw / path.name).exists():
                shutil.copyfile(path, raw / path.name)
    kind(root, download=True)


def download(folder: Path) -> None:
    """Download what torchvision has, in the files that tests and benchmarks read."""
    from torchvision import datasets

    for name in FROM_TORCHVISION[:2]:
        unpack(name, folder / name)
    if not (folder / "cifar10" / "test_labels.npy").exists():
        original = folder / "cifar10-original"
        for train in (True, False):
            data = datasets.CIFAR10(original, train=train, download=True)
            labels = np.asarray(data.targets, dtype=np.uint8)
            write_mosaics(folder / "cifar10", data.data, labels, "train" if train else "test")
        shutil.rmtree(original)
    if not (folder / "usps" / "usps.npz").exists():
        (folder / "usps").mkdir(exist_ok=True)
        arrays = {}
        for part in ("train", "test"):
            digits = datasets.USPS(folder / "usps", train=part == "train", download=True)
            arrays |= {f"x_{part}": digits.data, f"y_{part}": np.asarray(digits.targets, dtype=np.uint8)}
        np.savez(folder / "usps" / "usps.npz", **arrays)


def write_mosaics(folder: Path, images: np.ndarray, labels: np.ndarray, part: str) -> None:
    """Write images uint8 [n, 32, 32, 3] row by row into lossless pictures of 100 × 100, and their labels.

    Args:
        folder: of the set.
        images: a multiple of 10,000.
        labels: uint8 [n].
        part: "train" or "test".
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(np.split(images, len(images) // TILES**2), start=1):
        tiles = batch.reshape(TILES, TILES, SIDE, SIDE, 3).swapaxes(1, 2).reshape(TILES * SIDE, TILES * SIDE, 3)
        name = f"data_batch_{number}" if part == "train" else "test_batch"
        Image.fromarray(tiles).save(folder / f"{name}.webp", lossless=True)
    np.save(folder / f"{part}_labels.npy", labels)


def main() -> None:
    """Download the sets, or make a root for torchvision of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DOWNLOADED, help="where they go")
    parser.add_argument("--unpack", choices=FROM_TORCHVISION[:2], help="only this one, as torchvision's class takes it")
    words = parser.parse_args()
    if words.unpack:
        unpack(words.unpack, words.folder)
        return
    download(words.folder)
    print(f"in {words.folder}: {', '.join(FROM_TORCHVISION)}")
    for name in ELSEWHERE:
        if find(name) is None:
            print(how_to_get(name))


if __name__ == "__main__":
    main()
