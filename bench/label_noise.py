"""Cases of label noise: images with labels known to be wrong, a network trained on them, and five more by folds.

    python bench/label_noise.py --work FOLDER [CASE ...]     train what is missing (all cases: two hours on one core)
    python bench/label_noise.py --work FOLDER cifar10n-aggregate-all cifar10n-worst-all      minutes on a GPU

A folder per case and seed holds the images and the labels as given (data.npz), the true ones (true.npy), the checkpoint
(model.pt), the seconds of its training (case.json), and the out-of-fold probabilities of five trainings where the case
has them (folds.npy). bench/mislabels.py runs the commands on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "peers"))
from common import read_fashion_mnist, read_mosaic
from compare import train
from label_noise_project import build, normalised
from public_data import need

FOLDS = 5
# Class-dependent noise on Fashion-MNIST: what each class is taken for.
LOOK_ALIKE = np.array([6, 3, 4, 1, 2, 7, 0, 9, 6, 5])


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        data: ``fashion-mnist``, ``mnist`` or ``cifar10``.
        count: training images, drawn by the seed.
        noise: ``uniform``, ``look-alike``, ``none``, or a column of CIFAR-10N.
        rate: share of labels changed by the first two.
        net: ``cnn``, ``wide``, ``resnet8``, ``resnet9`` or ``resnet9_wide``; the last two want a GPU.
        epochs: of training.
        seeds: how many.
        folds: whether five trainings on four fifths are made as well.
    """

    data: str
    count: int
    noise: str
    rate: float
    net: str
    epochs: int
    seeds: int
    folds: bool = False


CASES = {
    "fashion-10": Case("fashion-mnist", 10_000, "uniform", 0.1, "cnn", 10, 5, folds=True),
    "fashion-60": Case("fashion-mnist", 10_000, "uniform", 0.1, "cnn", 60, 5),
    "fashion-60k": Case("fashion-mnist", 60_000, "uniform", 0.1, "wide", 40, 1),
    "look-alike-10": Case("fashion-mnist", 10_000, "look-alike", 0.1, "cnn", 10, 2),
    "look-alike-60": Case("fashion-mnist", 10_000, "look-alike", 0.1, "cnn", 60, 2),
    "uniform40-10": Case("fashion-mnist", 10_000, "uniform", 0.4, "cnn", 10, 2),
    "uniform40-60": Case("fashion-mnist", 10_000, "uniform", 0.4, "cnn", 60, 2),
    "mnist": Case("mnist", 60_000, "none", 0.0, "cnn", 10, 1),
    "mnist-test": Case("mnist", 60_000, "none", 0.0, "cnn", 3, 5),
    "cifar10n-aggregate": Case("cifar10", 10_000, "aggre", 0.0, "resnet8", 20, 1, folds=True),
    "cifar10n-worst": Case("cifar10", 10_000, "worse", 0.0, "resnet8", 20, 1, folds=True),
    "cifar10n-aggregate-all": Case("cifar10", 50_000, "aggre", 0.0, "resnet9", 20, 1, folds=True),
    "cifar10n-worst-all": Case("cifar10", 50_000, "worse", 0.0, "resnet9", 20, 1, folds=True),
    "cifar10": Case("cifar10", 50_000, "clean", 0.0, "resnet9", 10, 1),
    "cifar10-wide": Case("cifar10", 50_000, "clean", 0.0, "resnet9_wide", 10, 1),
}


def prepare(case: Case, seed: int, folder: Path) -> None:
    """Write images and labels, and train what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.npz").exists():
        x, given, true = noisy(case, seed)
        np.save(folder / "true.npy", true)
        np.savez(folder / "data.npz", x=x, y=given)
    with np.load(folder / "data.npz") as data:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        x, y = normalised(data["x"]).to(device), torch.from_numpy(data["y"]).to(device)
    if not (folder / "case.json").exists():
        torch.manual_seed(seed)
        started = time.perf_counter()
        model = fit(case, x, y)
        seconds = time.perf_counter() - started
        torch.save(model.cpu().state_dict(), folder / "model.pt")
        facts = {"train_seconds": seconds, "threads": torch.get_num_threads()}
        (folder / "case.json").write_text(json.dumps(facts) + "\n")
    if case.folds and not (folder / "folds.npy").exists():
        started = time.perf_counter()
        probabilities = torch.zeros(len(y), 10, device=y.device)
        part = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)) % FOLDS).to(y.device)
        for fold in range(FOLDS):
            torch.manual_seed(100 + fold)
            model = fit(case, x[part != fold], y[part != fold])
            with torch.no_grad():
                probabilities[part == fold] = torch.cat([model(b) for b in x[part == fold].split(500)]).softmax(dim=1)
        facts = json.loads((folder / "case.json").read_text()) | {"fold_seconds": time.perf_counter() - started}
        (folder / "case.json").write_text(json.dumps(facts) + "\n")
        np.save(folder / "folds.npy", probabilities.cpu().numpy())


def noisy(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images uint8 [n, 28, 28] or [n, 32, 32, 3], labels as given and true labels int64 [n]."""
    images, labels = read(case.data, "train")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(images))[: case.count]
    true = labels[chosen]
    given = true.copy()
    if case.data == "cifar10":
        given = np.load(need("cifar10n") / f"{case.noise}.npy")[chosen].astype(np.int64)
    elif case.noise != "none":
        wrong = generator.choice(case.count, int(case.rate * case.count), replace=False)
        other = (true[wrong] + generator.integers(1, 10, len(wrong))) % 10
        given[wrong] = LOOK_ALIKE[true[wrong]] if case.noise == "look-alike" else other
    return images[chosen], given, true


def read(data: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels of ``train`` or ``test``."""
    if data == "cifar10":
        names = [f"data_batch_{number}" for number in range(1, 6)] if part == "train" else ["test_batch"]
        tiles = [read_mosaic(need("cifar10") / f"{name}.webp") for name in names]
        return np.concatenate(tiles), np.load(need("cifar10") / f"{part}_labels.npy").astype(np.int64)
    folder = need(data) / ("MNIST" if data == "mnist" else "FashionMNIST") / "raw"
    images, labels = read_fashion_mnist(folder, "train" if part == "train" else "t10k")
    return images, labels.astype(np.int64)


def fit(case: Case, x: Tensor, y: Tensor) -> nn.Module:
    """Minimise cross-entropy by Adam with a falling rate; CIFAR-10 with flips and shifts of up to four pixels."""
    model = build(case.net).to(x.device)
    return train(model, x, y, case.epochs, shifted if case.data == "cifar10" else lambda x: x)


def shifted(x: Tensor) -> Tensor:
    """Flip half of the images, and move the batch by up to four pixels."""
    down, right = (int(step) for step in torch.randint(-4, 5, (2,)))
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return nn.functional.pad(x, (4, 4, 4, 4))[:, :, 4 + down : 36 + down, 4 + right : 36 + right]


def usual() -> list[str]:
    """Name the cases that every machine can train."""
    return [name for name, case in CASES.items() if not case.net.startswith("resnet9")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the cases go")
    parser.add_argument("cases", nargs="*", help="NAME or NAME:SEED")
    arguments = parser.parse_args()
    for wanted in arguments.cases or usual():
        name, _, seed = wanted.partition(":")
        for number in [int(seed)] if seed else range(CASES[name].seeds):
            prepare(CASES[name], number, arguments.work / f"{name}-{number}")
            print(
                f"{name}-{number}", (arguments.work / f"{name}-{number}" / "case.json").read_text().strip(), flush=True
            )


if __name__ == "__main__":
    main()
