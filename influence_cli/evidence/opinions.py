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
from influence_cli.evidence.features import Features
from influence_cli.evidence.logistic import leave_one_out_logistic
from influence_cli.evidence.neighbours import distance, nearest, vote
from influence_cli.evidence.readout import COMPONENTS, FLOOR, leave_one_out, log_softmax_
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

    ``summary`` has ridge, temperature, dimension and the number of features, by name.
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
    what: str,
    logistic: bool = False,
    unseen: bool = False,
) -> Opinions:
    """Fit the readout and find the neighbours.

    Args:
        features: float32 [n, d], on the device that does the work.
        targets: int64 [n], on it too.
        classes: C.
        terminal: progress, warnings.
        what: the features are, such as ``activations``.
        logistic: fit the logistic readout as well.
        unseen: they are of a network that has not seen the labels.
    """
    with terminal.status(f"leave-one-out readout of {features.shape[1]:,} {what}"):
        components = OF_UNSEEN if unseen else COMPONENTS
        readout = leave_one_out(features, targets, classes, components=components, by_squares=unseen)
        # In their place: two copies of all outputs may not fit.
        voiced = log_softmax_(readout.outputs, readout.temperature)
    if readout.floored:
        terminal.warn(
            f"{readout.floored:,} examples have leverage above {1 - FLOOR}: the readout fits them whatever their "
            f"label is; it has too many {what} for so few examples"
        )
    with terminal.progress(len(targets), "nearest neighbours") as advance:
        rows, similarity = nearest(readout.components, on_examples=advance)
    log_probabilities = {"readout": voiced, "neighbours": vote(rows, similarity, targets, classes)}
    if logistic:
        with terminal.status("leave-one-out logistic regression"):
            log_probabilities["logistic"] = leave_one_out_logistic(readout.components, targets, classes)
    far = distance(readout.components, rows)
    return Opinions(
        {name: values.cpu() for name, values in log_probabilities.items()},
        rows.cpu(),
        similarity.cpu(),
        far.cpu(),
        {
            "ridge": readout.ridge,
            "temperature": readout.temperature,
            "dimension": readout.dimension,
            "activations": float(features.shape[1]),
        },
    )


def given_opinion(probabilities: Tensor) -> Opinions:
    """Take class probabilities of another model as its one opinion; it has no neighbours."""
    none = torch.empty(0)
    logs = probabilities.clamp_min(LEAST).log()
    return Opinions({"probabilities": logs}, none, none, none, {})


def opinions_of_others(
    features: Sequence[Features], indices: np.ndarray, targets: Tensor, classes: int, terminal: Terminal
) -> dict[str, Opinions]:
    """Form the opinions of other networks, by the name of their features.

    Args:
        features: of the whole data set.
        indices: int64 [n], positions of the examples that are judged.
        targets: int64 [n], on the device that does the work.
        classes: C.
        terminal: progress, warnings.
    """
    formed = {}
    for each in features:
        rows = each.rows(indices)
        if each.probabilities:
            formed[each.name] = given_opinion(rows)
        else:
            what = f"features of {each.name}"
            formed[each.name] = form_opinions(
                rows.to(targets.device), targets, classes, terminal, what=what, unseen=True
            )
    return formed


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
