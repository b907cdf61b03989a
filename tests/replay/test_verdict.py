"""The verdict: kept, and never trust where predictions fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_cli.replay.verdict import judge
from tests.conftest import Command
from tests.support.recipe_project import rows

PREDICTED = np.random.default_rng(0).normal(size=(4, 200))


@pytest.mark.parametrize(
    ("noise", "scale", "words"),
    [
        (0.1, 1.0, "this run answers to its data (r 0.9"),
        (0.8, 1.0, "this run answers to its data in part (r 0."),
        (20.0, 1.0, "this run is chaotic (r "),
        (0.0, -1.0, "this run is chaotic (r -1.00"),
        (0.0, 0.5, "this run answers to its data (r 1.00"),
    ],
)
def test_the_sentence_follows_the_agreement(noise: float, scale: float, words: str) -> None:
    actual = scale * PREDICTED + noise * np.random.default_rng(1).normal(size=PREDICTED.shape)

    verdict = judge(PREDICTED, actual, 3)

    assert words in verdict.sentence()
    assert "trust these numbers" not in verdict.sentence() or verdict.agreement >= 0.9
    if not noise:
        assert verdict.slope == pytest.approx(scale)


def test_changes_of_nothing_are_no_agreement() -> None:
    verdict = judge(np.zeros((4, 3)), np.zeros((4, 3)), 1)

    assert verdict.chaotic
    assert not verdict.trusted


@pytest.mark.slow
def test_check_gives_the_kept_verdict_and_trains_nothing(influence: Command, run_project: Path) -> None:
    other = ("-s", "curvature.method=auto")
    for words in ((), other):
        done = influence("check", *words, cwd=run_project)
        assert "this run answers to its data (r " in done.err
        assert "4 trainings without 1 random images, and one pass" not in done.err

    findings = {row["item"]: row for row in rows(influence, run_project, "check", *other)}
    assert findings["recipe"]["value"] == "sgd, lr 0.2, batch 20, momentum 0.9"
    assert findings["steps of the run"]["value"] == 30
    assert findings["record of the run"]["unit"].startswith("complete, 6 states of 30 steps")
    assert findings["verdict on the run"]["value"] > 0.9


def test_check_says_where_l2_is_not_what_was_trained(influence: Command, run_project: Path) -> None:
    done = influence("check", "-s", "l2=0.01", cwd=run_project)

    assert "the recipe trains with weight_decay 0, but l2 is 0.01" in done.err
