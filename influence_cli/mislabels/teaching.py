"""What a person has decided about labels teaches the rest: new labels for the evidence, and a probability of wrong.

Decided labels count as they were decided in readout and neighbours; dropped and unsure ones count for nothing there.
Of every other label the probability that it is wrong is a penalised logistic regression on what the person found,

    logit p(wrong) = a + b·s + u(given) + v(given, suggested),  s = logit of the score,  u, v ~ N(0, ``PAIR``²)

so a pair of classes that is often wrong rises as a whole. The model's own estimate counts as ``PRIOR`` more decisions,
spread evenly over the scores: it is all there is where nothing was decided yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.data.split import Split

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# How many decisions the model's own estimate is worth, and at how many scores it is asked.
PRIOR, ASKED = 10.0, 40
# Standard deviation of the effect of a class, and of a pair of classes, in logits.
PAIR = 1.0
# Scores are this far from 0 and 1 at least.
EDGE = 1e-6
# The scores are multiplied by this in the regression, so that the penalty is on the effects of classes alone.
WIDE = 100.0


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


@dataclass(frozen=True)
class Lesson:
    """What decisions say about the labels that nobody has decided on.

    Attributes:
        wrong: float64 [n], the probability that a label is wrong; NaN for one that is decided or not judged.
        order: int64 [m], the rows that are not decided, the most suspicious first, those that are not judged last.
    """

    wrong: np.ndarray
    order: np.ndarray


def learn(
    log_probabilities: np.ndarray, indices: np.ndarray, suggested: np.ndarray, expected: np.ndarray | None, taught: Taught
) -> Lesson:
    """Rank the labels that are not decided by what was found of the others.

    Args:
        log_probabilities: [n, C] that have not seen the labels; NaN where a label is not judged.
        indices: int64 [n], positions in the data set.
        suggested: int64 [n], the likeliest class, −1 where a label is not judged.
        expected: float64 [n], the model's own probability that a label is wrong; None where it has none.
        taught: the decisions, by position in the data set.
    """
    given = taught.given[indices]
    score = 1 - np.exp(log_probabilities[np.arange(len(indices)), given].astype(np.float64))
    unseen = np.ones(len(taught.wrong), dtype=bool)
    unseen[indices] = np.isnan(score)
    unscored = int((taught.wrong[unseen] == 1).sum())
    pairs = np.stack([given, suggested], axis=1)
    wrong = probability_wrong(score, pairs, taught.wrong[indices], expected, unscored)
    wrong[taught.decided[indices]] = np.nan
    rows = np.flatnonzero(~taught.decided[indices])
    by = np.where(np.isnan(wrong[rows]), np.inf, -wrong[rows])
    return Lesson(wrong, rows[np.lexsort((indices[rows], by))])


def probability_wrong(
    score: np.ndarray, pairs: np.ndarray, wrong: np.ndarray, expected: np.ndarray | None, unscored: int = 0
) -> np.ndarray:
    """Fit the probability that a label is wrong to what a person found.

    Args:
        score: float64 [n] in [0, 1], higher is more suspicious, from evidence that has not seen the label; NaN where a
            label is not judged.
        pairs: int64 [n, 2], given and suggested class.
        wrong: float64 [n], 1 or 0 as the person found, NaN where nothing was.
        expected: float64 [n], the model's own probability that a label is wrong; None where it has none.
        unscored: more labels found wrong that have no score; they count as those that have one.

    Returns:
        float64 [n], NaN where a label is not judged.
    """
    from scipy.sparse import hstack
    from sklearn.linear_model import LogisticRegression

    judged, result = ~np.isnan(score), np.full(len(score), np.nan)
    if not judged.any():
        return result
    inside = np.clip(score, EDGE, 1 - EDGE)
    s = np.log(inside) - np.log1p(-inside)
    known = np.flatnonzero(judged & ~np.isnan(wrong))
    effects = _effects(pairs, judged, known)
    asked, own = _asked(s, judged & np.isnan(wrong), expected)
    x = hstack([WIDE * s[np.concatenate([known, asked, asked])][:, None], _blank_below(effects[known], 2 * len(asked))])
    hits = wrong[known] == 1
    more = 1 + unscored / max(1, int(hits.sum()))
    each = PRIOR / max(1, len(asked))
    weight = np.concatenate([np.where(hits, more, 1.0), each * own, each * (1 - own)])
    y = np.concatenate([hits, np.ones(len(asked), dtype=bool), np.zeros(len(asked), dtype=bool)])
    if len(np.unique(y)) < 2:  # everything is decided, and all alike
        result[judged] = float(y[0]) if len(y) else 0.5
        return result
    fit = LogisticRegression(C=1.0, max_iter=1000, tol=1e-6).fit(x.tocsr(), y, sample_weight=weight)
    slope, rest = max(float(fit.coef_[0, 0]), 0.0) * WIDE, fit.coef_[0, 1:]
    result[judged] = 1 / (1 + np.exp(-(float(fit.intercept_[0]) + slope * s[judged] + effects[judged] @ rest)))
    return result


def _effects(pairs: np.ndarray, judged: np.ndarray, known: np.ndarray) -> csr_matrix:
    """Give a column per class and per pair of classes that was met, ``PAIR`` where an example has it, sparse [n, k]."""
    from scipy.sparse import coo_matrix

    span = int(pairs.max()) + 2
    names = [pairs[:, 0].astype(np.int64), (pairs[:, 0] + 1) * span + pairs[:, 1] + span]
    met = np.unique(np.concatenate([name[known] for name in names]))
    rows, columns = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for name in names if len(met) else ():
        at = np.searchsorted(met, name).clip(max=len(met) - 1)
        hits = np.flatnonzero((met[at] == name) & (pairs[:, 0] != pairs[:, 1]) & judged)
        rows.append(hits)
        columns.append(at[hits])
    places = np.concatenate(rows), np.concatenate(columns)
    return coo_matrix((np.full(len(places[0]), PAIR), places), (len(judged), len(met))).tocsr()


def _asked(s: np.ndarray, open_: np.ndarray, expected: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Give rows that are spread evenly over the scores, int64 [m], and the model's own estimate of each."""
    rows = np.flatnonzero(open_)
    if expected is None or not len(rows):
        return np.empty(0, dtype=np.int64), np.empty(0)
    places = rows[np.argsort(s[rows], kind="stable")]
    grid = np.linspace(s[places[0]], s[places[-1]], ASKED)
    asked = places[np.searchsorted(s[places], grid).clip(max=len(places) - 1)]
    return asked, expected[asked].clip(1e-3, 1 - 1e-3)


def _blank_below(matrix: csr_matrix, blank: int) -> csr_matrix:
    from scipy.sparse import csr_matrix, vstack

    return vstack([matrix, csr_matrix((blank, matrix.shape[1]))]).tocsr()
