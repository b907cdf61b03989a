"""How many labels are wrong, which classes are confused, and how far down a ranking it is worth looking.

The counts are confident learning's (Northcutt et al., JAIR 2021), by the cleanlab library, on probabilities that have
not seen the label. From its joint distribution Q of given and true labels follows, by Bayes, the probability that a
label is wrong:

    p(true | x) = Q(given | true)⁻¹ p(given | x),  p(wrong | x, given) = 1 − p(given = true | x) Q(given | given) / Σ …

and the expected precision of the first k of a ranking is its mean over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.evidence.readout import TRIED, fit_temperature, row_parts


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


def estimate_noise(log_probabilities: np.ndarray, labels: np.ndarray) -> Noise:
    """Estimate the label noise by confident learning.

    Args:
        log_probabilities: [n, C] that have not seen the labels; a temperature is fitted to them first.
        labels: int64 [n], as given.
    """
    soft = calibrated(log_probabilities, labels)
    return noise_of(soft, labels, count_wrong(soft, labels))


def calibrated(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fit a temperature to log-probabilities [n, C] and give the probabilities, float64 [n, C]."""
    n, classes = log_probabilities.shape
    soft = np.empty((n, classes))
    every = -(-n * classes // TRIED)
    some = torch.from_numpy(log_probabilities[::every]).double()
    temperature = fit_temperature(some, torch.from_numpy(labels[::every]))
    for rows in row_parts(n, classes):
        soft[rows] = (temperature * torch.from_numpy(log_probabilities[rows]).double()).softmax(dim=1).numpy()
    return soft


def count_wrong(soft: np.ndarray, labels: np.ndarray) -> int:
    """Count the labels that are probably wrong, by confident learning."""
    # Imported here: with pandas and scikit-learn it takes two seconds, and only this command needs it.
    from cleanlab.count import num_label_issues

    return int(num_label_issues(labels, soft))


def noise_of(soft: np.ndarray, labels: np.ndarray, count: int) -> Noise:
    """Give the estimate by probabilities [n, C] from ``calibrated`` and their count of wrong labels."""
    from cleanlab.count import compute_confident_joint

    joint = np.asarray(compute_confident_joint(labels, soft), dtype=np.float64)
    joint /= joint.sum()
    return Noise(count, joint, _wrong(soft, labels, joint))


def _wrong(soft: np.ndarray, labels: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """Give p(wrong | x, given) [n].

    Classes that are confused with each other, directly or through others, make up blocks of Q, which are inverted one
    by one. Of p(true | x) only the classes that have the given label in Q are needed.
    """
    rates = joint.sum(axis=0)
    present = rates > 0
    wrong = np.ones(len(labels))
    for block in _confusable(joint):
        channel = np.eye(len(block))  # Q(given | true); an empty class maps to itself
        inside = present[block]
        channel[:, inside] = joint[np.ix_(block, block[inside])] / rates[block[inside]]
        inverse = np.linalg.pinv(channel)
        for at, label in enumerate(block):
            rows = np.flatnonzero(labels == label)
            causes = np.flatnonzero(channel[at])
            true = np.clip(soft[np.ix_(rows, block)] @ inverse[causes].T, 0, None) * channel[at, causes]
            total, given = true.sum(axis=1), true[:, causes == at].sum(axis=1)
            # If a row is all zero, its label is impossible under Q.
            wrong[rows] = 1 - np.divide(given, total, out=np.zeros_like(given), where=total > 0)
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
