"""Training by a recipe: it goes on after a kill with the same bytes, and stops where the loss is no number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from influence_cli.config.load import load_config
from influence_cli.model.task import load_tasks
from influence_cli.replay import recipe_run as recipe_run_module
from influence_cli.replay.open import recipe_run
from influence_cli.replay.recipe_run import RecipeRun
from tests.conftest import Command
from tests.support.recipe_project import RECIPE, make, states
from tests.support.small_project import refusal

AUGMENTED = {**RECIPE, "augment": [{"RandomHorizontalFlip": {}}], "epochs": 4}


def run_of(project: Path) -> tuple[Any, RecipeRun]:
    config = load_config(project / "influence.yaml")
    (task,) = load_tasks(config, trained=False)
    return recipe_run(config, task)


@pytest.mark.parametrize("recipe", [RECIPE, AUGMENTED], ids=["plain", "augmented"])
def test_a_training_that_is_stopped_between_states_goes_on_with_the_same_bytes(
    recipe: dict[str, Any], influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make(tmp_path / "whole", recipe), make(tmp_path / "cut", recipe)
    influence("train", cwd=whole)
    take_step, taken = recipe_run_module.take_step, 0

    def until_the_eighth(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 8:
            raise KeyboardInterrupt
        return take_step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(recipe_run_module, "take_step", until_the_eighth)
        stopped = influence("train", cwd=cut, code=130)
    assert "run the same command to resume" in stopped.err
    assert not (cut / "model.pt").exists()

    resumed = influence("train", cwd=cut)

    assert "wrote model.pt" in resumed.err
    assert states(cut) == states(whole)


def test_a_step_takes_the_images_of_its_rows_and_the_same_ones_again(tmp_path: Path) -> None:
    _, run = run_of(make(tmp_path, AUGMENTED))

    first, again = run.taken(5), run.taken(5)

    assert torch.equal(first.inputs, again.inputs)
    plain, labels = run.data.take(first.rows)
    assert torch.equal(first.targets, labels)
    same = (first.inputs == plain).flatten(1).all(dim=1)
    assert 0 < int(same.sum()) < len(same)  # some are flipped
    flipped = (first.inputs.flip(-1) == plain).flatten(1).all(dim=1)
    assert bool((same | flipped).all())
    assert np.array_equal(first.rows, again.rows)


def test_a_rate_that_diverges_names_the_step(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path, {**RECIPE, "lr": 1e20})

    message = refusal(influence, project, "train")

    assert "training diverged: the loss of step " in message
    assert "of 30 is not a number" in message
    assert not (project / "model.pt").exists()


def test_what_a_kill_leaves_is_continued_with_the_same_bytes(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path)
    influence("train", cwd=project)
    whole = states(project)
    for name in ("model.pt", "influence.run/state-000030.h5", "influence.run/state-000024.h5"):
        (project / name).unlink()
    (project / "influence.run" / "state-000024.h5.part").write_bytes(b"half")

    influence("train", cwd=project)

    assert states(project) == whole


def test_a_copy_of_a_project_keeps_its_run(influence: Command, tmp_path: Path) -> None:
    project, copy = make(tmp_path / "project"), tmp_path / "copy"
    influence("train", "-q", cwd=project)
    rows = influence("rank", 0, "--top", 3, cwd=project)
    shutil.copytree(project, copy, copy_function=shutil.copyfile)  # as cp -r: every file has a time of its own

    again = influence("rank", 0, "--top", 3, cwd=copy)

    assert again.out == rows.out.replace(str(project), str(copy))
    assert "predicted and actual" not in again.err  # the verdict is kept
    assert "is trained and its run is recorded" in influence("train", cwd=copy).err
