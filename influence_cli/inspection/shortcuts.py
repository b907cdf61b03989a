"""Which properties of the files tell the label: a network may learn them in the place of what the images show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence_cli.inspection.properties import Properties

# Numbers are cut into so many parts of equal size; folds; examples with a known value that are needed.
PARTS, FOLDS, FEWEST = 20, 5, 50
# A property is a shortcut from this share of the way between guessing and knowing on. The best of ours without one:
# .25, the brightness of Fashion-MNIST, where shoes are smaller than coats (bench/results/issues.md).
SHORTCUT = 0.35


@dataclass(frozen=True)
class Shortcut:
    """How well one property tells the labels.

    Attributes:
        name: of the property.
        accuracy: mean share of right guesses by class, out of sample.
        guessing: the same by chance, 1/C.
        classes: the classes that are told best, the best first.
        recall: float64 [C], share of right guesses of each class; NaN for a class that has none.
    """

    name: str
    accuracy: float
    guessing: float
    classes: tuple[int, ...]
    recall: np.ndarray

    @property
    def share(self) -> float:
        """Give the part of the way from guessing to knowing, 1 where every label is told."""
        return (self.accuracy - self.guessing) / (1 - self.guessing)

    @property
    def is_one(self) -> bool:
        """Say whether the property tells the labels well enough to be a shortcut."""
        return self.share >= SHORTCUT


def find_shortcuts(properties: Properties, labels: np.ndarray, seed: int = 0) -> tuple[Shortcut, ...]:
    """Predict the label from each property alone, by its frequency among the others with a like value.

    Every class counts alike. The guess of an example comes from the other folds.

    Args:
        properties: of the images.
        labels: int64 [n]; examples with −1 are left out.
        seed: of the folds.

    Returns:
        All properties, that which tells most first.
    """
    codes = {name: _cut(values) for name, values in properties.numbers.items()}
    codes |= {name: np.unique(values, return_inverse=True)[1] for name, values in properties.words.items()}
    results = []
    for name, values in codes.items():
        kept = (labels >= 0) & (values >= 0)
        present = np.unique(labels[kept])
        if int(kept.sum()) < FEWEST or len(present) < 2:
            continue
        recall = np.full(int(labels.max()) + 1, np.nan)
        recall[present] = _recall(values[kept], np.searchsorted(present, labels[kept]), len(present), seed)
        best = present[np.argsort(-recall[present], kind="stable")]
        results.append(
            Shortcut(name, float(recall[present].mean()), 1 / len(present), tuple(map(int, best[:3])), recall)
        )
    return tuple(sorted(results, key=lambda one: -one.share))


def _cut(values: np.ndarray) -> np.ndarray:
    """Number the parts that values lie in, int64 [n]; −1 for NaN. A value that is frequent has a part to itself."""
    known = np.isfinite(values)
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, PARTS + 1)[1:-1])) if known.any() else np.empty(0)
    parts = np.searchsorted(edges, values, side="left") * 2 + np.isin(values, edges)
    return np.where(known, parts, -1)


def _recall(values: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Give the share of right guesses of each class, [C], out of sample; ties share it."""
    folds = np.random.default_rng(seed).permutation(len(labels)) % FOLDS
    hits = np.zeros(len(labels))
    count = int(values.max()) + 1
    for fold in range(FOLDS):
        there = folds != fold
        table = np.zeros((count, classes))
        np.add.at(table, (values[there], labels[there]), 1.0)
        table /= np.maximum(np.bincount(labels[there], minlength=classes), 1)  # every class counts alike
        best = table == table.max(axis=1, keepdims=True)
        rows = np.flatnonzero(~there)
        hits[rows] = best[values[rows], labels[rows]] / best[values[rows]].sum(axis=1)
    return np.bincount(labels, hits, minlength=classes) / np.maximum(np.bincount(labels, minlength=classes), 1)
