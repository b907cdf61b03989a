"""Leave-one-out on MNIST by the command: `influence verify --loo` in the two settings of Koh & Liang 2017, figure 2.

    python bench/paper/leave_one_out.py --mnist ROOT --work FOLDER      (ROOT as torchvision unpacks it)

*softmax*: all 60,000 images, configs/mnist_softmax.yaml at its minimum. *hessian* and *ggn*: a network of 2,616
parameters with tanh (bench/paper/leave_one_out_project.py), 5,500 images, l2 0.001, λ 0.01, the exact Hessian as in the
paper and the Gauss–Newton matrix; trained on from the checkpoint by the function that made it, a fixed number of steps.
The test image is the command's default, the first that is misclassified; half of the K training images are the most
influential on it, half random.

Finished retrainings of the network are kept, and both matrices share them. A second run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "bench" / "paper"), str(REPOSITORY / "configs")]
import leave_one_out_project
from models import train_softmax_regression

PARTS = ("all", "most influential", "random")
CNN_CONFIG = """
model: {{factory: "{project}:build", checkpoint: cnn.pt}}
l2: 0.001
train: {{dataset: "{project}:Images", args: {{root: "{mnist}", part: train}}}}
test: {{dataset: "{project}:Images", args: {{root: "{mnist}", part: test}}}}
training: {{factory: "{project}:train", args: {{factor: "{factor}"}}}}
gradients: {{store: cnn.h5}}
curvature: {{method: explicit, damping: 0.01}}
"""


@dataclass(frozen=True)
class Case:
    """A run of the command.

    Attributes:
        name: of its files and its line of the table.
        config: of the command.
        images: training images.
        parameters: of the model.
        theirs: Pearson's r in the paper, where it gives one.
        words: further arguments.
    """

    name: str
    config: Path
    images: int
    parameters: int
    theirs: str
    words: tuple[str, ...] = ()


def softmax_case(mnist: Path, work: Path) -> Case:
    """Train the softmax regression, unless it is there."""
    checkpoint = work / "mnist_softmax.pt"
    if not checkpoint.exists():
        torch.save(train_softmax_regression(str(mnist)).state_dict(), checkpoint)
    overrides = {
        "model.checkpoint": checkpoint,
        "train.args.root": mnist,
        "test.args.root": mnist,
        "gradients.store": work / "softmax.h5",
    }
    words = tuple(word for key, value in overrides.items() for word in ("-s", f"{key}={value}"))
    return Case("softmax", REPOSITORY / "configs" / "mnist_softmax.yaml", 60_000, 7_850, "≈ 1 (figure)", words)


def cnn_case(mnist: Path, work: Path, matrix: str) -> Case:
    """Train the network from scratch, unless it is there, by the function that the command retrains it by."""
    config, checkpoint, factor = work / "cnn.yaml", work / "cnn.pt", work / "cnn.factor.pt"
    project = REPOSITORY / "bench" / "paper" / "leave_one_out_project.py"
    config.write_text(CNN_CONFIG.format(project=project, mnist=mnist, factor=factor))
    if not checkpoint.exists():
        factor.unlink(missing_ok=True)
        torch.manual_seed(0)
        images, started = leave_one_out_project.Images(str(mnist), "train"), time.perf_counter()
        model = leave_one_out_project.train(
            leave_one_out_project.build(), [images[i] for i in range(len(images))], l2=0.001, seed=0, factor=str(factor)
        )
        torch.save(model.float().state_dict(), checkpoint)
        print(f"trained from scratch in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    sizes = (leave_one_out_project.IMAGES, sum(weight.numel() for weight in leave_one_out_project.build().parameters()))
    words = ("--on-the-fly", "-s", f"curvature.matrix={matrix}")
    return Case(f"cnn-{matrix}", config, *sizes, "0.86" if matrix == "hessian" else "", words)


def verify(case: Case, work: Path, count: int) -> dict[str, Any]:
    """Run the command; give what its run file says of the test image."""
    output = work / f"{case.name}.csv"
    command = ["verify", "--loo", str(count), "--plot", str(output.with_suffix(".svg")), "-o", str(output)]
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "influence_cli", *command, "-c", str(case.config), *case.words], cwd=work, check=True
    )
    print(f"{case.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    fits: list[dict[str, Any]] = json.loads(output.with_name(f"{output.name}.run.json").read_text())["fits"]
    return fits[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, run the command, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="root of torchvision's MNIST, unpacked")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, stores and retrainings")
    parser.add_argument("--count", type=int, default=100, help="K, training images that are left out")
    parser.add_argument("--only", choices=("softmax", "hessian", "ggn"), help="one line of the table")
    options = parser.parse_args(arguments)
    mnist, work = options.mnist.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(
        "| case | training images | parameters | test image | K | "
        + " | ".join(f"{part}: r | slope | intercept" for part in PARTS)
        + " | Koh & Liang: r |"
    )
    print("|---|" + "---|" * (5 + 3 * len(PARTS)))
    for name in (options.only,) if options.only else ("softmax", "hessian", "ggn"):
        case = softmax_case(mnist, work) if name == "softmax" else cnn_case(mnist, work, name)
        fits = verify(case, work, options.count)
        found = [fits[part] for part in PARTS]
        cells = [f"{fit['r']:.5f} | {fit['slope']:.3f} | {fit['intercept']:+.1e}" for fit in found]
        sizes = f"{case.images:,} | {case.parameters:,} | {fits['test']} | {fits['all']['examples']}"
        print(f"| {case.name} | {sizes} | {' | '.join(cells)} | {case.theirs} |", flush=True)


if __name__ == "__main__":
    main()
