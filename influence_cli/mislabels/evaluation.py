"""How well signals find the wrong labels that are known: what ``--truth`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.metrics import auroc, average_precision, bootstrap_precision, share_found

CHECKED = (0.01, 0.05, 0.10, 0.20, 0.30)
# Shares of the recovery curve, denser at the start of the ranking.
CURVE = (
    0.0,
    *(round(0.005 * step, 4) for step in range(1, 41)),
    *(round(0.2 + 0.02 * step, 4) for step in range(1, 11)),
)


@dataclass(frozen=True)
class Quality:
    """How well a signal finds the wrong labels.

    Attributes:
        signal: its name, or ``random``.
        average_precision: AP.
        interval: 95% of the AP over bootstrap samples of the examples.
        auroc: area under the ROC curve.
        found: share of the wrong labels found at each share of ``CHECKED``.
        suggested: share of the wrong labels for which the signal's own probabilities name the true one; None for a
            signal without probabilities, or where the true labels are not known.
    """

    signal: str
    average_precision: float
    interval: tuple[float, float]
    auroc: float
    found: tuple[float, ...]
    suggested: float | None = None


@dataclass(frozen=True)
class Recovery:
    """Recovery curves.

    Attributes:
        checked: shares of the examples that are checked.
        recovered: the share of the wrong labels among these, by signal.
    """

    checked: tuple[float, ...]
    recovered: dict[str, list[float]]


def qualities(
    signals: Mapping[str, np.ndarray], wrong: np.ndarray, suggested: Mapping[str, float] | None = None
) -> list[Quality]:
    """Score signals by the truth, best first, and random order after them.

    Args:
        signals: values [n] by name, higher is more suspicious.
        wrong: bool [n].
        suggested: share of correct suggestions among the wrong labels, by signal.

    Raises:
        InfluenceError: there are no wrong ones, or no right ones.
    """
    if not wrong.any() or wrong.all():
        raise InfluenceError(
            f"--truth says that {int(wrong.sum())} of {len(wrong)} labels are wrong",
            "it needs both correct and wrong labels",
        )
    table = [
        Quality(
            name,
            average_precision(values, wrong),
            bootstrap_precision(values, wrong),
            auroc(values, wrong),
            tuple(share_found(values, wrong, CHECKED)),
            (suggested or {}).get(name),
        )
        for name, values in signals.items()
    ]
    table.sort(key=lambda quality: -quality.average_precision)
    # Expected over random orders: AP is near the share of wrong labels, and checking x % finds x %.
    share = float(wrong.mean())
    return [*table, Quality("random", share, (share, share), 0.5, CHECKED)]


def recovery(signals: Mapping[str, np.ndarray], wrong: np.ndarray) -> Recovery:
    """Give the recovery curve of every signal: the share of the wrong labels among the first shares of ``CURVE``.

    Random order finds as much as it checks.
    """
    return Recovery(CURVE, {name: share_found(values, wrong, CURVE) for name, values in signals.items()})
