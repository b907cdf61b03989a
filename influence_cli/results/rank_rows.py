"""The rows and columns of `influence rank`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.influence.example_facts import TestFacts, TrainingFacts
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.ranking.rank import RankedGroup

COLUMNS = (
    "test",
    "test_path",
    "test_label",
    "test_predicted",
    "effect",
    "rank",
    "index",
    "path",
    "label",
    "predicted",
    "loss",
    "influence",
)


def rank_rows(
    prepared: Prepared, group: RankedGroup, facts: TrainingFacts, *, aggregate: bool
) -> Iterator[dict[str, object]]:
    """Give the rows of a group: one test example after another, helpful before harmful, strongest first."""
    from influence_cli.influence.scores import effect

    classes = prepared.task.classes
    tests = [None] if aggregate else group.tests
    for test, strongest in zip(tests, group.strongest, strict=True):
        head = test_columns(classes, test)
        for side in ("helpful", "harmful"):
            order, values, scores = strongest.of(side)
            for number, (row, value) in enumerate(zip(order, values, strict=True)):
                yield head | {
                    "effect": effect(value),
                    "rank": number + 1,
                    **training_columns(prepared, facts, int(row)),
                    "influence": float(value),
                    "normalised": None if scores is None else float(scores[number]),
                }


def test_rows(
    prepared: Prepared,
    tests: Sequence[TestFacts],
    influence: np.ndarray,
    facts: TrainingFacts,
    train: int,
    count: int | None,
) -> Iterator[dict[str, object]]:
    """Give the rows of --train: test examples ordered by the influence of one training example."""
    from influence_cli.data.split import rows_of
    from influence_cli.influence.scores import effect, strongest

    classes = prepared.task.classes
    row = int(rows_of(facts.indices, [train])[0])
    for order, values in strongest(influence, count).effects():
        for number, (position, value) in enumerate(zip(order, values, strict=True), start=1):
            yield {
                **test_columns(classes, tests[int(position)]),
                "effect": effect(value),
                "rank": number,
                **training_columns(prepared, facts, row),
                "influence": float(value),
            }


def test_columns(classes: Sequence[str], test: TestFacts | None) -> dict[str, object]:
    """Give the columns of a test example, from ``test`` to ``test_predicted``; all None for a mean of several."""
    return {
        "test": test.index if test else None,
        "test_path": test.path if test else None,
        "test_label": classes[test.label] if test and test.label is not None else None,
        "test_predicted": classes[test.predicted] if test else None,
    }


def training_columns(prepared: Prepared, facts: TrainingFacts, row: int) -> dict[str, object]:
    """Give the columns of a training example, from ``index`` to ``loss``."""
    classes, index = prepared.task.classes, int(facts.indices[row])
    return {
        "index": index,
        "path": prepared.task.train.path(index),
        "label": classes[int(facts.labels[row])],
        "predicted": classes[int(facts.predicted[row])],
        "loss": float(facts.losses[row]),
    }
