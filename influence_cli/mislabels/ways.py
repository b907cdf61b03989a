"""How many labels are wrong, by each way to estimate it without a person: their range is the estimate.

No single one of them is to be relied on: evidence that is weak itself counts too many, evidence that has half believed
the wrong labels too few. Where they agree there is reason to trust them; where they do not, decisions on a random
sample tell (mislabels/sample.py).
"""

from __future__ import annotations

import numpy as np

from influence_cli.mislabels.noise import Noise, calibrated, contradicted
from influence_cli.mislabels.suspicion import likeliest, logarithms

# The least probability of the model that counts.
LEAST = 1e-30


def ways_to_count(
    log_probabilities: dict[str, np.ndarray],
    labels: np.ndarray,
    order: np.ndarray,
    noise: Noise,
    leading: str,
    model: np.ndarray | None,
) -> dict[str, int]:
    """Count the wrong labels of a list in several ways.

    Args:
        log_probabilities: by source, [n, C] that have not seen the labels; NaN where a label is not judged.
        labels: int64 [n], as given.
        order: int64 [m], rows of the list.
        noise: the estimate by the leading source.
        leading: which source that is.
        model: the model's probabilities [n, C], if it has not memorised the labels.

    Returns:
        By name of the way, the leading source first:

        - confident learning by each source (Northcutt et al. 2021)
        - ``probabilities``: the sum of p(wrong) by the leading source
        - ``agreeing``: labels that are wrong by confident learning of every source, and of the model
        - ``contradicted``: labels that the leading source finds less likely than another class
    """
    suggested = likeliest(log_probabilities[leading])
    rows = np.sort(order[suggested[order] >= 0])
    if not len(rows):
        return {}
    given, whole = labels[rows], len(rows) == len(labels)
    flags = {
        name: contradicted(calibrated(values if whole else values[rows], given))
        for name, values in ({leading: log_probabilities[leading]} | log_probabilities).items()
    }
    ways = {name: int(flagged.sum()) for name, flagged in flags.items()}
    if len(order) == len(labels):
        ways[leading] = noise.count
    voices = [*flags.values()]
    if model is not None:
        voices.append(contradicted(calibrated(logarithms(model, rows, LEAST), given)))
    return ways | {
        "probabilities": round(float(noise.wrong[rows].sum())),
        "agreeing": int(np.all(voices, axis=0).sum()),
        "contradicted": int((suggested[rows] != given).sum()),
    }
