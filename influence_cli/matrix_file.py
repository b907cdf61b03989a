"""Write all of influence[t, i] to an HDF5 file, a group of test examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.rank import Group
from influence_cli.user_code import describe


@contextmanager
def matrix_writer(path: Path | None, indices: np.ndarray) -> Iterator[Callable[[Group, bool], None]]:
    """Open FILE.h5 for rows of influence; it appears under its name only when complete.

    Data sets: ``influence`` [m, n] (NaN for training examples that could not be read), ``test`` [m] (−1 for a file or
    an aggregate), ``target`` [m], ``train`` [n].

    Args:
        path: the file, or None to write nothing.
        indices: positions of the training examples, the columns.

    Yields:
        A function that takes a group and whether it is an aggregate.
    """
    if path is None:
        yield lambda _group, _aggregate: None
        return
    part = path.with_name(path.name + ".part")
    try:
        with h5py.File(part, "w") as file:
            file["train"] = indices
            columns = len(indices)
            scores = file.create_dataset(
                "influence", (0, columns), "float32", maxshape=(None, columns), chunks=(1, columns)
            )
            tests = file.create_dataset("test", (0,), "int64", maxshape=(None,))
            targets = file.create_dataset("target", (0,), "int64", maxshape=(None,))

            def add(group: Group, aggregate: bool) -> None:
                start, count = len(scores), len(group.influence)
                for dataset in (scores, tests, targets):
                    dataset.resize(start + count, axis=0)
                scores[start:] = group.influence
                facts = [None] if aggregate else group.tests
                tests[start:] = [-1 if test is None or test.index is None else test.index for test in facts]
                targets[start:] = [-1 if test is None else test.target for test in facts]

            yield add
        part.replace(path)
    except OSError as error:
        raise InfluenceError(f"--matrix {path} cannot be written: {describe(error)}") from error
    finally:
        part.unlink(missing_ok=True)
