"""The second moment of the stored gradients, F = (1/n) Σ gᵢgᵢᵀ, and its eigenpairs: from only a store, like TRAK.

It uses the given labels, so it is the *empirical* Fisher. Use it with a store of raw gradients, if the parameters or
the examples are few enough for a square matrix of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.runtime.memory import available_bytes
from influence_cli.solvers.eigen import eigenpairs
from influence_cli.store.store import Store

# If both p and n are larger, the matrix and its eigenvectors are too large for a workstation.
WIDEST = 12_000


@dataclass(frozen=True)
class Moment:
    """Eigenpairs of F.

    Attributes:
        values: Λ [k] float64, largest first, above rounding.
        vectors: [p, k] float64, orthonormal columns.
        trace: ΣΛ.
    """

    values: Tensor
    vectors: Tensor
    trace: float


def stored_moment(path: Path, on_examples: Callable[[int], None] = lambda _: None, *, where: str) -> Moment:
    """Scan a store of raw gradients once.

    Args:
        path: the store.
        on_examples: called with the number of rows read.
        where: names the setting in an error.

    Raises:
        InfluenceError: neither parameters nor examples are few enough, or memory does not hold the matrix.
    """
    with Store.open(path) as store:
        n, p, read = store.layout.n, store.layout.k, max(1, store.readable())
        small = min(n, p)
        # The matrix, its eigenvectors and a copy of them; if there are fewer examples, their rows as well.
        need, free = 8 * small * (3 * small + (2 * p if p > n else p)), available_bytes(torch.device("cpu"))
        if small > WIDEST or need > free:
            raise InfluenceError(
                f"{where}: the second moment of {n:,} gradients of {p:,} parameters needs {human_bytes(need)}; "
                f"the limit is {WIDEST:,} parameters or examples, and {human_bytes(free)} is free",
                "track fewer layers (gradients.layers), or use curvature.method: ekfac",
            )
        if p <= n:
            moment = torch.zeros(small, small, dtype=torch.float64)
            for _, block in store.scan():
                part = torch.from_numpy(block)
                moment += part.T @ part
                on_examples(len(block))
        else:
            rows = torch.cat([torch.from_numpy(block).double() for _, block in store.scan()])
            on_examples(n)
            moment = rows @ rows.T
        values, vectors = (part[0] for part in eigenpairs((moment / read)[None]))
        used = values > 1e-10 * float(values[0].clamp_min(1e-300))
        values, vectors = values[used], vectors[:, used]
        if p > n:
            vectors = rows.T @ (vectors / (values * read).sqrt())
    if not len(values):
        raise InfluenceError(f"{where}: every stored gradient is zero", "is the model trained on other labels?")
    return Moment(values, vectors, float(values.sum()))
