"""The loop on the demo project: find wrong labels, decide, relabel, train again. Is the model better for it?

    .venv/bin/python bench/relabel_loop.py [--work FOLDER] [--seeds 3]     (make bench-loop; ten minutes)

For each seed: the demo project with its own 10% of wrong labels, trained; the first 10% of `influence mislabels` are
reviewed, by the truth: a wrong label is relabelled, a right one kept. `influence relabel` writes the label file, and
the model is trained again from the same seed with it. Beside it, the same from as many images chosen at random, and
from all images. Only training labels of the demo are changed; the 1,000 test images have those of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from influence_cli import load_config
from influence_cli.config.user_code import import_object
from influence_cli.data.batches import labelled_inputs
from influence_cli.data.datasets import load_split
from influence_cli.demo.project import write_project

SHARE = 0.1
ARMS = ("mislabels", "random", "all")
TITLES = {
    "mislabels": "the first 10% of `influence mislabels`",
    "random": "10% at random",
    "all": "every image (the ceiling)",
}


def train(folder: Path, seed: int, overrides: Iterable[str] = ()) -> float:
    """Train the project's model on its labels by its own function, save it, and give its accuracy on the test set."""
    config = load_config(folder / "influence.yaml", [f"seed={seed}", "device=cpu", *overrides])
    split = load_split(config, "train", config.train)
    torch.manual_seed(seed)
    model = import_object(config.model.factory, config.folder, "model.py")(**config.model.args)
    fit = import_object("./model.py:train", config.folder, "model.py")
    model = fit(model, list(labelled_inputs(split)), l2=config.l2, seed=seed)
    torch.save(model.state_dict(), folder / "model.pt")
    assert config.test is not None
    pairs = list(labelled_inputs(load_split(config, "test", config.test)))
    with torch.no_grad():
        predicted = model(torch.stack([x for x, _ in pairs])).argmax(dim=1)
    return float((predicted == torch.tensor([y for _, y in pairs])).double().mean())


def influence(folder: Path, *words: str) -> str:
    """Run a command in the project, as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "influence_cli", *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def decide(folder: Path, name: str, indices: Iterable[int]) -> int:
    """Review images by the truth, write the decisions, and say how many labels were wrong."""
    config = load_config(folder / "influence.yaml")
    split = load_split(config, "train", config.train)
    assert split.classes is not None
    with (folder / "truth.csv").open(newline="") as file:
        true = {int(row["index"]): row["true_label"] for row in csv.DictReader(file)}
    found = 0
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "path", "label", "decision", "new_label"))
        for index in indices:
            decision = "relabel" if index in true else "keep"
            found += index in true
            label = split.classes[split.labels[index]]
            writer.writerow((index, split.path(index), label, decision, true.get(index, "")))
    return found


def loop(folder: Path, seed: int) -> dict[str, tuple[int, int, float, float]]:
    """Run the loop for a seed: reviewed, wrong labels found, accuracy before and after, for each way to choose."""
    print(f"seed {seed}", file=sys.stderr)
    count = write_project(folder, seed=seed)["train"]
    reviewed = round(SHARE * count)
    before = train(folder, seed)
    rows = influence(folder, "mislabels", "-q", "--top", str(reviewed), "--format", "jsonl", "-s", f"seed={seed}")
    chosen = {
        "mislabels": [json.loads(row)["index"] for row in rows.splitlines()],
        "random": np.random.default_rng(seed + 1000).choice(count, reviewed, replace=False).tolist(),
        "all": list(range(count)),
    }
    found = {}
    for arm in ARMS:
        wrong = decide(folder, arm, chosen[arm])
        labels, exclude = f"{arm}-labels.csv", f"{arm}-exclude.csv"
        influence(folder, "relabel", f"{arm}.csv", "--labels", labels, "--exclude", exclude, "-q", "--force")
        files = [f"train.labels={folder / labels}", f"train.exclude={folder / exclude}"]
        found[arm] = (len(chosen[arm]), wrong, before, train(folder, seed, files))
        print(f"  {arm}: {wrong} of {len(chosen[arm])}, {before:.3f} to {found[arm][3]:.3f}", file=sys.stderr)
    return found


def table(seeds: list[dict[str, tuple[int, int, float, float]]]) -> str:
    """Write the means over seeds, and of the differences the standard error, in Markdown."""
    lines = [
        "| reviewed | images | wrong labels found | test accuracy before | after | difference |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        values = np.array([seed[arm] for seed in seeds])
        change = values[:, 3] - values[:, 2]
        images, wrong, before, after = values.mean(axis=0)
        lines.append(f"| {TITLES[arm]} | {images:,.0f} | {wrong:.0f} | {before:.3f} | {after:.3f} | {spread(change)} |")
    better = np.array([seed["mislabels"][3] - seed["random"][3] for seed in seeds])
    lines += ["", f"The first row after, less the second after: {spread(better)}."]
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    """Write a mean and its standard error."""
    return f"{values.mean():+.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the projects (default: one that is removed)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (from 0; at least 2)")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: a standard error needs two")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        results = [loop(work / f"seed-{seed}", seed) for seed in range(arguments.seeds)]
    print(f"Means of {arguments.seeds} seeds; difference ± standard error over the paired seeds.\n")
    print(table(results))


if __name__ == "__main__":
    main()
