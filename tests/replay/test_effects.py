"""Influence by replay: the commands, against trainings without an image and against each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from influence_cli.config.load import load_config
from influence_cli.metrics import pearson, slope
from influence_cli.model.task import load_tasks
from influence_cli.replay.effects import RunEffects
from influence_cli.replay.forward import run_again
from influence_cli.replay.open import open_run
from influence_cli.replay.outcomes import outcomes
from tests.conftest import Command
from tests.support import ranks
from tests.support.copies import copied
from tests.support.recipe_project import N, SOFTMAX, TESTS, TO_MINIMUM, influences, make, rows
from tests.support.small_project import refusal


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_influence_at_a_minimum_is_that_of_the_exact_hessian(
    optimizer: str, influence: Command, tmp_path: Path
) -> None:
    recipe = {**TO_MINIMUM, "optimizer": optimizer}
    if optimizer == "adam":
        recipe |= {"lr": 0.05, "eps_root": 1e-8, "schedule": "cosine"}
        del recipe["momentum"]
    project = make(tmp_path, recipe, model=SOFTMAX, l2=recipe["weight_decay"])
    influence("train", cwd=project)

    replayed = influences(influence, project, "0:3")

    exact = influences(influence, project, "0:3", "-s", "curvature.method=explicit", "-s", "curvature.matrix=hessian")
    assert np.abs(replayed - exact).max() < 0.01 * np.abs(exact).max()


def test_influence_predicts_the_run_without_an_image(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path, {**TO_MINIMUM, "epochs": 100}, model=SOFTMAX)
    influence("train", cwd=project)
    config = load_config(project / "influence.yaml")
    (task,) = load_tasks(config)
    replayed = open_run(config, task)
    tests = np.arange(3)

    actual = []
    for left_out in (1, 17, 42, 59):
        weights = np.ones(N)
        weights[left_out] = 0
        state = run_again(replayed.network, replayed.run, weights)
        actual.append(outcomes(task, replayed.network, state, tests)[0])
    changes = np.array(actual) - outcomes(task, replayed.network, replayed.run.state(replayed.run.steps), tests)[0]

    estimated = influences(influence, project, "0:3")[:, [1, 17, 42, 59]].T
    assert pearson(estimated.ravel(), changes.ravel()) > 0.999
    assert abs(slope(estimated.ravel(), changes.ravel()) - 1) < 0.1
