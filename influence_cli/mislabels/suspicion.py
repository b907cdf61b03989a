"""From opinions to suspicion: what each says of a label as given, the class it suggests, the margin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from influence_cli.evidence.mapped import is_on_disk, large, picked, row_parts
from influence_cli.evidence.mapped import likeliest as likeliest_of
from influence_cli.influence.example_facts import TrainingFacts


def with_probabilities(
    opinions: Mapping[str, np.ndarray], probabilities: np.ndarray | None, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """Add ``pred-probs``, the logarithms of probabilities from elsewhere, to the opinions."""
    return {**opinions} if probabilities is None else {**opinions, "pred-probs": logarithms(probabilities, indices)}


def signals_without_gradients(
    log_probabilities: Mapping[str, np.ndarray], facts: TrainingFacts, trajectory: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Give the signals that need no gradient, float64 [n] each, higher is more suspicious.

    Args:
        log_probabilities: by source, [n, C]; NaN where a label is not judged.
        facts: labels, the model's probabilities and losses.
        trajectory: [n, C], probabilities averaged over the checkpoints of a run; None without.
    """
    signals = {name: -_at(values, facts.labels).astype(np.float64) for name, values in log_probabilities.items()}
    signals["loss"] = facts.losses.astype(np.float64)
    signals["margin"] = margin_of(facts.probabilities, facts.labels)
    if trajectory is not None:
        signals["trajectory"] = margin_of(trajectory, facts.labels, logarithms=True)
    return signals


def suggestions(
    log_probabilities: np.ndarray | None, probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the likeliest class of each example, its probability and that of the given label, [n] each.

    Args:
        log_probabilities: [n, C]; NaN where a label is not judged.
        probabilities: [n, C], which count where there are no log-probabilities.
        labels: int64 [n], as given.
    """
    values = probabilities if log_probabilities is None else log_probabilities
    suggested = likeliest(values)
    both = _at(values, suggested), _at(values, labels)
    confidence, given = both if log_probabilities is None else map(np.exp, both)
    return suggested, confidence, given


def logarithms(probabilities: np.ndarray, indices: np.ndarray, least: float = 1e-300) -> np.ndarray:
    """Give the logarithms of some rows [n, C]; of ``least`` where a probability is smaller."""
    if not is_on_disk():
        return np.asarray(np.log(np.maximum(probabilities[indices], least)))
    logs = large(len(indices), probabilities.shape[1]).numpy()
    for rows in row_parts(*logs.shape):
        logs[rows] = np.log(np.maximum(probabilities[indices[rows]], least))
    return logs


def likeliest(probabilities: np.ndarray) -> np.ndarray:
    """Give the class of largest probability, or log-probability, int64 [n]; −1 for a row of NaN."""
    return likeliest_of(torch.from_numpy(probabilities)).numpy()


def _at(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give the (log-)probability of each row's label, [n]; of the last class for −1."""
    labels = np.where(labels < 0, probabilities.shape[1] - 1, labels)
    return picked(torch.from_numpy(probabilities), torch.from_numpy(labels)).numpy()


def margin_of(probabilities: np.ndarray, labels: np.ndarray, *, logarithms: bool = False) -> np.ndarray:
    """Give the probability, or its logarithm, of the largest other class minus that of the label, [n]."""
    margins = np.empty(len(labels))
    for part in row_parts(*probabilities.shape):
        others, some = probabilities[part].copy(), labels[part]
        if logarithms:
            others = np.log(np.maximum(others, 1e-30))
        rows = np.arange(len(some))
        given = others[rows, some]
        others[rows, some] = -np.inf
        margins[part] = others.max(axis=1) - given
    return margins
