"""How many labels are wrong, which classes are confused, and how far down a ranking it is worth looking.

The counts are confident learning's (Northcutt et al., JAIR 2021) on probabilities that have not seen the label, equal
to those of the cleanlab library, but made block by block: it takes several copies of all probabilities. From the joint
distribution Q of given and true labels follows, by Bayes, the probability that a label is wrong:

    p(true | x) = Q(given | true)⁻¹ p(given | x),  p(wrong | x, given) = 1 − p(given = true | x) Q(given | given) / Σ …

and the expected precision of the first k of a ranking is its mean over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.evidence.mapped import HELD, SCATTERED, chosen, is_on_disk, parts_of, row_parts, single_rows
from influence_cli.evidence.readout import TRIED, fit_temperature

# Numbers of cleanlab 2.9: a probability counts as equal within TIE; the least threshold of a class.
TIE, LEAST = 1e-6, 2e-6


@dataclass(frozen=True)
class Noise:
    """An estimate of the label noise of a split.

    Attributes:
        count: labels that are probably wrong; the default cut of the ranking.
        joint: float64 [C, C], share of all examples by given (row) and true label (column).
        wrong: float64 [n], the probability that a label is wrong; 0 for one that is not judged.
    """

    count: int
    joint: np.ndarray
    wrong: np.ndarray

    @property
    def rate(self) -> float:
        """Give the share of labels that are probably wrong."""
        return self.count / len(self.wrong)

    def expected_precision(self, order: np.ndarray) -> np.ndarray:
        """Give the expected share of wrong labels among the first k of a ranking, k = 1 … n, float64 [n]."""
        return np.asarray(np.cumsum(self.wrong[order]) / np.arange(1, len(order) + 1))


@dataclass(frozen=True)
class Calibrated:
    """Probabilities at a fitted temperature, made by parts where they are needed.

    Attributes:
        log_probabilities: [n, C] that have not seen the labels.
        labels: int64 [n], as given.
        temperature: by which the log-probabilities are multiplied.
    """

    log_probabilities: np.ndarray
    labels: np.ndarray
    temperature: float

    @property
    def classes(self) -> int:
        """Give C."""
        return int(self.log_probabilities.shape[1])

    def of(self, rows: slice | np.ndarray) -> np.ndarray:
        """Give the probabilities of some rows, float64 [m, C]."""
        some = torch.from_numpy(self.log_probabilities[rows]).double()
        return np.asarray((self.temperature * some).softmax(dim=1).numpy())

    def parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of each part, and their probabilities."""
        for rows in row_parts(len(self.labels), self.classes):
            yield rows, self.of(rows)


def estimate_noise(log_probabilities: np.ndarray, labels: np.ndarray) -> Noise:
    """Estimate the label noise by confident learning.

    Args:
        log_probabilities: [n, C] that have not seen the labels; a temperature is fitted to them first.
        labels: int64 [n], as given.
    """
    soft = calibrated(log_probabilities, labels)
    return noise_of(soft, *confident_counts(soft))


