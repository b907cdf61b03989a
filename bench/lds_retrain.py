"""Retrain on random halves of the data: the ground truth of the linear datamodeling score (LDS).

    python bench/lds_retrain.py --net cnn --out FOLDER --subsets 60

10,000 Fashion-MNIST images, 10% of their labels flipped, and 300 test images. One network is trained on all 10,000 (the
checkpoint that influence is computed on) and one on each of M random halves. An attribution method predicts the loss of
test image t on a half S by the sum of its scores over S; the LDS is the rank correlation of that prediction, over the
halves, with the losses kept here (Park et al. 2023, "TRAK", section 2). The halves are the same for both networks.

FOLDER/data.npz        the choice of images, labels and flips, and the settings
FOLDER/model.pt        the state_dict trained on all 10,000
FOLDER/subset_000.npz  the positions of one half, the 300 losses, the CPU seconds; a rerun makes the missing ones
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from make_demo_data import read_idx
from torch import Tensor, nn

from influence_cli.demo import project_model

DATA = Path(__file__).parents[2] / "shared" / "data" / "fashion-mnist"
TRAIN, TEST, FLIPPED, CLASSES = 10_000, 300, 0.10, 10


@dataclass(frozen=True)
class Recipe:
    """Say how a network is built and trained; every training of it, on a half or on all, is the same."""

    build: Callable[[], nn.Module]
    epochs: int
    batch: int
    rate: float
    l2: float


@dataclass(frozen=True)
class Choice:
    """Hold which images were drawn: positions in the original files, labels as given and as they were."""

    train_indices: np.ndarray  # int64 [10000]
    given: np.ndarray  # int64 [10000], some flipped
    true: np.ndarray  # int64 [10000]
    flipped: np.ndarray  # bool [10000]
    test_indices: np.ndarray  # int64 [300]
    test_labels: np.ndarray  # int64 [300]


@dataclass(frozen=True)
class GroundTruth:
    """Hold everything that a score needs: the data, the checkpoint, and what retraining did to the test losses."""

    net: str
    seed: int
    l2: float
    choice: Choice
    train_inputs: Tensor  # float32 [10000, 1, 28, 28]
    test_inputs: Tensor  # float32 [300, 1, 28, 28]
    model: nn.Module  # trained on all, in eval mode
    membership: np.ndarray  # bool [M, 10000], which images each half has
    losses: np.ndarray  # float32 [M, 300], nats
    seconds: np.ndarray  # float64 [M], of one core


class Residual(nn.Module):
    """Add to the input, or to a strided 1×1 projection of it, two 3×3 convolutions with batch norm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        same = channels_in == channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, channels_in, h, w] to [b, channels, h/stride, w/stride]."""
        branch = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(branch + self.skip(x))


def build_deep() -> nn.Module:
    """Make a residual network for 28×28 grey images: nine convolutions, seven batch norms, a linear head."""
    stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Residual(16, 16, stride=1), Residual(16, 32, stride=2), Residual(32, 64, stride=2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    return nn.Sequential(*stem, *blocks, *head)


RECIPES = {
    "cnn": Recipe(project_model.build, epochs=12, batch=128, rate=4e-3, l2=1e-4),
    "deep": Recipe(build_deep, epochs=8, batch=64, rate=8e-3, l2=1e-4),
}


def read(data: Path, part: str, kind: str) -> np.ndarray:
    """Read the images or the labels of a part, train or t10k, as bytes."""
    name = {"images": "images-idx3", "labels": "labels-idx1"}[kind]
    return read_idx(data / "FashionMNIST" / "raw" / f"{part}-{name}-ubyte.gz")


def read_inputs(data: Path, part: str, indices: np.ndarray | slice) -> Tensor:
    """Read the chosen images of a part as the networks take them, float32 [b, 1, 28, 28]."""
    return ((torch.tensor(read(data, part, "images")[indices]).float() / 255 - 0.286) / 0.353).unsqueeze(1)


def choose(data: Path, seed: int) -> Choice:
    """Draw the images and flip labels, each flipped one to another class with equal chance."""
    generator = np.random.default_rng([seed, 0])
    labels, test_labels = (read(data, part, "labels").astype(np.int64) for part in ("train", "t10k"))
    train = np.sort(generator.choice(len(labels), TRAIN, replace=False))
    test = np.sort(generator.choice(len(test_labels), TEST, replace=False))
    flipped = np.zeros(TRAIN, dtype=bool)
    flipped[generator.choice(TRAIN, round(FLIPPED * TRAIN), replace=False)] = True
    moved = (labels[train] + generator.integers(1, CLASSES, TRAIN)) % CLASSES
    given = np.where(flipped, moved, labels[train])
    return Choice(train, given, labels[train], flipped, test, test_labels[test])


def half(seed: int, subset: int) -> np.ndarray:
    """Draw the positions of one half, int32 [5000], rising; the same whatever M is."""
    generator = np.random.default_rng([seed, 1, subset])
    return np.sort(generator.choice(TRAIN, TRAIN // 2, replace=False)).astype(np.int32)


def train(net: str, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Train a network from a seeded start."""
    torch.manual_seed(seed)
    return minimise(RECIPES[net].build(), RECIPES[net], x, y, seed)


