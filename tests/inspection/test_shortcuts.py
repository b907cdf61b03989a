"""Properties that tell the label, made to do so or not."""

from __future__ import annotations

import numpy as np

from influence_cli.inspection.properties import Properties
from influence_cli.inspection.shortcuts import find_shortcuts


def test_a_property_that_follows_the_label_is_a_shortcut_and_noise_is_none() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 800)
    numbers = {"brightness": labels + generator.normal(0, 0.2, 800), "sharpness": generator.normal(0, 1, 800)}
    words = {"path: folder 1": np.where(labels == 2, "studio", "street")}
    results = {one.name: one for one in find_shortcuts(Properties(numbers, words, np.array([])), labels)}
    assert results["brightness"].is_one
    assert results["brightness"].share > 0.9
    assert not results["sharpness"].is_one
    assert abs(results["sharpness"].accuracy - 0.25) < 0.06
    # One class is told, the others are guessed: (1 + 3 · 1/3) / 4.
    assert abs(results["path: folder 1"].accuracy - 0.5) < 0.03
    assert results["path: folder 1"].classes[0] == 2


def test_a_large_class_is_no_shortcut() -> None:
    labels = np.array([0] * 900 + [1] * 100)
    values = np.random.default_rng(1).normal(0, 1, 1000)
    (one,) = find_shortcuts(Properties({"brightness": values}, {}, np.array([])), labels)
    assert abs(one.accuracy - 0.5) < 0.08


def test_unknown_values_and_labels_are_left_out() -> None:
    labels = np.array([0, 1] * 100 + [-1] * 50)
    values = np.where(labels == 1, 3.0, 1.0)
    values[:20] = np.nan
    (one,) = find_shortcuts(Properties({"date": values}, {}, np.array([])), labels)
    assert one.accuracy == 1
