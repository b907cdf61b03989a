"""What other networks give about the examples: features, or class probabilities, a row per example of the data set.

They have seen none of these labels. ``from_file`` and ``evidence/network_features.py`` make them, and ``gather.py``
forms opinions of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, counted
from influence_cli.evidence.mapped import large, row_parts

# Examples looked at at once, for numbers that are not finite.
CHUNK = 8_192


@dataclass(frozen=True)
class Features:
    """What another network gives about every example.

    Attributes:
        name: as in ``readout:NAME``.
        values: [length of the data set, d], a row per position; maybe mapped from a file. Rows of examples that are not
            in use may be NaN.
        probabilities: whether a row is a probability of each class, and so an opinion as it stands.
    """

    name: str
    values: np.ndarray
    probabilities: bool = False

    def rows(self, indices: np.ndarray) -> Tensor:
        """Copy the rows of some positions, float32 [n, d].

        Features that are never negative, such as means behind a ReLU, are skewed: of those it is the square roots, by
        which readout and neighbours are better (power normalisation, Perronnin et al. 2010).
        """
        some = large(len(indices), self.values.shape[1])
        rooted = not self.probabilities
        for part in row_parts(*some.shape):
            some[part] = torch.from_numpy(np.asarray(self.values[indices[part]], dtype=np.float32))
            rooted = rooted and bool((some[part] >= 0).all())
        if rooted:
            for part in row_parts(*some.shape):
                some[part] = some[part].sqrt()
        return some


def signals_of(features: Features) -> tuple[str, ...]:
    """Name the signals that features make."""
    if features.probabilities:
        return (f"probabilities:{features.name}",)
    return f"readout:{features.name}", f"neighbours:{features.name}"


def refuse_unusable(values: np.ndarray, split: Split, where: str, file_rows: np.ndarray | None = None) -> None:
    """Refuse features of the examples in use that are not finite, or all the same.

    Args:
        values: [length of the data set, d].
        split: the examples.
        where: start of the error.
        file_rows: [length of the data set], the file's row of each position, where it has another order.

    Raises:
        InfluenceError: naming the first such row.
    """
    first, same = None, True
    bad: list[int] = []
    for start in range(0, len(split), CHUNK):
        indices = split.indices[start : start + CHUNK]
        rows = np.asarray(values[indices])
        first = rows[0] if first is None else first
        bad += indices[~np.isfinite(rows).all(axis=1)].tolist()
        same = same and bool((rows == first).all())
    if bad:
        row = bad[0] if file_rows is None else file_rows[bad[0]]
        raise InfluenceError(
            f"{where}: row {row} ({split.title(bad[0])}) holds NaN or infinity"
            + (f", and so do {counted(len(bad) - 1, 'more row')}" if len(bad) > 1 else ""),
            f"check that image, or list it under {split.name}.exclude",
        )
    if same and len(split) > 1:
        raise InfluenceError(
            f"{where}: the features of all examples are the same", "is this the right file or network?"
        )