def minimise(
    model: nn.Module,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    seed: int,
    progress: Callable[[int, int], None] = lambda *_: None,
    left: dict[str, object] | None = None,
) -> nn.Module:
    """Minimise mean cross-entropy + l2/2·‖θ‖² by Adam, its rate falling to 0 (cosine); ``left`` takes its state."""
    # Channels last halves the time of these small convolutions on one core; the shapes stay as they are.
    model = model.train().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    # Adam's weight_decay (unlike AdamW's) adds l2·θ to the gradient, which is the gradient of the penalty.
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate, weight_decay=recipe.l2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * -(-len(y) // recipe.batch))
    order = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        for batch in torch.randperm(len(y), generator=order).split(recipe.batch):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, recipe.epochs)
    if left is not None:
        left.update(optimizer.state_dict())
    return model.eval().to(memory_format=torch.contiguous_format)


def timed_train(net: str, x: Tensor, y: Tensor, seed: int) -> tuple[nn.Module, float]:
    """Train, and give the CPU seconds too: with one thread, the time of a core that nobody else uses."""
    started = time.process_time()
    model = train(net, x, y, seed)
    return model, time.process_time() - started


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[np.ndarray, float]:
    """Give the cross-entropy of each image, float32 [b] in nats, and the accuracy; batch norm in eval mode."""
    logits = torch.cat([model.eval()(part) for part in x.split(500)])
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    return losses.numpy(), (logits.argmax(1) == y).double().mean().item()


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file that is whole or absent, also when the process is killed."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        save(file)
    part.replace(path)


def settings(net: str, seed: int) -> dict[str, str | float]:
    """Give what all files of a folder must agree on."""
    return {"net": net, "seed": seed} | {name: value for name, value in vars(RECIPES[net]).items() if name != "build"}


def load_choice(folder: Path) -> Choice:
    """Read which images a folder is about."""
    with np.load(folder / "data.npz") as file:
        return Choice(**{name: file[name] for name in Choice.__dataclass_fields__})


def prepare(folder: Path, data: Path, net: str, seed: int) -> Choice:
    """Make the folder, or go on with one that was made with the same settings."""
    wanted = settings(net, seed)
    if (folder / "data.npz").exists():
        with np.load(folder / "data.npz") as file:
            found = {name: file[name].item() for name in wanted}
        if found != wanted:
            sys.exit(f"{folder} was made with {found}, not {wanted}: pass another --out")
        return load_choice(folder)
    folder.mkdir(parents=True, exist_ok=True)
    choice = choose(data, seed)
    write(folder / "data.npz", lambda file: np.savez_compressed(file, **vars(choice), **wanted))
    return choice


def load(folder: Path, data: Path = DATA) -> GroundTruth:
    """Read a folder of this script; it may still lack halves."""
    choice = load_choice(folder)
    with np.load(folder / "data.npz") as file:
        net, seed, l2 = file["net"].item(), file["seed"].item(), file["l2"].item()
    model = RECIPES[net].build().eval()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    paths = sorted(folder.glob("subset_*.npz"))
    membership = np.zeros((len(paths), len(choice.given)), dtype=bool)
    losses = np.zeros((len(paths), len(choice.test_labels)), dtype=np.float32)
    seconds = np.zeros(len(paths))
    for row, path in enumerate(paths):
        with np.load(path) as file:
            membership[row, file["positions"]] = True
            losses[row], seconds[row] = file["losses"], file["seconds"]
    inputs = read_inputs(data, "train", choice.train_indices), read_inputs(data, "t10k", choice.test_indices)
    return GroundTruth(net, seed, l2, choice, *inputs, model, membership, losses, seconds)


def main() -> None:
    """Train on all images, then on every half that the folder lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds FashionMNIST/raw/*.gz")
    words = parser.parse_args()
    if not words.data.is_dir():
        parser.error(f"there is no {words.data}: pass --data FOLDER with FashionMNIST/raw/*.gz")
    torch.set_num_threads(1)  # so that two networks can be trained side by side
    choice = prepare(words.out, words.data, words.net, words.seed)
    x, y = read_inputs(words.data, "train", choice.train_indices), torch.from_numpy(choice.given)
    test_x, test_y = read_inputs(words.data, "t10k", choice.test_indices), torch.from_numpy(choice.test_labels)
    if not (words.out / "model.pt").exists():
        model, spent = timed_train(words.net, x, y, seed=1000 * words.seed)
        write(words.out / "model.pt", lambda file: torch.save(model.state_dict(), file))
        whole = read_inputs(words.data, "t10k", slice(None)), torch.tensor(read(words.data, "t10k", "labels")).long()
        size = sum(p.numel() for p in model.parameters())
        print(f"{settings(words.net, words.seed)}, {size:,} parameters")
        print(f"all {TRAIN:,} images: test accuracy {measure(model, *whole)[1]:.4f}, {spent:.1f} s", flush=True)
    for subset in range(words.subsets):
        path = words.out / f"subset_{subset:03d}.npz"
        if path.exists():
            continue
        positions = half(words.seed, subset)
        model, spent = timed_train(words.net, x[positions], y[positions], seed=1000 * words.seed + 1 + subset)
        losses, accuracy = measure(model, test_x, test_y)
        write(path, partial(np.savez, positions=positions, losses=losses, seconds=spent))
        print(f"{path.name}: loss {losses.mean():.4f}, accuracy {accuracy:.3f}, {spent:.1f} s", flush=True)


if __name__ == "__main__":
    main()
