"""A random sample of labels for a person to decide on, and how many labels are wrong by what the person found.

The examples are divided into strata by the score, and from each as many are drawn. Where half of the labels are wrong a
stratum is small, where hardly any is it is large: boundaries at equal parts of a half √(p(1 − p)) + a half uniform
(Dalenius and Hodges 1959, for p the model's own estimate, which the other half keeps from doing harm).

Of x_h wrong labels among n_h decided of N_h the estimate is Σ N_h x_h/n_h. Its 95% interval is that of the profile
likelihood: all totals Σ N_h p_h whose most likely p_1 … p_H have

    2 Σ [ℓ_h(x_h/n_h) − ℓ_h(p_h)]/(1 − n_h/N_h) ≤ 3.84,  ℓ_h(p) = x_h log p + (n_h − x_h) log(1 − p)

It holds its level with twenty decisions per stratum, also where no wrong label was drawn from most strata, which a
normal interval does not (bench/results/labels_decisions.md). 1 − n_h/N_h makes it exact once all are decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence_cli.data.split import Split

# Strata, and decisions per stratum at least: with fewer there are fewer strata.
STRATA, FEWEST = 5, 10
# The smallest sample; the quantile of χ² with one degree of freedom at 95%.
SMALLEST, QUANTILE = 20, 3.841458820694124
# Decisions on labels of one class, from which its own number follows.
PER_CLASS = 20
# The ends of an interval are found by halving: how often, and the largest multiplier.
STEPS, LARGEST = 80, 2.0**60


@dataclass(frozen=True)
class Sample:
    """Strata of a data set, and what was drawn from them.

    Attributes:
        split: ``train`` or ``test``.
        length: examples of the data set, those not in use as well.
        classes: names by number.
        seed: of the draw.
        counts: int64 [H, C], examples by stratum, the most suspicious first, and label at the time.
        scores: float64 [H, 2], the smallest and largest score of a stratum; NaN where none is judged.
        drawn: positions int64 [n], in the order in which they are shown: any first part is a sample too.
        strata: int64 [n], of those.
        labels: int64 [n], of those at the time.
        before: positions int64 [k], which had been decided before and are in no stratum.
    """

    split: str
    length: int
    classes: tuple[str, ...]
    seed: int
    counts: np.ndarray
    scores: np.ndarray
    drawn: np.ndarray
    strata: np.ndarray
    labels: np.ndarray
    before: np.ndarray


@dataclass(frozen=True)
class WrongCount:
    """How many of some labels are wrong, by a sample.

    Attributes:
        count: the estimate.
        low: of the 95% interval.
        high: of the 95% interval.
        of: how many labels.
        decided: how many decisions it follows from.
    """

    count: float
    low: float
    high: float
    of: int
    decided: int


@dataclass(frozen=True)
class Sampled:
    """What follows from the decisions on a sample.

    Attributes:
        all: how many labels of all strata are wrong.
        by_class: the same of the labels of one class, by number, where the numbers allow it.
        drawn: size of the sample.
        found: wrong labels of the strata that were found, in the sample or beside it.
        before: those found before the sample was drawn.
    """

    all: WrongCount
    by_class: dict[int, WrongCount]
    drawn: int
    found: int
    before: int

    @property
    def open(self) -> int:
        """Give the images of the sample that are not decided."""
        return self.drawn - self.all.decided

    @property
    def left(self) -> int:
        """Estimate how many wrong labels are not found yet."""
        return max(0, round(self.all.count) - self.found)


def strata_of(score: np.ndarray, expected: np.ndarray | None, count: int) -> np.ndarray:
    """Divide examples into strata of falling score.

    Args:
        score: float64 [n], higher is more suspicious; NaN, which counts as the lowest, where a label is not judged.
        expected: float64 [n], the model's own probability that the label is wrong; None where it has none.
        count: how many strata; fewer where there are fewer examples.

    Returns:
        int64 [n], from 0, the most suspicious.
    """
    n = len(score)
    order = np.argsort(-np.where(np.isnan(score), -np.inf, score), kind="stable")
    width = np.full(n, 1 / n)
    if expected is not None:
        spread = np.sqrt(np.clip(expected * (1 - expected), 0, None))[order]
        if spread.sum() > 0:
            width = width / 2 + spread / (2 * spread.sum())
    ends = np.cumsum(width)
    strata = np.empty(n, dtype=np.int64)
    strata[order] = np.minimum((ends - width / 2) * count, count - 1).astype(np.int64)
    return np.unique(strata, return_inverse=True)[1].astype(np.int64)


def shares(sizes: np.ndarray, count: int) -> np.ndarray:
    """Divide a sample of ``count`` evenly over strata; what one has not goes to the others. int64 [H]."""
    drawn = np.zeros(len(sizes), dtype=np.int64)
    left = min(count, int(sizes.sum()))
    while left:
        free = np.flatnonzero(drawn < sizes)
        each = max(1, left // len(free))
        for stratum in free[:left]:
            more = min(each, int(sizes[stratum] - drawn[stratum]), left)
            drawn[stratum] += more
            left -= more
    return drawn


@dataclass(frozen=True)
class Listed:
    """Labels that can be drawn.

    Attributes:
        indices: int64 [n], positions in the data set.
        labels: int64 [n], as given.
        score: float64 [n], by which strata are made; NaN where a label is not judged.
        expected: float64 [n], the model's own probability that a label is wrong; None where it has none.
    """

    indices: np.ndarray
    labels: np.ndarray
    score: np.ndarray
    expected: np.ndarray | None


def draw_sample(
    listed: Listed, count: int, split: Split, classes: tuple[str, ...], *, before: np.ndarray, seed: int
) -> Sample:
    """Draw a stratified sample.

    Args:
        listed: what can be drawn.
        count: how many; all of them where there are fewer.
        split: the data set.
        classes: names by number.
        before: positions that were decided before.
        seed: the same one draws the same sample of the same labels.
    """
    score, labels = listed.score, listed.labels
    strata = strata_of(score, listed.expected, min(STRATA, max(1, count // FEWEST)))
    number = int(strata.max()) + 1
    generator = np.random.default_rng([seed, len(before)])
    counts = np.zeros((number, len(classes)), dtype=np.int64)
    np.add.at(counts, (strata, labels), 1)
    rows = []
    for stratum, size in enumerate(shares(counts.sum(axis=1), count)):
        rows.append(generator.choice(np.flatnonzero(strata == stratum), size, replace=False))
    drawn = generator.permutation(np.concatenate(rows))
    return Sample(
        split.name,
        len(split.labels),
        classes,
        seed,
        counts,
        np.array([_ends(score[strata == stratum]) for stratum in range(number)]),
        listed.indices[drawn],
        strata[drawn],
        labels[drawn],
        np.sort(before),
    )


def _ends(score: np.ndarray) -> tuple[float, float]:
    judged = score[~np.isnan(score)]
    return (float(judged.min()), float(judged.max())) if len(judged) else (np.nan, np.nan)


def estimate(sample: Sample, wrong: np.ndarray) -> Sampled:
    """Estimate how many labels are wrong by the decisions on a sample.

    Args:
        sample: what was drawn.
        wrong: float64 [length], by position: 1 for a label found wrong, 0 for one found right, NaN for one not decided.
    """
    found = wrong[sample.drawn]
    outside = np.ones(sample.length, dtype=bool)
    outside[sample.before] = False
    certain = int((wrong[outside] == 1).sum()), int((wrong[outside] == 0).sum())
    by_class = {}
    for label, sizes in enumerate(sample.counts.T):
        own = sample.labels == label
        seen = np.bincount(sample.strata[own & ~np.isnan(found)], minlength=len(sizes))
        if seen.sum() >= PER_CLASS and (seen[sizes > 0] > 0).all():
            sure = int((found[own] == 1).sum()), int((found[own] == 0).sum())
            by_class[label] = _count(sizes, sample.strata[own], found[own], sure)
    total = _count(sample.counts.sum(axis=1), sample.strata, found, certain)
    return Sampled(total, by_class, len(sample.drawn), certain[0], int((wrong[sample.before] == 1).sum()))


def _count(sizes: np.ndarray, strata: np.ndarray, found: np.ndarray, certain: tuple[int, int]) -> WrongCount:
    """Give estimate and interval; ``certain`` labels are known to be wrong and right, which bounds both."""
    known = ~np.isnan(found)
    decided = np.bincount(strata[known], minlength=len(sizes))
    wrong = np.bincount(strata[known], weights=found[known], minlength=len(sizes))
    count, low, high = total_interval(sizes, wrong, decided)
    least, most = certain[0], int(sizes.sum()) - certain[1]
    count, low, high = (float(np.clip(value, least, most)) for value in (count, low, high))
    return WrongCount(count, low, high, int(sizes.sum()), int(known.sum()))


def total_interval(sizes: np.ndarray, wrong: np.ndarray, decided: np.ndarray) -> tuple[float, float, float]:
    """Estimate Σ N_h p_h, with the 95% interval of its profile likelihood.

    With a multiplier t of the total, the likeliest p_h solve x/p − (n − x)/(1 − p) + t·N = 0, a quadratic equation; the
    ends are at the t whose loss of likelihood is the quantile's.

    Args:
        sizes: int [H], N_h.
        wrong: float [H], x_h.
        decided: int [H], n_h ≤ N_h; a stratum without any counts as all others do, and may have any p in the interval.

    Returns:
        The estimate, and the ends of the interval.
    """
    whole = decided >= sizes
    exact = float(wrong[whole].sum())
    size, n, x = (each[~whole].astype(np.float64) for each in (sizes, decided, wrong))
    if not len(size):
        return exact, exact, exact
    pooled = float(x.sum() / n.sum()) if n.sum() else 0.5
    count = float((size * np.divide(x, n, out=np.full(len(n), pooled), where=n > 0)).sum())
    weight = 1 / (1 - n / size)
    n, x = n * weight, x * weight
    top = _log_likelihood(np.divide(x, n, out=np.zeros(len(n)), where=n > 0), n, x)

    def end(sign: int) -> float:
        below, above = 0.0, 1.0
        while 2 * (top - _log_likelihood(_likeliest(sign * above * size, n, x), n, x)) <= QUANTILE and above < LARGEST:
            above *= 2
        for _ in range(STEPS):
            middle = (below + above) / 2
            lost = 2 * (top - _log_likelihood(_likeliest(sign * middle * size, n, x), n, x))
            below, above = (below, middle) if lost > QUANTILE else (middle, above)
        return float((size * _likeliest(sign * below * size, n, x)).sum())

    return exact + count, exact + end(-1), exact + end(1)


def _likeliest(pull: np.ndarray, n: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Give the p [H] that solve x/p − (n − x)/(1 − p) + pull = 0."""
    slope = n - pull
    root = np.sqrt(slope**2 + 4 * pull * x)
    # Of the two forms of the solution the one without a difference of nearly equal numbers.
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(slope >= 0, 2 * x / (slope + root), (root - slope) / (2 * pull))
    return np.asarray(np.clip(np.nan_to_num(p, nan=0.0), 0, 1))


def _log_likelihood(p: np.ndarray, n: np.ndarray, x: np.ndarray) -> float:
    hits = np.where(x > 0, x * np.log(np.maximum(p, 1e-300)), 0)
    return float((hits + np.where(n > x, (n - x) * np.log(np.maximum(1 - p, 1e-300)), 0)).sum())
