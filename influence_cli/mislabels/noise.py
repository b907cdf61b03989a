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

from influence_cli.mislabels.readout import fit_temperature


@dataclass(frozen=True)
class Noise:
    """An estimate of the label noise of a split.

    Attributes:
        count: labels that are probably wrong; the default cut of the ranking.
        joint: float64 [C, C], share of all examples by given (row) and true label (column).
        wrong: float64 [n], the probability that a label is wrong.
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
    # Imported here: with pandas and scikit-learn it takes two seconds, and only this command needs it.
    from cleanlab.count import compute_confident_joint, num_label_issues

    given = torch.from_numpy(labels)
    log_p = torch.from_numpy(log_probabilities).double()
    soft = (fit_temperature(log_p, given) * log_p).softmax(dim=1).numpy()
    counts = np.asarray(compute_confident_joint(labels, soft), dtype=np.float64)
    joint = counts / counts.sum()
    return Noise(int(num_label_issues(labels, soft)), joint, _wrong(soft, labels, joint))


def _wrong(soft: np.ndarray, labels: np.ndarray, joint: np.ndarray) -> np.ndarray:
    rates, present = joint.sum(axis=0), joint.sum(axis=0) > 0
    channel = np.eye(len(joint))  # Q(given | true); an empty class maps to itself
    channel[:, present] = joint[:, present] / rates[present]
    true = np.clip(soft @ np.linalg.pinv(channel).T, 0, None)
    joined = true * channel[labels]
    total, given = joined.sum(axis=1), joined[np.arange(len(labels)), labels]
    # If a row is all zero, its label is impossible under Q.
    return np.asarray(1 - np.divide(given, total, out=np.zeros_like(given), where=total > 0))
