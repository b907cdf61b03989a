"""Estimated against actual effect of changing training images: Koh & Liang 2017, section 2.2, softmax regression.

    python bench/paper/perturbation.py --mnist ROOT --work FOLDER       (ROOT as torchvision unpacks it)

MNIST, the first --train images of it, softmax regression on means of --pool × --pool pixels (1,970 parameters for 2,
7,850 for 1), l2 0.01, at its minimum in float64. --changes times a training image is drawn, and changed in one of four
ways: Gaussian noise of 0.05 on every pixel, the steepest change that rounding to 8 bits hides, the lightest tenth of
its pixels 10% darker, and a shift by one pixel to the right, which is no small change. For each of --tests test images,
the estimated rise of its loss is that of `influence perturb` (estimated: to first order in the change; replaced:
without that restriction), the actual one that of training again to the minimum with the changed image in its place.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli import Terminal, load_config, load_tasks, prepare_all
from influence_cli.data.batches import read_batches
from influence_cli.influence.test_selection import Selected
from influence_cli.metrics import pearson, slope
from influence_cli.perturb.eight_bit import ball, pixel_scale
from influence_cli.perturb.estimate import perturb_image
from influence_cli.retrain.top_layer import top_layer

MODEL = """
import torch
from torch import nn
from torchvision.datasets import MNIST


def build(pool):
    return nn.Sequential(nn.AvgPool2d(pool), nn.Flatten(), nn.Linear((28 // pool) ** 2, 10))


class First(torch.utils.data.Subset):
    def __init__(self, root, count):
        data = MNIST(root, train=True)
        super().__init__(data, range(count))
        self.targets, self.classes = data.targets[:count], data.classes
"""
CONFIG = """
model: {{factory: ./model.py:build, args: {{pool: {pool}}}, checkpoint: model.pt}}
l2: 0.01
train:
  dataset: ./model.py:First
  args: {{root: "{root}", count: {train}}}
  transform: [ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}]
test: {{dataset: torchvision.datasets.MNIST, args: {{root: "{root}", train: false}}}}
device: cpu
"""


LARGE = "one pixel to the right"


def fixed(delta: Tensor) -> Callable[[Tensor], Tensor]:
    """Give a change that does not ask for the slope."""
    return lambda _: delta


def main() -> None:
    """Change, estimate, train again, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="root of torchvision's MNIST, unpacked")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=10, help="training images of each way")
    parser.add_argument("--pool", type=int, default=2)
    parser.add_argument("--tests", type=int, default=20)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "model.py").write_text(MODEL)
    (work / "influence.yaml").write_text(
        CONFIG.format(root=options.mnist.resolve(), train=options.train, pool=options.pool)
    )
    config, terminal, started = work / "influence.yaml", Terminal(quiet=True), time.perf_counter()
    size = (28 // options.pool) ** 2
    torch.save({"2.weight": torch.zeros(10, size), "2.bias": torch.zeros(10)}, work / "model.pt")
    (task,) = load_tasks(load_config(config))
    w = top_layer(task, terminal).w.float()
    torch.save({"2.weight": w[:, :size].clone(), "2.bias": w[:, size].clone()}, work / "model.pt")
    stores = prepare_all(load_config(config), load_tasks(load_config(config)), terminal, on_the_fly=True)
    task = stores[0].task
    generator = np.random.default_rng(0)
    noise = torch.Generator().manual_seed(0)
    tests = generator.choice(task.test_split().indices, options.tests, replace=False)
    selected = [Selected(int(t), None, int(task.test_split().labels[t])) for t in np.sort(tests)]

    def image(index: int) -> Tensor:
        return next(read_batches(task.train, np.array([index]), 1)).inputs[0]

    scale = pixel_scale(task.train)
    # From the image to a function of the slope, so that what is drawn is the same for every test image.
    kinds: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
        "noise of 0.05": lambda x: fixed(0.05 * torch.randn(x.shape, generator=noise)),
        "hidden by 8 bits, steepest": lambda x: lambda s: ball(scale, x, "it").corner(x, s) - x,
        "lightest pixels 10% darker": lambda x: fixed(torch.where(x > x.flatten().quantile(0.9), -0.1 * x, 0 * x)),
        LARGE: lambda x: fixed(torch.roll(x, 1, dims=2) - x),
    }
    print("| change | pairs | estimated: r | slope | replaced: r | slope |")
    print("|---|---|---|---|---|---|")
    every: list[tuple[float, ...]] = []
    for name, change in kinds.items():
        points = []
        for index in generator.choice(task.train.indices, options.changes, replace=False):
            delta = change(image(int(index)))
            found = perturb_image(
                stores,
                int(index),
                selected,
                change=lambda s, delta=delta: delta(s).double(),
                retrain=True,
                terminal=terminal,
            )
            points += [(one.estimated, one.replaced, one.actual) for one in found.effects]
        every += points if name != LARGE else []
        print_row(name, points)
    print_row("the first three", every)
    print(f"{options.train:,} images, {w.numel():,} parameters, {time.perf_counter() - started:.0f} s")


def print_row(name: str, points: list[tuple[float, ...]]) -> None:
    """Print correlation and slope of actual on estimated and on replaced."""
    estimated, replaced, actual = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    cells = [f"{found(x, actual):.4f}" for x in (estimated, replaced) for found in (pearson, slope)]
    print(f"| {name} | {len(points)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
