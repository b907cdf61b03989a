"""An error that nobody expected: whose code it is, at which example and part of the work, where to report it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command, edit

MODEL = """
import torch
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        if (abs(x.sum(dim=(1, 2, 3)) - MARK) < 1e-3).any():
            FAIL
        return super().forward(x)


def build():
    return Net(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
"""
DATA = """
import sys
from torchvision.datasets import ImageFolder


class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Apart(BaseException):
    pass


class Data(ImageFolder):
    def __getitem__(self, index):
        if index == 20:
            FAIL
        return super().__getitem__(index)
"""
LOSS = """
import torch


def mine(outputs, targets):
    LOSSES
"""


def error_of(influence: Command, project: Path, *words: object) -> tuple[str, str]:
    err = influence(*words, cwd=project, code=2).err
    lines = err.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return lines[at], lines[at + 1]


def mark(project: Path, index: int) -> float:
    """Give the sum of the input of one training example, by which the model knows it."""
    import numpy as np
    from torchvision.datasets import ImageFolder

    return float(np.asarray(ImageFolder(project / "train")[index][0].convert("L"), dtype=np.float64).sum() / 255)


@pytest.mark.parametrize("command", ["gradients", "mislabels"])
@pytest.mark.parametrize("fail", ["raise ValueError('not this one')", "torch.ones(3) @ torch.ones(4)"])
def test_a_model_that_fails_on_one_later_example(influence: Command, tiny: Path, command: str, fail: str) -> None:
    text = MODEL.replace("MARK", repr(mark(tiny, 21))).replace("FAIL", fail)
    (tiny / "model.py").write_text(text)
    line, hint = error_of(influence, tiny, command)
    number = text.splitlines().index(f"            {fail}") + 1
    assert line.startswith(f"error: {command}: your code failed with ")
    assert f"(model.py:{number}," in line
    assert ("not this one" if "ValueError" in fail else "inconsistent tensor size") in line
    assert " at training example 21 (" in line
    assert ", during " in line
    assert f"mend model.py:{number}, or list the example under exclude" in hint


@pytest.mark.parametrize("fail", ["raise Odd", "raise Apart('apart')", "sys.exit('enough')"])
def test_a_data_set_that_fails_in_a_way_of_its_own(influence: Command, tiny: Path, fail: str) -> None:
    (tiny / "data.py").write_text(DATA.replace("FAIL", fail))
    edit(tiny, "torchvision.datasets.ImageFolder", "./data.py:Data")
    line, _ = error_of(influence, tiny, "gradients")
    assert "training example 20 (" in line
    assert "cannot be read: " in line


def test_a_program_that_the_users_code_ends_is_no_success(influence: Command, tiny: Path) -> None:
    text = MODEL.replace("MARK", repr(mark(tiny, 21))).replace("FAIL", "raise SystemExit(0)")
    (tiny / "model.py").write_text(text)
    line, _ = error_of(influence, tiny, "gradients")
    assert "your code failed with SystemExit: 0 (model.py:9, in forward)" in line


def test_a_loss_that_fails_on_one_label(influence: Command, tiny: Path) -> None:
    fail = "assert not ((targets == 2) & (outputs[:, 0] > -1e9)).any(), 'no c'\n    return outputs[:, 0]"
    (tiny / "losses.py").write_text(LOSS.replace("LOSSES", fail))
    edit(tiny, "l2: 0.01", "l2: 0.01\nloss: ./losses.py:mine")
    line, hint = error_of(influence, tiny, "gradients")
    assert "AssertionError: no c" in line
    assert "training example 16 (" in line or "losses.py" in line
    assert hint


def test_an_error_of_influence_itself_asks_for_a_report(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_cli.precompute.fill_store.block_sums", None)
    line, hint = error_of(influence, tiny, "gradients")
    assert line.startswith(
        "error: gradients: unexpected error in influence itself (influence_cli/precompute/fill_store"
    )
    assert "TypeError: 'NoneType' object is not callable at one of 8 examples from training example 0 (" in line
    assert ", during gradients of influence.h5" in line
    assert "none of your code raised it: please report it" in hint


COMMANDS = {
    "check": (),
    "gradients": (),
    "rank": (0,),
    "mislabels": (),
    "groups": (0,),
    "select": ("--keep", 0.5),
    "verify": (),
    "perturb": (3, "--test", 0),
}


@pytest.mark.quick("rank", "mislabels")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_loss_of_one_number_alike(influence: Command, tiny: Path, command: str) -> None:
    (tiny / "losses.py").write_text(
        LOSS.replace("LOSSES", "return torch.nn.functional.cross_entropy(outputs, targets)")
    )
    edit(tiny, "l2: 0.01", "l2: 0.01\nloss: ./losses.py:mine")
    line, hint = error_of(influence, tiny, command, *COMMANDS[command])
    assert "loss ./losses.py:mine returns one number for a batch of" in line
    assert "reduction='none'" in hint
    assert not (tiny / "influence.h5").exists()
