"""Commands killed by SIGKILL at random moments, again and again: their reruns leave what one pass leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command, edit
from tests.support import recipe_project, relabel_project, small_project
from tests.support.kill_forks import kill
from tests.support.relabel_project import CLASSES, decide

# Few where every moment of a change on the disk is tried by itself (tests/system/test_crash_points.py): a real kill,
# and two processes at one time.
KILLS, MANY_KILLS = 2, 200
# Of every three of the first 30 images one goes to the next class, one leaves the data set, one stays.
NAMES = tuple(f"{number}.png" for number in range(10))
COMMANDS = ("gradients", "fit", "verify", "labels", "moves", "undo", "train")


def make_relabel(name: str, folder: Path, influence: Command) -> None:
    """Write images and decisions: label files that carry on those of before, 20 moves, and these already made."""
    folder.mkdir()
    relabel_project.make(folder, CLASSES, NAMES)
    if name == "labels":
        decide(folder, (2, "drop"), (5, "relabel", "plain"), name="first.csv")
        influence("relabel", "first.csv", "-q", cwd=folder)
        edit(folder, "{root: data/train}}", "{root: data/train}, labels: labels.csv, exclude: exclude.csv}")
    decided = [(at, "relabel", CLASSES[at // 10 + 1]) for at in range(30) if at % 3 == 0]
    decide(folder, *decided, *((at, "drop") for at in range(30) if at % 3 == 1))
    if name == "undo":
        influence("relabel", "decisions.csv", "--apply-moves", "-q", cwd=folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [KILLS, pytest.param(MANY_KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_moment_ends_as_one_pass_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, influence: Command, name: str, kills: int
) -> None:
    if name in COMMANDS[:3]:
        small_project.make(tmp_path / name)
    elif name == "train":
        recipe_project.make(tmp_path / name, {**recipe_project.RECIPE, "epochs": 60})
    else:
        make_relabel(name, tmp_path / name, influence)
    if name == "verify":
        small_project.with_training(tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    told = kill(name, kills, tmp_path / "work")
    print(told)
    assert told.startswith(f"{kills} kills of {name} in ")