def calibrated(log_probabilities: np.ndarray, labels: np.ndarray) -> Calibrated:
    """Fit a temperature to log-probabilities [n, C], by the likelihood of the labels."""
    every = -(-log_probabilities.size // TRIED)
    rows = torch.arange(0, len(labels), every)
    some = chosen(torch.from_numpy(log_probabilities), rows).double()
    return Calibrated(log_probabilities, labels, fit_temperature(some, torch.from_numpy(labels)[rows]))


def noise_of(soft: Calibrated, count: int, confident: np.ndarray) -> Noise:
    """Give the estimate by calibrated probabilities and their ``confident_counts``."""
    joint = calibrated_joint(confident, soft.labels)
    joint /= joint.sum()
    with single_rows():
        return Noise(count, joint, _wrong(soft, joint))


def confident_counts(soft: Calibrated) -> tuple[int, np.ndarray]:
    """Count as confident learning does, with the tolerances of cleanlab 2.9.

    A class counts for an example if its probability is at least the mean probability of the class among its own
    examples; of several that do, the largest.

    Returns:
        How many labels are probably wrong (cleanlab's ``num_label_issues``), and the confident joint: int64 [C, C],
        examples by given (row) and counted class (column), at least one on the diagonal.
    """
    classes, wrong = soft.classes, 0
    joint = np.zeros(classes * classes, dtype=np.int64)
    for rows, counted, contradictory in _counted(soft):
        known = counted >= 0
        joint += np.bincount(soft.labels[rows][known] * classes + counted[known], minlength=len(joint))
        wrong += int(contradictory.sum())
    table = joint.reshape(classes, classes)
    np.fill_diagonal(table, table.diagonal().clip(min=1))
    return wrong, table


def contradicted(soft: Calibrated) -> np.ndarray:
    """Mark the labels that are probably wrong, bool [n]; ``confident_counts`` counts them."""
    wrong = np.zeros(len(soft.labels), dtype=bool)
    for rows, _, contradictory in _counted(soft):
        wrong[rows] = contradictory
    return wrong


def _counted(soft: Calibrated) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield the rows of each part, the class that each counts for (−1 for none), and whether its label is wrong."""
    thresholds = _thresholds(soft) - TIE
    for rows, part in soft.parts():
        given, best = soft.labels[rows], part.argmax(axis=1)
        reached = part >= thresholds
        several = reached.sum(axis=1)
        counted = np.where(several > 1, best, np.where(several > 0, reached.argmax(axis=1), -1))
        # A label that is the likeliest within the tolerance is not wrong.
        part[np.arange(len(given)), given] += TIE
        yield rows, counted, (counted >= 0) & (counted != given) & (part.argmax(axis=1) != given)


def _thresholds(soft: Calibrated) -> np.ndarray:
    """Give the mean probability of each class among the examples that have it as their label, [C]; 2 where none has."""
    labels, given = soft.labels, np.empty(len(soft.labels))
    for rows, part in soft.parts():
        given[rows] = part[np.arange(len(part)), labels[rows]]
    thresholds = np.full(soft.classes, 2.0)
    for label, every in _by_label(labels):
        thresholds[label] = max(LEAST, given[every].mean())
    return thresholds


def _by_label(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each label that there is, and its rows, rising."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    for label, rows in zip(present, np.split(order, starts[1:]), strict=True):
        yield int(label), rows


def calibrated_joint(confident: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scale a confident joint [C, C] so that its rows count the labels; round, keeping the sum of each row.

    Of a row, the numbers that rounding changes most are rounded the other way (``calibrate_confident_joint`` of
    cleanlab 2.9).
    """
    counts = np.bincount(labels, minlength=len(confident))
    # Numbers are added column by column, as there: of equal numbers the last bit decides which one is rounded up.
    confident = np.asfortranarray(confident)
    scaled = (confident.T / confident.sum(axis=1) * counts).T
    scaled = scaled / scaled.sum() * counts.sum()
    rounded = scaled.round()
    for row, exact in zip(rounded, scaled, strict=True):
        total = exact.sum().round()
        while lacking := int(total - row.sum()):
            step = 1 if lacking > 0 else -1
            row[np.argsort(exact - row)[::-step][: abs(lacking)]] += step
    return np.asarray(rounded)


def _wrong(soft: Calibrated, joint: np.ndarray) -> np.ndarray:
    """Give p(wrong | x, given) [n].

    Classes that are confused with each other, directly or through others, make up blocks of Q, which are inverted one
    by one. Of p(true | x) only the classes that have the given label in Q are needed.
    """
    rates = joint.sum(axis=0)
    present = rates > 0
    wrong = np.ones(len(soft.labels))
    rows_of = dict(_by_label(soft.labels))
    step = SCATTERED if is_on_disk() else max(1, HELD // soft.classes)
    for block in _confusable(joint):
        channel = np.eye(len(block))  # Q(given | true); an empty class maps to itself
        inside = present[block]
        channel[:, inside] = joint[np.ix_(block, block[inside])] / rates[block[inside]]
        inverse = np.linalg.pinv(channel)
        for at, label in enumerate(block):
            causes = np.flatnonzero(channel[at])
            every = rows_of.get(int(label), np.empty(0, dtype=np.int64))
            turn = inverse[causes].T
            for part in parts_of(len(every), step):
                likely = soft.of(every[part])[:, block] @ turn
                true = np.clip(likely, 0, None) * channel[at, causes]
                total, given = true.sum(axis=1), true[:, causes == at].sum(axis=1)
                # If a row is all zero, its label is impossible under Q.
                wrong[every[part]] = 1 - np.divide(given, total, out=np.zeros_like(given), where=total > 0)
    return wrong


def _confusable(joint: np.ndarray) -> list[np.ndarray]:
    """Divide the classes into groups that share no example of Q: int64 arrays, ascending."""
    links: list[set[int]] = [set() for _ in joint]
    for a, b in zip(*np.nonzero(joint), strict=True):
        links[a].add(int(b))
        links[b].add(int(a))
    groups, seen = [], np.zeros(len(joint), dtype=bool)
    for first in range(len(joint)):
        group, following = [], [first]
        while following:
            one = following.pop()
            if not seen[one]:
                seen[one] = True
                group.append(one)
                following += links[one]
        if group:
            groups.append(np.array(sorted(group)))
    return groups
