"""The checkpoints of a run: their probabilities averaged, and the margin of the logits of the mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import ImageFolder

from tests.conftest import Command

RUN = ("-s", "model.learning_rates=0.1", "-s", "model.steps=10")


@pytest.fixture
def run(project: Path) -> Path:
    """Keep three checkpoints: the last one is the model's."""
    state = torch.load(project / "model.pt")
    for number, scale in enumerate((0.1, 0.5), start=1):
        noise = {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            for name, value in state.items()
        }
        torch.save(
            {name: scale * (value + noise[name]) for name, value in state.items()}, project / f"early{number}.pt"
        )
    return project


def by_hand(project: Path, files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Average the probabilities an image and a checkpoint at a time; and give the labels."""
    data = ImageFolder(project / "train")
    x = torch.stack([torch.tensor(np.array(image.convert("L"))).double() / 255 for image, _ in data])
    x = nn.functional.avg_pool2d(x[:, None], 4).flatten(1)
    total = np.zeros((len(x), 10))
    for file in files:
        state = torch.load(project / file)
        total += (x @ state["2.weight"].double().T + state["2.bias"].double()).softmax(dim=1).numpy()
    return total / len(files), np.array(data.targets)


@pytest.mark.parametrize("ensemble", ["tracin", "source", "mean"])
def test_the_margin_is_that_of_the_logits_of_the_mean(influence: Command, run: Path, ensemble: str) -> None:
    words = ("-s", "model.checkpoint=[early1.pt, early2.pt, model.pt]", "-s", f"model.ensemble={ensemble}")
    words += () if ensemble == "mean" else RUN
    done = influence("mislabels", "--signal", "trajectory", "--all", "--format", "json", *words, cwd=run)
    rows = json.loads(done.out)
    soft, labels = by_hand(run, ["early1.pt", "early2.pt", "model.pt"])
    every = np.arange(len(labels))
    given = np.log(soft[every, labels])
    others = soft.copy()
    others[every, labels] = 0
    margin = np.log(others.max(axis=1)) - given
    index = np.array([row["index"] for row in rows])
    assert (np.diff(margin[index]) < 1e-5).all()
    names = sorted(path.name for path in (run / "train").iterdir())
    assert [row["suggested"] for row in rows] == [names[c] for c in soft[index].argmax(axis=1)]
    assert [row["confidence"] for row in rows] == pytest.approx(soft[index].max(axis=1), abs=1e-5)
    explained = influence("mislabels", "--explain", 7, "--signals", *words, cwd=run).out
    own = next(row for line in explained.splitlines() if (row := json.loads(line))["name"] == "trajectory")
    assert own["value"] == pytest.approx(margin[7], abs=1e-4)
    assert own["suggested"] == names[soft[7].argmax()]


def test_the_page_says_what_it_is(influence: Command, run: Path) -> None:
    words = ("-s", "model.checkpoint=[early1.pt, model.pt]", "-s", "model.ensemble=tracin", *RUN)
    influence("mislabels", "--signal", "trajectory", "--report", "page.html", *words, cwd=run)
    assert "averaged over the checkpoints of the run" in (run / "page.html").read_text()


def test_it_needs_several_checkpoints(influence: Command, run: Path) -> None:
    done = influence("mislabels", "--signal", "trajectory", cwd=run, code=2)
    assert "--signal trajectory: it needs several checkpoints" in done.err
