"""check: every number that it prints is the one that a separate computation gives, and what looks wrong is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import ImageFolder

from tests.conftest import Command, edit, make_project

DEEP = """
from torch import nn


def build():
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10), nn.Linear(10, 10, bias=False))
"""


def findings(influence: Command, folder: Path, *words: object) -> dict[str, tuple[object, str]]:
    """Run check and give value and unit by item."""
    rows = [json.loads(line) for line in influence("check", *words, cwd=folder).out.splitlines()]
    assert all(list(row) == ["item", "value", "unit"] for row in rows)
    return {row["item"]: (row["value"], row["unit"]) for row in rows}


def scale_weights(project: Path, factor: float, name: str = "model.pt") -> None:
    state = torch.load(project / "model.pt")
    torch.save({key: value * factor for key, value in state.items()}, project / name)


def measured(project: Path, part: str, checkpoint: str = "model.pt", l2: float = 0.01) -> dict[str, float]:
    """Go through the images one by one with autograd in float64."""
    state = torch.load(project / checkpoint)
    w, b = (state[name].double().requires_grad_() for name in ("2.weight", "2.bias"))
    right, losses, total, squares = 0, [], torch.zeros(500, dtype=torch.float64), 0.0
    data = ImageFolder(project / part)
    for image, label in data:
        x = torch.tensor(np.array(image.convert("L"))).double() / 255
        outputs = nn.functional.avg_pool2d(x[None, None], 4).flatten() @ w.T + b
        loss = nn.functional.cross_entropy(outputs[None], torch.tensor([label]))
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, (w, b))])
        right += int(outputs.argmax()) == label
        losses.append(loss.item())
        total += gradient
        squares += float(gradient.square().sum())
    theta = torch.cat([w.detach().flatten(), b.detach()])
    return {
        "accuracy": right / len(data),
        "loss": float(np.mean(losses)),
        "slope": float((total / len(data) + l2 * theta).norm()),
        "typical": float(np.sqrt(squares / len(data))),
    }


@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_accuracy_loss_and_gradients_are_those_of_autograd(influence: Command, project: Path, factor: float) -> None:
    scale_weights(project, factor)
    found = findings(influence, project)
    train, test = measured(project, "train"), measured(project, "test")
    assert found["training accuracy"] == (pytest.approx(train["accuracy"]), "over 320 examples")
    assert found["mean training loss"] == (pytest.approx(train["loss"], rel=1e-5), "nats")
    assert found["typical gradient norm"][0] == pytest.approx(train["typical"], rel=1e-5)
    assert found["gradient norm at the checkpoint"][0] == pytest.approx(train["slope"], rel=1e-4, abs=1e-5)
    assert found["test accuracy"] == (pytest.approx(test["accuracy"]), "over 80 examples")
    # Only the trained weights are at a minimum.
    assert (train["slope"] < 1e-5) == (factor == 1.0)


def test_counts_are_those_of_the_data_and_the_model(influence: Command, project: Path) -> None:
    bags = sorted((project / "train" / "Bag").iterdir())
    for path in bags[4:]:
        path.unlink()
    size = 320 - len(bags) + 4
    np.save(project / "out.npy", np.array([0, 5]))
    found = findings(influence, project, "-s", "train.exclude=out.npy", "-s", "train.n=5000")
    assert found["classes"] == (10, "")
    assert found["training examples"] == (size - 2, f"of {size}")
    assert found["n"][0] == 5000
    assert found["smallest class"] == (4, "training examples of Bag")
    assert found["test examples"] == (80, "of 80")
    assert found["device"][0] == "cuda" if torch.cuda.is_available() else "cpu"
    assert found["parameters tracked"] == (500, "in 2 tensors")
    assert found["parameters left out"][0] == 0
    assert found["example gradients"][0] == "layer pass, 1 layers"


def test_parameters_that_are_left_out_are_counted_and_named(influence: Command, project: Path) -> None:
    (project / "deep.py").write_text(DEEP)
    torch.save(torch.load(project / "model.pt") | {"3.weight": torch.eye(10)}, project / "model.pt")
    edit(project, "./model.py:build", "./deep.py:build")
    found = findings(influence, project, "-s", "gradients.layers='3'")
    assert found["parameters tracked"] == (100, "in 1 tensors")
    assert found["parameters left out"][0] == 500
    done = influence("check", "-s", "gradients.layers='3'", cwd=project)
    assert "parameters left out (2): 2.weight, 2.bias" in done.err


@pytest.mark.parametrize(
    ("words", "curvature"),
    [
        ((), "explicit ggn"),
        (("-s", "curvature.matrix=hessian"), "explicit hessian"),
        (("-s", "curvature.method=identity"), "identity"),
        (("-s", "curvature.method=cg"), "cg ggn"),
    ],
)
@pytest.mark.quick("words0*")
def test_the_store_is_planned_and_not_made(
    influence: Command, project: Path, words: tuple[str, ...], curvature: str
) -> None:
    before = sorted(path for path in project.rglob("*") if "__pycache__" not in path.parts)
    found = findings(influence, project, *words)
    assert sorted(path for path in project.rglob("*") if "__pycache__" not in path.parts) == before
    assert found["curvature"][0] == curvature
    assert found["store"] == ("influence.h5", "not created yet")
    for item in ("memory, about", "time to fill it, about"):
        assert float(str(found[item][0])) > 0
    influence("gradients", *words, cwd=project)
    bound = float(str(found["store size, at most"][0]))
    # The bound is of the data: HDF5 adds some kB of names and places.
    assert bound / 3 < (project / "influence.h5").stat().st_size < bound + 32_000
    assert findings(influence, project, *words)["store"] == ("influence.h5", "exists")


def test_the_budget_bounds_the_planned_size(influence: Command, project: Path) -> None:
    found = findings(influence, project, "-s", "gradients.budget=300kB")
    assert found["store size, at most"] == (300_000, "300 kB")


def test_a_disk_that_is_too_small_is_a_warning(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(project)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    done = influence("check", cwd=project)
    assert "has 5.0 kB free, but the store needs up to 1.7 MB" in done.err
    assert "1 warning (see above); next: influence gradients" in done.err


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of more examples than the sample takes."""
    return make_project(tmp_path_factory.mktemp("large") / "project", train=600)


