"""Rows and columns of `influence groups`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.precompute.prepared import Prepared
    from influence_cli.ranking.groups import GroupInfluence

COLUMNS = (
    "test",
    "test_path",
    "test_label",
    "test_predicted",
    "effect",
    "rank",
    "group",
    "examples",
    "influence",
    "mean_influence",
    "harmful_share",
    "first",
)


def group_rows(
    prepared: Prepared,
    influence: GroupInfluence,
    first: np.ndarray | None,
    *,
    each: bool,
    count: int | None,
    actual: dict[int, np.ndarray],
) -> Iterator[dict[str, object]]:
    """Give one row per group, most harmful first: for every test example, or for their mean."""
    from influence_cli.influence.scores import effect
    from influence_cli.results.rank_rows import test_columns

    for number in range(len(influence.tests)) if each else (None,):
        test = None if number is None else influence.tests[number]
        sums = influence.total() if number is None else influence.on(number)
        for rank, group in enumerate(sums.order[:count].tolist(), start=1):
            changes = actual.get(group)
            yield {
                **test_columns(prepared.task.classes, test),
                "effect": effect(sums.influence[group]),
                "rank": rank,
                "group": influence.grouping.names[group],
                "examples": int(sums.examples[group]),
                "influence": float(sums.influence[group]),
                "mean_influence": float(sums.mean[group]),
                "harmful_share": float(sums.share[group]),
                "first": None if each or first is None else float(first[group]),
                "actual": None if changes is None else float(changes.mean() if number is None else changes[number]),
            }
