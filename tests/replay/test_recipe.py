"""Recipes: schedules equal to torch's, order and seeds that depend on the recipe alone, and contradictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from influence_cli.config.load import load_config
from influence_cli.errors import InfluenceError
from influence_cli.replay.recipe import Recipe, make_recipe
from tests.conftest import Command
from tests.support.recipe_project import RECIPE, N, make
from tests.support.small_project import refusal


def recipe(folder: Path, **keys: Any) -> Recipe:
    return make_recipe(load_config(make(folder, {**RECIPE, **keys}) / "influence.yaml"), N)


def rates_of_torch(steps: int, schedule: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9)
    schedule, rates = schedule(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("constant", lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)),
        ("step", lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 23])),
        ("one-cycle", lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=30)),
    ],
)
def test_a_schedule_is_that_of_torch(name: str, schedule: Any, tmp_path: Path) -> None:
    ours = recipe(tmp_path, schedule=name)

    assert ours.steps == 30
    assert [ours.rate(step) for step in range(30)] == pytest.approx(rates_of_torch(30, schedule), abs=1e-9)


def test_a_warmup_rises_to_the_rate(tmp_path: Path) -> None:
    ours = recipe(tmp_path, warmup=2)

    assert [ours.rate(step) for step in range(7)] == pytest.approx([0.2 * min(1, (s + 1) / 6) for s in range(7)])


def test_every_epoch_takes_every_example_once_in_another_order(tmp_path: Path) -> None:
    ours = recipe(tmp_path, batch=25)

    epochs = [np.concatenate([ours.rows(3 * epoch + batch) for batch in range(3)]) for epoch in range(2)]

    assert ours.steps_per_epoch == 3
    assert [len(ours.rows(step)) for step in range(3)] == [25, 25, 10]
    assert all(sorted(epoch.tolist()) == list(range(N)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert ours.rows(0).tolist() != recipe(tmp_path, batch=25, seed=1).rows(0).tolist()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "betas are Adam's; sgd takes momentum"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum is for sgd; adam takes betas"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum"),
        ({"schedule": "one-cycle", "warmup": 1}, "one-cycle has its own warm-up"),
        ({"lr": -1}, "training.recipe.lr is -1"),
        ({"optimizer": "lion"}, "training.recipe.optimizer is 'lion'"),
        ({"shedule": "cosine"}, "unknown key 'shedule' in 'training.recipe'"),
        ({"augment": ["RandomHorizontalFlop"]}, "RandomHorizontalFlop"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(
    keys: dict[str, Any], said: str, influence: Command, tmp_path: Path
) -> None:
    project = make(tmp_path, {**RECIPE, **keys})

    message = refusal(influence, project, "train")

    assert said in message
    key = next(iter(reversed(keys)))
    lines = (project / "influence.yaml").read_text().splitlines()
    near = [number for number, line in enumerate(lines, 1) if line.strip().startswith((f"{key}:", "training:"))]
    assert any(f"influence.yaml:{number}:" in message for number in (*near, *(number + 1 for number in near)))


def test_no_recipe_is_said_with_an_example(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path)
    (project / "influence.yaml").write_text((project / "influence.yaml").read_text().partition("training:")[0])

    assert "there is no training.recipe" in refusal(influence, project, "train")


def test_a_loss_of_ones_own_takes_no_label_smoothing(tmp_path: Path) -> None:
    project = make(tmp_path, {**RECIPE, "label_smoothing": 0.1}, loss={"factory": "torch.nn.MultiMarginLoss"})

    with pytest.raises(InfluenceError, match="label_smoothing goes with cross_entropy"):
        make_recipe(load_config(project / "influence.yaml"), N)


def test_damping_training_goes_by_the_rates_of_the_recipe(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path)
    influence("train", "-q", cwd=project)
    by_training = ("-s", "curvature.method=ekfac", "-s", "curvature.damping=training")
    steps = RECIPE["epochs"] * -(-N // RECIPE["batch"])
    time = RECIPE["lr"] * steps / (1 - RECIPE["momentum"])

    shown = influence("rank", 0, *by_training, cwd=project).err

    assert f"damping λ = {3 / time:.6g} (training: 3/(η·K), η·K = {time:.3g}" in shown


def test_damping_training_of_an_adam_recipe_says_what_is_missing(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path, {"optimizer": "adam", "lr": 0.01, "batch": 20, "epochs": 1})

    message = refusal(influence, project, "rank", 0, "-s", "curvature.damping=training")

    assert "curvature.damping training needs the second moments of adam" in message
