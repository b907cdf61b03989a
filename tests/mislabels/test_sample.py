"""A stratified sample: its strata, its draw, and the interval against a search of the likelihood and by drawing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.mislabels.sample import (
    QUANTILE,
    Listed,
    Sample,
    draw_sample,
    estimate,
    shares,
    strata_of,
    total_interval,
)
from influence_cli.mislabels.sample_file import read_sample, sample_facts

CLASSES = ("ant", "bee", "cat")


def split_of(n: int, name: str = "train") -> Split:
    return Split(name, None, None, np.zeros(n, dtype=np.int64), np.arange(n), None, CLASSES, None, "data")


def population(n: int = 2_000, seed: int = 0) -> tuple[Listed, np.ndarray]:
    """Draw labels of which the suspicious ones are often wrong, and which of them are."""
    generator = np.random.default_rng(seed)
    score = generator.beta(0.4, 2, n)
    wrong = generator.random(n) < score**1.5
    return Listed(np.arange(n), generator.integers(0, 3, n), score, np.clip(score, 0, 1)), wrong


def drawn(listed: Listed, count: int = 100, seed: int = 0, before: tuple[int, ...] = ()) -> Sample:
    return draw_sample(
        listed, count, split_of(len(listed.indices)), CLASSES, before=np.array(before, dtype=np.int64), seed=seed
    )


def test_strata_are_of_falling_score_and_small_where_half_of_the_labels_may_be_wrong() -> None:
    score = np.linspace(0, 1, 1_000)
    expected = np.where(score > 0.9, 0.5, 0.0)
    strata = strata_of(score, expected, 5)
    assert_array_equal(strata, np.sort(strata)[::-1])
    sizes = np.bincount(strata)
    assert sizes.sum() == 1_000
    assert sizes[0] < 50 < 200 < sizes[-1]
    # Without an estimate all are equally large; a label that is not judged comes last.
    score[17] = np.nan
    assert_array_equal(np.bincount(strata_of(score, None, 5)), [200] * 5)
    assert strata_of(score, None, 5)[17] == 4


def test_a_small_stratum_leaves_its_share_to_the_others() -> None:
    assert_array_equal(shares(np.array([3, 50, 20]), 60), [3, 37, 20])
    assert_array_equal(shares(np.array([30, 30, 30]), 31), [11, 10, 10])
    assert_array_equal(shares(np.array([3, 4]), 100), [3, 4])


def test_a_draw_is_without_repeats_in_random_order_and_the_same_by_its_seed() -> None:
    listed, _ = population()
    sample = drawn(listed)
    assert len(np.unique(sample.drawn)) == 100
    assert_array_equal(np.bincount(sample.strata), [20] * 5)
    assert set(sample.strata[:30].tolist()) == set(range(5))
    assert_array_equal(sample.labels, listed.labels[sample.drawn])
    assert_array_equal(sample.counts.sum(axis=0), np.bincount(listed.labels))
    for stratum, (low, high) in enumerate(sample.scores):
        own = listed.score[sample.drawn[sample.strata == stratum]]
        assert low <= own.min() <= own.max() <= high
    assert_array_equal(drawn(listed).drawn, sample.drawn)
    assert not np.array_equal(drawn(listed, seed=1).drawn, sample.drawn)


@pytest.mark.parametrize(("wrong", "decided"), [((9, 1), (10, 10)), ((3, 0), (10, 12)), ((0, 0), (8, 20))])
def test_the_interval_is_that_of_the_profile_likelihood(wrong: tuple[int, int], decided: tuple[int, int]) -> None:
    """All pairs of probabilities on a grid, and the totals of those that are likely enough."""
    sizes, x, n = np.array([300, 5_000]), np.array(wrong), np.array(decided)
    grid = np.linspace(0, 1, 4_001)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.where(k > 0, k * np.log(grid), 0) + np.where(m > k, (m - k) * np.log1p(-grid), 0)
                for k, m in zip(x, n, strict=True)]  # fmt: skip
    loss = [2 * (one.max() - one) / (1 - m / size) for one, m, size in zip(logs, n, sizes, strict=True)]
    likely = loss[0][:, None] + loss[1][None, :] <= QUANTILE
    totals = (sizes[0] * grid[:, None] + sizes[1] * grid[None, :])[likely]
    count, low, high = total_interval(sizes, x, n)
    assert count == pytest.approx((sizes * x / n).sum())
    assert low == pytest.approx(totals.min(), abs=3)
    assert high == pytest.approx(totals.max(), abs=3)


def test_nothing_decided_says_nothing_and_all_decided_is_exact() -> None:
    sizes = np.array([20, 30])
    assert total_interval(sizes, np.zeros(2), np.zeros(2))[1:] == pytest.approx((0, 50))
    assert total_interval(sizes, np.array([3, 7]), sizes) == (10, 10, 10)
    _, low, high = total_interval(sizes, np.array([3, 0]), np.array([20, 0]))
    assert (low, high) == pytest.approx((3, 33))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    listed, wrong = population()
    held = []
    for seed in range(200):
        sample = drawn(listed, seed=seed)
        decided = np.full(len(wrong), np.nan)
        decided[sample.drawn] = wrong[sample.drawn]
        found = estimate(sample, decided).all
        held.append(found.low <= wrong.sum() <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


def test_labels_decided_beside_the_sample_bound_the_number() -> None:
    listed, wrong = population()
    sample = drawn(listed, before=(0, 1))
    decided = np.where(np.arange(len(wrong)) < 1_900, wrong.astype(float), np.nan)
    found = estimate(sample, decided)
    assert found.found == wrong[2:1_900].sum()
    assert found.before == wrong[:2].sum()
    assert found.found <= found.all.low <= found.all.high <= found.found + 102
    assert found.left == round(found.all.count) - found.found


def test_a_part_of_the_sample_gives_a_wider_interval() -> None:
    listed, wrong = population()
    sample = drawn(listed, 200)
    widths, counts = [], []
    for part in (60, 200):
        decided = np.full(len(wrong), np.nan)
        decided[sample.drawn[:part]] = wrong[sample.drawn[:part]]
        found = estimate(sample, decided)
        widths.append(found.all.high - found.all.low)
        counts.append((found.all.decided, found.open))
    assert counts == [(60, 140), (200, 0)]
    assert widths[0] > 1.4 * widths[1]


def test_classes_have_a_number_of_their_own_where_enough_of_them_was_decided() -> None:
    listed, wrong = population()
    for size, some in ((100, True), (20, False)):
        sample = drawn(listed, size)
        decided = np.full(len(wrong), np.nan)
        decided[sample.drawn] = wrong[sample.drawn]
        found = estimate(sample, decided)
        assert bool(found.by_class) is some
        for label, one in found.by_class.items():
            own = listed.labels == label
            assert one.of == own.sum()
            assert one.low < wrong[own].sum() < one.high


def test_a_run_file_keeps_the_draw(tmp_path: Path) -> None:
    listed, _ = population()
    listed.score[:50] = np.nan
    sample, path = drawn(listed, before=(3, 5)), tmp_path / "rows.csv.run.json"
    path.write_text(json.dumps({"sample": sample_facts(sample)}))
    back = read_sample(path, split_of(2_000), CLASSES)
    for name, value in vars(sample).items():
        assert_array_equal(getattr(back, name), value)


def test_a_draw_of_another_data_set_is_refused(tmp_path: Path) -> None:
    listed, _ = population()
    path = tmp_path / "rows.csv.run.json"
    facts = sample_facts(drawn(listed))

    def refused(text: str, n: int = 2_000, name: str = "train", classes: tuple[str, ...] = CLASSES) -> str:
        path.write_text(text)
        with pytest.raises(InfluenceError) as error:
            read_sample(path, split_of(n, name), classes)
        return error.value.message

    whole = json.dumps({"sample": facts})
    assert "another data set (2,000 examples, not 1,999)" in refused(whole, 1_999)
    assert "another data set (train labels)" in refused(whole, name="test")
    assert "another data set (other classes)" in refused(whole, classes=("ant", "bee", "dog"))
    assert "drew no sample" in refused("{}")
    assert "not a run file" in refused("rank,index\n")
    for key, value in (("drawn", [{"index": 0, "stratum": 0, "label": 7}]), ("strata", []), ("examples", 3)):
        assert "changed by hand" in refused(json.dumps({"sample": {**facts, key: value}}))
