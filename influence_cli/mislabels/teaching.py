"""What a person has decided about labels teaches the rest: new labels for the evidence, and a probability of wrong.

Decided labels count as they were decided in readout and neighbours; dropped and unsure ones count for nothing there.
Of every other label the probability that it is wrong is a penalised logistic regression on what the person found,

    logit p(wrong) = m(s) + a + b·s + u(given) + v(given, suggested),  s = logit of the score,

where m is the model's own estimate as a rising function of the score, and the others are normal around 0: the list
begins as the model has it, and moves as far as the decisions say. A pair of classes that is often wrong rises as a
whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.data.split import Split

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# The model's own estimate is this far from 0 and 1 at least. Standard deviations of its shift, and of its slope in the
# deviation of the scores, in logits.
CERTAIN, SHIFT, SLOPE = 2e-3, 2.0, 0.5
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
    log_probabilities: np.ndarray,
    indices: np.ndarray,
    suggested: np.ndarray,
    expected: np.ndarray | None,
    taught: Taught,
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
    return Lesson(wrong, rows[np.lexsort((indices[rows], -score[rows], -wrong[rows]))])


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
    from scipy.optimize import minimize

    judged, result = ~np.isnan(score), np.full(len(score), np.nan)
    known = np.flatnonzero(judged & ~np.isnan(wrong))
    s = _logit(score)
    before = _before(s, expected, judged & np.isnan(wrong))
    if not len(known):
        result[judged] = 1 / (1 + np.exp(-before[judged]))
        return result
    slopes = np.stack([np.full(len(s), SHIFT), SLOPE * (s - s[known].mean()) / max(float(s[known].std()), 1.0)], axis=1)
    effects = _effects(pairs, judged, known)
    hits = (wrong[known] == 1).astype(np.float64)
    weight = np.where(hits == 1, 1 + unscored / max(1.0, hits.sum()), 1.0)
    x, own, some = slopes[known], effects[known], before[known]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logits = some + x @ theta[:2] + own @ theta[2:]
        loss = weight @ (np.logaddexp(0, logits) - hits * logits) + theta @ theta / 2
        slope = weight * (1 / (1 + np.exp(-logits)) - hits)
        return float(loss), np.concatenate([x.T @ slope, own.T @ slope]) + theta

    theta = minimize(objective, np.zeros(2 + effects.shape[1]), jac=True, method="L-BFGS-B").x
    logits = before + slopes @ theta[:2] + effects @ theta[2:]
    result[judged] = 1 / (1 + np.exp(-logits[judged]))
    return result


def _logit(p: np.ndarray, edge: float = EDGE) -> np.ndarray:
    inside = np.clip(p, edge, 1 - edge)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _before(s: np.ndarray, expected: np.ndarray | None, open_: np.ndarray) -> np.ndarray:
    """Give the logits before any decision: the model's own estimate as a rising function of the score, float64 [n]."""
    from sklearn.isotonic import IsotonicRegression

    if expected is None or not open_.any():
        return np.clip(s, -_logit(np.array(1 - CERTAIN)), _logit(np.array(1 - CERTAIN)))
    rising = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(s[open_], expected[open_])
    values = np.full(len(s), np.nan)
    judged = ~np.isnan(s)
    values[judged] = _logit(rising.predict(s[judged]), CERTAIN)
    return values


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
