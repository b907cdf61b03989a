"""A store and the code that made it: what an edit changes is refused and named, what changes nothing is not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from influence_cli.precompute import staleness
from tests.conftest import Command, edit
from tests.support.small_project import refusal

LOSS = """
import torch
from helper import scale

WEIGHTS = torch.tensor([1.0, 1.0, 5.0])


def mine(outputs, targets):
    return scale(torch.nn.functional.cross_entropy(outputs, targets, weight=WEIGHTS, reduction="none"))
"""
HELPER = """
def scale(losses):
    return 1.0 * losses
"""
MODEL = """
import torch
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        bright = (x.mean(dim=(1, 2, 3)) > 9).float()[:, None]
        y = super().forward(x)
        return y + 0.1 * bright


def build():
    return Net(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def bright():
    return Net(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
"""
DATA = """
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder


class Data(ImageFolder):
    def __init__(self, root):
        super().__init__(root)
        self.gain = np.load(Path(root).parent / "gain.npy")

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.point(lambda value: value * float(self.gain)), label
"""
STEPS = """
def evaluation(image):
    return image.rotate(0)
"""
UNKNOWN = "it was made before stores kept a hash of the code"


@pytest.fixture
def mine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a loss, a module that it imports, a data set that reads an array, and a transform, of its own."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second have one time of change
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("losses", LOSS), ("helper", HELPER), ("model", MODEL), ("data", DATA), ("steps", STEPS)):
        (tiny / f"{name}.py").write_text(text)
    np.save(tiny / "gain.npy", np.array(1.0))
    edit(tiny, "l2: 0.01", "l2: 0.01\nloss: {factory: ./losses.py:mine}")
    edit(tiny, "torchvision.datasets.ImageFolder", "./data.py:Data")
    edit(tiny, "transform: [{", "transform: [./steps.py:evaluation, {")
    return tiny


def change(project: Path, name: str, old: str, new: str) -> None:
    """Edit a source, and forget what this process has loaded of it: a command is a process of its own."""
    path = project / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    forget(project)


def forget(project: Path) -> None:
    sys.modules.pop("helper", None)  # of another test's project too
    for key, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(project)):
            del sys.modules[key]


def coordinates(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file["coordinates"])


def test_an_edited_loss_is_refused_and_named_though_only_the_last_class_feels_it(
    influence: Command, mine: Path
) -> None:
    forget(mine)
    influence("gradients", "-q", cwd=mine)
    change(mine, "losses.py", "5.0]", "50.0]")
    for words in (("rank", 0), ("gradients", "--fsck")):
        said = refusal(influence, mine, *words)
        assert "belongs to another model: the code in losses.py changed since the store was made, and the loss" in said
        assert "influence gradients --overwrite" in said
    # The remedy gives what a new store holds: nothing of the old curvature stays either.
    influence("gradients", "--overwrite", "-q", cwd=mine)
    influence("gradients", "-q", "-s", "gradients.store=new.h5", cwd=mine)
    assert np.array_equal(coordinates(mine / "influence.h5"), coordinates(mine / "new.h5"))


def test_few_examples_show_an_edit_that_the_last_class_alone_feels(
    influence: Command, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is sorted by class: its first quarter knows nothing of the last class."""
    monkeypatch.setattr(staleness, "EXAMPLES", 6)
    forget(mine)
    influence("gradients", "-q", cwd=mine)
    change(mine, "losses.py", "5.0]", "50.0]")
    assert "the code in losses.py changed since the store was made, and the loss" in refusal(influence, mine, "rank", 0)


EDITS = {
    "imported": ("helper.py", "1.0 * losses", "1.01 * losses", "helper.py", "loss"),
    # A branch that most examples do not take: of the 24 only the brightest.
    "model": ("model.py", "> 9", "> 0.65", "model.py", "output"),
    "transform": ("steps.py", "rotate(0)", "rotate(90)", "steps.py", "output"),
    "data set": ("data.py", "value * float(self.gain)", "255 - value", "data.py", "output"),
    "argument": ("influence.yaml", "model.py:build", "model.py:bright", "model.factory", "output"),
}


@pytest.mark.quick("imported", "model", "transform")
@pytest.mark.parametrize("case", EDITS)
def test_edits_of_the_code_around_a_loss(influence: Command, mine: Path, case: str) -> None:
    file, old, new, named, what = EDITS[case]
    forget(mine)
    influence("gradients", "-q", cwd=mine)
    change(mine, file, old, new)
    said = refusal(influence, mine, "gradients")
    assert f"{named} changed since the store was made, and the {what}" in said
    assert ("the code in" in said) == named.endswith(".py")


def test_an_edit_that_changes_the_gradients_alone_is_refused(influence: Command, mine: Path) -> None:
    forget(mine)
    influence("gradients", "-q", cwd=mine)
    change(mine, "model.py", "return y + 0.1 * bright", "return y.detach() + 2 * (y - y.detach()) + 0.1 * bright")
    assert "the code in model.py changed since the store was made, and the gradient of" in refusal(
        influence, mine, "gradients"
    )


def test_a_comment_changes_nothing_and_other_code_with_the_same_numbers_is_said_once(
    influence: Command, mine: Path
) -> None:
    forget(mine)
    influence("gradients", "-q", cwd=mine)
    before = coordinates(mine / "influence.h5")
    for name in ("losses.py", "helper.py", "model.py", "data.py", "steps.py"):
        change(mine, name, "\n", "\n# A comment.\n")
    assert "changed since" not in influence("gradients", cwd=mine).err
    change(mine, "steps.py", "image.rotate(0)", "image.rotate(0).rotate(0)")
    change(mine, "losses.py", "5.0]", "5.0 + 0.0]")
    said = influence("gradients", cwd=mine).err
    assert "the code in losses.py, steps.py changed since the store was made; outputs and losses of 24 examples" in said
    assert "are the same, and so are the gradients of 4 of them" in said
    assert "changed since" not in influence("gradients", cwd=mine).err
    assert "changed since" not in influence("gradients", "--fsck", cwd=mine).err
    assert np.array_equal(coordinates(mine / "influence.h5"), before)


def test_a_changed_side_file_is_named(influence: Command, mine: Path) -> None:
    forget(mine)
    influence("gradients", "-q", cwd=mine)
    (mine / "gain.npy").touch()
    assert "differs" not in influence("gradients", cwd=mine).err
    np.save(mine / "gain.npy", np.array(0.5))
    forget(mine)
    said = refusal(influence, mine, "gradients")
    assert "what differs: a file that the code of the data set reads (gain.npy)" in said


def test_a_store_that_knows_no_code_opens_after_a_comparison(
    influence: Command, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from influence_cli.precompute import prepare

    with monkeypatch.context() as old:
        fingerprint = prepare.fingerprint

        def without_code(*words: object) -> dict[str, str]:
            parts = fingerprint(*words)  # type: ignore[arg-type]
            return {name: part for name, part in parts.items() if name not in ("code", "side files")}

        old.setattr(prepare, "fingerprint", without_code)
        old.setattr(prepare, "check_code", lambda *words, **how: None)
        forget(mine)
        influence("gradients", "-q", cwd=mine)
    said = influence("gradients", cwd=mine).err
    assert f"whether the code has changed is unknown, since {UNKNOWN}; outputs and losses of 24 examples" in said
    assert "unknown" not in influence("gradients", cwd=mine).err
    change(mine, "losses.py", "5.0]", "50.0]")
    assert "the code in losses.py changed" in refusal(influence, mine, "gradients")


def test_examples_that_cannot_be_compared_are_said_and_none_is_refused(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("gradients", "-q", cwd=tiny)
    images = sorted((tiny / "train").rglob("*.png"))
    for path in images[1:]:  # the first one is what other checks look at
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    said = influence("gradients", cwd=tiny).err
    assert "warning: influence.h5: 23 examples could not be compared with the store: training example 1 (" in said
    monkeypatch.setattr(staleness, "spread", lambda split, count: split.indices[1:])
    assert "none of 23 examples can be read now: training example 1 (" in refusal(influence, tiny, "gradients")
