"""How many labels are wrong, by each way to estimate it without a person: their range is the estimate.

No single one of them is to be relied on: evidence that is weak itself counts too many, evidence that has half believed
the wrong labels too few. Where they agree there is reason to trust them; where they do not, decisions on a random
sample tell (mislabels/sample.py).
"""

from __future__ import annotations

import numpy as np

from influence_cli.evidence.readout import row_parts
from influence_cli.mislabels.noise import Noise, calibrated

# Two probabilities this near are equal, as in cleanlab.
TIE = 1e-6


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
    rows = np.sort(order[~np.isnan(log_probabilities[leading][order, 0])])
    if not len(rows):
        return {}
    given, whole = labels[rows], len(rows) == len(labels)
    flags = {
        name: contradicted(values if whole else values[rows], given)
        for name, values in ({leading: log_probabilities[leading]} | log_probabilities).items()
    }
    ways = {name: int(flagged.sum()) for name, flagged in flags.items()}
    if len(order) == len(labels):
        ways[leading] = noise.count
    voices = [*flags.values()]
    if model is not None:
        voices.append(contradicted(np.log(np.maximum(model if whole else model[rows], 1e-30)), given))
    return ways | {
        "probabilities": round(float(noise.wrong[rows].sum())),
        "agreeing": int(np.all(voices, axis=0).sum()),
        "contradicted": int((log_probabilities[leading].argmax(axis=1)[rows] != given).sum()),
    }


def contradicted(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mark the labels that confident learning counts as wrong, bool [n]; cleanlab's ``num_label_issues`` counts them.

    A class counts for an example if its probability is at least the mean probability of the class among its own
    examples; of several that do, the largest. A label is wrong if another class counts, and is the likeliest as well.

    Args:
        log_probabilities: [n, C] that have not seen the labels; a temperature is fitted to them first.
        labels: int64 [n], as given.
    """
    soft = calibrated(log_probabilities, labels)
    n, classes = soft.shape
    counts = np.bincount(labels, minlength=classes)
    own = np.bincount(labels, weights=soft[np.arange(n), labels], minlength=classes)
    # A class without examples counts for none.
    least = np.where(counts > 0, own / np.maximum(counts, 1), 2) - TIE
    wrong = np.zeros(n, dtype=bool)
    for part in row_parts(n, classes):
        some, label = soft[part], labels[part]
        reached, rows = some >= least, np.arange(len(label))
        several = reached.sum(axis=1)
        counted = np.where(several > 1, some.argmax(axis=1), reached.argmax(axis=1))
        likeliest = some.max(axis=1) > some[rows, label] + TIE
        wrong[part] = (several > 0) & (counted != label) & likeliest
    return wrong
