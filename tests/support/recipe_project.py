"""A project whose training is a recipe: 60 images of 8 × 8 in three classes, 83 parameters, 30 smooth steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.conftest import Command

N, TESTS = 60, 9
MODEL = """
from torch import nn


def build():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 3))
"""
# One layer, which has a single minimum.
SOFTMAX = MODEL.replace("nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 3)", "nn.Linear(16, 3)")
RECIPE = {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9, "batch": 20, "epochs": 10}
# Long enough for the minimum, in steps of the whole set.
TO_MINIMUM = {"lr": 0.5, "momentum": 0.8, "batch": N, "epochs": 120, "weight_decay": 0.05, "precision": "float64"}


def make(folder: Path, recipe: dict[str, Any] = RECIPE, *, model: str = MODEL, **config: Any) -> Path:
    """Write images, model and config; nothing is trained yet.

    Args:
        folder: where.
        recipe: the section ``training.recipe``.
        model: the text of model.py.
        config: further sections.
    """
    generator = np.random.default_rng(0)
    for part, count in (("train", N), ("test", TESTS)):
        for number in range(count):
            path = folder / part / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 120, (8, 8)) + 30 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "model.py").write_text(model)
    grey = [{"Grayscale": {"num_output_channels": 1}}, "ToImage", {"ToDtype": {"dtype": "float32", "scale": True}}]
    sections = {
        "model": {"factory": "./model.py:build", "checkpoint": "model.pt"},
        "train": {"dataset": "torchvision.datasets.ImageFolder", "args": {"root": "train"}, "transform": grey},
        "test": {"dataset": "torchvision.datasets.ImageFolder", "args": {"root": "test"}},
        "curvature": {"method": "replay"},
        "training": {"recipe": recipe},
        **config,
    }
    (folder / "influence.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    return folder


def rows(influence: Command, project: Path, *words: object) -> list[dict[str, Any]]:
    """Run a command, and read its rows."""
    done = influence(*words, "--format", "json", cwd=project)
    table: list[dict[str, Any]] = json.loads(done.out)
    return table


def influences(influence: Command, project: Path, *words: object) -> np.ndarray:
    """Give the influence of every training example on test examples, [tests, n], by ``rank … --all``."""
    values: dict[tuple[Any, int], float] = {}
    for row in rows(influence, project, "rank", *words, "--all"):
        values[row["test"], row["index"]] = row["influence"]
    tests = list(dict.fromkeys(test for test, _ in values))
    return np.array([[values.get((test, index), 0.0) for index in range(N)] for test in tests])


def states(project: Path) -> dict[str, bytes]:
    """Give the bytes of the checkpoint and of all kept states."""
    files = [project / "model.pt", *sorted((project / "influence.run").glob("state-*.h5"))]
    return {path.name: path.read_bytes() for path in files}
