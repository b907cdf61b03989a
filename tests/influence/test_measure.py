"""What influence is on: a margin beside the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from influence_cli import RankOptions, load_config, load_tasks, prepare_all, rank_training
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import training_facts
from influence_cli.influence.measure import check_measure
from influence_cli.influence.test_selection import at_position
from influence_cli.ranking.rank import rank_into_sinks
from influence_cli.ranking.sinks import KeptInfluence


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_influence_on_the_margin_is_that_on_the_loss_over_one_minus_the_probability(
    tiny: Path, *, on_the_fly: bool
) -> None:
    """∇ of −log(p/(1 − p)) is ∇ of −log p over 1 − p: above zero is helpful in both."""
    config = load_config(tiny / "influence.yaml", ["curvature.damping=0.1", "curvature.method=ekfac"])
    tasks = load_tasks(config)
    stores = prepare_all(config, tasks, on_the_fly=on_the_fly)
    split, n = tasks[0].test_split(), len(tasks[0].train)
    selected = [at_position(split, int(index)) for index in split.indices]
    values = {}
    for measure in ("loss", "margin"):
        held = KeptInfluence(len(selected), n)
        options = RankOptions(sinks=[held], measure=measure)
        tests, _ = rank_into_sinks(
            rank_training(stores, selected, facts=training_facts(stores), count=1, options=options)
        )
        values[measure] = held.values
    probabilities = np.array([[test.probability] for test in tests])
    assert values["margin"] == pytest.approx(values["loss"] / (1 - probabilities), rel=1e-4)
    margins = np.log(probabilities / (1 - probabilities))[:, 0]
    assert np.array([test.loss for test in tests]) == pytest.approx(-margins, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", ["hinge", "smooth_hinge"])
def test_a_loss_without_probabilities_has_no_margin(tiny: Path, loss: str) -> None:
    (task,) = load_tasks(load_config(tiny / "influence.yaml", [f"loss={loss}"]))
    with pytest.raises(InfluenceError, match="--measure margin is of probabilities"):
        check_measure(task, "margin")
    check_measure(task, "loss")
    with pytest.raises(InfluenceError, match="reads no softmax"):
        check_measure(replace(task, loss_name="./losses.py:mine", softmax_loss=False), "margin")
