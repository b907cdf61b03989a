"""Labels judged by arrays in temporary files, against the same in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from influence_cli.config.load import load_config
from influence_cli.errors import InfluenceError
from influence_cli.evidence import mapped, plan
from influence_cli.mislabels.find import Mislabels, find_mislabels
from influence_cli.mislabels.signals import SignalChoice
from influence_cli.model.task import Task, load_tasks
from influence_cli.runtime.terminal import Terminal
from tests.conftest import Command, edit
from tests.support.small_project import refusal

# Activations in files have 11 bits; a neighbour can be another one.
HALF = 1e-2


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be large enough for memory, and parts be small."""
    monkeypatch.setattr(plan, "MEMORY", 0)
    monkeypatch.setattr(plan, "PER_EXAMPLE", 0)
    monkeypatch.setattr(mapped, "HELD", 150)


def judged(
    task: Task, *, on: str = "train", signal: str = "combined", probabilities: np.ndarray | None = None
) -> Mislabels:
    choice = SignalChoice(signal, (signal,), probabilities)
    return find_mislabels([task], on=on, choice=choice, terminal=Terminal(silent=True))


@pytest.mark.parametrize("on", ["train", "test"])
def test_judgements_are_those_in_memory(
    trained: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, on: str
) -> None:
    monkeypatch.chdir(trained)
    (task,) = load_tasks(load_config(trained / "influence.yaml"))
    wanted = judged(task, on=on)
    before = {path.name for path in trained.iterdir()}
    request.getfixturevalue("files")
    maps = len(mapped._maps)
    found = judged(task, on=on)
    assert len(mapped._maps) > maps
    np.testing.assert_allclose(found.score, wanted.score, atol=HALF)
    assert np.abs(np.argsort(found.order) - np.argsort(wanted.order)).max() <= 10
    sure = wanted.confidence > 0.6
    assert np.array_equal(found.suggested[sure], wanted.suggested[sure])
    for name, values in wanted.log_probabilities.items():
        np.testing.assert_allclose(np.exp(found.log_probabilities[name]), np.exp(values), atol=HALF, err_msg=name)
    np.testing.assert_allclose(found.facts.losses, wanted.facts.losses, atol=HALF)
    assert np.array_equal(found.facts.predicted, wanted.facts.predicted)
    assert found.noise is not None
    assert wanted.noise is not None
    assert found.noise.count == pytest.approx(wanted.noise.count, abs=2)
    assert found.evidence.memorised == wanted.evidence.memorised
    assert {path.name for path in trained.iterdir()} == before, "no temporary file is left"


@pytest.mark.usefixtures("files")
def test_probabilities_from_elsewhere_are_read_by_parts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (task,) = load_tasks(load_config(trained / "influence.yaml"))
    probabilities = np.random.default_rng(0).dirichlet(np.ones(10), len(task.train))
    probabilities[0, 0] = 0
    given = probabilities[np.arange(len(task.train)), task.train.labels]
    found = judged(task, signal="pred-probs", probabilities=probabilities)
    np.testing.assert_allclose(found.score, 1 - given, atol=1e-6)


@pytest.mark.usefixtures("files")
def test_the_command_tells_of_the_files_and_of_what_cannot_be_in_them(influence: Command, tiny: Path) -> None:
    plain = influence("mislabels", "--top", 3, cwd=tiny)
    assert "of memory and" in plain.err
    assert "of disk for temporary files in /" in plain.err
    assert "memory is short" not in plain.err
    # The logistic readout needs its arrays in memory, of which there is enough.
    assert "of disk" not in influence("mislabels", "--top", 3, "--signal", "logistic", cwd=tiny).err


def test_short_memory_makes_files_and_refuses_logistic(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_whole", lambda *_, **how: plan.Needs(10**15, 0, 0))
    assert "of disk for temporary files in" in influence("mislabels", "--top", 3, cwd=tiny).err
    assert "memory is short" in influence("mislabels", "--top", 3, cwd=tiny).err
    said = refusal(influence, tiny, "mislabels", "--signal", "logistic")
    assert "--signal logistic: memory is too short for its arrays of examples and classes" in said
    told = influence("mislabels", "--signals", "--format", "csv", cwd=tiny)
    assert "warning: no logistic readout: memory is too short" in told.err
    assert "signal_readout" in told.out
    assert "signal_logistic" not in told.out


def test_short_disk_is_refused_only_where_memory_is_short_too(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MEMORY", 0)
    monkeypatch.setattr(plan, "PER_EXAMPLE", 0)
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "of disk" not in influence("mislabels", "--top", 3, cwd=tiny).err
    monkeypatch.setattr(plan, "_whole", lambda *_, **how: plan.Needs(10**15, 0, 0))
    said = refusal(influence, tiny, "mislabels")
    assert "of temporary files, but" in said
    assert "has 10 B free" in said
    assert "TMPDIR=FOLDER" in said


@pytest.mark.usefixtures("files")
def test_rare_classes_and_several_checkpoints_go_to_files_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = min((project / "train").iterdir())
    for path in sorted(first.iterdir())[2:]:
        path.unlink()
    shutil.copyfile(project / "model.pt", project / "second.pt")
    monkeypatch.chdir(project)
    edit(project, "checkpoint: model.pt", "checkpoint: [model.pt, second.pt]")
    tasks = load_tasks(load_config(project / "influence.yaml"))
    found = find_mislabels(tasks, terminal=Terminal(silent=True))
    assert np.isnan(found.score).sum() == 2
    monkeypatch.setattr(plan, "MEMORY", 10**12)
    wanted = find_mislabels(tasks, terminal=Terminal(silent=True))
    np.testing.assert_allclose(found.score, wanted.score, atol=HALF)
    assert (found.suggested[found.order[-2:]] == -1).all()


def test_the_error_of_a_disk_that_fills_up_names_the_folder(
    trained: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("files")
    monkeypatch.chdir(trained)
    (task,) = load_tasks(load_config(trained / "influence.yaml"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped.disk, "reserve", full)
    with pytest.raises(InfluenceError, match="a temporary file cannot be made there"):
        judged(task)
