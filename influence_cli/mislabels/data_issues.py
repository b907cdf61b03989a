"""Data issues beyond single labels: duplicates with two labels, outliers, classes that are confused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence_cli.evidence.mapped import parts_of

# Two images are near-duplicates above this cosine in the readout's components.
ALIKE = 0.95
# An outlier's distance exceeds the median by this many deviations, both of logarithms (1.48 × the median deviation).
DEVIATIONS = 4.0
# Classes are confused in both directions if each loses this share of its examples to the other.
CONFUSED = 0.03


@dataclass(frozen=True)
class DataIssues:
    """Data issues beyond single labels, for a data team.

    Attributes:
        duplicates: rows of two examples with the same input and different labels, int64 [m, 2].
        alike: rows of two near-duplicates with different labels, most similar first, int64 [m, 2].
        outliers: rows of examples far from every other one, farthest first, int64 [m].
        confused: pairs of classes that are confused with each other, and how many examples each way.
    """

    duplicates: np.ndarray
    alike: np.ndarray
    outliers: np.ndarray
    confused: tuple[tuple[int, int, int, int], ...]


def find_data_issues(
    labels: np.ndarray,
    hashes: np.ndarray,
    nearest: np.ndarray,
    similarity: np.ndarray,
    distance: np.ndarray,
    joint: np.ndarray | None,
) -> DataIssues:
    """Look for duplicates with different labels, outliers, and classes confused in both directions.

    Args:
        labels: int64 [n].
        hashes: uint64 [n], of the inputs.
        nearest: int64 [n, k], rows of the nearest others, nearest first; k may be 0.
        similarity: [n, k], the cosine, largest first.
        distance: [n], mean distance to the nearest of them; NaN where it is not known.
        joint: [C, C], share of examples by given (row) and true label (column), if known.
    """
    duplicates = _same(labels, hashes)
    alike = _alike(labels, nearest, similarity)
    near, same = (_numbers(pairs[:, 0], pairs[:, 1], len(labels)) for pairs in (alike, duplicates))
    alike = alike[~np.isin(near, same)]
    return DataIssues(duplicates, alike, _outliers(distance), _confused(joint, len(labels)))


def _same(labels: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Pair the first of equal inputs with every later one of another label."""
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    pairs = []
    for one in np.flatnonzero(counts > 1):
        first, *others = np.flatnonzero(group == one)
        pairs += [(first, other) for other in others if labels[other] != labels[first]]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _alike(labels: np.ndarray, nearest: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    parts = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=similarity.dtype))]
    for part in parts_of(len(similarity)):
        rows, ranks = np.nonzero(similarity[part] >= ALIKE)  # never NaN, of an example that is not judged
        others, near = nearest[part][rows, ranks], similarity[part][rows, ranks]
        differ = labels[part][rows] != labels[others]
        parts.append((rows[differ] + part.start, others[differ], near[differ]))
    rows, others, near = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    # A pair as one number: a well trained network has millions of them, and rows sort slowly.
    numbers, first = np.unique(_numbers(rows, others, len(labels)), return_index=True)
    numbers = numbers[np.argsort(-near[first], kind="stable")]
    return np.stack([numbers // len(labels), numbers % len(labels)], axis=1).astype(np.int64)


def _numbers(one: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
    """Number unordered pairs of rows."""
    return np.asarray(np.minimum(one, other).astype(np.int64) * n + np.maximum(one, other))


def _outliers(distance: np.ndarray) -> np.ndarray:
    known = np.isfinite(distance)
    if not known.any():
        return np.empty(0, dtype=np.int64)
    far = np.log(np.maximum(distance, 1e-12))
    above = far - np.median(far[known])
    deviation = 1.4826 * np.median(np.abs(above[known]))
    rows = np.flatnonzero(above > DEVIATIONS * deviation) if deviation > 0 else np.empty(0, dtype=np.int64)
    return np.asarray(rows[np.argsort(-above[rows], kind="stable")])


def _confused(joint: np.ndarray | None, n: int) -> tuple[tuple[int, int, int, int], ...]:
    """List (a, b, examples labelled a that are b, examples labelled b that are a), most first."""
    if joint is None:
        return ()
    size = np.maximum(joint.sum(axis=1), 1e-12)
    share = joint / size[:, None]
    often = np.triu(share >= CONFUSED, 1)
    pairs = [
        (int(a), int(b), round(n * joint[a, b]), round(n * joint[b, a]))
        for a, b in zip(*np.nonzero(often), strict=True)
        if share[b, a] >= CONFUSED
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair[2] - pair[3]))
