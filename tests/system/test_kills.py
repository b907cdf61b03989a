"""Commands killed by SIGKILL at random moments, again and again: their reruns leave what one pass leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Command, edit
from tests.support import relabel_project, small_project
from tests.support.relabel_project import CLASSES, decide

KILLS, MANY_KILLS = 8, 200
# Of every three of the first 30 images one goes to the next class, one leaves the data set, one stays.
ROOT = Path(__file__).parents[2]
NAMES = tuple(f"{number}.png" for number in range(10))
COMMANDS = ("gradients", "fit", "verify", "labels", "moves", "undo")


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


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [KILLS, pytest.param(MANY_KILLS, marks=pytest.mark.slow)])
def test_commands_killed_at_any_moment_end_as_one_pass_leaves_them(
    tmp_path: Path, influence: Command, kills: int
) -> None:
    """So many kills a command, in one process, which loads torch once and forks."""
    for name in COMMANDS[:3]:
        small_project.make(tmp_path / name)
    small_project.with_training(tmp_path / "verify")
    for name in COMMANDS[3:]:
        make_relabel(name, tmp_path / name, influence)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_forks", str(kills), *COMMANDS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = [f"{kills} kills of {name}" for name in COMMANDS]
    assert [line.partition(" in ")[0] for line in done.stdout.splitlines()] == expected
