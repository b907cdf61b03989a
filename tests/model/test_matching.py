"""Do model and data fit together: hidden test labels, and a forward that wants more than the image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from influence_cli.model.matching import numbered
from tests.conftest import Command

CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def points(seed, n):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 4, generator=g) + 1.5 * nn.functional.one_hot(y, 4).float(), y


def train():
    return TensorDataset(*points(0, 30))


def hidden():
    return TensorDataset(points(1, 6)[0], torch.full((6,), -1))


def some():
    return TensorDataset(points(1, 6)[0], torch.tensor([0, 1, -1, 2, 0, 1]))


def build():
    return nn.Linear(4, 3)


class NeedsLabel(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x, label, scale=1.0, *, margin):
        return super().forward(x)
"""
CONFIG = """
model: {factory: ./code.py:build, checkpoint: model.pt}
l2: 0.01
train: {dataset: ./code.py:train}
test: {dataset: ./code.py:hidden}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "model.pt")
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "influence.yaml").write_text(CONFIG)
    return tmp_path


def test_commands_that_need_no_test_label_run_without(influence: Command, project: Path) -> None:
    assert "6; they have no labels" in influence("check", cwd=project).out
    influence("gradients", cwd=project)
    for words in (["rank", "3", "--target", "predicted"], ["rank", "3", "--target", "2"]):
        rows = [json.loads(line) for line in influence(*words, cwd=project).out.splitlines()]
        assert len(rows) > 1
        assert {row["test_label"] for row in rows} == {None}
    rows = [json.loads(line) for line in influence("rank", "--train", 4, "--target", "1", cwd=project).out.splitlines()]
    assert {row["test_label"] for row in rows} == {None}
    assert influence("mislabels", "--signals", "--top", 2, cwd=project).out.count("\n") == 2


@pytest.mark.parametrize(
    "words",
    [
        ["rank", "3"],
        ["rank", "misclassified"],
        ["rank", "--train", "4"],
        ["mislabels", "--on", "test"],
        ["groups", "0:3"],
        ["verify", "0"],
        ["verify"],
        ["perturb", "1", "--test", "0"],
        ["select", "--keep", "0.5"],
    ],
)
def test_commands_that_need_a_test_label_say_that_there_is_none(
    influence: Command, project: Path, words: list[str]
) -> None:
    err = influence(*words, cwd=project, code=2).err
    assert "the test examples have no labels (all are −1)" in err
    assert "test.labels names a file of labels" in err


def test_a_label_on_stdin_is_enough(influence: Command, project: Path) -> None:
    out = influence("rank", "-", cwd=project, stdin="3\t1\n").out
    assert {json.loads(line)["test_label"] for line in out.splitlines()} == {"1"}


def test_a_few_hidden_labels_are_an_error(influence: Command, project: Path) -> None:
    err = influence("check", "-s", "test.dataset=./code.py:some", cwd=project, code=2).err
    assert "test example 2 has the label -1, but the model has 3 outputs, so labels are 0 to 2" in err


def test_a_forward_that_needs_more_than_the_image_is_told(influence: Command, project: Path) -> None:
    err = influence("check", "-s", "model.factory=./code.py:NeedsLabel", cwd=project, code=2).err
    assert "missing 1 required positional argument" in err or "missing" in err
    assert "its forward also needs 'label', 'margin': name a wrapper" in err
    assert "transform" not in err


def test_outputs_beyond_the_names_get_numbers() -> None:
    assert numbered(("a", "b"), 2) == ("a", "b")
    assert numbered(("a", "3"), 4) == ("a", "3", "2", "output 3")
