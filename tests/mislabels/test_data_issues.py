"""What is found besides, on examples made to hold it."""

from __future__ import annotations

import numpy as np

from influence_cli.mislabels.data_issues import ALIKE, DataIssues, find_data_issues


def found(**changed: np.ndarray) -> DataIssues:
    generator = np.random.default_rng(0)
    n = 40
    given = {
        "labels": np.arange(n) % 4,
        "hashes": np.arange(n, dtype=np.uint64),
        "nearest": (np.arange(n)[:, None] + np.arange(1, 4)) % n,
        "similarity": np.tile(np.array([0.8, 0.7, 0.6], dtype=np.float32), (n, 1)),
        "distance": generator.normal(10, 1, n),
        "joint": np.diag(np.full(4, 0.25)),
    }
    return find_data_issues(**{**given, **changed})


def test_nothing_is_found_where_there_is_nothing() -> None:
    none = found()
    assert (len(none.duplicates), len(none.alike), len(none.outliers), len(none.confused)) == (0, 0, 0, 0)


def test_duplicates_count_where_their_labels_differ() -> None:
    hashes = np.arange(40, dtype=np.uint64)
    hashes[[5, 9, 14]] = 1  # labels 1, 1 and 2, and example 1 has label 1
    assert found(hashes=hashes).duplicates.tolist() == [[1, 14]]


def test_near_duplicates_are_paired_once_most_similar_first() -> None:
    similarity = np.tile(np.array([0.8, 0.7, 0.6]), (40, 1))
    similarity[3, 0] = ALIKE + 0.01  # 3 and 4
    similarity[10, :2] = (ALIKE + 0.03, ALIKE + 0.02)  # 10 and 11, 10 and 12
    nearest = (np.arange(40)[:, None] + np.arange(1, 4)) % 40
    nearest[11, 0], similarity[11, 0] = 10, ALIKE + 0.03  # the same pair from the other side
    assert found(similarity=similarity, nearest=nearest).alike.tolist() == [[10, 11], [10, 12], [3, 4]]
    labels = np.zeros(40, dtype=np.int64)
    assert len(found(similarity=similarity, nearest=nearest, labels=labels).alike) == 0


def test_a_duplicate_is_not_listed_as_a_near_one_too() -> None:
    hashes = np.arange(40, dtype=np.uint64)
    hashes[4] = hashes[3]
    similarity = np.tile(np.array([0.8, 0.7, 0.6]), (40, 1))
    similarity[3, 0] = 1.0
    both = found(hashes=hashes, similarity=similarity)
    assert both.duplicates.tolist() == [[3, 4]]
    assert len(both.alike) == 0


def test_outliers_are_far_from_every_other_example() -> None:
    distance = np.random.default_rng(0).normal(10, 1, 40)
    distance[[7, 30]] = (30, 60)
    assert found(distance=distance).outliers.tolist() == [30, 7]
    assert len(found(distance=np.ones(40)).outliers) == 0


def test_classes_confused_both_ways_are_named_with_counts() -> None:
    joint = np.diag([0.2, 0.2, 0.25, 0.25])
    joint[0, 1], joint[1, 0], joint[2, 3] = 0.05, 0.05, 0.05  # 2 and 3 one way only
    assert found(joint=joint).confused == ((0, 1, 2, 2),)


def test_without_a_readout_duplicates_are_still_found() -> None:
    hashes = np.arange(40, dtype=np.uint64)
    hashes[6] = hashes[4]
    none = np.empty((40, 0))
    only = found(hashes=hashes, nearest=none.astype(np.int64), similarity=none, distance=np.empty(0), joint=None)
    assert only.duplicates.tolist() == [[4, 6]]
    assert len(only.outliers) == 0
