"""All influence on the first few test examples, held for a page: what its bars, histogram and table are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from influence_cli.influence.example_facts import TestFacts


class KeptInfluence:
    """Takes the numbers of `rank_training` as they are computed, and holds those of the first test examples.

    Attributes:
        values: influence float32 [m, n] on them (one row for an aggregate); NaN of what could not be read.
    """

    def __init__(self, tests: int, training: int) -> None:
        self.values = np.full((tests, training), np.nan, dtype=np.float32)
        self._next = 0
        self._rows = slice(0, 0)

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Take the next test examples; those past the first few are let go."""
        self._rows = slice(self._next, min(self._next + len(tests), len(self.values)))
        self._next = self._rows.stop

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take their influence [m, b] on a range of training examples."""
        self.values[self._rows, where] = values[: self._rows.stop - self._rows.start]
