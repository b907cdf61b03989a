"""Build the demo's images from the original Fashion-MNIST files.

    python bench/make_demo_data.py FOLDER_WITH_THE_GZ_FILES

Chooses 500 training and 100 test images a class (seeded, kept in the original order) and writes one PNG
mosaic and an .npz of labels and original positions into influence_cli/demo/.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).parents[1] / "influence_cli" / "demo"
COLUMNS = 100


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes."""
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def choose(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Choose as many positions of every class, in rising order."""
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
    return np.sort(np.concatenate(chosen))


def main(folder: Path) -> None:
    """Write the mosaic and the labels."""
    images, labels, positions = [], [], []
    for part, per_class, seed in (("train", 500, 0), ("t10k", 100, 1)):
        x = read_idx(next(folder.rglob(f"{part}-images-idx3-ubyte.gz")))
        y = read_idx(next(folder.rglob(f"{part}-labels-idx1-ubyte.gz")))
        chosen = choose(y, per_class, seed)
        images.append(x[chosen])
        labels.append(y[chosen])
        positions.append(chosen.astype(np.uint16))
    tiles = np.concatenate(images)
    mosaic = tiles.reshape(-1, COLUMNS, 28, 28).swapaxes(1, 2).reshape(-1, COLUMNS * 28)
    Image.fromarray(mosaic).save(OUT / "fashion_mnist.png", optimize=True)
    np.savez_compressed(OUT / "fashion_mnist.npz", labels=np.concatenate(labels), positions=np.concatenate(positions))
    for name in ("fashion_mnist.png", "fashion_mnist.npz"):
        sys.stdout.write(f"{OUT / name}: {(OUT / name).stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
