"""Opinions formed of features: a readout without each label, the vote of the nearest neighbours, a logistic readout.

A class that has too few examples for them is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.evidence.approximate import TRIED, neighbours_of
from influence_cli.evidence.features import Features
from influence_cli.evidence.logistic import leave_one_out_logistic
from influence_cli.evidence.mapped import is_on_disk, large, log_softmax_, release, row_parts
from influence_cli.evidence.neighbours import NEIGHBOURS, distance, vote
from influence_cli.evidence.readout import COMPONENTS, FLOOR, leave_one_out
from influence_cli.runtime import distributed, exchange
from influence_cli.runtime.terminal import Terminal

# A leave-one-out readout of a class with fewer examples has one or none to go by.
FEWEST = 3
# Principal components in which neighbours are sought by the features of a network that has not seen the labels: more
# than of the model's layers, of which the last ones are about the labels. Its ridge is chosen by squares, for the
# likelihood of labels of which many are wrong asks for much too large a one (bench/results/labels_features.md).
OF_UNSEEN = 128
# A class that another model gives no probability may still be the right one.
LEAST = 1e-4


@dataclass(frozen=True)
class Opinions:
    """Log-probabilities [n, C] by ``readout``, ``neighbours``, ``logistic``, on the CPU, and the neighbours that voted.

    ``summary`` has ridge, temperature, dimension and the number of features, by name; the recall of the neighbours,
    if they were not found by comparing all examples with all.
    """

    log_probabilities: dict[str, Tensor]
    nearest: Tensor
    similarity: Tensor
    distance: Tensor
    summary: dict[str, float]


def form_opinions(
    features: Tensor,
    targets: Tensor,
    classes: int,
    terminal: Terminal,
    *,
    device: torch.device,
    what: str,
    logistic: bool = False,
    other: bool = False,
) -> Opinions | None:
    """Fit the readout and find the neighbours.

    Args:
        features: float32 [m, d], or float16 in a file: of all n examples, or this process's part of them, in order.
        targets: int64 [n], of all examples.
        classes: C.
        terminal: progress, warnings.
        device: that does the work.
        what: the features are, such as ``activations``.
        logistic: fit the logistic readout as well.
        other: they are of a network that has not seen the labels, all in this process.

    Returns:
        The opinions on all examples, in the first process of a job; None in the others.
    """
    shared = distributed.size() > 1 and not other
    kept = OF_UNSEEN if other else COMPONENTS
    start = sum(distributed.gathered(len(features))[: distributed.rank()]) if shared else 0
    part = slice(start, start + len(features))
    # What is in a file stays there, and goes to the device part by part.
    where = torch.device("cpu") if is_on_disk() else device
    with terminal.status(f"leave-one-out readout of {features.shape[1]:,} {what}"):
        readout = leave_one_out(
            features.to(where),
            targets[part].to(where),
            classes,
            device=device,
            shared=shared,
            kept=kept,
            by_squares=other,
        )
        # In their place: two copies of all outputs may not fit.
        voiced = log_softmax_(readout.outputs, readout.temperature)
    if readout.floored and (not shared or distributed.is_first()):
        terminal.warn(
            f"{readout.floored:,} examples have leverage above {1 - FLOOR}: the readout fits them whatever their "
            f"label is; it has too many {what} for so few examples"
        )
    summary = {
        "ridge": readout.ridge,
        "temperature": readout.temperature,
        "dimension": readout.dimension,
        "activations": float(features.shape[1]),
    }
    components = (exchange.rows_to_all(readout.components.cpu()) if shared else readout.components).to(device)
    with terminal.progress(len(targets), "nearest neighbours") as advance:
        rows, similarity, recall = neighbours_of(
            components, terminal, distributed.counted(advance) if shared else advance, part
        )
    if recall is not None:
        summary["recall"] = recall
        terminal.say(f"neighbours by faiss: {recall:.1%} of the {NEIGHBOURS} nearest, measured on {TRIED} examples")
    votes = vote(rows.to(where), similarity.to(where), targets.to(where), classes)
    far = distance(components, rows, part)
    parts = (voiced, votes, rows, similarity, far[:, None])
    voiced, votes, rows, similarity, far = (_to_first(each) if shared else each.cpu() for each in parts)
    log_probabilities = {"readout": voiced, "neighbours": votes}
    if shared and not distributed.is_first():
        return None
    if logistic:
        with terminal.status("leave-one-out logistic regression"):
            log_probabilities["logistic"] = leave_one_out_logistic(components, targets.to(device), classes).cpu()
    return Opinions(log_probabilities, rows, similarity, far[:, 0], summary)


def _of_given(probabilities: Tensor) -> Opinions:
    """Take class probabilities of another model as its one opinion; it has no neighbours."""
    none = torch.empty(0)
    for rows in row_parts(*probabilities.shape):
        probabilities[rows] = probabilities[rows].clamp_min(LEAST).log()
    return Opinions({"probabilities": probabilities}, none, none, none, {})


def opinions_of_others(
    features: Sequence[Features],
    indices: np.ndarray,
    targets: Tensor,
    classes: int,
    terminal: Terminal,
    *,
    device: torch.device,
) -> dict[str, Opinions]:
    """Form the opinions of other networks, by the name of their features, in this process alone.

    Args:
        features: of the whole data set.
        indices: int64 [n], positions of the examples that are judged.
        targets: int64 [n].
        classes: C.
        terminal: progress, warnings.
        device: that does the work.
    """
    formed = {}
    for each in features:
        rows, what = each.rows(indices), f"features of {each.name}"
        one = (
            _of_given(rows)
            if each.probabilities
            else form_opinions(rows, targets, classes, terminal, device=device, what=what, other=True)
        )
        if one is not None:
            formed[each.name] = one
    return formed


def _to_first(rows: Tensor) -> Tensor:
    """Give the first process all rows, on the CPU; to the others their own."""
    rows = rows.cpu()
    joined = exchange.rows_to_first(rows, large, release)
    return rows if joined is None else joined


def enough(labels: np.ndarray, classes: int) -> np.ndarray:
    """Mark the examples of classes that have enough of them for a readout, bool [n]."""
    return np.asarray(np.bincount(labels, minlength=classes)[labels] >= FEWEST)


def _rare(labels: np.ndarray, judged: np.ndarray, classes: Sequence[str]) -> str:
    counts = np.bincount(labels[~judged], minlength=len(classes))
    rare = np.flatnonzero(counts)
    return ", ".join(f"{classes[int(c)]} ({counts[c]})" for c in rare[:6]) + (", …" if len(rare) > 6 else "")


def left_out(labels: np.ndarray, judged: np.ndarray, classes: Sequence[str]) -> str:
    """Say which classes are not judged."""
    return (
        f"the leave-one-out readout needs at least {FEWEST} examples per class; these have fewer and are not judged, "
        f"they come last without a score: {_rare(labels, judged, classes)}"
    )


def no_readout(labels: np.ndarray, width: int, judged: np.ndarray, classes: Sequence[str]) -> InfluenceError | None:
    """Find why there can be no readout of some activations [n, width]; None if there can."""
    counts = np.bincount(labels, minlength=len(classes))
    if (counts > 0).sum() < 2:
        count = len(labels)
        which = "the only label is" if count == 1 else f"all {count:,} labels are"
        return InfluenceError(
            f"{which} {classes[int(counts.argmax())]}: no label can be suspected",
            "use a data set with two or more classes",
        )
    if not width:
        return InfluenceError(
            "the model has no linear layer or convolution whose input could be read",
            "use --signal loss, margin or self-influence",
        )
    if (counts >= FEWEST).sum() < 2:
        return InfluenceError(
            f"the leave-one-out readout needs at least {FEWEST} examples per class, in two classes or more; these have "
            f"fewer: {_rare(labels, judged, classes)}",
            "use --signal loss or self-influence",
        )
    return None
