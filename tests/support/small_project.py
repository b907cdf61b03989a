"""A project so small that a command on it takes a second: 24 images of 8 × 8 in three classes, 51 parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder

from tests.conftest import Command

# Commands in one process, after one that takes the memory which any of them does; then by how many MB its peak grew.
GROWTH = """
import json, sys
from pathlib import Path
from influence_cli.cli import app


def run(words):
    try:
        app(words)
    except SystemExit as ended:
        return ended.code or 0


def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


first, *others = json.loads(sys.argv[1])
assert run(first) == 0
before = peak()
codes = [run(words) for words in others]
print(json.dumps([codes, peak() - before]))
"""
# Three blocks.
N, BLOCK, BLOCKS = 24, 8, 3
CONFIG = f"""
model: {{factory: ./model.py:build, checkpoint: model.pt}}
l2: 0.01
train:
  dataset: torchvision.datasets.ImageFolder
  args: {{root: train}}
  transform: [{{Grayscale: {{num_output_channels: 1}}}}, ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}]
test:
  dataset: torchvision.datasets.ImageFolder
  args: {{root: test}}
gradients: {{block: {BLOCK}}}
"""
MODEL = """
from torch import nn


def build():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
"""
EKFAC = ("-s", "curvature.method=ekfac")
# A training that is over at once, and depends on all that it is given.
TRAINING = """

def train(model, data, *, l2, seed, progress):
    import torch

    with torch.no_grad():
        model[-1].bias += torch.stack([x for x, _ in data]).mean() * torch.arange(3) + seed % 97 / 97
        model[-1].bias[0] -= sum(y for _, y in data) / len(data)
    progress(1, 1)
    return model
"""


def make(folder: Path) -> Path:
    """Write the images, a config, and a model that is trained to its minimum."""
    generator = np.random.default_rng(0)
    for part, count in (("train", N), ("test", 6)):
        for number in range(count):
            path = folder / part / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 120, (8, 8)) + 60 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=0)  # one size, whatever it shows
    (folder / "influence.yaml").write_text(CONFIG)
    (folder / "model.py").write_text(MODEL)
    train(folder)
    return folder


def train(folder: Path) -> None:
    """Train the model of the project to its minimum, so that no command has anything to warn of."""
    data = ImageFolder(folder / "train")
    images = torch.stack([torch.tensor(np.asarray(image.convert("L"))).float()[None] / 255 for image, _ in data])
    torch.manual_seed(0)
    model, labels = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), torch.tensor(data.targets)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))
        loss = nn.functional.cross_entropy(model(images), labels) + 0.005 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.save(model.state_dict(), folder / "model.pt")


def with_training(folder: Path, *, deep: bool = False) -> Path:
    """Give the project a training function, and a second layer: then no Newton step can take the place of a training.

    Args:
        folder: the project.
        deep: whether it is to have that layer, untrained.
    """
    text = (folder / "model.py").read_text()
    if deep:
        text = text.replace("nn.Linear(16, 3))", "nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 3))")
        torch.manual_seed(0)
        model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 3))
        torch.save(model.state_dict(), folder / "model.pt")
    (folder / "model.py").write_text(text + TRAINING)
    with (folder / "influence.yaml").open("a") as file:
        file.write("training: {factory: ./model.py:train}\n")
    return folder


def place_of(project: Path, name: str, row: int) -> int:
    """Find the first byte of a row in the store."""
    with h5py.File(project / "influence.h5") as file:
        data = file[name]
        return int(data.id.get_offset() + row * (data.nbytes // len(data)))


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def refusal(influence: Command, project: Path, *words: object, stdin: str = "") -> str:
    """Run a command that has to fail, and give its only error line and the hint below it."""
    done = influence(*words, cwd=project, code=2, stdin=stdin)
    assert done.out == ""
    assert "unexpected error" not in done.err
    lines = done.err.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(lines) <= at + 2, done.err
    return "\n".join(lines[at:])


def growth(project: Path, *commands: list[str]) -> tuple[list[int], int]:
    """Run commands in a process of their own; give the exit codes of all but the first, and the growth in MB.

    No fork: what it shares with the process that it comes from counts only once it is touched.
    """
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, json.dumps(commands)], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    codes, grown = json.loads(done.stdout.splitlines()[-1])
    return codes, grown
