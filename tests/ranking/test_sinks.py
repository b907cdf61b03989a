"""What a page is made of: the first test examples' influence, whatever the groups that it comes in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_cli import Terminal, load_config, load_tasks, prepare_all, rank_training, select_tests
from influence_cli.influence.example_facts import training_facts
from influence_cli.ranking.rank import RankOptions
from influence_cli.ranking.sinks import KeptInfluence


@pytest.mark.parametrize("groups", [(5,), (2, 3), (1, 1, 1, 1, 1), (4, 1)])
def test_the_first_rows_are_kept_whatever_the_groups(groups: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    kept, start = KeptInfluence(3, 7), 0
    for size in groups:
        kept.begin([None] * size)
        for where in (slice(0, 4), slice(4, 7)):
            kept.add(where, values[start : start + size, where])
        start += size
    assert np.array_equal(kept.values, values[:3])


def test_it_takes_what_rank_computes(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    terminal, config = Terminal(quiet=True), load_config(stored / "influence.yaml")
    tasks = load_tasks(config)
    stores = prepare_all(config, tasks, terminal)
    selected = select_tests(["0:3"], tasks[0].test, tasks[0].classes, lambda: np.empty(0), None)
    facts = training_facts(stores)
    kept = KeptInfluence(2, len(facts.indices))
    (group,) = rank_training(
        stores, selected, facts=facts, count=None, terminal=terminal, options=RankOptions(sinks=[kept])
    )
    for row, found in zip(kept.values, group.strongest, strict=False):
        for order, values in found.effects():
            assert np.array_equal(row[order], values)
    # The probabilities of a test example are the model's, and go with its loss.
    for test in group.tests:
        assert test.probability == pytest.approx(np.exp(-test.loss), rel=1e-5)
        assert test.probability <= test.confidence <= 1
        assert (test.predicted == test.target) == (test.probability == test.confidence)
