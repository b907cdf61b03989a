"""Where all scores of a ranking go, in addition to the strongest: a matrix file, or memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from influence_cli.errors import InfluenceError, describe
from influence_cli.influence.example_facts import TestFacts
from influence_cli.runtime import disk


class KeptInfluence:
    """Takes the numbers of `rank_training` as they are computed, and holds those of a few test examples.

    Attributes:
        values: influence float32 [m, n] on them (one row for an aggregate); NaN for unreadable examples.
    """

    def __init__(self, tests: int, training: int, wanted: Collection[int | str] | None = None) -> None:
        """Hold some test examples.

        Args:
            tests: how many at most.
            training: training examples, n.
            wanted: those held, by position in the test set or by file where they have none; None for the first ones.
        """
        self.values = np.full((tests, training), np.nan, dtype=np.float32)
        self._wanted = wanted
        self._next = 0
        self._rows = slice(0, 0)
        self._places: list[int] = []

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Take the next test examples; only the first or the wanted ones are kept."""
        room = len(self.values) - self._next
        self._places = [place for place, test in enumerate(tests) if is_wanted(test, self._wanted)][:room]
        self._rows = slice(self._next, self._next + len(self._places))
        self._next = self._rows.stop

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take their influence [m, b] on a range of training examples."""
        self.values[self._rows, where] = values[self._places]


def is_wanted(test: TestFacts | None, wanted: Collection[int | str] | None) -> bool:
    """Tell whether a test example is among those that are held; an aggregate, None, always is."""
    return wanted is None or test is None or (str(test.path) if test.index is None else test.index) in wanted


# Columns per chunk: a piece of a scan fills whole chunks, and a reader of one row touches few.
CHUNK = 4096


class MatrixFile:
    """An open FILE.h5.

    Data sets: ``influence`` [m, n] (NaN for training examples that could not be read), ``test`` [m] (−1 for a file or
    an aggregate), ``target`` [m], ``train`` [n].
    """

    def __init__(self, file: h5py.File, indices: np.ndarray) -> None:
        columns = len(indices)
        file["train"] = indices
        self._scores = file.create_dataset(
            "influence", (0, columns), "float32", maxshape=(None, columns), chunks=(1, max(1, min(CHUNK, columns)))
        )
        self._tests = file.create_dataset("test", (0,), "int64", maxshape=(None,))
        self._targets = file.create_dataset("target", (0,), "int64", maxshape=(None,))
        self._start = 0
        # Columns that do not fill a chunk yet: each chunk is written once, even with narrow pieces.
        self._held: list[np.ndarray] = []
        self._first = 0

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Add rows for the next test examples (None for an aggregate)."""
        self._held, self._first = [], 0
        self._start = len(self._scores)
        for dataset in (self._scores, self._tests, self._targets):
            dataset.resize(self._start + len(tests), axis=0)
        self._tests[self._start :] = [-1 if test is None or test.index is None else test.index for test in tests]
        self._targets[self._start :] = [-1 if test is None else test.target for test in tests]

    def add(self, where: slice, values: np.ndarray) -> None:
        """Fill in their influence on a range of training examples, each range after the one before it."""
        self._held.append(values)
        full = where.stop if where.stop == self._scores.shape[1] else where.stop // CHUNK * CHUNK
        if full > self._first:
            joined = np.concatenate(self._held, axis=1)
            self._scores[self._start :, self._first : full] = joined[:, : full - self._first]
            self._held = [joined[:, full - self._first :]]
            self._first = full


@contextmanager
def matrix_file(path: Path | None, indices: np.ndarray) -> Iterator[MatrixFile | None]:
    """Open FILE.h5; it appears under its name only when complete.

    Args:
        path: the file, or None to write nothing.
        indices: positions of the training examples, the columns.
    """
    if path is None:
        yield None
        return
    try:
        with disk.whole(path) as part, h5py.File(part, "w", locking=False) as file:
            yield MatrixFile(file, indices)
    except OSError as error:
        raise InfluenceError(f"--matrix {path} cannot be written: {describe(error)}") from error
