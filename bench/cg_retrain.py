"""Retrain a small residual network on random halves of CIFAR-10: the second truth of bench/cg.py.

    python bench/cg_retrain.py --out FOLDER --subsets 60

4,000 CIFAR-10 images and 300 test images, labels as they are; ResNet-8 with a first convolution of stride 2, trained as
bench/lds_retrain.py trains, without augmentation. One network on all images, one on each random half. What is
finished is kept: a rerun makes the missing ones.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import label_noise
import label_noise_project
import lds_retrain
import numpy as np
import torch
from torch import Tensor, nn

COUNT, TESTS, SEED = 4_000, 300, 0


def build() -> nn.Module:
    """Make ResNet-8 for 16×16 positions: a quarter of the work of one that starts with stride 1."""
    model = label_noise_project.resnet8()
    model[0] = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
    return model


RECIPE = lds_retrain.Recipe(build, epochs=12, batch=64, rate=8e-3, l2=1e-4)


def images(part: str) -> tuple[Tensor, Tensor]:
    """Draw the images of a part, train or test: float32 [b, 3, 32, 32], and their labels int64 [b]."""
    pixels, labels = label_noise.read("cifar10", part)
    generator = np.random.default_rng([SEED, 2, part == "train"])
    chosen = np.sort(generator.choice(len(labels), COUNT if part == "train" else TESTS, replace=False))
    return label_noise_project.normalised(pixels[chosen]), torch.from_numpy(labels[chosen])


def half(subset: int) -> np.ndarray:
    """Draw the positions of one half, rising; the same whatever the number of halves."""
    generator = np.random.default_rng([SEED, 3, subset])
    return np.sort(generator.choice(COUNT, COUNT // 2, replace=False)).astype(np.int32)


def train(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Train from a seeded start."""
    torch.manual_seed(seed)
    return lds_retrain.minimise(build(), RECIPE, x, y, seed)


def main() -> None:
    """Train on all images, then on every half that the folder lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subsets", type=int, default=60)
    words = parser.parse_args()
    torch.set_num_threads(1)
    words.out.mkdir(parents=True, exist_ok=True)
    (x, y), (test_x, test_y) = images("train"), images("test")
    if not (words.out / "model.pt").exists():
        model = train(x, y, 0)
        lds_retrain.write(words.out / "model.pt", lambda file: torch.save(model.state_dict(), file))
        print(f"all {COUNT:,} images: test accuracy {lds_retrain.measure(model, test_x, test_y)[1]:.3f}", flush=True)
    for subset in range(words.subsets):
        path = words.out / f"subset_{subset:03d}.npz"
        if path.exists():
            continue
        positions = half(subset)
        model = train(x[positions], y[positions], 1 + subset)
        losses, accuracy = lds_retrain.measure(model, test_x, test_y)
        lds_retrain.write(path, partial(np.savez, positions=positions, losses=losses))
        print(f"{path.name}: loss {losses.mean():.4f}, accuracy {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
