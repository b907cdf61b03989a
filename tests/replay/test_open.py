"""Opening a run: that of this checkpoint, this data and this recipe, or the message says what is another's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import torch
from PIL import Image

from tests.conftest import Command
from tests.support.copies import copied
from tests.support.small_project import flip, refusal


@pytest.fixture
def project(run_project: Path, tmp_path: Path) -> Iterator[Path]:
    with copied(run_project, tmp_path / "project") as folder:
        yield folder


def test_another_recipe_is_named(influence: Command, project: Path) -> None:
    message = refusal(influence, project, "rank", 1, "-s", "training.recipe.epochs=11")

    assert "influence.run records another run; what differs: training.recipe" in message


def test_another_label_is_named(influence: Command, project: Path) -> None:
    (project / "train" / "a" / "000.png").rename(project / "train" / "b" / "000.png")

    assert "influence.run records another run; what differs: " in refusal(influence, project, "rank", 1)


def test_another_model_is_named(influence: Command, project: Path) -> None:
    (project / "model.py").write_text((project / "model.py").read_text().replace("GELU", "Tanh"))

    assert "what differs: the model" in refusal(influence, project, "rank", 1)


def test_another_image_is_noticed(influence: Command, project: Path) -> None:
    path = project / "train" / "c" / "005.png"
    path.unlink()
    Image.new("L", (8, 8), 7).save(path)

    assert "influence.run records another run" in refusal(influence, project, "rank", 1)


def test_another_checkpoint_is_named_with_its_parameter(influence: Command, project: Path) -> None:
    weights = torch.load(project / "model.pt", weights_only=True)
    weights["4.bias"] += 0.1
    torch.save(weights, project / "model.pt")

    message = refusal(influence, project, "rank", 1)

    assert "model.pt is not the end of the recorded run: 4.bias differs by" in message
    assert "influence train --overwrite" in message


def test_a_record_that_is_not_finished_is_named(influence: Command, project: Path) -> None:
    (project / "influence.run" / "state-000018.h5").unlink()

    message = refusal(influence, project, "rank", 1)

    assert "influence.run is not finished: the state before step 18 of 30 is missing" in message


def test_no_record_is_said(influence: Command, project: Path) -> None:
    (project / "influence.run").rename(project / "elsewhere")

    assert "there is no record of the run that made model.pt" in refusal(influence, project, "rank", 1)


def test_a_damaged_state_is_named_and_no_number_comes_of_it(influence: Command, project: Path) -> None:
    path = project / "influence.run" / "state-000012.h5"
    with h5py.File(path) as file:
        content = file["parameters"][()].tobytes()
    flip(path, path.read_bytes().index(content))

    assert "influence.run/state-000012.h5 is damaged: its checksum does not match" in refusal(
        influence, project, "rank", 1, "--aggregate"
    )
