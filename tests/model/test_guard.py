"""What a user's code does besides its work: the numbers are those of the same project without it, or it is named."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Command, edit
from tests.support.small_project import refusal, with_training

CODE = """
import torch
from torch import nn
{top}


class Net(nn.Sequential):
    def forward(self, x):
        {forward}
        return super().forward(x)


def shifted(x):
    {transform}
    return x


def build():
    {factory}
    net = Net(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    {after}
    return {result}
"""
PLACES = {"top": "", "forward": "pass", "transform": "pass", "factory": "pass", "after": "pass", "result": "net"}
TRAINS = "w = torch.zeros(1, requires_grad=True); o = torch.optim.SGD([w], 1.0); w.sum().backward(); o.step(); o.step()"
ARGUMENTS = "import argparse; p = argparse.ArgumentParser(); p.add_argument('--lr'); p.parse_args()"
HELD = "import threading; net.lock = threading.Lock(); net.rows = (i for i in range(3))"
# Where the code stands, what it is, and what stderr says of it.
FENCED = [
    *((place, "torch.set_default_dtype(torch.float64)", "") for place in ("top", "factory", "forward")),
    *((place, "torch.set_grad_enabled(False)", "") for place in ("top", "factory")),
    ("top", "torch.set_default_device('meta')", ""),
    ("top", "import os; os.chdir('/')", ""),
    ("top", ARGUMENTS, ""),
    ("top", TRAINS, "./model.py trains a model while it is imported"),
    ("factory", "import warnings; warnings.simplefilter('error')", ""),
    ("factory", "import numpy; numpy.random.seed(3); torch.manual_seed(3)", ""),
    ("forward", "x.mul_(2.0); x = x / 2.0", ""),
    ("forward", "x.data.mul_(2.0); x = x / 2.0", ""),
    ("transform", "x.mul_(2.0); x = x / 2.0; torch.set_default_dtype(torch.float64)", ""),
    ("after", HELD, ""),
    ("after", "net.double()", "everything is computed in float32"),
    ("result", "torch.compile(net)", ""),
    ("result", "nn.DataParallel(net)", ""),
]


def write(project: Path, **code: str) -> None:
    (project / "model.py").write_text(CODE.format(**(PLACES | code)))


def numbers(text: str) -> list[list[object]]:
    """Read rows of CSV, without their paths."""
    rows = list(csv.DictReader(io.StringIO(text)))

    def number(value: str) -> object:
        try:
            return pytest.approx(float(value), rel=1e-5, abs=2e-6)
        except ValueError:
            return value

    return [[number(value) for name, value in row.items() if not name.endswith("path")] for row in rows]


@pytest.mark.quick("top-torch.set_default_dtype*", "forward-x.mul_*")
@pytest.mark.parametrize(("place", "code", "said"), FENCED)
def test_numbers_are_those_of_the_same_project_without_it(
    influence: Command, tiny: Path, place: str, code: str, said: str
) -> None:
    edit(tiny, "{dtype: float32, scale: true}}]", "{dtype: float32, scale: true}}, ./model.py:shifted]")
    commands = [
        ("mislabels", "--all", "--format", "csv"),
        ("rank", 0, 1, "--all", "--format", "csv"),
        ("verify", 0, "--loo", 4, "--format", "csv"),
    ]
    write(tiny)
    usual = [influence(*words, cwd=tiny).out for words in commands]
    (tiny / "influence.h5").unlink()
    write(tiny, **{place: code})
    for name in [name for name in sys.modules if name.startswith("influence_user_model_")]:
        del sys.modules[name]
    for words, expected in zip(commands, usual, strict=True):
        done = influence(*words, cwd=tiny)
        assert numbers(done.out) == numbers(expected)
        assert said in done.err or words[0] != "mislabels"
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


REFUSED = [
    ({"top": "import sys; sys.exit(3)"}, "model.py ended the program (SystemExit: 3)", "if __name__ == '__main__':"),
    ({"forward": "torch.set_grad_enabled(False)"}, "the model's outputs have no gradient", "torch.no_grad"),
    (
        {"top": "class Net2(nn.Module): pass", "after": "net.forward = torch.inference_mode()(net.forward)"},
        "the model's outputs have no gradient",
        "torch.inference_mode",
    ),
    ({"after": "net.forward = torch.no_grad()(net.forward)"}, "the model's outputs have no gradient", "torch.no_grad"),
    (
        {"after": "net[0] = nn.BatchNorm2d(1, affine=False)", "forward": "self[0].train(); x = x[..., ::2, ::2]"},
        "every forward pass of the model changes 0.running_mean, 0.running_var, in eval mode too",
        "0 is in training mode although the model is not",
    ),
    (
        {"result": "torch.jit.script(nn.Sequential(*net))"},
        "returned a TorchScript model, whose layers cannot be watched",
        "return the module that torch.jit.script was given",
    ),
]


@pytest.mark.parametrize(("code", "message", "hint"), REFUSED)
def test_what_gives_no_right_number_is_named(
    influence: Command, tiny: Path, code: dict[str, str], message: str, hint: str
) -> None:
    write(tiny, **code)
    if "BatchNorm" in str(code):
        state = torch.load(tiny / "model.pt")
        numbers = {"0.running_mean": torch.zeros(1), "0.running_var": torch.ones(1)}
        torch.save(state | numbers | {"0.num_batches_tracked": torch.tensor(1)}, tiny / "model.pt")
    told = refusal(influence, tiny, "check")
    assert message in told
    assert hint in told


def test_an_input_that_is_changed_later_on_is_refused(influence: Command, tiny: Path) -> None:
    """The first example is dark, so its pixels stay; those of class c are not."""
    write(tiny, forward="x.mul_(0.5) if float(x.mean()) > 0.5 else None")
    assert "changes some of its inputs in place, but not the first ones" in refusal(influence, tiny, "rank", 0)


def test_a_data_set_in_memory_stays_as_it_is(influence: Command, tiny: Path) -> None:
    """A transform and a model change what they get: the data set's own numbers are the same after every command."""
    (tiny / "data.py").write_text(
        "import torch\n"
        "IMAGES = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "KEPT = IMAGES.clone()\n\n\n"
        "def make():\n"
        "    assert torch.equal(IMAGES, KEPT)\n"
        "    return torch.utils.data.TensorDataset(IMAGES, torch.arange(24) % 3)\n"
    )
    text = (tiny / "influence.yaml").read_text()
    start = text.index("train:")
    sets = "train: {dataset: ./data.py:make, transform: ./model.py:shifted}\ntest: {dataset: ./data.py:make}\n"
    (tiny / "influence.yaml").write_text(text[:start] + sets)
    write(tiny, forward="x.sub_(0.5)", transform="x.mul_(2.0)")
    first = influence("rank", 0, "--all", "--format", "csv", cwd=tiny).out
    (tiny / "influence.h5").unlink()
    assert influence("rank", 0, "--all", "--format", "csv", cwd=tiny).out == first
    influence("gradients", "--fsck", cwd=tiny)
    influence("mislabels", cwd=tiny)


def test_a_training_that_changes_its_images_is_refused(influence: Command, tiny: Path) -> None:
    with_training(tiny, deep=True)
    path = tiny / "model.py"
    path.write_text(
        path.read_text().replace("    progress(1, 1)", "    [x.sub_(0.5) for x, _ in data]\n    progress(1, 1)")
    )
    told = refusal(influence, tiny, "verify", 0, "--loo", 2)
    assert "./model.py:train changes its training images in place" in told


@pytest.mark.parametrize("held", ["", "net.lock = __import__('threading').Lock()"])
def test_a_model_that_cannot_be_copied_is_trained_again(influence: Command, tiny: Path, held: str) -> None:
    with_training(tiny, deep=True)
    path = tiny / "model.py"
    path.write_text(
        path.read_text()
        .replace("    return nn.", "    net = nn.")
        .replace("3))\n", f"3))\n    {held}\n    return net\n", 1)
    )
    assert len(influence("verify", 0, "--loo", 2, "--format", "csv", cwd=tiny).out.splitlines()) == 3
