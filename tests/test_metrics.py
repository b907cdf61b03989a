"""metrics: every number against its definition, counted out example by example, with ties."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from math import ceil, isnan

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from influence_cli.errors import InfluenceError
from influence_cli.metrics import (
    auroc,
    average_precision,
    bootstrap_both_ways,
    bootstrap_change_fits,
    bootstrap_lds,
    change_fits,
    intercept,
    lds,
    pearson,
    percentile_rank,
    share_found,
    slope,
    spearman,
)

# Few distinct values make ties; any finite number may be among them.
NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
SHARES = [0.0, 0.01, 0.2, 0.25, 0.5, 0.75, 0.99, 1.0]


@st.composite
def rankings(draw: st.DrawFn, largest: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Draw scores and truths, of which at least one is true and one false."""
    truth = draw(
        st.lists(st.booleans(), min_size=2, max_size=largest).filter(lambda given: 0 < sum(given) < len(given))
    )
    scores = draw(st.lists(NUMBERS, min_size=len(truth), max_size=len(truth)))
    return np.array(scores), np.array(truth)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw two rows of numbers that are not too close to constant for float64."""
    size = draw(st.integers(2, 20))
    numbers = st.integers(-1000, 1000).map(lambda value: value / 8)
    return tuple(np.array(draw(st.lists(numbers, min_size=size, max_size=size))) for _ in range(2))


def counted_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """AP = Σ (R_k − R_{k−1}) P_k, a step a distinct score: everything at least as high is checked."""
    total, before = 0.0, 0.0
    for cut in sorted(set(scores.tolist()), reverse=True):
        checked = [bool(t) for s, t in zip(scores, truth, strict=True) if s >= cut]
        recall = sum(checked) / int(truth.sum())
        total += (recall - before) * sum(checked) / len(checked)
        before = recall
    return total


def counted_pairs(scores: np.ndarray, truth: np.ndarray) -> float:
    """Count how often a true one scores above a false one, equal ones half."""
    won = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, t in zip(scores, truth, strict=True)
        for b, f in zip(scores, truth, strict=True)
        if t and not f
    ]
    return sum(won) / len(won)


def mean_rank(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


@given(rankings())
def test_average_precision_is_the_sum_over_distinct_scores(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    assert average_precision(*ranking) == pytest.approx(counted_precision(*ranking), rel=1e-12)


@given(rankings())
def test_auroc_is_the_share_of_pairs_in_order(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    assert auroc(*ranking) == pytest.approx(counted_pairs(*ranking), rel=1e-12, abs=1e-12)


@given(rankings(largest=6))
def test_share_found_is_the_mean_over_all_orders_of_equal_scores(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = ranking
    # Every way to sort by falling score.
    orders = [order for order in permutations(range(len(scores))) if all(np.diff(scores[list(order)]) <= 0)]
    for share, found in zip(SHARES, share_found(scores, truth, SHARES), strict=True):
        checked = ceil(share * len(scores))
        hits = [truth[list(order[:checked])].sum() for order in orders]
        assert found == pytest.approx(np.mean(hits) / truth.sum(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "truth", "precision", "area"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 1, 1),
        ([4, 3, 2, 1], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2, 0),
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2, 0.75),
        ([1, 1, 1, 1], [1, 0, 0, 0], 0.25, 0.5),
        ([2, 2, 1], [1, 0, 1], 0.5 * 1 / 2 + 0.5 * 2 / 3, 0.25),
        ([np.inf, np.inf, -np.inf, 0], [1, 0, 0, 1], 0.5 * 1 / 2 + 0.5 * 2 / 3, (0.5 + 1 + 0 + 1) / 4),
    ],
)
def test_small_rankings(scores: list[float], truth: list[int], precision: float, area: float) -> None:
    values, right = np.array(scores, dtype=float), np.array(truth, dtype=bool)
    assert average_precision(values, right) == pytest.approx(precision)
    assert auroc(values, right) == pytest.approx(area)


@given(rankings())
def test_only_the_order_of_the_scores_counts(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = ranking
    ranks = mean_rank(scores) * 3 - 7
    assert average_precision(ranks, truth) == average_precision(scores, truth)
    assert auroc(ranks, truth) == auroc(scores, truth)
    assert share_found(ranks, truth, SHARES) == share_found(scores, truth, SHARES)


@pytest.mark.parametrize("checked", [0.07, 0.14, 0.28, 0.55])
def test_a_share_of_the_examples_is_rounded_up_but_not_by_rounding_errors(checked: float) -> None:
    """Of 100, 7 % are 7 examples, though 0.07 · 100 is a hair above 7 in floating point; 29.3 % are 30."""
    scores, truth = -np.arange(100.0), np.arange(100) < 50
    assert share_found(scores, truth, [checked])[0] == pytest.approx(min(round(100 * checked), 50) / 50)
    assert share_found(scores, truth, [0.293])[0] == pytest.approx(30 / 50)


MEASURES = [average_precision, auroc, lambda scores, truth: share_found(scores, truth, [0.5])]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ([1.0, 2.0], [True], "2 scores do not match 1 truth values"),
        ([1.0, np.nan], [True, False], "a score is NaN"),
        ([1.0, 2.0], [True, True], "2 of 2 are true: measuring a ranking needs both true and false ones"),
        ([1.0, 2.0], [False, False], "0 of 2 are true: measuring a ranking needs both true and false ones"),
        ([], [], "0 of 0 are true"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    measure: Callable[..., object], scores: list[float], truth: list[bool], message: str
) -> None:
    with pytest.raises(InfluenceError, match=message):
        measure(np.array(scores), np.array(truth, dtype=bool))


@given(pairs())
def test_pearson_and_spearman_are_the_correlations_of_values_and_ranks(both: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = both
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert spearman(x, y) == pytest.approx(np.corrcoef(mean_rank(x), mean_rank(y))[0, 1], abs=1e-9)


@given(pairs())
def test_slope_is_that_of_the_least_squares_line(both: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = both
    assume(len(set(x)) > 1)
    wanted = np.linalg.lstsq(np.stack([x, np.ones(len(x))], axis=1), y, rcond=None)[0][0]
    assert slope(x, y) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@given(st.floats(-1e9, 1e9), st.integers(2, 12))
def test_a_constant_has_no_correlation_and_no_slope(value: float, size: int) -> None:
    """Also where its mean is not the number itself: the mean of three 0.1 is a hair above 0.1."""
    constant, other = np.full(size, value), np.arange(size) ** 2 - 1.0
    assert isnan(pearson(constant, other))
    assert isnan(pearson(other, constant))
    assert isnan(spearman(constant, other))
    assert isnan(slope(constant, other))


@pytest.mark.parametrize("scale", [1e-60, 1e-9, 1e9, 1e60])
def test_a_correlation_does_not_depend_on_the_scale(scale: float) -> None:
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 1.0, 5.0, 6.0])
    assert pearson(x * scale, y) == pytest.approx(pearson(x, y))
    assert spearman(x * scale, y) == pytest.approx(spearman(x, y))
    assert slope(x * scale, y * scale) == pytest.approx(slope(x, y))


@given(st.lists(NUMBERS, min_size=2, max_size=30))
def test_a_percentile_counts_those_below_and_half_of_the_equal_ones(values: list[float]) -> None:
    found = percentile_rank(np.array(values))
    for number, value in enumerate(values):
        others = [other for position, other in enumerate(values) if position != number]
        below = sum(other < value for other in others) + sum(other == value for other in others) / 2
        assert found[number] == pytest.approx(below / len(others), abs=1e-12)
    assert ((found >= 0) & (found <= 1)).all()


def test_a_percentile_of_one_value_is_in_the_middle_and_of_nan_is_refused() -> None:
    assert percentile_rank(np.array([3.0])).tolist() == [0.5]
    with pytest.raises(InfluenceError, match="NaN"):
        percentile_rank(np.array([3.0, np.nan]))


def test_the_intercept_is_where_the_line_of_least_squares_meets_zero() -> None:
    x, y = np.array([1.0, 2.0, 4.0, 7.0]), np.array([2.0, 1.0, 5.0, 4.0])
    b, a = np.polyfit(x, y, 1)
    assert np.allclose((intercept(x, y), slope(x, y)), (a, b))
    assert isnan(intercept(np.ones(3), np.arange(3.0)))


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    """Make predictions and losses of 6 test examples over 11 subsets, with ties, one of them constant."""
    generator = np.random.default_rng(3)
    predicted = generator.integers(0, 6, (6, 11)).astype(float)
    actual = predicted + generator.normal(size=(6, 11))
    predicted[4] = 2.0
    return predicted, actual


def test_lds_is_spearman_a_test_example_and_zero_where_one_side_is_constant(
    predictions: tuple[np.ndarray, np.ndarray],
) -> None:
    predicted, actual = predictions
    expected = [spearman(p, a) for p, a in zip(predicted, actual, strict=True)]
    assert isnan(expected[4])
    expected[4] = 0.0
    assert np.allclose(lds(predicted, actual), expected)
    with pytest.raises(InfluenceError, match="NaN"):
        lds(predicted, actual * np.nan)


def test_the_bootstrap_of_lds_equals_a_plain_loop(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    """Rows and columns are drawn by index here, and ranked anew in each draw, the same for both methods."""
    predicted, actual = predictions
    other = np.random.default_rng(4).normal(size=actual.shape)
    found = bootstrap_lds([predicted, other], actual, draws=40, seed=5)
    generator = np.random.default_rng(5)
    for draw in found:
        rows, columns = generator.integers(0, 6, 6), generator.integers(0, 11, 11)
        for value, method in zip(draw, (predicted, other), strict=True):
            scores = [spearman(method[t, columns], actual[t, columns]) for t in rows]
            assert value == pytest.approx(np.mean(np.nan_to_num(scores)), abs=1e-12)


def test_changes_are_fitted_row_by_row_through_the_origin() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.normal(size=(4, 9))
    actual = 0.5 * predicted + 0.1 * generator.normal(size=(4, 9))
    found = change_fits(predicted, actual)
    assert found[0] == pytest.approx([np.corrcoef(x, y)[0, 1] for x, y in zip(predicted, actual, strict=True)])
    lines = [np.linalg.lstsq(x[:, None], y, rcond=None)[0][0] for x, y in zip(predicted, actual, strict=True)]
    assert found[1] == pytest.approx(lines)
    # Predictions that are right but for a constant have a correlation of 1, and no slope of 1.
    assert change_fits(predicted[:1] + 10, actual[:1])[1][0] != pytest.approx(found[1][0], rel=0.1)
    still = np.full((1, 9), 0.1)
    assert change_fits(still, actual[:1])[0].tolist() == [0.0]
    assert change_fits(0 * still, actual[:1]).tolist() == [[0.0], [0.0]]


def test_resampled_fits_are_those_of_copied_columns_and_pair_with_the_ranks() -> None:
    generator = np.random.default_rng(1)
    first, second, actual = generator.normal(size=(3, 5, 7))
    found = bootstrap_change_fits([first, second], actual, draws=3, seed=2)
    ranks = bootstrap_lds([first, second], actual, draws=3, seed=2)
    draws = np.random.default_rng(2)
    for draw in range(3):
        rows, columns = draws.integers(0, 5, 5), draws.integers(0, 7, 7)
        for number, values in enumerate((first, second)):
            again = [part[rows][:, columns] for part in (values, actual)]
            assert found[draw, :, number] == pytest.approx(change_fits(*again).mean(axis=1))
            assert ranks[draw, number] == pytest.approx(lds(*again).mean())


def test_repeats_and_tests_are_both_resampled() -> None:
    values = np.random.default_rng(3).normal(size=(2, 3, 4))
    found, draws = bootstrap_both_ways(values, draws=5, seed=4), np.random.default_rng(4)
    for draw in range(5):
        tests, repeats = draws.integers(0, 4, 4), draws.integers(0, 3, 3)
        assert found[draw] == pytest.approx(values[:, repeats][:, :, tests].mean(axis=(1, 2)))
