"""The estimate of label noise against noise that is drawn, and its probabilities against Bayes."""

from __future__ import annotations

import numpy as np
import pytest

from influence_cli.evidence import mapped
from influence_cli.mislabels.noise import Calibrated, calibrated, calibrated_joint, confident_counts, estimate_noise


def drawn(n: int, rate: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw true labels of four classes with clear probabilities, and given ones of which some are wrong."""
    generator = np.random.default_rng(seed)
    true = generator.integers(0, 4, n)
    given = true.copy()
    wrong = generator.random(n) < rate
    given[wrong] = (true[wrong] + generator.integers(1, 4, wrong.sum())) % 4
    logits = generator.normal(size=(n, 4))
    logits[np.arange(n), true] += 4
    # What a readout without the label would say: the classes, each given by the noise.
    clean = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    channel = np.full((4, 4), rate / 3)
    np.fill_diagonal(channel, 1 - rate)
    return np.log(clean @ channel.T), given, wrong


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_rate_and_the_precision_are_about_the_true_ones(rate: float) -> None:
    log_p, given, wrong = drawn(4_000, rate)
    noise = estimate_noise(log_p, given)
    assert noise.rate == pytest.approx(rate, rel=0.25)
    assert noise.count == round(noise.rate * 4_000)
    assert noise.joint.sum() == pytest.approx(1)
    assert noise.joint.sum(axis=1) == pytest.approx(np.bincount(given) / 4_000, abs=0.01)
    order = np.argsort(log_p[np.arange(4_000), given])
    expected = noise.expected_precision(order)
    actual = np.cumsum(wrong[order]) / np.arange(1, 4_001)
    for cut in (noise.count // 2, noise.count, 2 * noise.count):
        assert expected[cut - 1] == pytest.approx(actual[cut - 1], abs=0.15)


def test_clean_labels_are_told_to_be_clean() -> None:
    log_p, given, _ = drawn(4_000, 0.0)
    assert estimate_noise(log_p, given).rate < 0.02


def test_pairs_of_classes_are_found() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 3_000)
    given = np.where((true == 0) & (generator.random(3_000) < 0.3), 1, true)
    soft = np.full((3_000, 3), 0.02)
    soft[np.arange(3_000), true] = 0.96
    soft[true == 0] = (0.68, 0.30, 0.02)
    joint = estimate_noise(np.log(soft), given).joint
    off = joint - np.diag(np.diag(joint))
    assert np.unravel_index(off.argmax(), off.shape) == (1, 0)
    assert off[1, 0] > 10 * np.sort(off, axis=None)[-2]


def test_a_class_without_labels_does_not_break_it() -> None:
    log_p, given, _ = drawn(2_000, 0.1)
    given[given == 3] = 2
    noise = estimate_noise(log_p, given)
    assert np.isfinite(noise.wrong).all()
    assert noise.wrong.min() >= 0
    assert noise.wrong.max() <= 1


def test_the_probabilities_of_each_block_of_classes_are_those_of_the_whole_table() -> None:
    """Two groups of classes that are never taken for each other, against one inverse of all of Q."""
    parts = [drawn(2_000, 0.2, seed) for seed in (1, 2)]
    apart = np.full((2_000, 4), -40.0)
    log_p = np.concatenate([np.hstack([parts[0][0], apart]), np.hstack([apart, parts[1][0]])])
    given = np.concatenate([parts[0][1], parts[1][1] + 4])
    noise = estimate_noise(log_p, given)
    assert not noise.joint[:4, 4:].any()
    assert noise.joint[:4, :4].all()
    channel = noise.joint / noise.joint.sum(axis=0)
    true = np.clip(calibrated(log_p, given).of(slice(None)) @ np.linalg.inv(channel).T, 0, None)
    joined = true * channel[given]
    right = 1 - joined[np.arange(4_000), given] / joined.sum(axis=1)
    assert noise.wrong == pytest.approx(right, abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_the_counts_are_those_of_cleanlab(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random probabilities with equal ones among them, rare classes and one that no label names; three rows a part."""
    from cleanlab.count import compute_confident_joint, num_label_issues

    generator = np.random.default_rng(seed)
    n, classes = 500, int(generator.integers(3, 9))
    monkeypatch.setattr(mapped, "HELD", 3 * classes)
    true = generator.integers(0, classes, n)
    given = np.where(generator.random(n) < 0.25, generator.integers(0, classes, n), true)
    given[given == 1] = 0
    given[:2] = classes - 1
    logs = generator.normal(size=(n, classes)).round(seed % 2 * 3)
    logs[np.arange(n), true] += 2.0
    soft = Calibrated(logs - np.log(np.exp(logs).sum(axis=1, keepdims=True)), given, 1.0)
    whole = soft.of(slice(None))
    count, confident = confident_counts(soft)
    assert count == num_label_issues(given, whole)
    assert np.array_equal(confident, compute_confident_joint(given, whole, calibrate=False))
    assert np.array_equal(calibrated_joint(confident, given), compute_confident_joint(given, whole))
