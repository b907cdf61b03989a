"""The file of all influence[t, i]: written in pieces of any width, read back whole."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from influence_cli.ranking.sinks import CHUNK, matrix_file


@pytest.mark.parametrize("width", [7, 256, CHUNK, 3 * CHUNK])
def test_pieces_of_any_width_become_the_whole(tmp_path: Path, width: int) -> None:
    n, generator = 2 * CHUNK + 100, np.random.default_rng(0)
    groups = [generator.normal(size=(tests, n)).astype(np.float32) for tests in (3, 2)]
    with matrix_file(tmp_path / "scores.h5", np.arange(n)) as sink:
        assert sink is not None
        for values in groups:
            sink.begin([None] * len(values))
            for start in range(0, n, width):
                where = slice(start, min(n, start + width))
                sink.add(where, values[:, where])
    with h5py.File(tmp_path / "scores.h5") as file:
        np.testing.assert_array_equal(file["influence"][:], np.concatenate(groups))
