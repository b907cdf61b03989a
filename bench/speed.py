"""How fast are the gradient pass and the store? Ratios, measured in one run.

    make bench              (or: python bench/speed.py --data FOLDER --images 60000)

On Fashion-MNIST with the demo's CNN (55,338 parameters, all tracked):
U       plain batched forward + backward over the images, in memory
pass    example gradients of the same images, in memory, no disk (batches alternate with U's)
fill    `influence gradients`: images read through torchvision, gradients computed, checksummed, written
scan    what `rank` does with a store of 10,000 images and 10 test images, checksums verified, file in the page cache,
        beside the same matrix product from memory (scans and products alternate)
"""

from __future__ import annotations

import argparse
import gc
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.config import load_config
from influence_cli.errors import human_bytes
from influence_cli.layers import example_gradients, micro_batch
from influence_cli.precompute import decide, prepare
from influence_cli.scores import influence
from influence_cli.store import Store
from influence_cli.task import Task, load_tasks
from influence_cli.terminal import Terminal

SHARED = Path(__file__).parents[2] / "shared" / "data" / "fashion-mnist"
CONFIG = """
model: {{factory: {model}:build, checkpoint: model.pt}}
train:
  dataset: torchvision.datasets.FashionMNIST
  args: {{root: {root}}}
  exclude: exclude.npy
  transform: [ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}, {{Normalize: {{mean: [0.286], std: [0.353]}}}}]
gradients: {{budget: 100GB}}
curvature: {{method: identity}}
"""


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def project(folder: Path, root: Path, images: int) -> Task:
    """Write a config over the first images of the training set, with a seeded model, and load it."""
    import influence_cli.demo.project_model as project_model

    torch.manual_seed(0)
    torch.save(project_model.build().state_dict(), folder / "model.pt")
    np.save(folder / "exclude.npy", np.arange(images, 60_000))
    (folder / "influence.yaml").write_text(CONFIG.format(model=project_model.__file__, root=root))
    return load_tasks(load_config(folder / "influence.yaml"))[0]


def measure_pass(task: Task, images: int) -> tuple[float, float]:
    """Give the seconds of plain passes and of gradient passes over the images, batch by batch in turn."""
    choice, _ = decide(load_config_of(task), task, Terminal(quiet=True))
    inputs, targets = in_memory(task, images)
    step = micro_batch(choice.network, 256)
    parameters = list(task.model.parameters())
    plain = gradients = 0.0
    for start in range(0, images, step):
        x, y = inputs[start : start + step], targets[start : start + step]

        def forward_backward(x: Tensor = x, y: Tensor = y) -> object:
            return torch.autograd.grad(task.loss(task.model(x), y).mean(), parameters)

        def example(x: Tensor = x, y: Tensor = y) -> object:
            return example_gradients(choice.network, x, y)

        if start == 0:  # the first call of each warms up
            forward_backward(), example()
        plain += seconds(forward_backward)
        gradients += seconds(example)
    return plain, gradients


def load_config_of(task: Task) -> object:
    """Load the config beside the task's checkpoint again."""
    return load_config(task.checkpoint.parent / "influence.yaml")


def in_memory(task: Task, images: int) -> tuple[Tensor, Tensor]:
    """Hold the images as the model takes them."""
    data = task.train.source
    inputs = ((data.data[:images].float() / 255 - 0.286) / 0.353).unsqueeze(1)
    return inputs, data.targets[:images]


def measure_fill(task: Task) -> tuple[float, Path]:
    """Time `influence gradients` without its start-up."""
    terminal = Terminal(quiet=True)
    config = load_config_of(task)
    with redirect_stderr(StringIO()):  # that the model is untrained is no news here
        spent = seconds(lambda: prepare(config, 0, task, terminal, overwrite=True))
    return spent, config.gradients.store


def measure_scan(path: Path, tests: int = 10, rounds: int = 7) -> tuple[float, float, int]:
    """Give the median seconds of scanning with a product, of the product from memory, and the bytes."""
    with Store.open(path) as store:
        rows = np.empty((store.layout.n, store.layout.k), dtype=np.float32)
        for where, block in store.scan():
            rows[where] = block
    memory = torch.from_numpy(rows)
    s_test = torch.randn(tests, rows.shape[1])

    def scan() -> None:
        with Store.open(path) as store:
            for _, block in store.scan():
                influence(s_test, torch.from_numpy(block), 1)

    scans, products = [], []
    for _ in range(rounds):
        scans.append(seconds(scan))
        products.append(seconds(lambda: influence(s_test, memory, 1)))
    return statistics.median(scans), statistics.median(products), rows.nbytes


def main() -> None:
    """Run the three measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder that holds FashionMNIST/raw/*.gz")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--scanned", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores go (13 GB for 60,000 images)")
    words = parser.parse_args()
    if not words.data.is_dir():
        sys.exit(f"there is no {words.data}: pass --data FOLDER with FashionMNIST/raw/*.gz")
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        folder = Path(name)
        shutil.copytree(words.data / "FashionMNIST", folder / "data" / "FashionMNIST", copy_function=shutil.copyfile)
        for part in (folder / "data").rglob("*"):
            if part.is_dir():
                part.chmod(0o755)
        FashionMNIST(folder / "data", download=True)
        print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        task = project(folder, folder / "data", words.images)
        plain, gradients = measure_pass(task, words.images)
        print(f"{words.images:,} images: plain forward + backward {plain:.1f} s = 1 U")
        print(f"gradient pass, no disk    {gradients:6.1f} s = {gradients / plain:.2f} U")
        spent, path = measure_fill(task)
        size = path.stat().st_size
        print(f"gradient pass, to disk    {spent:6.1f} s = {spent / plain:.2f} U  ({human_bytes(size)} written)")
        path.unlink()
        task = project(folder, folder / "data", words.scanned)
        _, path = measure_fill(task)
        gc.collect()
        scan, product, size = measure_scan(path)
        print(f"store scan, {words.scanned:,} images × 10 tests: {scan:.2f} s ({human_bytes(size / scan)}/s)")
        print(f"same product from memory  {product:.2f} s ({human_bytes(size / product)}/s)")
        print(f"scan reaches {product / scan:.0%} of the product's speed")


if __name__ == "__main__":
    main()
