"""Which training labels look wrong by what a ranking knows of them anyway: the model's own predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from influence_cli.config.schema import LossConfig
from influence_cli.influence.example_facts import TrainingFacts

# The share of its training labels that a model has to predict before it may speak against one of them.
TRUSTED = 0.8
# The probability of the label below which a prediction speaks clearly against it.
UNLIKELY = 0.1


@dataclass(frozen=True)
class Doubts:
    """Doubts about training labels.

    Attributes:
        wrong: bool [n], whether the label looks wrong.
        why: what the doubt rests on, or why there is none, in a sentence.
        weighed: whether the model's predictions can say anything about its training labels.
    """

    wrong: np.ndarray
    why: str
    weighed: bool


def label_doubts(facts: TrainingFacts, loss: LossConfig) -> Doubts:
    """Doubt the labels that the model clearly does not predict, if it predicts most of the others.

    A model that has memorised its labels, or has learned few of them, cannot speak against any.

    Args:
        facts: of the training examples.
        loss: of the config. A plain cross-entropy is −log of the label's probability; of another loss the prediction
            alone counts.
    """
    differs = facts.read & (facts.predicted != facts.labels)
    share = 1 - float(differs.sum()) / max(int(facts.read.sum()), 1)
    none = np.zeros(len(differs), dtype=bool)
    more = "influence mislabels weighs other evidence."
    if share < TRUSTED:
        # Rounded down, so that it never reads like the share that is enough.
        why = f"No label is marked: the model predicts only {math.floor(100 * share)}% of them. {more}"
        return Doubts(none, why, weighed=False)
    if not differs.any():
        return Doubts(
            none, f"No label is marked: the model predicts all of them, wrong ones included. {more}", weighed=False
        )
    clear, how = differs, ""
    if loss.factory == "cross_entropy" and not loss.args:
        clear, how = differs & (facts.losses > -math.log(UNLIKELY)), f" and gives the label less than {UNLIKELY:.0%}"
    agrees = f"{math.floor(1000 * share) / 10:.1f}%"
    why = f"label looks wrong: the model, which predicts {agrees} of the training labels, takes the image for another "
    return Doubts(clear, f"{why}class{how}. A doubt, not a verdict: {more}", weighed=True)
