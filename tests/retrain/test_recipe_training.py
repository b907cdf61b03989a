"""A recipe that is run again without some examples, beside a loop with torch's optimiser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from influence_cli import Retraining, load_config, load_tasks
from influence_cli.model.task import build_model
from influence_cli.replay.recipe import make_recipe
from influence_cli.retrain.recipe_training import RecipeSteps, recipe_training
from influence_cli.retrain.training import train, training_pairs
from influence_cli.runtime.seeds import seed_of
from tests.conftest import Command
from tests.retrain.test_strongest import inputs

RECIPE = "training: {recipe: {optimizer: sgd, lr: 0.5, momentum: 0.9, batch: 10, epochs: 8, schedule: cosine}}\n"


@pytest.fixture
def run(tiny: Path) -> Path:
    """The tiny project with a recipe, which has no weight decay."""
    config = tiny / "influence.yaml"
    config.write_text(config.read_text().replace("l2: 0.01", "l2: 0.0") + RECIPE)
    return tiny


def by_torch(project: Path, without: list[int], seed: int, some: slice = slice(None)) -> nn.Module:
    """Train in the recipe's order; what is left out counts 0 in a batch whose divisor stays."""
    x, y = (each[some] for each in inputs(project / "train"))
    recipe = make_recipe(load_config(project / "influence.yaml", [f"training.recipe.seed={seed}"]), len(x))
    torch.manual_seed(recipe.seed(1))
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    weights = torch.ones(len(x))
    weights[without] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for step in range(recipe.steps):
        rows = torch.from_numpy(recipe.rows(step))
        optimizer.param_groups[0]["lr"] = 0.25 * (1 + np.cos(np.pi * step / recipe.steps))
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
        ((weights[rows] * losses).sum() / len(rows)).backward()
        optimizer.step()
    return model


def test_a_recipe_without_some_examples_is_torchs_run_with_their_weights_at_0(run: Path) -> None:
    config = load_config(run / "influence.yaml")
    (task,) = load_tasks(config)
    steps = Retraining(config).steps(task)
    assert isinstance(steps, RecipeSteps)
    shares: list[float] = []
    for repeat, seed in ((0, 0), (1, seed_of(0, 8, 1)), (0, 0)):
        for rows in ([], [3, 17]):
            model = steps.train_without(np.array(rows, dtype=np.int64), repeat, shares.append)
            expected = by_torch(run, rows, seed).state_dict()
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert max(shares) == pytest.approx(1)


def test_a_recipe_is_a_training_function_where_there_is_no_other(influence: Command, run: Path) -> None:
    config = load_config(run / "influence.yaml")
    (task,) = load_tasks(config)
    training, pairs = recipe_training(config, task), training_pairs(task.train)[4:17]
    torch.manual_seed(make_recipe(load_config(run / "influence.yaml", ["training.recipe.seed=5"]), 13).seed(1))
    start = build_model(config)
    model = train(training, start, pairs, l2=0.0, seed=5, what="it")
    expected = by_torch(run, [], 5, slice(4, 17)).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    done = influence("verify", "--lds", "--subsets", 3, "--repeats", 1, "-s", "curvature.damping=0.01", cwd=run)
    assert json.loads(done.out)["subsets"] == 3


@pytest.mark.slow
def test_verify_runs_the_recipe_again(influence: Command, run: Path) -> None:
    words = ("verify", "--lds", "--same-run", "--drop", 1, "--subsets", 6, "-s", "curvature.damping=0.01")
    other = influence(*words, cwd=run)
    assert "the run does not end in the checkpoint: the loss of a test example differs by up to" in other.err
    influence("train", "--overwrite", cwd=run)
    (run / "influence.h5").unlink()
    done = influence(*words, cwd=run)
    assert "does not end in the checkpoint" not in done.err
    assert "7 of 7 retrainings are already in" in done.err
    (row,) = [json.loads(line) for line in done.out.splitlines()]
    assert (row["left_out"], row["subsets"]) == (1, 6)
    rows = [
        json.loads(line)
        for line in influence("verify", "--top", 2, "--tests", 3, *words[-2:], cwd=run).out.splitlines()
    ]
    base, test = by_torch(run, [], 0), inputs(run / "test")
    for each in rows:
        assert np.isfinite(each["actual"])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(base(test[0]), test[1], reduction="none").numpy()
    with np.load(run / "influence.retrained" / "from-start" / "all_0.npz") as file:
        assert file["losses"] == pytest.approx(losses, rel=1e-4, abs=1e-5)
    for measure in ("loss", "margin"):
        done = influence(*words, "--methods", "replay,ekfac", "--measure", measure, cwd=run)
        replay, _ = [json.loads(line) for line in done.out.splitlines()]
        assert replay["method"] == "replay"
        # One image of 24, in a run that answers smoothly: order and size.
        assert replay["pearson"] > 0.95
        assert replay["slope"] == pytest.approx(1, abs=0.3)
