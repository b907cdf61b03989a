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
# Penalty of what has none by the model.
LOOSE = 1e-4


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
    judged, result = ~np.isnan(score), np.full(len(score), np.nan)
    inside = np.clip(score, EDGE, 1 - EDGE)
    s = np.log(inside) - np.log1p(-inside)
    known = np.flatnonzero(judged & ~np.isnan(wrong))
    columns, count = _effects(pairs, known)
    asked, own = _asked(s, judged & np.isnan(wrong), expected)
    hits = (wrong[known] == 1).astype(np.float64)
    more = 1 + unscored / max(1.0, hits.sum())
    each = PRIOR / max(1, len(asked))
    rows = np.concatenate([known, asked, asked])
    at = columns[rows]
    at[len(known) :] = -1  # the model's own estimate is of the scores, not of the classes
    y = np.concatenate([hits, np.ones(len(asked)), np.zeros(len(asked))])
    weight = np.concatenate([np.where(hits == 1, more, 1.0), each * own, each * (1 - own)])
    if not len(rows):
        result[judged] = score[judged]
        return result
    theta = fit_logistic(s[rows], at, y, weight, count)
    effects = np.append(theta[2:], 0.0)
    logits = theta[0] + max(theta[1], 0.0) * s[judged] + effects[columns[judged]].sum(axis=1)
    result[judged] = 1 / (1 + np.exp(-logits))
    return result


def fit_logistic(s: np.ndarray, columns: np.ndarray, y: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """Minimise Σ w·[log(1 + eᶠ) − y·f] + Σ effects²/(2·PAIR²), f = a + b·s + effects, by Newton's method.

    Args:
        s: float64 [m].
        columns: int64 [m, 2], the two effects of each row, −1 for none.
        y: float64 [m], 0 or 1.
        weight: float64 [m].
        count: how many effects there are.

    Returns:
        a, b and the effects, float64 [2 + count]. a and b have a penalty of ``LOOSE``, which only keeps them finite.
    """
    names = np.concatenate([np.tile([0, 1], (len(s), 1)), np.where(columns < 0, 0, columns + 2)], axis=1)
    values = np.concatenate([np.stack([np.ones(len(s)), s], axis=1), columns >= 0], axis=1)
    size = count + 2
    penalty = np.full(size, 1 / PAIR**2)
    penalty[:2] = LOOSE
    crossed = (names[:, :, None] * size + names[:, None, :]).reshape(-1)
    theta = np.zeros(size)

    def objective(theta: np.ndarray) -> float:
        f = (values * theta[names]).sum(axis=1)
        return float(weight @ (np.logaddexp(0, f) - y * f) + penalty @ theta**2 / 2)

    now = objective(theta)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(values * theta[names]).sum(axis=1)))
        slope = np.bincount(names.ravel(), ((weight * (p - y))[:, None] * values).ravel(), size) + penalty * theta
        curve = (weight * p * (1 - p))[:, None, None] * values[:, :, None] * values[:, None, :]
        matrix = np.bincount(crossed, curve.ravel(), size * size).reshape(size, size) + np.diag(penalty)
        step, scale = np.linalg.solve(matrix, slope), 1.0
        while objective(theta - scale * step) > now and scale > 1e-6:  # far from the minimum it may overshoot
            scale /= 2
        theta = theta - scale * step
        before, now = now, objective(theta)
        if before - now <= 1e-12 * (1 + abs(now)):
            break
    return theta


def _effects(pairs: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the classes and pairs of classes that were met: int64 [n, 2], −1 for another, and how many there are."""
    span = int(pairs.max()) + 2
    names = np.stack([pairs[:, 0], (pairs[:, 0] + 1) * span + pairs[:, 1] + span], axis=1).astype(np.int64)
    names[pairs[:, 0] == pairs[:, 1]] = -1
    met = np.unique(names[known])
    met = met[met >= 0]
    if not len(met):
        return np.full(names.shape, -1), 0
    at = np.searchsorted(met, names).clip(max=len(met) - 1)
    return np.where(met[at] == names, at, -1), len(met)


def _asked(s: np.ndarray, open_: np.ndarray, expected: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Give rows that are spread evenly over the scores, int64 [m], and the model's own estimate of each."""
    rows = np.flatnonzero(open_)
    if expected is None or not len(rows):
        return np.empty(0, dtype=np.int64), np.empty(0)
    places = rows[np.argsort(s[rows], kind="stable")]
    grid = np.linspace(s[places[0]], s[places[-1]], ASKED)
    asked = places[np.searchsorted(s[places], grid).clip(max=len(places) - 1)]
    return asked, expected[asked].clip(1e-3, 1 - 1e-3)
