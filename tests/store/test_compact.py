"""compact: one file of many, the same bytes, and nothing lost on the way."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest

from influence_cli.errors import InfluenceError, Stopped
from influence_cli.runtime import disk
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.compact import compact
from influence_cli.store.store import Store
from tests.store.test_shards import assert_whole, shard_files
from tests.support.sharded_store import N, make, scanned
from tests.support.small_project import flip

COLUMNS = ("coordinates", "scales", "losses", "outputs", "labels", "indices", "state")
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "influence.h5"


def columns(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][:N].tobytes() for name in COLUMNS if name in file}


def others(path: Path) -> list[str]:
    """List what lies beside the store."""
    return sorted(file.name for file in path.parent.iterdir() if file != path and file.suffix != ".lock")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_rows_keep_their_bytes(path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(path, 3, dtype=dtype)
    with Store.open(path, write=True) as store:
        store.write_summary(np.arange(4.0))
    before, rows = columns(path), scanned(path)
    compact(path, Terminal())
    assert columns(path) == before
    np.testing.assert_array_equal(scanned(path), rows)
    with Store.open(path) as store:
        assert not store.shards
        np.testing.assert_array_equal(store.summary(), np.arange(4.0))
    assert others(path) == []
    assert "merged 3 shards into" in capsys.readouterr().err


def test_one_file_is_what_it_would_have_been(path: Path) -> None:
    compact(make(path), Terminal(quiet=True))
    assert_whole(path, N)
    other = make(path.with_name("one.h5"), None)
    with h5py.File(path) as own, h5py.File(other) as wanted:
        assert own.keys() == wanted.keys()
        for name in own.keys() - {"header"}:
            np.testing.assert_array_equal(own[name][()], wanted[name][()], err_msg=name)


def test_a_second_call_has_nothing_to_do(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact(make(path), Terminal(quiet=True))
    before = path.stat()
    compact(path, Terminal())
    assert capsys.readouterr().err == f"{path} is already one file\n"
    assert path.stat() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_it_goes_on_where_it_was_stopped(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    make(path)
    own, copied = Store.copy, list[int]()

    def copy(self: Store, block: int, source: Store) -> None:
        if len(copied) == 2:
            raise error
        own(self, block, source)
        copied.append(block)

    monkeypatch.setattr(Store, "copy", copy)
    with pytest.raises(Stopped if error is KeyboardInterrupt else error):
        compact(path, Terminal(quiet=True))
    assert_whole(path, N)
    copied.clear()
    copied.append(-1)  # one more than two are left
    monkeypatch.setattr(Store, "copy", lambda self, block, source: (own(self, block, source), copied.append(block)))
    compact(path, Terminal(quiet=True))
    assert copied == [-1, 2, 3, 4]
    assert others(path) == []
    assert_whole(path, N)


@pytest.mark.parametrize("rest", ["of another store", "truncated"])
def test_what_another_call_has_begun_of_something_else_is_made_anew(path: Path, rest: str) -> None:
    make(path)
    merged = make(path.with_name("influence.h5.merged"), None, n=10)
    if rest == "truncated":
        merged.write_bytes(merged.read_bytes()[:900])
    compact(path, Terminal(quiet=True))
    assert others(path) == []
    assert_whole(path, N)


def test_damage_is_not_copied(path: Path) -> None:
    make(path)
    file = shard_files(path)[1]
    with h5py.File(file) as own:
        place = own["coordinates"].id.get_offset()
    flip(file, place + 3)
    before = path.read_bytes()
    with pytest.raises(InfluenceError, match=r"0001\.h5 is damaged: the checksum of block 1 does not match"):
        compact(path, Terminal(quiet=True))
    assert path.read_bytes() == before
    assert len(shard_files(path)) == 3


def test_a_store_that_is_not_complete_is_refused(path: Path) -> None:
    make(path, blocks=[0, 1, 2, 4])
    with pytest.raises(InfluenceError, match="is not complete"):
        compact(path, Terminal(quiet=True))
    assert len(shard_files(path)) == 3


def test_a_disk_without_room_is_told_before_anything_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    with monkeypatch.context() as full:
        full.setattr(disk.shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 0))
        with pytest.raises(InfluenceError, match="more is needed"):
            compact(path, Terminal(quiet=True))
    assert_whole(path, N)
    assert len(others(path)) == 1


def test_a_store_in_use_is_left_alone(path: Path) -> None:
    make(path)
    with Store.open(path, write=True), pytest.raises(InfluenceError, match="in use"):
        compact(path, Terminal(quiet=True))
    assert_whole(path, N)
