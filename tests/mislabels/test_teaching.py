"""What decisions teach: the regression against scikit-learn's, and what it does to a list."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression

from influence_cli.mislabels.teaching import Taught, fit_logistic, learn, probability_wrong, taught_split
from tests.mislabels.test_sample import split_of


def test_the_regression_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    s = 3 * generator.normal(size=300)
    columns = np.stack([generator.integers(-1, 4, 300), generator.integers(4, 10, 300)], axis=1)
    y = (generator.random(300) < 1 / (1 + np.exp(-s - (columns[:, 0] == 2)))).astype(float)
    weight = generator.random(300) + 0.5
    theta = fit_logistic(s, columns, y, weight, 10)
    design = np.zeros((300, 11))
    design[:, 0] = 100 * s  # the penalty is on the effects
    for column in columns.T:
        rows = np.flatnonzero(column >= 0)
        design[rows, 1 + column[rows]] = 1
    other = LogisticRegression(C=1, max_iter=10_000, tol=1e-10).fit(design, y, sample_weight=weight)
    expected = [other.intercept_[0], 100 * other.coef_[0, 0], *other.coef_[0, 1:]]
    assert_allclose(theta, expected, atol=2e-4)


def listed(n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give scores, pairs and wrong labels: those of the pair (0, 1) are always wrong, the others never."""
    generator = np.random.default_rng(1)
    pairs = np.stack([np.arange(n) % 2, 1 - np.arange(n) % 2], axis=1)
    return generator.uniform(0.3, 0.9, n), pairs, (pairs[:, 0] == 0).astype(float)


def test_a_pair_that_is_often_wrong_rises_as_a_whole() -> None:
    score, pairs, wrong = listed()
    known = np.where(np.arange(400) < 40, wrong, np.nan)
    p = probability_wrong(score, pairs, known, np.full(400, 0.5))
    assert p[40:][wrong[40:] == 1].min() > p[40:][wrong[40:] == 0].max()


def test_without_decisions_it_is_about_the_estimate_and_rises_with_the_score() -> None:
    score, pairs, _ = listed()
    p = probability_wrong(score, pairs, np.full(400, np.nan), score)
    assert_array_equal(np.argsort(p, kind="stable"), np.argsort(score, kind="stable"))
    assert_allclose(p, score, atol=0.08)
    score[3] = np.nan
    assert np.isnan(probability_wrong(score, pairs, np.full(400, np.nan), None)[3])


def test_decisions_that_are_all_alike_do_not_break_it() -> None:
    score, pairs, _ = listed()
    for value in (0.0, 1.0):
        for known in (np.full(400, value), np.where(np.arange(400) < 10, value, np.nan)):
            p = probability_wrong(score, pairs, known, None)
            assert np.isfinite(p).all()
            assert abs(np.median(p) - value) < 0.3


def test_dropped_labels_count_though_they_have_no_score() -> None:
    score, pairs, wrong = listed()
    known = np.where(np.arange(400) < 40, wrong, np.nan)
    few, many = (probability_wrong(score, pairs, known, None, unscored=k)[40:].mean() for k in (0, 40))
    assert many > few


def taught_of(n: int, relabelled: int, dropped: int, kept: int) -> Taught:
    decided, left = np.zeros((2, n), dtype=bool)
    labels, wrong = np.zeros(n, dtype=np.int64), np.full(n, np.nan)
    decided[[relabelled, dropped, kept]] = True
    labels[relabelled], left[dropped] = 2, True
    wrong[[relabelled, dropped, kept]] = (1, 1, 0)
    return Taught(decided, np.zeros(n, dtype=np.int64), labels, wrong, left)


def test_the_evidence_takes_labels_as_decided_without_those_that_were_dropped() -> None:
    split = taught_split(split_of(6), taught_of(6, 1, 3, 4))
    assert_array_equal(split.labels, [0, 2, 0, 0, 0, 0])
    assert_array_equal(split.indices, [0, 1, 2, 4, 5])
    assert split.overridden is not None
    assert_array_equal(split.overridden, [0, 1, 0, 0, 0, 0])


def test_decided_labels_leave_the_list_and_those_not_judged_come_last() -> None:
    logs = np.log(np.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2]]))
    logs[1] = np.nan
    indices = np.array([0, 1, 2, 4, 5])
    suggested = np.array([0, -1, 1, 1, 0])
    lesson = learn(logs, indices, suggested, None, taught_of(6, 5, 3, 4))
    assert sorted(lesson.order.tolist()) == [0, 1, 2]
    assert lesson.order[-1] == 1  # it is not judged
    assert np.isnan(lesson.wrong[[1, 3, 4]]).all()
    assert not np.isnan(lesson.wrong[[0, 2]]).any()