@pytest.mark.slow
def test_a_sample_is_seeded_and_near_the_whole(influence: Command, large: Path) -> None:
    one, again = findings(influence, large), findings(influence, large)
    other = findings(influence, large, "-s", "seed=1")
    whole = findings(influence, large, "--full")
    for item in ("training accuracy", "mean training loss"):
        assert one[item] == again[item]
    assert one["training accuracy"][1] == other["training accuracy"][1] == "over 512 examples"
    assert one["mean training loss"] != other["mean training loss"]
    exact = measured(large, "train")
    assert whole["training accuracy"] == (pytest.approx(exact["accuracy"]), "over 600 examples")
    assert whole["mean training loss"][0] == pytest.approx(exact["loss"], rel=1e-5)
    assert whole["gradient norm at the checkpoint"][0] == pytest.approx(0, abs=1e-4)
    for sample in (one, other):
        assert sample["training accuracy"][0] == pytest.approx(exact["accuracy"], abs=0.05)
        assert sample["mean training loss"][0] == pytest.approx(exact["loss"], abs=0.05)


@pytest.mark.slow
def test_the_noise_of_a_sample_is_no_warning_but_a_slope_is(influence: Command, large: Path, tmp_path: Path) -> None:
    assert "warning" not in influence("check", cwd=large).err
    project = Path(shutil.copytree(large, tmp_path / "project"))
    scale_weights(project, -1)
    exact = measured(project, "train")
    assert exact["slope"] > 0.25 * exact["typical"]
    for words in ((), ("--full",)):
        done = influence("check", *words, cwd=project)
        assert "warning: training stopped early" in done.err
        assert "(see above); next: influence gradients" in done.err


def test_every_checkpoint_has_findings_of_its_own(influence: Command, project: Path) -> None:
    scale_weights(project, 0.5, "half.pt")
    edit(project, "checkpoint: model.pt", "checkpoint: [model.pt, half.pt]")
    rows = [json.loads(line) for line in influence("check", cwd=project).out.splitlines()]
    assert [Path(row["value"]).name for row in rows if row["item"] == "checkpoint"] == ["model.pt", "half.pt"]
    losses = [row["value"] for row in rows if row["item"] == "mean training loss"]
    wanted = [measured(project, "train", name)["loss"] for name in ("model.pt", "half.pt")]
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert [row["value"] for row in rows if row["item"] == "store"] == ["influence.0.h5", "influence.1.h5"]
    # What belongs to the data is said once.
    assert len([row for row in rows if row["item"] == "training examples"]) == 1


def test_without_a_test_set_there_are_no_test_findings(influence: Command, project: Path) -> None:
    edit(project, "test:\n  dataset: torchvision.datasets.ImageFolder\n  args: {root: test}\n", "")
    found = findings(influence, project)
    assert not [item for item in found if item.startswith("test ")]
    assert found["training accuracy"][1] == "over 320 examples"


def test_examples_that_cannot_be_read_are_left_out_where_asked(influence: Command, project: Path) -> None:
    bad = sorted((project / "train" / "Bag").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:90])
    assert str(bad) in influence("check", cwd=project, code=2).err
    assert findings(influence, project, "--skip-unreadable")["training accuracy"][1] == "over 319 examples"


@pytest.mark.slow
def test_formats_hold_the_same_findings(influence: Command, project: Path) -> None:
    lines = [json.loads(line) for line in influence("check", cwd=project).out.splitlines()]
    rows = json.loads(influence("check", "--format", "json", cwd=project).out)
    changing = ("memory, about", "time to fill it, about")
    assert [row for row in rows if row["item"] not in changing] == [row for row in lines if row["item"] not in changing]
    done = influence("check", "-o", "check.csv", cwd=project)
    assert done.out == ""
    assert (project / "check.csv").read_text().splitlines()[0] == "item,value,unit"
    assert "accuracy" in influence("check", "--format", "table", cwd=project).out


def test_the_next_command_is_named(influence: Command, project: Path) -> None:
    assert "nothing looks wrong; next: influence gradients" in influence("check", cwd=project).err


def test_where_retraining_disagrees_the_likely_cause_is_named(project: Path) -> None:
    """At the minimum of the config's objective it is the training; far from it, an early stop; else that objective."""
    from influence_cli import load_config
    from influence_cli.model.task import load_tasks
    from influence_cli.precompute.check import objective_hint
    from influence_cli.runtime.terminal import Terminal

    def hint(*overrides: str, poor: bool = True) -> str:
        config = load_config(project / "influence.yaml", list(overrides))
        return objective_hint(config, 0, load_tasks(config)[0], Terminal(quiet=True), poor=poor)

    assert hint().startswith("likely cause: the training function. The checkpoint is at a minimum")
    assert hint(poor=False) == ""
    assert "is multiplied by c = 0.5: a weighted or summed loss, or another l2; write l2: 0.01" in hint("l2=0.005")
    assert "training had weight decay; write l2: 0.01" in hint("l2=0", poor=False)
    scale_weights(project, 0.6)
    assert "the gradient is small but not 0: training stopped before its minimum" in hint()
    assert hint(poor=False) == ""
