"""Wrong labels found and put right: Koh & Liang 2017, figure 6 and section 5.4.

    python bench/paper/mislabeled.py --work FOLDER [--only logistic|cnn]      (forty minutes on a core)

10% of the training labels are flipped at random. Somebody checks 5 to 30% of the training images in some order, puts
the flipped labels among them right, and the model is trained again: how many of the flips are found, and what is the
accuracy on the test set then? The orders: `influence mislabels`, its default score; self-influence, the paper's order;
the training loss; and chance. The scores are the columns of one `influence mislabels --signals` a repeat.

- *logistic*: MNIST, 4 against 9, softmax regression on 28 × 28 pixels; 4,147 images, 40 repeats and an l2 of 1e-4 as in
  the paper, whose images are e-mails (Enron, spam or not). Trained to its minimum in float64 every time.
- *cnn*: Fashion-MNIST, ten classes, a flipped label being any other; the demo's CNN and its training function, 2,000
  images, 10 epochs, 5 repeats. All trainings of a repeat have one seed.

Images are the same in all repeats, the flips others. A repeat that is finished is a line of FOLDER/repeats.jsonl, and
the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.demo import project_model
from influence_cli.retrain.newton import Outputs, Problem, factor_of, minimise
from influence_cli.retrain.newton_update import follow

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_demo_data import read_idx
from public_data import need

FLIPPED, CUTS = 0.1, (0.05, 0.1, 0.15, 0.2, 0.3)
# The orders, and the columns of `influence mislabels --signals` that three of them are made of.
COLUMNS = {"default": "signal_combined", "self-influence": "signal_self_influence", "loss": "signal_loss"}
ORDERS = (*COLUMNS, "random")
PAIRS = (("default", "self-influence"), ("default", "loss"), ("self-influence", "loss"), ("default", "random"))
PROJECT = """
import numpy as np
import torch
from torch import nn


class Images(torch.utils.data.Dataset):
    def __init__(self, file):
        with np.load(file) as data:
            self.x, self.targets = torch.from_numpy(data["x"]), data["y"].tolist()
            self.classes = data["classes"].tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.targets[index]


def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))
"""
CONFIG = """
model: {{factory: "{factory}", args: {{num_classes: {classes}}}, checkpoint: model.pt}}
l2: {l2}
train: {{dataset: ./project.py:Images, args: {{file: images.npz}}, labels: labels.npy}}
device: cpu
"""
# The state of a trained model and its accuracy on the test set; from other labels to the accuracy of one trained on
# them; from the labels as given and a seed to both.
Trained = tuple[dict[str, Tensor], float]
Again = Callable[[np.ndarray], float]
Trainer = Callable[[np.ndarray, int], tuple[Trained, Again]]


@dataclass(frozen=True)
class Case:
    """A model and its images.

    Attributes:
        title: of its tables.
        data: the data set, as bench/public_data.py names it.
        files: the folder in it.
        classes: labels that take part, as the data set has them.
        count: training images.
        factory: of the model, for the config.
        l2: λ₂.
        mean, deviation: that pixels in [0, 1] are centred and scaled by.
        repeats: how many.
    """

    title: str
    data: str
    files: str
    classes: tuple[int, ...]
    count: int
    factory: str
    l2: float
    mean: float
    deviation: float
    repeats: int


CASES = {
    "logistic": Case(
        "softmax regression, MNIST 4 against 9", "mnist", "MNIST", (4, 9), 4147, "./project.py:linear", 1e-4, 0, 1, 40
    ),
    "cnn": Case(
        "CNN, Fashion-MNIST",
        "fashion-mnist",
        "FashionMNIST",
        tuple(range(10)),
        2000,
        "influence_cli.demo.project_model.build",
        1e-3,
        0.286,
        0.353,
        5,
    ),
}
EPOCHS = 10


@dataclass(frozen=True)
class Images:
    """Training and test images of a case, float32 [n, 1, 28, 28], and their true labels, int64 [n]."""

    x: Tensor
    y: np.ndarray
    x_test: Tensor
    y_test: Tensor


def read_images(case: Case, data: Path | None) -> Images:
    """Read the images of the case's classes, and draw as many training images as it has."""
    found = []
    for part in ("train", "t10k"):
        folder = need(case.data, data) / case.files / "raw"
        pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None]
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        kept = np.flatnonzero(np.isin(labels, case.classes))
        if part == "train":
            kept = np.random.default_rng(0).permutation(kept)[: case.count]
        x = (torch.from_numpy(pixels[kept]).float() / 255 - case.mean) / case.deviation
        found.append((x, np.searchsorted(case.classes, labels[kept])))
    (x, y), (x_test, y_test) = found
    return Images(x, y, x_test, torch.from_numpy(y_test))


