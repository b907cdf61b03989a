"""Several ways to count wrong labels, by hand on a few and on labels whose noise is known."""

from __future__ import annotations

import numpy as np
import pytest
from cleanlab.count import num_label_issues

from influence_cli.mislabels.noise import calibrated, contradicted, estimate_noise
from influence_cli.mislabels.ways import ways_to_count
from tests.mislabels.test_noise import drawn


def test_the_ways_agree_on_clear_labels_and_their_range_holds_the_truth() -> None:
    log_p, given, wrong = drawn(4_000, 0.1)
    other = drawn(4_000, 0.1, seed=0)[0] + np.random.default_rng(5).normal(size=log_p.shape)
    sources = {"readout": log_p, "neighbours": other}
    noise, order = estimate_noise(log_p, given), np.arange(4_000)
    ways = ways_to_count(sources, given, order, noise, "readout", None)
    assert list(ways) == ["readout", "neighbours", "probabilities", "agreeing", "contradicted"]
    assert ways["readout"] == noise.count
    assert ways["neighbours"] == estimate_noise(other, given).count
    assert ways["contradicted"] == (log_p.argmax(axis=1) != given).sum()
    both = contradicted(calibrated(log_p, given)) & contradicted(calibrated(other, given))
    assert ways["agreeing"] == both.sum()
    assert min(ways.values()) <= wrong.sum() <= max(ways.values())
    # A model that has learnt the labels by heart agrees with nobody.
    heart = np.eye(4)[given]
    assert ways_to_count(sources, given, order, noise, "readout", heart)["agreeing"] == 0


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_labels_are_those_that_cleanlab_counts(rate: float) -> None:
    log_p, given, _ = drawn(4_000, rate)
    soft = calibrated(log_p, given)
    assert contradicted(soft).sum() == num_label_issues(given, soft.of(slice(None)))


def test_only_the_labels_of_the_list_count() -> None:
    log_p, given, _ = drawn(4_000, 0.1)
    noise = estimate_noise(log_p, given)
    half = np.arange(0, 4_000, 2)
    ways = ways_to_count({"readout": log_p}, given, half, noise, "readout", None)
    assert ways["contradicted"] == (log_p.argmax(axis=1) != given)[::2].sum()
    log_p[:3_990] = np.nan
    assert ways_to_count({"readout": log_p}, given, np.arange(3_990), noise, "readout", None) == {}
