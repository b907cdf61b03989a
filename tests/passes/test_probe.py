"""What would make every number wrong is found before the first one, by every command, whatever its seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command, edit

# What a project is given, and what all commands say of it.
FLIP = """

import torch
from torchvision.datasets import ImageFolder


class Flip(ImageFolder):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image.transpose(0) if torch.rand(1) < {chance} else image), label
"""
HIDDEN = """

import numpy as np
from torchvision.datasets import ImageFolder

GENERATOR = np.random.default_rng()


class Flip(ImageFolder):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image.transpose(0) if GENERATOR.random() < 0.1 else image), label
"""
DROPOUT = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.features(x), {chance}))


def build():
    return Net()
"""
COMMANDS = [("check",), ("mislabels", "--top", "3"), ("rank", "0"), ("gradients",)]


def with_data_set(project: Path, code: str) -> None:
    (project / "model.py").write_text((project / "model.py").read_text() + code)
    edit(project, "torchvision.datasets.ImageFolder", "./model.py:Flip")


def with_model(project: Path, code: str) -> None:
    import torch

    (project / "model.py").write_text(code)
    state = torch.load(project / "model.pt", weights_only=True)
    torch.save({f"head.{name.rpartition('.')[2]}": value for name, value in state.items()}, project / "model.pt")


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_an_image_flipped_one_time_in_ten(words: tuple[str, ...], influence: Command, tiny: Path) -> None:
    with_data_set(tiny, FLIP.format(chance=0.1))
    for seed in range(3):
        done = influence(*words, "-s", f"seed={seed}", cwd=tiny, code=2)
        assert "the train transform is random: two readings of training example" in done.err


@pytest.mark.quick("check")
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_generator_that_nobody_sees(words: tuple[str, ...], influence: Command, tiny: Path) -> None:
    with_data_set(tiny, HIDDEN)
    done = influence(*words, cwd=tiny, code=2)
    assert "is random: two readings of" in done.err


def test_a_draw_without_an_effect_is_told_and_stops_nothing(influence: Command, tiny: Path) -> None:
    with_data_set(tiny, FLIP.format(chance=-1.0))
    done = influence("check", cwd=tiny)
    assert "the train data set draws random numbers (torch), though no reading differed" in done.err


@pytest.mark.parametrize("chance", [0.5, 0.0001])
@pytest.mark.parametrize("words", COMMANDS[:2], ids=lambda words: words[0])
def test_dropout_that_eval_mode_does_not_switch_off(
    words: tuple[str, ...], chance: float, influence: Command, tiny: Path
) -> None:
    with_model(tiny, DROPOUT.format(chance=chance))
    for seed in range(3):
        done = influence(*words, "-s", f"seed={seed}", cwd=tiny, code=2)
        assert "the outputs are random in eval mode" in done.err


OF_THE_BATCH = """

def mine(outputs, targets):
    weight = 1.0 + (targets == 0)
    return weight / weight.sum() * len(targets) * nn.functional.cross_entropy(outputs, targets, reduction="none")
"""


@pytest.mark.parametrize("words", COMMANDS[:2], ids=lambda words: words[0])
def test_a_loss_that_divides_by_what_the_batch_holds(words: tuple[str, ...], influence: Command, tiny: Path) -> None:
    with (tiny / "model.py").open("a") as file:
        file.write(OF_THE_BATCH)
    done = influence(*words, "-s", "loss=./model.py:mine", cwd=tiny, code=2)
    assert "loss ./model.py:mine: an example's loss depends on the rest of its batch" in done.err


SOFTMAX = """
from torch import nn


def build():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Softmax(dim=1))
"""
OF_A_BATCH = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), nn.Linear(16, 3)

    def forward(self, x):
        x = self.features(x)
        return self.head(x - x.mean(dim=0))


def build():
    return Net()
"""


def test_mislabels_refuses_probabilities(influence: Command, tiny: Path) -> None:
    (tiny / "model.py").write_text(SOFTMAX)
    assert "the outputs are probabilities" in influence("mislabels", cwd=tiny, code=2).err


def test_mislabels_refuses_outputs_that_depend_on_the_batch(influence: Command, tiny: Path) -> None:
    with_model(tiny, OF_A_BATCH)
    assert "depends on the rest of its batch" in influence("mislabels", cwd=tiny, code=2).err


def test_classes_that_the_model_was_trained_with_in_another_order(influence: Command, tiny: Path) -> None:
    """The weights of the last layer are turned by one class: nothing else is wrong with the model."""
    import torch

    state = torch.load(tiny / "model.pt", weights_only=True)
    torch.save({name: value.roll(1, dims=0) for name, value in state.items()}, tiny / "model.pt")
    said = "the predictions fit another order of the classes (3 of 3 have another output)"
    written = 'train.classes: {"a": 1, "b": 2, "c": 0}'
    for words in (("check",), ("rank", "0")):
        done = influence(*words, cwd=tiny)
        assert said in done.err
        assert written in done.err
    edit(tiny, "train:\n", "train:\n  classes: " + written.partition(": ")[2] + "\n")
    again = influence("rank", "0", "-s", "gradients.store=again.h5", cwd=tiny)
    assert "another order" not in again.err
    assert "near chance" not in again.err
