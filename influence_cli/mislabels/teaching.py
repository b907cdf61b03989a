"""What a person has decided about labels teaches the rest: new labels for the evidence, and a probability of wrong.

Decided labels count as they were decided in readout and neighbours; dropped and unsure ones count for nothing there.
Of every other label the probability that it is wrong is a penalised logistic regression on what the person found,

    logit p(wrong) = a + b·s + u(given) + v(given, suggested),  s = logit of the score,  u, v ~ N(0, ``PAIR``²)

so a pair of classes that is often wrong rises as a whole. The model's own estimate counts as ``PRIOR`` more decisions,
spread evenly over the scores: it is all there is where nothing was decided yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from influence_cli.data.split import Split

# How many decisions the model's own estimate is worth, and at how many scores it is asked.
PRIOR, ASKED = 10.0, 40
# Standard deviation of the effect of a class, and of a pair of classes, in logits.
PAIR = 1.0
# Scores are this far from 0 and 1 at least.
EDGE = 1e-6


@dataclass(frozen=True)
class Taught:
    """What a person decided about the labels of a data set, by position.

    Attributes:
        decided: bool [length].
        given: int64 [length], the labels that were looked at; of all others as they are.
        labels: int64 [length], as decided.
        wrong: float64 [length], 1 for a label that was relabelled or dropped, 0 for one that was kept; NaN where that
            is not known: undecided or unsure.
        left_out: bool [length], dropped or unsure.
    """

    decided: np.ndarray
    given: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray
    left_out: np.ndarray


def taught_split(split: Split, taught: Taught) -> Split:
    """Give the examples with the labels that were decided, without those that count for nothing."""
    changed = taught.labels != split.labels
    before = np.zeros(len(changed), dtype=bool) if split.overridden is None else split.overridden
    left = split.indices[~taught.left_out[split.indices]]
    return replace(split, labels=taught.labels, indices=left, overridden=before | changed)


def probability_wrong(
    score: np.ndarray, pairs: np.ndarray, wrong: np.ndarray, expected: np.ndarray, dropped: int = 0
) -> np.ndarray:
    """Fit the probability that a label is wrong to what a person found.

    Args:
        score: float64 [n] in [0, 1], higher is more suspicious, from evidence that has not seen the label; NaN where a
            label is not judged.
        pairs: int64 [n, 2], given and suggested class.
        wrong: float64 [n], 1 or 0 as the person found, NaN where nothing was.
        expected: float64 [n], the model's own probability that a label is wrong.
        dropped: more labels found wrong that have no score; they count as those that have one.

    Returns:
        float64 [n], NaN where a label is not judged.
    """
    from scipy.sparse import coo_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    judged = ~np.isnan(score)
    s = np.log(np.clip(score, EDGE, 1 - EDGE)) - np.log1p(-np.clip(score, EDGE, 1 - EDGE))
    known = np.flatnonzero(judged & ~np.isnan(wrong))
    # One column per class and per pair that was met.
    span = int(pairs.max()) + 2
    names = [pairs[:, 0].astype(np.int64), (pairs[:, 0] + 1) * span + pairs[:, 1] + span]
    met = np.unique(np.concatenate([name[known] for name in names]))
    rows, columns = [], []
    for name in names:
        at = np.searchsorted(met, name).clip(max=len(met) - 1)
        hits = np.flatnonzero((met[at] == name) & (pairs[:, 0] != pairs[:, 1]) & judged)
        rows.append(hits)
        columns.append(at[hits])
    effects = coo_matrix(
        (np.full(sum(map(len, rows)), PAIR), (np.concatenate(rows), np.concatenate(columns))), (len(score), len(met))
    ).tocsr()
    places = np.flatnonzero(judged)[np.argsort(s[judged], kind="stable")]
    grid = np.linspace(s[places[0]], s[places[-1]], ASKED)
    near = np.searchsorted(s[places], grid).clip(max=len(places) - 1)
    asked = places[near]
    # A wide slope costs nothing: the penalty is on the effects of classes.
    wide = 100.0
    x = hstack([wide * s[np.concatenate([known, asked, asked])][:, None], _blank_below(effects, known, 2 * ASKED)])
    more = 1 + dropped / max(1.0, float((wrong[known] == 1).sum()))
    own = expected[asked].clip(1e-3, 1 - 1e-3)
    weight = np.concatenate([np.where(wrong[known] == 1, more, 1.0), PRIOR / ASKED * own, PRIOR / ASKED * (1 - own)])
    y = np.concatenate([wrong[known], np.ones(ASKED), np.zeros(ASKED)])
    fit = LogisticRegression(C=1.0, max_iter=1000, tol=1e-6).fit(x.tocsr(), y, sample_weight=weight)
    result = np.full(len(score), np.nan)
    coefficients, intercept = fit.coef_[0], float(fit.intercept_[0])
    logits = intercept + max(coefficients[0], 0.0) * wide * s[judged] + effects[judged] @ coefficients[1:]
    result[judged] = 1 / (1 + np.exp(-logits))
    return result


def _blank_below(matrix, rows: np.ndarray, blank: int):  # type: ignore[no-untyped-def]
    from scipy.sparse import csr_matrix, vstack

    return vstack([matrix[rows], csr_matrix((blank, matrix.shape[1]))])
