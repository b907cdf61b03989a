"""How many labels are wrong by the evidence, where it allows an estimate at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from influence_cli.evidence.gather import Evidence
from influence_cli.evidence.guessing import beats_guessing, largest_share
from influence_cli.evidence.mapped import chosen
from influence_cli.mislabels.noise import Noise, calibrated, confident_counts, noise_of
from influence_cli.mislabels.suspicion import likeliest
from influence_cli.mislabels.ways import ways_to_count


def estimate(source: str, log_probabilities: np.ndarray, evidence: Evidence) -> tuple[Noise | None, str]:
    """Estimate the label noise, or say why the evidence does not allow it.

    Evidence that is no better than guessing says nothing of the labels. Where it contradicts most of them, wrong labels
    and classes that it cannot tell apart look the same.
    """
    known = likeliest(log_probabilities) >= 0
    whole = bool(known.all())
    labels = evidence.facts.labels if whole else evidence.facts.labels[known]
    log_p = log_probabilities if whole else _some(log_probabilities, known)
    # The model, a part of ``combined``, has seen the labels.
    judge = evidence.judge if source == "combined" else source
    right = int((likeliest(evidence.log_probabilities.get(judge, log_probabilities))[known] == labels).sum())
    compared = f"accuracy {right / len(labels):.2%}, guessing {largest_share(labels):.2%}"
    if not beats_guessing(right, labels):
        what = "these probabilities are" if judge == "pred-probs" else f"the {judge} is"
        return None, f"{what} no better than guessing ({compared})"
    soft = calibrated(log_p, labels)
    count, confident = confident_counts(soft)
    if count > len(labels) / 2:
        return None, (
            f"the evidence contradicts {count / len(labels):.0%} of the labels, which says more of the evidence than "
            f"of the labels ({judge}: {compared})"
        )
    noise = noise_of(soft, count, confident)
    if not whole:
        wrong = np.zeros(len(known))
        wrong[known] = noise.wrong
        noise = replace(noise, wrong=wrong)
    return noise, ""


def ways_of(
    leading: str | None,
    log_probabilities: dict[str, np.ndarray],
    evidence: Evidence,
    noise: Noise | None,
    order: np.ndarray,
) -> dict[str, int]:
    """Estimate the number of wrong labels of the list in all ways; in none without noise."""
    if leading is None or noise is None:
        return {}
    facts = evidence.facts
    model = None if evidence.memorised else facts.probabilities
    return ways_to_count(log_probabilities, facts.labels, order, noise, leading, model)


def _some(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return chosen(torch.from_numpy(values), torch.from_numpy(np.flatnonzero(mask))).numpy()
