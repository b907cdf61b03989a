"""The signals that `influence mislabels` can rank by, and which of them can be had here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.evidence.features import Features, signals_of
from influence_cli.mislabels.teaching import Taught

PROBABILITY_SIGNALS = ("combined", "readout", "neighbours", "logistic", "pred-probs")
GRADIENTS = ("self-influence", "gradient-norm", "tracin", "test-influence")
SIGNALS = (*PROBABILITY_SIGNALS, "loss", "margin", "trajectory", *GRADIENTS)


def is_opinion(signal: str) -> bool:
    """Say whether a signal is a probability of every class that has not seen the label."""
    return signal in PROBABILITY_SIGNALS or ":" in signal


def wanted_signals(
    signal: str,
    *,
    extent: Literal["one", "free", "all"],
    on: str,
    checkpoints: int,
    tests: bool,
    solves: bool,
    probabilities: bool,
    features: Sequence[Features] = (),
) -> tuple[str, ...]:
    """Choose the signals to compute, of those that are available here.

    Args:
        signal: the one to rank by.
        extent: the one, with all that need no gradients (``free``), or all of them.
        on: ``train`` or ``test``.
        checkpoints: how many.
        tests: whether there is a test set.
        solves: whether the curvature method needs one solve per example.
        probabilities: whether ``--pred-probs`` is given.
        features: of other networks.

    Raises:
        InfluenceError: the signal is unknown or not available here.
    """
    known = (*SIGNALS, *(name for each in features for name in signals_of(each)))
    if signal not in known:
        raise InfluenceError(
            f"--signal {signal}: there is no such signal",
            f"known: {', '.join(known)}" + ("" if features else "; others, such as readout:NAME, need --features"),
        )
    why = {
        "pred-probs": (not probabilities, "it needs --pred-probs FILE"),
        "tracin": (checkpoints < 2, "it needs several checkpoints; with one it equals gradient-norm"),
        "trajectory": (checkpoints < 2, "it needs several checkpoints of one run; with one it equals margin"),
        "test-influence": (
            on == "test" or not tests,
            "it scores training examples and needs a test set with labels in the config",
        ),
        "self-influence": (solves, "it would need one solve per example; use -s curvature.method=auto"),
    }
    missing = {name: reason for name, (cannot, reason) in why.items() if cannot}
    if signal in missing:
        raise InfluenceError(f"--signal {signal}: {missing[signal]}", f"known: {', '.join(known)}")
    if extent == "one":
        return (signal,)
    return tuple(
        name for name in known if name not in missing and (extent == "all" or name == signal or name not in GRADIENTS)
    )


@dataclass(frozen=True)
class SignalChoice:
    """Which signals are computed, and which one decides the order.

    Attributes:
        rank_by: which of ``SIGNALS`` to rank by.
        wanted: signals to compute.
        probabilities: [examples of the data set, C] from elsewhere, for ``pred-probs``.
        features: of other networks, which take part in ``combined``.
        taught: what a person has decided about some of the labels; the signal is then one of opinions.
    """

    rank_by: str = "combined"
    wanted: Collection[str] = ("combined",)
    probabilities: np.ndarray | None = None
    features: Sequence[Features] = ()
    taught: Taught | None = None


COMBINED = SignalChoice()