def flip(y: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Give the labels with a tenth of them replaced by any other, all others being as likely."""
    generator = np.random.default_rng(seed)
    wrong = generator.choice(len(y), round(FLIPPED * len(y)), replace=False)
    given = y.copy()
    given[wrong] = (y[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return given


def logistic(case: Case, images: Images) -> Trainer:
    """Train softmax regression to its minimum: from that of the true labels, and again from that of those as given."""
    a, a_test = (
        torch.cat([x.flatten(1).double(), x.new_ones(len(x), 1).double()], dim=1) for x in (images.x, images.x_test)
    )
    classes = len(case.classes)
    # The weight of a pixel that no training image has is 0 at the minimum.
    used = a.any(dim=0)
    a, a_test = a[:, used], a_test[:, used]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def problem(labels: np.ndarray) -> Problem:
        return Problem(Outputs(a, a.new_zeros(len(a), classes), torch.from_numpy(labels)), loss, case.l2)

    def accuracy(w: Tensor) -> float:
        return float(((a_test @ w.T).argmax(dim=1) == images.y_test).double().mean())

    def inverse_at(labels: np.ndarray, w: Tensor) -> Tensor:
        return torch.cholesky_inverse(factor_of(problem(labels), w))

    right, _, _ = minimise(problem(images.y), a.new_zeros(classes, a.shape[1]))
    near_right = inverse_at(images.y, right)

    def train(given: np.ndarray, seed: int) -> tuple[Trained, Again]:
        del seed  # there is one minimum
        w = follow(problem(given), right, near_right)
        near = inverse_at(given, w)
        whole = w.new_zeros(classes, len(used))
        whole[:, used] = w
        state = {"1.weight": whole[:, :-1].float(), "1.bias": whole[:, -1].float()}
        return (state, accuracy(w)), lambda labels: accuracy(follow(problem(labels), w, near))

    return train


def cnn(case: Case, images: Images) -> Trainer:
    """Train the CNN by its own function, from a start that the seed alone decides."""

    def fit(labels: np.ndarray, seed: int) -> Trained:
        torch.manual_seed(seed)
        pairs = list(zip(images.x, labels.tolist(), strict=True))
        # Channels last: twice as fast on a CPU.
        model = project_model.build().to(memory_format=torch.channels_last)
        model = project_model.train(model, pairs, l2=case.l2, epochs=EPOCHS, seed=seed)
        with torch.no_grad():
            predicted = torch.cat([model(x).argmax(dim=1) for x in images.x_test.split(500)])
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        return state, float((predicted == images.y_test).double().mean())

    return lambda given, seed: (fit(given, seed), lambda labels: fit(labels, seed)[1])


TRAINERS = {"logistic": logistic, "cnn": cnn}


def orders(
    folder: Path, case: Case, images: Images, given: np.ndarray, state: dict[str, Tensor], seed: int
) -> dict[str, np.ndarray]:
    """Run `influence mislabels` on a trained model, and give the order of checking by each score: int64 [n]."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.array([str(name) for name in case.classes])
    np.savez(folder / "images.npz", x=images.x.numpy(), y=images.y, classes=names)
    np.save(folder / "labels.npy", given)
    torch.save(state, folder / "model.pt")
    (folder / "project.py").write_text(PROJECT)
    (folder / "influence.yaml").write_text(CONFIG.format(factory=case.factory, classes=len(case.classes), l2=case.l2))
    # On the fly: all coordinates, and no gradients to keep of each repeat.
    words = ["mislabels", "--signals", "--all", "--on-the-fly", "-q", "-o", "scores.csv"]
    done = subprocess.run(
        [sys.executable, "-m", "influence_cli", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    with (folder / "scores.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))
    found = {name: np.argsort([-float(row[column]) for row in rows], kind="stable") for name, column in COLUMNS.items()}
    return found | {"random": np.random.default_rng([seed, 1]).permutation(len(given))}


def repeat(name: str, images: Images, train: Trainer, folder: Path, seed: int) -> dict[str, Any]:
    """Flip, train, rank, and put right what is found at each cut of each order."""
    case, started = CASES[name], time.perf_counter()
    given = flip(images.y, len(case.classes), seed)
    (state, before), again = train(given, seed)
    ranked = orders(folder, case, images, given, state, seed)
    wrong = given != images.y
    found: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for order in ORDERS:
        for cut in CUTS:
            checked = ranked[order][: round(cut * len(given))]
            labels = given.copy()
            labels[checked] = images.y[checked]
            found.setdefault(order, []).append(float(wrong[checked].sum() / wrong.sum()))
            after.setdefault(order, []).append(again(labels))
    return {
        "case": name,
        "repeat": seed,
        "before": before,
        "right": again(images.y),
        "found": found,
        "after": after,
        "seconds": round(time.perf_counter() - started, 1),
    }


def tables(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """Write what was found, the accuracy afterwards, and paired differences of it."""
    before, right = (np.array([line[key] for line in lines]) for key in ("before", "right"))
    heads = " | ".join(f"{cut:.0%} checked" for cut in CUTS)
    rule = "|---" * (len(CUTS) + 1) + "|"
    text = [
        f"\n{CASES[name].title}: {len(lines)} repeats, mean ± standard deviation\n",
        f"| share of the flipped labels found, by | {heads} |\n{rule}",
        *(row(order, [line["found"][order] for line in lines], 3) for order in ORDERS),
        f"\nTest accuracy: {cell(before, 4)} with the flipped labels, {cell(right, 4)} with all labels right.\n",
        f"| test accuracy, labels put right by | {heads} |\n{rule}",
        *(row(order, [line["after"][order] for line in lines], 4) for order in ORDERS),
        f"\n| paired difference of accuracy ± standard error | {heads} |\n{rule}",
    ]
    for one, other in PAIRS:
        change = np.array([line["after"][one] for line in lines]) - [line["after"][other] for line in lines]
        error = change.std(axis=0, ddof=1) / len(lines) ** 0.5
        cells = [f"{mean:+.4f} ± {own:.4f}" for mean, own in zip(change.mean(axis=0), error, strict=True)]
        text.append(f"| {one} − {other} | {' | '.join(cells)} |")
    return "\n".join(text)


def row(order: str, values: Sequence[Sequence[float]], digits: int) -> str:
    """Write a line of a table: of each cut the mean and standard deviation over repeats."""
    return f"| {order} | {' | '.join(cell(column, digits) for column in np.array(values).T)} |"


def cell(values: np.ndarray, digits: int) -> str:
    """Write a mean and a standard deviation."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def main() -> None:
    """Run the repeats that are missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the projects and the finished repeats")
    parser.add_argument("--data", type=Path, help="with mnist and fashion-mnist (default: see bench/public_data.py)")
    parser.add_argument("--only", choices=tuple(CASES), help="one of the two models")
    parser.add_argument("--repeats", type=int, help="how many, at least 2 (default: 40 and 5)")
    options = parser.parse_args()
    if options.repeats is not None and options.repeats < 2:
        parser.error("--repeats: a deviation needs two")
    torch.set_num_threads(1)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = work / "repeats.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name in (options.only,) if options.only else CASES:
        images, wanted = read_images(CASES[name], options.data), options.repeats or CASES[name].repeats
        done = {line["repeat"]: line for line in lines if line["case"] == name}
        missing = [seed for seed in range(wanted) if seed not in done]
        if missing:
            train = TRAINERS[name](CASES[name], images)
        for seed in missing:
            done[seed] = repeat(name, images, train, work / name, seed)
            with path.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
            print(f"{name}, repeat {seed}: {done[seed]['seconds']:.0f} s", file=sys.stderr, flush=True)
        print(tables(name, [done[seed] for seed in range(wanted)]), flush=True)


if __name__ == "__main__":
    main()
