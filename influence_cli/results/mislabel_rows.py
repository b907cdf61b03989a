"""Rows and columns of `influence mislabels`."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.data.split import Split
    from influence_cli.mislabels.find import Mislabels

COLUMNS = ("rank", "index", "path", "label", "suggested", "confidence", "score", "loss", "self_influence")
# Similar examples that are noted of each.
NEIGHBOURS = 5


def mislabel_rows(result: Mislabels, split: Split, classes: tuple[str, ...], count: int) -> Iterator[dict[str, object]]:
    """Give the rows of the ranking, most suspicious first, with every signal and whether the label is flagged.

    A label that is not judged has neither score nor suggestion.
    """
    facts, self_influence, flagged = result.facts, result.signals.get("self-influence"), len(result.flagged)
    for number, row in enumerate(result.order[:count], start=1):
        index, suggested = int(facts.indices[row]), int(result.suggested[row])
        yield {
            "rank": number,
            "index": index,
            "path": split.path(index),
            "label": classes[int(facts.labels[row])],
            "suggested": classes[suggested] if suggested >= 0 else None,
            "confidence": _number(result.confidence[row]),
            "score": _number(result.score[row]),
            "loss": float(facts.losses[row]),
            "self_influence": None if self_influence is None else float(self_influence[row]),
            "flagged": number <= flagged,
            **{signal_column(name): _number(values[row]) for name, values in result.signals.items()},
        }


def nearest_examples(result: Mislabels, rows: np.ndarray, most: int) -> dict[int, tuple[int, ...]]:
    """Give the positions in the data set of the examples most similar to each of some rows, nearest first."""
    indices = result.facts.indices
    return {
        int(indices[row]): tuple(int(indices[other]) for other in result.evidence.nearest[row, :most] if other >= 0)
        for row in rows
    }


def noted_neighbours(result: Mislabels, count: int) -> dict[str, str]:
    """Give the nearest examples of the first ones for the run file, where each of them is a line."""
    nearest = nearest_examples(result, result.order[:count], NEIGHBOURS)
    return {str(index): " ".join(map(str, others)) for index, others in nearest.items() if others}


def _number(value: float) -> float | None:
    return None if isnan(value) else float(value)


def signal_column(name: str) -> str:
    """Name the column of a signal: ``signal_self_influence``."""
    return "signal_" + name.replace("-", "_")
