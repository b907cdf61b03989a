"""How good a ranking or an estimate is: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from influence_cli.errors import InfluenceError

# Below this share of its size a row of numbers does not vary.
ROUNDING = 1e-12


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Compute AP = Σ (R_k − R_{k−1}) P_k over the distinct scores, highest first; equal scores are one step.

    Args:
        scores: [n], higher is more suspicious.
        truth: bool [n].
    """
    hits, checked = _steps(scores, truth)
    gained = np.diff(hits, prepend=0)
    return float((gained * hits / checked).sum() / hits[-1])


def bootstrap_precision(
    scores: np.ndarray, truth: np.ndarray, samples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Compute the 95% interval of the AP over bootstrap samples of the examples, drawn with replacement.

    The same seed draws the same examples for every signal, so that their intervals move together.
    """
    _steps(scores, truth)
    order, ends = _groups(np.asarray(scores, dtype=np.float64))
    true, generator, precisions = np.asarray(truth, dtype=bool)[order], np.random.default_rng(seed), []
    for _ in range(samples):
        # A sample is represented by how often each example is drawn, so nothing is sorted again.
        drawn = np.bincount(generator.integers(0, len(order), len(order)), minlength=len(order))[order]
        hits, checked = np.cumsum(drawn * true)[ends], np.cumsum(drawn)[ends]
        if hits[-1]:
            gained = np.diff(hits, prepend=0)
            precisions.append(float((gained * hits / np.maximum(checked, 1)).sum() / hits[-1]))
    low, high = np.quantile(precisions, (0.025, 0.975)) if precisions else (0.0, 1.0)
    return float(low), float(high)


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Compute the probability that a true one scores above a false one; equal scores count half (Mann–Whitney)."""
    _steps(scores, truth)
    ranks = _midranks(np.asarray(scores, dtype=np.float64))
    positives = int(truth.sum())
    negatives = len(truth) - positives
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def share_found(scores: np.ndarray, truth: np.ndarray, checked: Sequence[float]) -> list[float]:
    """Compute the share of the true ones among the ⌈x·n⌉ highest scores, in expectation over the order of equal ones.

    Args:
        scores: [n].
        truth: bool [n].
        checked: shares x in [0, 1].
    """
    hits, ends = _steps(scores, truth)
    wanted = [min(len(truth), int(np.ceil(share * len(truth) - 1e-9))) for share in checked]
    # Within a group of equal scores the expected number of hits grows linearly.
    expected = np.interp(wanted, np.concatenate([[0], ends]), np.concatenate([[0], hits]))
    return [float(value) for value in expected / hits[-1]]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the linear correlation; NaN where either is constant."""
    a, b = _centred(x), _centred(y)
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the correlation of the ranks, equal values sharing their mean rank; NaN where either is constant."""
    return pearson(_midranks(np.asarray(x, dtype=np.float64)), _midranks(np.asarray(y, dtype=np.float64)))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Compute b of the least-squares line y = a + b x; NaN where x is constant."""
    a, b = _centred(x), _centred(y)
    return float(a @ b) / float(a @ a) if float(a @ a) > 0 else float("nan")


def intercept(x: np.ndarray, y: np.ndarray) -> float:
    """Compute a of the least-squares line y = a + b x; NaN where x is constant."""
    return float(np.mean(y) - slope(x, y) * np.mean(x))


def lds(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Compute the linear datamodeling score of each test example: Spearman's correlation over the subsets.

    (Park et al. 2023, "TRAK", section 2, equation 3.) The score of a method is the mean over the test examples.

    Args:
        predicted: [tests, subsets], the summed influence of what each subset leaves out.
        actual: [tests, subsets], the loss after training on it.

    Returns:
        [tests], in [−1, 1]; 0 where either is constant, because the correlation is undefined there.
    """
    even = np.ones(np.shape(actual)[1], dtype=np.int64)
    return _correlations(_Sorted(predicted).ranks(even), _Sorted(actual).ranks(even), even)


def bootstrap_lds(predicted: Sequence[np.ndarray], actual: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Resample subsets and test examples with replacement, and compute the mean score of each method.

    The draws are the same for all methods: differences between columns are paired.

    Args:
        predicted: [tests, subsets] of each method.
        actual: [tests, subsets].
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        [draws, methods].
    """
    methods, truth = [_Sorted(values) for values in predicted], _Sorted(actual)
    tests, subsets = np.shape(actual)
    scores = np.empty((draws, len(methods)))
    for draw, (often, weights) in enumerate(_resamples(tests, subsets, draws, seed)):
        right = truth.ranks(weights)
        scores[draw] = [often @ _correlations(method.ranks(weights), right, weights) / tests for method in methods]
    return scores


def change_fits(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Say how well predicted changes of each test example's loss are the actual ones, in proportion and in size.

    Args:
        predicted: [tests, subsets], changes.
        actual: [tests, subsets], changes.

    Returns:
        [2, tests]: Pearson's correlation over the subsets, and the slope Σxy/Σx² of actual on predicted through the
        origin, 1 where the sizes are right. 0 where it is undefined, because every value is the same (or 0).
    """
    return _change_fits(predicted, actual, np.ones(np.shape(actual)[1], dtype=np.int64))


def bootstrap_change_fits(
    predicted: Sequence[np.ndarray], actual: np.ndarray, draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """Resample subsets and test examples, and compute the means of ``change_fits`` of each method.

    The draws are those of ``bootstrap_lds`` with the same seed.

    Args:
        predicted: [tests, subsets] of each method.
        actual: [tests, subsets].
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        [draws, 2, methods].
    """
    tests, subsets = np.shape(actual)
    means = np.empty((draws, 2, len(predicted)))
    for draw, (often, weights) in enumerate(_resamples(tests, subsets, draws, seed)):
        for number, values in enumerate(predicted):
            means[draw, :, number] = _change_fits(values, actual, weights) @ often / tests
    return means


def bootstrap_means(values: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Resample rows with replacement, and compute the mean of each column.

    Args:
        values: [rows, columns].
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        [draws, columns].
    """
    rows, columns = values.shape
    generator, means = np.random.default_rng(seed), np.empty((draws, columns))
    for draw in range(draws):
        # A sample is represented by how often each is drawn, so no row is copied.
        means[draw] = np.bincount(generator.integers(0, rows, rows), minlength=rows) @ values / rows
    return means


def bootstrap_both_ways(values: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Resample repeats and test examples with replacement, and compute the mean of each quantity: [draws, quantities].

    Args:
        values: [quantities, repeats, tests].
        draws: bootstrap samples.
        seed: of the draws.
    """
    _, repeats, tests = values.shape
    pairs = _resamples(tests, repeats, draws, seed)
    return np.array([values @ often @ weights / (tests * repeats) for often, weights in pairs])


def least_by_chance(values: np.ndarray, members: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Permute the values over groups of the same sizes, and give the smallest group sum: [draws].

    Args:
        values: [n].
        members: int64 [n], the group of each.
        draws: permutations.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    return np.array([np.bincount(members, generator.permutation(values)).min() for _ in range(draws)])


def percentile_rank(values: np.ndarray) -> np.ndarray:
    """Rank each value among the others: (number below + half of the other equal ones) / (n − 1), in [0, 1]."""
    values = np.asarray(values, dtype=np.float64)
    if np.isnan(values).any():
        raise InfluenceError("cannot take a percentile of NaN")
    return np.asarray((_midranks(values) - 1) / (len(values) - 1)) if len(values) > 1 else np.full(len(values), 0.5)


def _steps(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count hits and checked examples at the end of each group of equal scores, highest scores first."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if scores.shape != truth.shape:
        raise InfluenceError(f"{len(scores)} scores do not match {len(truth)} truth values")
    if np.isnan(scores).any():
        raise InfluenceError("a score is NaN")
    if not truth.any() or truth.all():
        raise InfluenceError(
            f"{int(truth.sum())} of {len(truth)} are true: measuring a ranking needs both true and false ones"
        )
    order, ends = _groups(scores)
    return np.cumsum(truth[order])[ends], ends + 1


def _groups(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort scores, highest first, and find where each group of equal scores ends."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    return order, np.flatnonzero(np.append(falling[1:] != falling[:-1], True))


def _resamples(tests: int, columns: int, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw test examples and columns with replacement: how often each is drawn, so nothing is copied or sorted."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        often = np.bincount(generator.integers(0, tests, tests), minlength=tests)
        yield often, np.bincount(generator.integers(0, columns, columns), minlength=columns)


def _change_fits(predicted: np.ndarray, actual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Give Pearson's correlation and the slope through the origin of each row, each column weighted: [2, tests]."""
    xx, yy, xy = (product @ weights for product in (np.square(predicted), np.square(actual), predicted * actual))
    slopes = np.divide(xy, xx, out=np.zeros(len(xx)), where=xx > 0)
    a, b = (values - (values @ weights / weights.sum())[:, None] for values in (predicted, actual))
    size = np.sqrt((np.square(a) @ weights) * (np.square(b) @ weights))
    # The mean of equal numbers may be off by a rounding: what is left of them then is no variation.
    varies = size > ROUNDING * np.sqrt(xx * yy)
    return np.array([np.divide((a * b) @ weights, size, out=np.zeros(len(a)), where=varies), slopes])


def _midranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


class _Sorted:
    """Rows [tests, subsets], sorted once, to rank them for many samples of the columns."""

    def __init__(self, values: np.ndarray) -> None:
        values = np.asarray(values, dtype=np.float64)
        if np.isnan(values).any():
            raise InfluenceError("a prediction or a loss for the linear datamodeling score is NaN")
        self._order = values.argsort(axis=1, kind="stable")
        rising = np.take_along_axis(values, self._order, axis=1)
        new = np.ones(values.shape, dtype=bool)
        new[:, 1:] = rising[:, 1:] != rising[:, :-1]
        last = np.ones(values.shape, dtype=bool)
        last[:, :-1] = new[:, 1:]
        tests, subsets = values.shape
        at, place = np.arange(subsets), self._order.argsort(axis=1)
        # The first place of each group of equal values, and the one past its last, in a flat table of running sums.
        first = np.maximum.accumulate(np.where(new, at, 0), axis=1)
        end = np.minimum.accumulate(np.where(last, at + 1, subsets)[:, ::-1], axis=1)[:, ::-1]
        rows = (subsets + 1) * np.arange(tests)[:, None]
        self._first = rows + np.take_along_axis(first, place, axis=1)
        self._end = rows + np.take_along_axis(end, place, axis=1)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Give the mean rank of each column (plus a constant) if column s occurs ``weights[s]`` times."""
        sums = np.zeros((len(self._order), len(weights) + 1))
        np.cumsum(weights[self._order], axis=1, out=sums[:, 1:])
        flat = sums.ravel()
        return np.asarray((flat[self._first] + flat[self._end]) / 2)


def _correlations(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlate rows of ranks [tests, subsets], each column weighted; 0 where one row is constant."""
    # Ranks are multiples of one half, so a constant row is exactly zero after its mean is subtracted.
    a, b = (ranks - (ranks @ weights / weights.sum())[:, None] for ranks in (a, b))
    size = np.sqrt((np.square(a) @ weights) * (np.square(b) @ weights))
    return np.asarray(np.divide((a * b) @ weights, size, out=np.zeros(len(a)), where=size > 0))


def _centred(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    # The mean of three 0.1 is slightly above 0.1, so constants are compared exactly.
    return np.zeros_like(array) if array.size and (array == array[0]).all() else np.asarray(array - array.mean())


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Compute Wilson's 95% interval of a share (JASA 1927): sound at 0 and 1, and for few trials."""
    if trials < 1:
        return 0.0, 1.0
    z, share = 1.959964, successes / trials
    centre = share + z * z / (2 * trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    scale = 1 + z * z / trials
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))
