"""`influence train`: the same recipe gives the same bytes, and nothing is overwritten without being told to."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Command
from tests.support.recipe_project import make, states
from tests.support.small_project import refusal


def test_the_same_recipe_gives_the_same_bytes(influence: Command, tmp_path: Path) -> None:
    one, other, seeded = (make(tmp_path / name) for name in ("one", "other", "seeded"))

    done = influence("train", cwd=one)
    influence("train", cwd=other)
    influence("train", "-s", "training.recipe.seed=1", cwd=seeded)

    assert done.out == ""
    assert "60 images, 10 epochs of 3 steps; 6 states are kept in influence.run" in done.err
    assert "wrote model.pt" in done.err
    assert "test accuracy" in done.err
    assert states(one) == states(other)
    assert states(one)["model.pt"] != states(seeded)["model.pt"]


def test_what_is_trained_is_not_trained_again(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path)
    influence("train", cwd=project)
    before = states(project)

    again = influence("train", cwd=project)

    assert "model.pt is trained and its run is recorded" in again.err
    assert "influence.run records another run; what differs: training.recipe" in refusal(
        influence, project, "train", "-s", "training.recipe.lr=0.1"
    )
    assert states(project) == before
    influence("train", "-s", "training.recipe.lr=0.1", "--overwrite", cwd=project)
    assert states(project)["model.pt"] != before["model.pt"]


def test_a_checkpoint_of_unknown_origin_is_not_overwritten(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path)
    (project / "model.pt").write_bytes(b"precious")

    assert "model.pt exists, and influence.run does not record how it was trained" in refusal(
        influence, project, "train"
    )
    assert (project / "model.pt").read_bytes() == b"precious"


def test_a_budget_that_is_too_small_is_refused_before_training(influence: Command, tmp_path: Path) -> None:
    project = make(tmp_path)

    message = refusal(influence, project, "train", "-s", "gradients.budget=1kB")

    assert "the record of 30 steps keeps 6 states of 664 bytes, 3,984 in all, but gradients.budget is 1,000" in message
    assert "gradients.budget=3984" in message
    assert not (project / "influence.run").exists()


def test_a_command_before_the_training_names_it(influence: Command, tmp_path: Path) -> None:
    message = refusal(influence, make(tmp_path), "check")

    assert "the checkpoint model.pt does not exist yet" in message
    assert "influence train trains it by training.recipe" in message
