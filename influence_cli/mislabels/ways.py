"""How many labels are wrong, by each way to estimate it without a person: their range is the estimate.

No single one of them is to be relied on: evidence that is weak itself counts too many, evidence that has half believed
the wrong labels too few. Where they agree there is reason to trust them; where they do not, decisions on a random
sample tell (mislabels/sample.py).
"""

from __future__ import annotations

import numpy as np

from influence_cli.mislabels.noise import Noise, calibrated, count_wrong


def ways_to_count(
    log_probabilities: dict[str, np.ndarray],
    labels: np.ndarray,
    order: np.ndarray,
    noise: Noise,
    leading: str,
    predicted: np.ndarray | None,
) -> dict[str, int]:
    """Count the wrong labels of a list in several ways.

    Args:
        log_probabilities: by source, [n, C] that have not seen the labels; NaN where a label is not judged.
        labels: int64 [n], as given.
        order: int64 [m], rows of the list.
        noise: the estimate by the leading source.
        leading: which source that is.
        predicted: int64 [n], by the model, if it has not memorised the labels; it agrees or does not.

    Returns:
        By name of the way, the leading source first:

        - confident learning by each source (Northcutt et al. 2021)
        - ``probabilities``: the sum of p(wrong) by the leading source
        - ``agreeing``: labels that every source and the model contradict, by the same class
        - ``contradicted``: labels that the leading source finds less likely than another class
    """
    rows = order[~np.isnan(log_probabilities[leading][order, 0])]
    if not len(rows):
        return {}
    given = labels[rows]
    ways, best = {leading: noise.count}, {}
    for name, values in log_probabilities.items():
        some = values if len(rows) == len(values) else values[np.sort(rows)]
        own = labels if len(rows) == len(values) else labels[np.sort(rows)]
        best[name] = values.argmax(axis=1)[rows]
        if name != leading or len(order) < len(values):
            ways[name] = count_wrong(calibrated(some, own), own)
    first = best[leading]
    voices = [*best.values(), *([] if predicted is None else [predicted[rows]])]
    same = np.all([each == first for each in voices], axis=0)
    return ways | {
        "probabilities": round(float(noise.wrong[rows].sum())),
        "agreeing": int((same & (first != given)).sum()),
        "contradicted": int((first != given).sum()),
    }
