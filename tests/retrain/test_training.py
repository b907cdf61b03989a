"""What a training is given: its seed, its half of the examples, and what that leaves out."""

from __future__ import annotations

import numpy as np

from influence_cli.retrain.lds import left_out
from influence_cli.retrain.subsets import kept_rows
from influence_cli.retrain.training import CHOSEN, HALVES, KEPT, ON_HALVES, WITHOUT, half
from influence_cli.runtime.seeds import seed_of


def test_every_training_has_a_seed_of_its_own() -> None:
    asked = [
        (run, kind, subset, repeat)
        for run in (0, 1)
        for kind in (HALVES, ON_HALVES, WITHOUT, CHOSEN, KEPT)
        for subset in range(20)
        for repeat in range(3)
    ]
    seeds = {numbers: seed_of(*numbers) for numbers in asked}
    assert len(set(seeds.values())) == len(asked)
    assert all(0 <= seed < 2**32 for seed in seeds.values())
    assert seeds == {numbers: seed_of(*numbers) for numbers in asked}


def test_halves_have_no_example_twice_and_differ() -> None:
    halves = [half(7, subset, 101) for subset in range(20)]
    assert all(len(rows) == len(np.unique(rows)) == 50 and (np.diff(rows) > 0).all() for rows in halves)
    assert len({rows.tobytes() for rows in halves}) == 20
    # However many subsets there are, and in whatever order they are asked for.
    assert np.array_equal(half(7, 3, 101), halves[3])
    # Each example is in about half of them.
    often = np.bincount(np.concatenate(halves), minlength=101)
    assert 0 < often.min() <= often.max() < 20


def test_a_subset_leaves_out_what_is_not_in_its_half() -> None:
    removed = left_out([np.array([0, 2]), np.array([1, 3])], 5)
    assert removed.tolist() == [[0, 1, 0, 1, 1], [1, 0, 1, 0, 1]]


def test_the_rows_that_are_kept_are_the_last_of_the_order() -> None:
    assert kept_rows(np.array([3, 0, 4, 1, 2]), 0.6).tolist() == [1, 2, 4]
