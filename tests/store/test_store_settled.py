"""Parts of the fingerprint that are written behind a store later on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_cli.store.layout import Layout, create
from influence_cli.store.shards import create_sharded
from influence_cli.store.store import READ, Rows, Store


def filled(path: Path, *, shards: int) -> Path:
    """Make a store of two blocks."""
    layout = Layout(6, 3, 2, 4)
    what = {"fingerprint": {"code": "old"}, "facts": {"batch": 4, "rows": True}, "arrays": {}}
    rows = {"labels": np.zeros(6, dtype=np.int64), "indices": np.arange(6)}
    if shards:
        create_sharded(path, layout, count=shards, **what, **rows)
    else:
        create(path, layout, **what, **rows)
    with Store.open(path, write=True) as store:
        for block, count in ((0, 4), (1, 2)):
            values = np.arange(3 * count, dtype=np.float32).reshape(count, 3) + 100 * block
            state = np.full(count, READ, dtype=np.uint8)
            store.write(block, Rows(values, np.zeros(count), np.zeros((count, 2)), state, 7))
    return path


@pytest.mark.parametrize("shards", [0, 2])
def test_the_last_parts_count_and_the_sealed_file_stays(tmp_path: Path, shards: int) -> None:
    path = filled(tmp_path / "store.h5", shards=shards)
    before = path.read_bytes()
    for parts in ({"code": "newer and longer"}, {"code": "new"}):
        with Store.open(path, write=True, rows=False) as store:
            store.settle(parts)
        with Store.open(path) as store:
            assert store.settled == parts
            assert store.fingerprint == {"code": "old"}
            assert store.some_rows([5, 1]).tolist() == [[103, 104, 105], [3, 4, 5]]
            assert not len(store.damaged())
    assert path.read_bytes()[: len(before)] == before


@pytest.mark.parametrize("damage", ["half", "flipped", "other"])
def test_a_line_that_is_not_whole_counts_as_none(tmp_path: Path, damage: str) -> None:
    path = filled(tmp_path / "store.h5", shards=0)
    size = path.stat().st_size
    with Store.open(path, write=True) as store:
        store.settle({"code": "new"})
    content = path.read_bytes()
    tail = {"half": content[size:-9], "flipped": content[size:].replace(b"new", b"nex"), "other": b"\xff\n" * 20}[
        damage
    ]
    path.write_bytes(content[:size] + tail)
    with Store.open(path) as store:
        assert store.settled == {}
        assert store.done().all()
