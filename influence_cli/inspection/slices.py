"""Where the model is worst: classes, and within a class the images of one light, size, folder or date."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from influence_cli.inspection.properties import Properties

# Parts that numbers are cut into; images that a slice needs, and the rest of its class.
PARTS, FEWEST = 4, 10
# All slices that are tried together name a worse one by chance this seldom (Holm).
SIGNIFICANCE = 0.05
NAMES = ("lowest", "second", "third", "highest")


@dataclass(frozen=True)
class Slice:
    """Images of a class that the model gets wrong more often than the others of that class.

    Attributes:
        label: the class.
        text: which images: ``brightness: lowest quarter``; empty for a whole class, against the other classes.
        rows: int64 [m], the images.
        wrong: how many of them the model gets wrong.
        rest: images of the rest, and how many of those are wrong.
        chance: how often so many wrong ones come by chance, times the slices that were tried.
    """

    label: int
    text: str
    rows: np.ndarray
    wrong: int
    rest: tuple[int, int]
    chance: float

    @property
    def accuracies(self) -> tuple[float, float]:
        """Give the accuracy on the slice and on the rest."""
        return 1 - self.wrong / len(self.rows), 1 - self.rest[1] / max(1, self.rest[0])

    @property
    def excess(self) -> float:
        """Give how many more are wrong than at the accuracy of the rest."""
        return self.wrong - len(self.rows) * self.rest[1] / max(1, self.rest[0])


def find_slices(properties: Properties, labels: np.ndarray, predicted: np.ndarray) -> tuple[Slice, ...]:
    """Find the slices on which the model is worse, the one with the most errors in excess first.

    Args:
        properties: of the images.
        labels: int64 [n]; examples with −1 are left out.
        predicted: int64 [n].
    """
    wrong = (labels != predicted) & (labels >= 0)
    tried = []
    for label in np.unique(labels[labels >= 0]).tolist():
        members = labels == label
        tried.append(_slice(label, "", members, (labels >= 0) & ~members, wrong))
        for text, part in _parts(properties, members):
            tried.append(_slice(label, text, part, members & ~part, wrong))
    tried = [one for one in tried if len(one.rows) >= FEWEST and one.rest[0] >= FEWEST]
    tried.sort(key=lambda one: one.chance)
    worse = []
    for number, one in enumerate(tried):
        chance = one.chance * (len(tried) - number)
        if chance >= SIGNIFICANCE:
            break
        worse.append(Slice(one.label, one.text, one.rows, one.wrong, one.rest, chance))
    return tuple(sorted(worse, key=lambda one: -one.excess))


def _parts(properties: Properties, members: np.ndarray) -> list[tuple[str, np.ndarray]]:
    parts = []
    for name, values in properties.numbers.items():
        known = members & np.isfinite(values)
        edges = np.unique(np.quantile(values[known], [0.25, 0.5, 0.75])) if known.any() else np.empty(0)
        if len(edges) == PARTS - 1:
            at = np.searchsorted(edges, values, side="left")
            parts += [(f"{name}: {NAMES[number]} quarter", known & (at == number)) for number in range(PARTS)]
    for name, values in properties.words.items():
        parts += [(f"{name}: {value}", members & (values == value)) for value in np.unique(values[members]) if value]
    return parts


def _slice(label: int, text: str, part: np.ndarray, rest: np.ndarray, wrong: np.ndarray) -> Slice:
    rows, errors = np.flatnonzero(part), int((part & wrong).sum())
    others = int(rest.sum()), int((rest & wrong).sum())
    return Slice(
        label, text, rows, errors, others, at_least(errors, len(rows), errors + others[1], len(rows) + others[0])
    )


def at_least(hits: int, drawn: int, marked: int, total: int) -> float:
    """Give how often chance puts so many marked ones, or more, among those drawn (Fisher's exact test, one-sided).

    Args:
        hits: marked ones among those drawn.
        drawn: how many are drawn.
        marked: marked ones among all.
        total: how many there are.
    """

    def ways(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    whole = ways(total, drawn)
    most = min(drawn, marked)
    least = max(hits, drawn + marked - total)
    logs = [ways(marked, k) + ways(total - marked, drawn - k) - whole for k in range(least, most + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))
