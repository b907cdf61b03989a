"""A store in shards whose rows follow from their numbers, so that it can be made of any size and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from influence_cli.store.layout import Layout, create
from influence_cli.store.shards import create_sharded
from influence_cli.store.store import READ, SKIPPED, Rows, Store

K, CLASSES, BLOCK = 3, 2, 4
# Five blocks, the last one not full.
N = 18
FINGERPRINT, FACTS = {"weights": "abc"}, {"batch": 4, "rows": True}
ARRAYS = {"spectrum": np.array([3.0, 2.0, 0.5]), "basis": np.arange(15, dtype=np.float32).reshape(5, 3) - 7}


def layout_of(n: int = N, dtype: str = "float32") -> Layout:
    """Give the shape of a store with so many rows."""
    return Layout(n, K, CLASSES, BLOCK, dtype)


def labels_of(n: int) -> np.ndarray:
    """Give the labels of so many rows."""
    return np.arange(n) % CLASSES


def indices_of(n: int) -> np.ndarray:
    """Give the positions of so many rows in a data set of which every third is used."""
    return np.arange(n) * 3


def rows_of(where: slice) -> Rows:
    """Make some rows."""
    numbers = np.random.default_rng(0).normal(size=(1_000, K + CLASSES + 1)).astype(np.float32)[where]
    at = np.arange(where.start, where.stop)
    state = np.where(at % 5 == 3, SKIPPED, READ).astype(np.uint8)
    return Rows(numbers[:, :K], numbers[:, K], numbers[:, K + 1 :], state, digest=100 + where.start)


def fill(path: Path, blocks: list[int] | None = None) -> None:
    """Write blocks of a store: those that are missing, or some."""
    with Store.open(path, write=True) as store:
        for block in np.flatnonzero(~store.done()).tolist() if blocks is None else blocks:
            store.write(block, rows_of(store.layout.rows(block)))


def make(
    path: Path, count: int | None = 3, n: int = N, dtype: str = "float32", blocks: list[int] | None = None
) -> Path:
    """Make a store of so many shards, or (None) in one file, and fill it, or some blocks of it."""
    words = {"fingerprint": FINGERPRINT, "facts": FACTS, "labels": labels_of(n), "indices": indices_of(n)}
    if count is None:
        create(path, layout_of(n, dtype), arrays=ARRAYS, **words)
    else:
        create_sharded(path, layout_of(n, dtype), count=count, arrays=ARRAYS, **words)
    fill(path, blocks)
    return path


def scanned(path: Path) -> np.ndarray:
    """Read all coordinates, verified."""
    with Store.open(path) as store:
        found = np.full((store.layout.n, store.layout.k), np.nan, dtype=np.float32)
        for where, part in store.scan():
            found[where] = part
    return found
