"""shards: several files are one store, grow, and are told apart; nothing is read that lies elsewhere."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from influence_cli.errors import InfluenceError
from influence_cli.precompute import fill_store as filling
from influence_cli.precompute import make_store
from influence_cli.runtime import disk
from influence_cli.store import shards
from influence_cli.store.header import check_shards
from influence_cli.store.layout import Layout
from influence_cli.store.shards import Shard, create_sharded, extend, remove_orphans
from influence_cli.store.store import Rows, Store
from tests.conftest import Command, edit
from tests.support.sharded_store import (
    ARRAYS,
    BLOCK,
    FACTS,
    FINGERPRINT,
    N,
    fill,
    indices_of,
    labels_of,
    layout_of,
    make,
    scanned,
)
from tests.support.sharded_store import rows_of as expected
from tests.support.small_project import flip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "influence.h5"


def grow(path: Path, n: int, count: int = 1, made_of: str = "def") -> None:
    """Make room for rows up to n."""
    extend(
        path,
        layout_of(n),
        count=count,
        fingerprint={"weights": made_of},
        labels=labels_of(n),
        indices=indices_of(n),
    )


def assert_whole(path: Path, n: int) -> None:
    """Check every row of a complete store, by our reader and through HDF5."""
    rows = expected(slice(0, n))
    np.testing.assert_array_equal(scanned(path), rows.coordinates)
    with Store.open(path) as store:
        assert store.done().all()
        assert not len(store.damaged())
        assert store.layout.n == n
        for name in ("losses", "outputs", "state"):
            np.testing.assert_array_equal(store.column(name), getattr(rows, name))
        np.testing.assert_array_equal(store.column("labels"), labels_of(n))
        np.testing.assert_array_equal(store.column("indices"), indices_of(n))
        np.testing.assert_array_equal(store.digests(), 100 + BLOCK * np.arange(store.layout.blocks))
        for name, values in ARRAYS.items():
            np.testing.assert_array_equal(store.array(name), values)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["coordinates"][:n], rows.coordinates)
        np.testing.assert_array_equal(file["losses"][:n], rows.losses)
        np.testing.assert_array_equal(file["labels"][:n], labels_of(n))
        assert file["flags"][()].tolist() == [1] * -(-n // BLOCK)


def shard_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.shards-*/*.h5"))


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_shards_are_read_as_one(path: Path, count: int) -> None:
    make(path, count)
    assert len(shard_files(path)) == min(count, 5)
    assert_whole(path, N)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rounded_rows_are_those_of_one_file(path: Path, dtype: str) -> None:
    make(path, 3, dtype=dtype)
    np.testing.assert_array_equal(scanned(path), scanned(make(path.with_name("one.h5"), None, dtype=dtype)))


def test_a_shard_is_filled_on_its_own(path: Path) -> None:
    make(path, 2, blocks=[])
    with Store.open(path) as store:
        files = store.shards
        assert not store.done().any()
    for file, blocks in files:
        with Store.open(file, write=True) as own:
            for block in blocks:
                own.write(block - blocks.start, expected(layout_of().rows(block)))
    assert_whole(path, N)


def test_the_curvature_and_the_summary_need_no_shard(path: Path) -> None:
    make(path)
    with Store.open(path, write=True) as store:
        store.write_summary(np.arange(4.0))
    shutil.rmtree(shard_files(path)[0].parent)
    with Store.open(path, rows=False) as store:
        np.testing.assert_array_equal(store.array("basis"), ARRAYS["basis"])
        np.testing.assert_array_equal(store.summary(), np.arange(4.0))


def test_the_main_file_stays_small(path: Path) -> None:
    layout = Layout(40_000, 100, 2, 4_000)
    labels, indices = np.zeros(layout.n, dtype=np.int64), np.arange(layout.n)
    words = {"fingerprint": FINGERPRINT, "facts": FACTS, "labels": labels, "indices": indices}
    create_sharded(path, layout, count=10, arrays={}, **words)
    assert path.stat().st_size < 100_000
    with Store.open(path) as store:
        assert store.size() > layout.n * layout.k * 4


@pytest.mark.parametrize("linked", [True, False])
def test_one_file_becomes_the_first_shard(path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    def fail(*_: object, **_how: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not linked:
        monkeypatch.setattr(os, "link", fail)
    make(path, None)
    before = path.stat().st_ino
    grow(path, 27, count=2)
    first, *others = shard_files(path)
    assert (first.stat().st_ino == before) == linked
    assert len(others) == 2
    with Store.open(path) as store:
        assert store.done().tolist() == [True] * 4 + [False] * 3, "the last block was not full"
        assert store.fingerprint == {"weights": "def"}
    fill(path)
    assert_whole(path, 27)


@pytest.mark.parametrize("count", [None, 1, 3, 5])
def test_a_store_grows_twice(path: Path, count: int | None) -> None:
    make(path, count)
    for n in (21, 34):
        grow(path, n, count=2)
        fill(path)
        assert_whole(path, n)


def test_an_incomplete_store_grows(path: Path) -> None:
    make(path, 2, blocks=[1, 3, 4])
    grow(path, 21)
    with Store.open(path) as store:
        assert store.done().tolist() == [False, True, False, True, False, False]
    fill(path)
    assert_whole(path, 21)


def test_a_store_of_one_block_that_is_not_full_keeps_no_row(path: Path) -> None:
    make(path, None, n=2)
    grow(path, 6)
    with Store.open(path) as store:
        assert not store.done().any()
    fill(path)
    assert_whole(path, 6)


def test_growth_that_is_cut_short_leaves_the_store_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path, None)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as broken:
        broken.setattr(shards, "_write_main", fail)
        with pytest.raises(OSError, match="gone"):
            grow(path, 27)
    assert_whole(path, N)
    grow(path, 27)
    assert len(list(path.parent.glob("*.shards-*"))) == 1, "what was begun is removed"
    fill(path)
    assert_whole(path, 27)


def test_a_missing_shard_is_named_with_its_rows(path: Path) -> None:
    make(path)
    file = shard_files(path)[1]
    file.unlink()
    with pytest.raises(InfluenceError, match=re.escape(f"{file.parent.name}/0001.h5, which held rows 4 to 11 of 18")):
        Store.open(path)


def test_shards_in_each_others_place_are_refused(path: Path) -> None:
    make(path, 5)
    first, second, *_ = shard_files(path)
    first.rename(first.with_suffix(".x"))
    second.rename(first)
    first.with_suffix(".x").rename(second)
    with pytest.raises(InfluenceError, match=r"0000\.h5 is a shard of another store.* rows 0 to 3"):
        Store.open(path)


def test_a_shard_of_another_store_is_refused(path: Path) -> None:
    make(path)
    other = make(path.with_name("other.h5"))
    shutil.copyfile(shard_files(other)[2], shard_files(path)[2])
    with pytest.raises(InfluenceError, match=r"0002\.h5 is a shard of another store"):
        Store.open(path)


def test_a_whole_store_in_the_place_of_a_shard_is_refused(path: Path) -> None:
    make(path)
    shutil.copyfile(make(path.with_name("other.h5"), None), shard_files(path)[0])
    with pytest.raises(InfluenceError, match="is a shard of another store"):
        Store.open(path)


def test_a_shard_that_is_no_store_is_refused(path: Path) -> None:
    make(path)
    shard_files(path)[1].write_bytes(b"no store at all")
    with pytest.raises(InfluenceError, match=r"0001\.h5 is not a readable HDF5 file"):
        Store.open(path)


@pytest.mark.parametrize(
    "elsewhere", ["../x.h5", "{folder}/x.h5", "x.h5", "a.shards-00000000/../../x.h5", "a.shards-00000000/x.h5", ""]
)
def test_a_header_that_names_a_file_elsewhere_is_refused(path: Path, elsewhere: str) -> None:
    other = make(path.with_name("x.h5"), None)
    with h5py.File(other) as file:
        own = format(int(file["header"].attrs["xxh3"]), "016x")
    shard = Shard(elsewhere.format(folder=path.parent), 0, 5, own)
    shards._write_main(path, layout_of(), FINGERPRINT, FACTS, ARRAYS, [shard])
    with pytest.raises(InfluenceError, match=f"{path.name} is damaged"):
        Store.open(path)


@pytest.mark.parametrize(
    "blocks", [[(0, 2), (2, 2)], [(0, 2), (3, 2)], [(0, 3), (2, 3)], [(0, 5), (5, 0)], [(0, 6)], [(0, -5)], []]
)
def test_a_header_whose_shards_are_not_all_blocks_once_is_refused(path: Path, blocks: list[tuple[int, int]]) -> None:
    make(path, 5)
    folder = shard_files(path)[0].parent.name
    with pytest.MonkeyPatch.context() as patched:
        found = [Shard(f"{folder}/{number:04d}.h5", *own, "0" * 16) for number, own in enumerate(blocks)]
        patched.setattr(h5py.VirtualLayout, "__setitem__", lambda *_: None)
        patched.setattr(h5py, "VirtualSource", lambda *_: [None] * 100)
        shards._write_main(path, layout_of(), FINGERPRINT, FACTS, ARRAYS, found)
    with pytest.raises(InfluenceError):
        Store.open(path)


def test_shards_of_a_header_are_one_behind_another() -> None:
    def shards_of(*places: tuple[int, int]) -> list[dict[str, object]]:
        names = [f"s.shards-00000000/{number:04d}.h5" for number in range(len(places))]
        return [
            {"file": name, "first": first, "blocks": count, "header": "0" * 16}
            for name, (first, count) in zip(names, places, strict=True)
        ]

    assert check_shards(shards_of((0, 2), (2, 3)), 5)
    # As many blocks as there are, but not each once, and not in order.
    for places in ([(0, 2), (1, 3)], [(1, 2), (2, 3)], [(2, 3), (0, 2)], [(0, 6), (6, -1)]):
        assert not check_shards(shards_of(*places), 5), places


def test_more_shards_than_files_may_be_open(path: Path) -> None:
    make(path, 30, n=120)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 40  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 50, limits[1]))
    try:
        np.testing.assert_array_equal(scanned(path), expected(slice(0, 120)).coordinates)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_nothing_is_removed_where_the_store_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is no list of the shards in use: all of them would be removed."""
    make(path)

    def fail(*_: object) -> None:
        raise InfluenceError("cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "open_file", fail)
        remove_orphans(path)
    assert_whole(path, N)


def test_only_folders_of_this_store_are_removed(path: Path) -> None:
    make(path)
    used = shard_files(path)[0].parent
    own = path.with_name("influence.h5.shards-0123abcd")
    others = [
        path.with_name(name)
        for name in (
            "influence.hdf5.shards-0123abcd",
            "other.h5.shards-0123abcd",
            "influence.h5.shards-mine",
            "influence.h5.shards-0123abcde",
            "xinfluence.h5.shards-0123abcd",
        )
    ]
    for folder in (own, *others):
        folder.mkdir()
        (folder / "0000.h5").touch()
    remove_orphans(path)
    assert not own.exists()
    assert all((folder / "0000.h5").exists() for folder in (used, *others))
    assert_whole(path, N)


def test_a_new_store_replaces_one_in_shards_and_its_shards(path: Path) -> None:
    make(path, 5)
    before = shard_files(path)[0].parent
    make(path, 2)
    assert not before.exists()
    assert len(shard_files(path)) == 2
    assert_whole(path, N)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first position of every block that is computed."""
    rows, found = filling.block_rows, []

    def note(*words: object) -> Rows:
        result = rows(*words)
        found.append(int(words[4][0]))
        return result

    monkeypatch.setattr(filling, "block_rows", note)
    return found


def test_a_damaged_block_of_a_shard_is_found_and_mended(
    tiny: Path, influence: Command, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    monkeypatch.setattr(make_store, "create", partial(create_sharded, count=3))
    influence("gradients", "-q", cwd=tiny)
    file = shard_files(tiny / "influence.h5")[1]
    with h5py.File(tiny / "influence.h5") as whole, h5py.File(file) as own:
        before, place = whole["coordinates"][()], own["coordinates"].id.get_offset()
    flip(file, place + 5)
    computed.clear()
    told = influence("gradients", "--fsck", cwd=tiny, code=2).err
    assert "1 damaged blocks: 1" in told
    assert "rank" not in influence("rank", "0", cwd=tiny, code=2).out
    influence("gradients", "--repair", cwd=tiny)
    assert computed == [8]
    with h5py.File(tiny / "influence.h5") as whole:
        np.testing.assert_array_equal(whole["coordinates"][()], before)


def add_image(project: Path, name: str) -> None:
    pixels = np.random.default_rng(len(name)).integers(0, 250, (8, 8)).astype(np.uint8)
    Image.fromarray(pixels).save(project / "train" / name)


def test_images_at_the_end_are_all_that_is_computed(tiny: Path, influence: Command, computed: list[int]) -> None:
    influence("gradients", cwd=tiny)
    assert computed == [0, 8, 16]
    for number in range(3):
        add_image(tiny, f"c/9{number}.png")
    told = influence("gradients", cwd=tiny).err
    assert computed == [0, 8, 16, 24], "the blocks of before stay"
    assert "adding 3 training examples that come after its 24; the other gradients are kept" in told
    assert "set train.n=24" in told
    assert "wrote 1 of 4 blocks" in told
    told = influence("gradients", cwd=tiny).err
    assert len(computed) == 4
    assert "that come after" not in told
    add_image(tiny, "c/99.png")
    influence("gradients", cwd=tiny)
    assert computed[4:] == [24], "the last block was not full"
    rows = influence("rank", "0", "--all", "--format", "csv", cwd=tiny).out.splitlines()
    assert len(rows) == 1 + 28
    influence("gradients", "--fsck", cwd=tiny)


def test_the_rows_that_have_come_are_those_of_the_curvature_of_before(tiny: Path, influence: Command) -> None:
    """Without a basis they are what a store made anew has, to the byte."""
    edit(tiny, "gradients:", "curvature: {method: identity}\ngradients:")
    influence("gradients", "-q", cwd=tiny)
    add_image(tiny, "c/99.png")
    influence("gradients", "-q", cwd=tiny)
    with h5py.File(tiny / "influence.h5") as file:
        grown = file["coordinates"][:25]
    influence("gradients", "-q", "--overwrite", cwd=tiny)
    assert not shard_files(tiny / "influence.h5")
    with h5py.File(tiny / "influence.h5") as file:
        np.testing.assert_array_equal(file["coordinates"][:25], grown)


def test_images_in_the_middle_are_refused(tiny: Path, influence: Command) -> None:
    influence("gradients", "-q", cwd=tiny)
    before = (tiny / "influence.h5").read_bytes()
    add_image(tiny, "a/99.png")
    told = influence("gradients", cwd=tiny, code=2).err
    assert "influence.h5" in told
    assert "--overwrite" in told
    assert (tiny / "influence.h5").read_bytes() == before


def test_an_image_at_the_end_and_another_that_has_changed_are_refused(tiny: Path, influence: Command) -> None:
    influence("gradients", "-q", cwd=tiny)
    add_image(tiny, "c/99.png")
    with (tiny / "train" / "a" / "000.png").open("ab") as file:
        file.write(b" ")
    assert "the training files" in influence("gradients", cwd=tiny, code=2).err


def test_a_disk_without_room_for_more_rows_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)

    def full(*_: object) -> None:
        raise InfluenceError("no room")

    monkeypatch.setattr(disk, "check_space", full)
    with pytest.raises(InfluenceError, match="no room"):
        grow(path, 27)
    assert_whole(path, N)
    assert len(shard_files(path)) == 3
