"""Two rows of ASTRA (arXiv 2507.14740, appendix F) by `influence verify --lds --measure margin`.

    python bench/astra.py --work build/astra                                        both rows, 100 halves, 2 seeds each
    python bench/astra.py --work build/astra --rows fashion-mnist --repeats 50      as they have it

FashionMNIST: 6,144 images, an MLP 512-256-128, SGD 0.03. CIFAR-10: 3,072 images, ResNet-9, SGD with a cyclic rate of at
most 0.4; the convolutions and linear layers count. Momentum is 0.9, weight decay 1e-3. The measure is the margin
log(p/(1 − p)) of 100 test images over random halves. λ is theirs, 1/(η·K), for EK-FAC and for conjugate gradients on
the exact GGN alike. They train 50 times on every half; with fewer the losses are noisier and every score is lower, so
the agreement of the repeats is printed, too.

What the appendix leaves open: the rate of the MLP is constant here, the cyclic one rises over the first fifth of the
steps, and no image is augmented. Retrainings are kept in --work, and a rerun makes the missing ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import astra_project as project

METHODS, TESTS = "ekfac,cg", 100
CONFIG = """
model: {{factory: {file}:build, args: {{row: {row}}}, checkpoint: model.pt}}
training: {{factory: {file}:train, args: {{row: {row}, epochs: {epochs}}}}}
loss: cross_entropy
l2: {l2}
train: {{dataset: {file}:Images, args: {{row: {row}, part: train, count: {images}}}}}
test: {{dataset: {file}:Images, args: {{row: {row}, part: test, count: {tests}}}}}
gradients: {{layers: {layers}}}
curvature: {{damping: {damping}}}
"""


def make_project(folder: Path, row: str, images: int, epochs: int) -> None:
    """Write the config, and train the checkpoint if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    matrices = [name for name, part in project.build(row).named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    text = CONFIG.format(
        file=os.path.relpath(Path(project.__file__), folder),
        row=row,
        epochs=epochs,
        l2=project.L2,
        images=images,
        tests=TESTS,
        layers=json.dumps(matrices),
        damping=project.ROWS[row].damping,
    )
    (folder / "influence.yaml").write_text(text)
    path = folder / "model.pt"
    if not path.exists():
        torch.manual_seed(0)
        data = project.Images(row, "train", images)
        model = project.build(row).to("cuda" if torch.cuda.is_available() else "cpu")
        pairs = list(zip(data.x, data.targets, strict=True))
        trained = project.train(model, pairs, l2=project.L2, seed=0, row=row, epochs=epochs)
        torch.save(trained.cpu().state_dict(), path)


def verify(folder: Path, words: list[str], processes: int) -> list[dict[str, str]]:
    """Run the command, several times at once, so that they share the retrainings; give its rows."""
    command = [sys.executable, "-m", "influence_cli", "verify", "--lds", "--measure", "margin", *words]
    print(" ".join(["influence", *command[3:]]), file=sys.stderr)
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = [
        subprocess.Popen([*command, "-o", f"astra-{number}.csv"], cwd=folder, env=environment)
        for number in range(processes)
    ]
    if sum(process.wait() for process in running):
        sys.exit("influence verify failed")
    with (folder / "astra-0.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Train what is missing, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(project.ROWS), help="which, with commas")
    parser.add_argument("--methods", default=METHODS, help="values of curvature.method")
    parser.add_argument("--subsets", type=int, default=100, help="halves")
    parser.add_argument("--repeats", type=int, default=2, help="trainings of each half")
    parser.add_argument("--images", type=int, help="training images, to try it out; by default those of the row")
    parser.add_argument("--epochs", type=int, help="to try it out; by default those of the row")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    words = parser.parse_args()
    lines = []
    for row in words.rows.split(","):
        images = words.images or project.ROWS[row].images
        epochs = words.epochs or project.ROWS[row].epochs
        folder = words.work / f"{row}-{images}-{epochs}"
        make_project(folder, row, images, epochs)
        options = ["--subsets", words.subsets, "--repeats", words.repeats, "--tests", TESTS, "--methods", words.methods]
        rows = verify(folder, [*map(str, options), "--on-the-fly"], words.processes)
        facts = json.loads((folder / "astra-0.csv.run.json").read_text())
        agreement = facts["agreement_of_repeats"]
        for each in rows:
            score, low, high = (float(each[name]) for name in ("lds", "low", "high"))
            gain = "" if not each["difference"] else f"{float(each['difference']):+.3f}"
            if gain:
                gain += f" ({float(each['difference_low']):+.3f} to {float(each['difference_high']):+.3f})"
            noise = "" if agreement is None else f"{agreement:.3f}"
            cells = [
                f"{row}, {images:,} images",
                each["method"],
                f"{score:.3f}",
                f"{low:.3f} to {high:.3f}",
                gain,
                noise,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    print(f"\n{words.subsets} halves, {words.repeats} trainings of each, {TESTS} test images, the margin.\n")
    print("| row | method | LDS | 95% | less the first method | half of the repeats on the other |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
