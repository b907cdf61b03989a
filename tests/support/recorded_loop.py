"""A plain PyTorch loop on the small project's images, recorded; and the config that reads the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from influence_cli import Recorder, load_config, load_tasks
from influence_cli.replay.open import Replayed, open_run

N, STEPS, BATCH = 24, 13, 7
MODEL = """
from torch import nn


def build(norm=False, dropout=0.0, double=False, noise=False):
    # A bias before a BatchNorm has a gradient of rounding alone.
    conv = nn.Conv2d(1, 4, 3, bias=noise or not norm)
    layers = [conv, *([nn.BatchNorm2d(4)] if norm else []), nn.GELU(), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(36, 3))
    return model.double() if double else model
"""
CONFIG = """
model: {{factory: ./model.py:build, args: {args}, checkpoint: model.pt}}
train:
  dataset: torchvision.datasets.ImageFolder
  args: {{root: train}}
  transform: [{{Grayscale: {{num_output_channels: 1}}}}, ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}]
test:
  dataset: torchvision.datasets.ImageFolder
  args: {{root: test}}
training: {{record: runs/a}}
curvature: {{method: replay}}
"""
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def make(folder: Path, **args: Any) -> Path:
    """Write images, model and config, but no checkpoint yet."""
    generator = np.random.default_rng(0)
    for part, count in (("train", N), ("test", 6)):
        for number in range(count):
            path = folder / part / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 120, (8, 8)) + 60 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "model.py").write_text(MODEL)
    words = ", ".join(f"{key}: {str(value).lower()}" for key, value in args.items())
    (folder / "influence.yaml").write_text(CONFIG.format(args=f"{{{words}}}"))
    return folder


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """Read the training images [n, 1, 8, 8] and labels [n] in the order of ImageFolder."""
    paths = sorted((folder / "train").rglob("*.png"))
    inputs = torch.stack([torch.tensor(np.asarray(Image.open(path))).float()[None] / 255 for path in paths])
    return inputs, torch.tensor(["abc".index(path.parent.name) for path in paths])


def build(folder: Path, **args: Any) -> nn.Module:
    """Make the model of the config."""
    space: dict[str, Any] = {}
    exec((folder / "model.py").read_text(), space)
    torch.manual_seed(1)
    model: nn.Module = space["build"](**args)
    return model


def record(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    clip: float | None = None,
    told: bool = True,
    steps: int = STEPS,
    changed: Callable[[Tensor, int], Tensor] | None = None,
    given: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the model as anybody would, with the two lines of the recorder, and write the checkpoint."""
    inputs, labels = images(folder)
    inputs = inputs.to(next(model.parameters()))
    draw = torch.Generator().manual_seed(5)
    model.train()
    with Recorder(folder / "runs" / "a", model, optimizer, clip=clip if told else None, labels=labels) as recorder:
        for step in range(steps):
            rows = torch.randperm(N, generator=draw)[:BATCH]
            x = inputs[rows] if changed is None else changed(inputs[rows], step)
            optimizer.zero_grad()
            loss(model(x), labels[rows]).backward()
            recorder.step(rows, x if given else None)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            after(step)
    torch.save(model.state_dict(), folder / "model.pt")


def opened(folder: Path) -> Replayed:
    """Open the record by its config."""
    config = load_config(folder / "influence.yaml", [])
    (task,) = load_tasks(config)
    return open_run(config, task)
