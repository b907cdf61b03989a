"""All that is known about one label: the value of every signal, and similar examples with their labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from influence_cli.data.split import Split, row_of
from influence_cli.errors import InfluenceError
from influence_cli.metrics import percentile_rank
from influence_cli.mislabels.find import Mislabels

COLUMNS = ("kind", "name", "value", "percentile", "suggested", "confidence", "index", "path", "label")
SHOWN = 10


def row_among(indices: np.ndarray, index: int, split: Split) -> int:
    """Find an example among some positions of a split, rising.

    Raises:
        InfluenceError: it is not one of them.
    """
    row = row_of(indices, index)
    if row is None:
        raise InfluenceError(
            f"--explain {index}: there is no such {split.name} example in use",
            f"valid indices are 0 to {len(split.source) - 1}, except excluded ones",
        )
    return row


def explain_rows(result: Mislabels, split: Split, classes: tuple[str, ...], index: int) -> Iterator[dict[str, object]]:
    """Give one row per signal (kind ``signal``), then one per neighbour (kind ``neighbour``), nearest first.

    For a signal, ``value`` is its number and ``percentile`` the share of examples that are less suspicious. For a
    neighbour, ``value`` is the cosine similarity; ``index``, ``path`` and ``label`` are the neighbour's.

    Raises:
        InfluenceError: there is no such example in use.
    """
    facts = result.facts
    row = row_among(facts.indices, index, split)
    blank = dict.fromkeys(COLUMNS)
    example = {"index": index, "path": split.path(index), "label": classes[int(facts.labels[row])]}
    for name, values in result.signals.items():
        logs = result.log_probabilities.get(name)
        shares = None if logs is None else np.exp(logs[row])
        if shares is None and name in ("loss", "margin"):
            shares = facts.probabilities[row]
        elif name == "trajectory" and result.evidence.trajectory is not None:
            shares = result.evidence.trajectory[row]
        judged = ~np.isnan(values)
        best = None if shares is None or not judged[row] else int(shares.argmax())
        yield {
            **blank,
            **example,
            "kind": "signal",
            "name": name,
            "value": float(values[row]) if judged[row] else None,
            "percentile": float(percentile_rank(values[judged])[judged[:row].sum()]) if judged[row] else None,
            "suggested": None if best is None else classes[best],
            "confidence": None if best is None or shares is None else float(shares[best]),
        }
    evidence = result.evidence
    shown = evidence.nearest[row, :SHOWN] if evidence.judged[row] else evidence.nearest[row, :0]
    for rank, other in enumerate(shown, start=1):
        at = int(facts.indices[other])
        yield {
            **blank,
            "kind": "neighbour",
            "name": str(rank),
            "value": float(evidence.similarity[row, rank - 1]),
            "index": at,
            "path": split.path(at),
            "label": classes[int(facts.labels[other])],
        }
