"""The library is silent: without a terminal its public functions print nothing, warnings included."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_cli import (
    LdsPlan,
    Retraining,
    Terminal,
    check_estimates,
    check_run,
    datamodeling_score,
    find_mislabels,
    group_by_class,
    group_influence,
    leave_one_out,
    load_config,
    load_tasks,
    perturb_image,
    prepare_all,
    rank_attackable,
    rank_tests,
    rank_training,
    select_tests,
)
from influence_cli.influence.example_facts import training_facts
from influence_cli.mislabels.signals import SIGNALS, SignalChoice
from influence_cli.model.predictions import misclassified
from influence_cli.perturb.eight_bit import pixel_scale
from influence_cli.retrain.top_layer import top_layer
from tests.support.small_project import make, with_training


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project that commands warn about: its checkpoint is untrained, no minimum, and near chance."""
    return with_training(make(tmp_path), deep=True)


def test_no_public_function_prints_without_a_terminal(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config(project / "influence.yaml", ["curvature.damping=0.1"])
    assert check_run(config)
    tasks = load_tasks(config)
    task = tasks[0]
    stores = prepare_all(config, tasks)
    selected = select_tests(["misclassified"], task.test, task.classes, lambda: misclassified(tasks))[:2]
    facts = training_facts(stores)
    assert list(rank_training(stores, selected, facts=facts))
    assert rank_tests(stores, 3).tests
    assert group_influence(stores, selected, group_by_class(task.train, task.classes), facts=facts).tests
    assert len(find_mislabels(tasks).order)
    wanted = [name for name in SIGNALS if name not in ("pred-probs", "tracin", "trajectory")]
    assert len(find_mislabels(tasks, stores, choice=SignalChoice(wanted=wanted)).signals) >= len(wanted)
    assert check_estimates(stores, selected)
    retraining = Retraining(config)
    assert leave_one_out(stores, selected, retraining=retraining, count=2).left_out
    assert datamodeling_score({"auto": config}, tasks, retraining=retraining, plan=LdsPlan(2, 1, 2)).tests.size
    assert perturb_image(stores, 0, selected).effects
    rank_attackable(top_layer(task), [0, 1], pixel_scale(task.train))
    assert capfd.readouterr() == ("", "")


def test_a_silent_terminal_keeps_the_warnings_that_it_does_not_print(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, terminal = load_config(project / "influence.yaml"), Terminal(silent=True)
    prepare_all(config, load_tasks(config), terminal)
    assert capfd.readouterr() == ("", "")
    assert terminal.warnings
    for text in terminal.warnings:
        Terminal(quiet=True).warn(text)
    assert capfd.readouterr().err.count("warning: ") == len(terminal.warnings)
