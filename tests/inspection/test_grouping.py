"""Groups without chains."""

from __future__ import annotations

import numpy as np

from influence_cli.inspection.copies import Links
from influence_cli.inspection.grouping import make_groups


def groups(near: list[tuple[int, int]], exact: list[tuple[int, int]] = []) -> list[list[int]]:  # noqa: B006
    pairs = np.array([*exact, *near], dtype=np.int64).reshape(-1, 2)
    similarity = np.array([1.0] * len(exact) + [0.99] * len(near))
    return [
        group.rows.tolist() for group in make_groups(Links(pairs, similarity, np.arange(len(pairs)) < len(exact)), 20)
    ]


def test_a_chain_is_cut_and_a_star_is_not() -> None:
    assert groups([(0, 1), (1, 2), (2, 3), (3, 4)]) == [[0, 1, 2], [3, 4]]
    assert groups([(5, 1), (5, 2), (5, 3)]) == [[1, 2, 3, 5]]


def test_exact_copies_stay_together_and_share_near_ones() -> None:
    assert groups([(2, 7)], exact=[(2, 4), (2, 9)]) == [[2, 4, 7, 9]]
    assert groups([], exact=[(1, 3)]) == [[1, 3]]


def test_a_member_says_whether_another_has_its_pixels() -> None:
    links = Links(np.array([[2, 4], [2, 7]]), np.array([1.0, 0.98]), np.array([True, False]))
    (group,) = make_groups(links, 9)
    assert group.exact.tolist() == [True, True, False]
    assert group.similarity.tolist() == [1.0, 1.0, 0.98]
