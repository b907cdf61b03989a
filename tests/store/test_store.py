"""store: what is written comes back, damage never passes for data, and any HDF5 tool can read the file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.runtime.disk import check_space
from influence_cli.store import scan
from influence_cli.store.encoding import decode, encode, room_for
from influence_cli.store.layout import Layout, create
from influence_cli.store.scan import in_order
from influence_cli.store.store import READ, SKIPPED, Rows, Store
from tests.support import fork_server
from tests.support.sharded_store import scanned

# 10 rows in blocks of 4: the last block has 2 rows of padding.
N, K, CLASSES, BLOCK = 10, 3, 2, 4
LABELS = np.arange(N) % CLASSES
INDICES = np.arange(N) * 3
SPECTRUM = np.array([3.0, 2.0, 0.5])
BASIS = np.arange(15, dtype=np.float32).reshape(5, 3) - 7
FINGERPRINT = {"weights": "abc", "versions": "torch 2 torchvision 0"}
FACTS = {"parameters": 5, "trace": 5.5}
DIGESTS = [2**63 + 11, 5, 7]


def example_rows(block: int, layout: Layout | None = None, seed: int = 0) -> Rows:
    """Make a block of numbers of very different sizes."""
    layout = layout or Layout(N, K, CLASSES, BLOCK)
    generator = np.random.default_rng([seed, block])
    where = layout.rows(block)
    count = where.stop - where.start
    size = 10.0 ** generator.integers(-6, 6, (count, 1))
    return Rows(
        coordinates=(generator.normal(size=(count, layout.k)) * size).astype(np.float32),
        losses=generator.random(count).astype(np.float32),
        outputs=generator.normal(size=(count, layout.classes)).astype(np.float32),
        state=np.where(generator.random(count) < 0.2, SKIPPED, READ).astype(np.uint8),
        digest=DIGESTS[block % len(DIGESTS)],
    )


def make(path: Path, dtype: str = "float32", fill: bool = True, arrays: Mapping[str, np.ndarray] | None = None) -> Path:
    layout = Layout(N, K, CLASSES, BLOCK, dtype)
    arrays = {"spectrum": SPECTRUM, "basis": BASIS} if arrays is None else arrays
    create(path, layout, fingerprint=FINGERPRINT, facts=FACTS, labels=LABELS, indices=INDICES, arrays=arrays)
    if fill:
        with Store.open(path, write=True) as store:
            for block in range(layout.blocks):
                store.write(block, example_rows(block))
            store.write_summary(np.arange(K + 1) / 3)
    return path


def flip(path: Path, name: str, at: int) -> None:
    """Change one bit of a data set's own bytes, past HDF5."""
    with h5py.File(path) as file:
        place = file[name].id.get_offset() + at
    flip_byte(path, place)


def flip_byte(path: Path, place: int) -> None:
    with path.open("r+b") as raw:
        raw.seek(place)
        old = raw.read(1)[0]
        raw.seek(place)
        raw.write(bytes([old ^ 1]))


# How far a stored row may be from what was written, in units of its largest number: half a step.
HALF_STEP = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.5 / 127}


def assert_near(found: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    """Require every row within half a step of its scale, however large or small it is."""
    assert found.dtype == np.float32
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(found - wanted) <= largest * HALF_STEP[dtype] * 1.001).all()


def all_of(part: str) -> np.ndarray:
    return np.concatenate([getattr(example_rows(block), part) for block in range(3)])


def error_of(path: Path) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        scanned(path)
    return caught.value


@pytest.mark.parametrize("dtype", HALF_STEP)
def test_everything_written_comes_back(tmp_path: Path, dtype: str) -> None:
    path = make(tmp_path / "s.h5", dtype)
    coordinates = all_of("coordinates")
    found = scanned(path)
    assert_near(found, coordinates, dtype)
    assert np.array_equal(found, coordinates) == (dtype == "float32")
    with Store.open(path) as store:
        assert store.layout == Layout(N, K, CLASSES, BLOCK, dtype)
        assert store.fingerprint == FINGERPRINT
        assert store.facts == FACTS
        assert np.array_equal(store.column("losses"), all_of("losses"))
        assert np.array_equal(store.column("outputs"), all_of("outputs"))
        assert np.array_equal(store.column("state"), all_of("state"))
        assert np.array_equal(store.column("labels"), LABELS)
        assert np.array_equal(store.column("indices"), INDICES)
        assert store.digests().tolist() == DIGESTS
        assert np.array_equal(store.array("spectrum"), SPECTRUM)
        assert np.array_equal(store.array("basis"), BASIS)
        assert store.array("eigenvectors") is None
        assert np.array_equal(store.summary(), np.arange(K + 1) / 3)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 9),
    block=st.integers(1, 50),
    dtype=st.sampled_from(list(HALF_STEP)),
    group=st.sampled_from([1, 200, 10**6]),
    part=st.sampled_from([1, 100, 10**6]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_any_shape_comes_back_in_order(
    n: int, k: int, block: int, dtype: str, group: int, part: int, threads: int
) -> None:
    layout = Layout(n, k, 3, block, dtype)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "s.h5"
        patch.setattr(scan, "PIECE_BYTES", group)
        patch.setattr(scan, "PART_BYTES", part)
        patch.setattr(scan, "ROOM_ROWS", 2)
        create(path, layout, fingerprint={}, facts={}, labels=np.zeros(n, int), indices=np.arange(n), arrays={})
        with Store.open(path, write=True) as store:
            for number in reversed(range(layout.blocks)):
                store.write(number, example_rows(number, layout))
            scanned = [(where, rows.copy()) for where, rows in store.scan()]
            mapped = list(store.map(lambda where, rows: (where, rows.copy()), threads=threads))
    wanted = np.concatenate([example_rows(number, layout).coordinates for number in range(layout.blocks)])
    for parts in (scanned, mapped):
        assert [where.start for where, _ in parts] == [0, *[where.stop for where, _ in parts[:-1]]]
        assert parts[-1][0].stop == n
        assert_near(np.concatenate([rows for _, rows in parts]), wanted, dtype)
    assert np.array_equal(*[np.concatenate([rows for _, rows in parts]) for parts in (scanned, mapped)])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_of_zeros_are_kept(tmp_path: Path, dtype: str) -> None:
    path = make(tmp_path / "s.h5", dtype, fill=False)
    empty = Rows(np.zeros((4, K)), np.zeros(4), np.zeros((4, CLASSES)), np.full(4, SKIPPED), 0)
    with Store.open(path, write=True) as store:
        for block in range(3):
            store.write(block, empty if block < 2 else example_rows(2))
    assert not scanned(path)[:8].any()


def test_int8_rounds_to_the_nearest_of_127_steps_either_way() -> None:
    rows = np.array([[127.0, -126.6, 0.4, 63.5, 64.5], [-2.0, 1.0, 0.0, 0.0, 1.9]], dtype=np.float32)
    found = encode(rows, "int8")
    assert found["coordinates"].dtype == np.int8
    assert found["coordinates"].tolist() == [[127, -127, 0, 64, 64], [-127, 64, 0, 0, 121]]
    assert np.array_equal(found["scales"], np.array([1.0, 2 / 127], dtype=np.float32))


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_never_passes_for_one_that_is(dtype: str, bad: float) -> None:
    rows = np.array([[1.0, 2.0, 3.0], [1.0, bad, 3.0]], dtype=np.float32)
    found = encode(rows, dtype)
    if dtype != "float32":
        found["coordinates"] = decode(found["coordinates"], found["scales"], room_for(2, 3))
    assert not np.isfinite(found["coordinates"][1]).all()
    assert np.isfinite(found["coordinates"][0]).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("size", [1e-45, 1e-43, 1e-40, 1e-38, 3e38])
def test_the_smallest_and_the_largest_numbers_keep_their_size(dtype: str, size: float) -> None:
    rows = np.array([[size, -size, size / 2]], dtype=np.float32)
    found = encode(rows, dtype)
    back = decode(found["coordinates"], found["scales"], room_for(1, 3))
    # So small a scale is rounded to a multiple of 1e-45: the row is off by as much a step.
    assert (np.abs(back - rows) <= max(size / 127, 200e-45)).all()


def test_the_last_block_is_padded_with_zeros(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    with h5py.File(path) as file:
        for name in ("coordinates", "losses", "outputs", "labels", "indices", "state"):
            assert file[name].shape[0] == 12, name
            assert not file[name][N:].any(), name
        assert file["flags"].shape == file["checksums"].shape == file["inputs"].shape == (3,)
    assert len(scanned(path)) == N


def test_a_block_is_done_only_after_its_write(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", fill=False)
    with Store.open(path, write=True) as store:
        assert store.done().tolist() == [False, False, False]
        store.write(1, example_rows(1))
        assert store.done().tolist() == [False, True, False]
    with Store.open(path) as store:
        assert store.done().tolist() == [False, True, False]
        assert store.damaged().tolist() == []
        assert store.summary() is None
        with pytest.raises(InfluenceError, match="not complete") as caught:
            next(store.scan())
        assert caught.value.hint == "influence gradients finishes it"


def test_a_store_named_from_a_folder_is_written_while_another_is_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is written while the next is read, and a data set is read in the folder of its config."""
    monkeypatch.chdir(tmp_path)
    make(Path("s.h5"), fill=False)
    (tmp_path / "other").mkdir()
    with Store.open(Path("s.h5"), write=True) as store, contextlib.chdir(tmp_path / "other"):
        for block in range(store.layout.blocks):
            store.write(block, example_rows(block))
    with Store.open(Path("s.h5")) as store:
        assert store.done().all()


def test_clear_forgets_blocks_and_the_summary(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    with Store.open(path, write=True) as store:
        store.clear(np.array([0, 2]))
        assert store.done().tolist() == [False, True, False]
        assert store.summary() is None
        store.write(2, example_rows(2))
        store.write(0, example_rows(0))
    assert np.array_equal(scanned(path), all_of("coordinates"))


@pytest.mark.parametrize("dtype", HALF_STEP)
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    one, two = make(tmp_path / "1.h5", dtype), make(tmp_path / "2.h5", dtype, fill=False)
    with Store.open(two, write=True) as store:
        for block in (2, 0, 1):
            store.write(block, example_rows(block, seed=9))
            store.write(block, example_rows(block))
        store.write_summary(np.arange(K + 1) / 3)
    assert one.read_bytes() == two.read_bytes()


# The size of a row in bytes, to find a row's place in a data set.
ROW = {"coordinates": 12, "losses": 4, "outputs": 8, "labels": 8, "indices": 8, "state": 1}


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("name", ROW)
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_flipped_bit_of_a_row_names_the_block_and_the_fix(tmp_path: Path, name: str, block: int, end: str) -> None:
    path = make(tmp_path / "s.h5")
    # The last byte of the last block is padding: it counts as well.
    flip(path, name, block * BLOCK * ROW[name] if end == "first" else (block + 1) * BLOCK * ROW[name] - 1)
    error = error_of(path)
    assert f"is damaged: the checksum of block {block} does not match" in error.message
    assert str(path) in error.message
    assert "--repair" in error.hint
    with Store.open(path) as store:
        assert store.damaged().tolist() == [block]


@pytest.mark.parametrize(("name", "width"), [("checksums", 8), ("inputs", 8)])
@pytest.mark.parametrize("block", [0, 2])
def test_a_flipped_bit_of_what_guards_a_block_is_found(tmp_path: Path, name: str, width: int, block: int) -> None:
    path = make(tmp_path / "s.h5")
    flip(path, name, block * width)
    assert f"the checksum of block {block} does not match" in error_of(path).message


@pytest.mark.parametrize(
    ("dtype", "name", "width"),
    [("float16", "coordinates", 6), ("float16", "scales", 4), ("int8", "coordinates", 3), ("int8", "scales", 4)],
)
def test_a_flipped_bit_of_a_rounded_row_is_found(tmp_path: Path, dtype: str, name: str, width: int) -> None:
    path = make(tmp_path / "s.h5", dtype)
    flip(path, name, 5 * width)
    assert "the checksum of block 1 does not match" in error_of(path).message


def test_swapped_blocks_are_found(tmp_path: Path) -> None:
    """A checksum holds for one place: rows that are whole but lie elsewhere do not pass."""
    path = make(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        for name in (*ROW, "checksums", "inputs"):
            size = 1 if name in ("checksums", "inputs") else BLOCK
            first, second = file[name][:size], file[name][size : 2 * size]
            file[name][:size], file[name][size : 2 * size] = second, first
    assert "block 0" in error_of(path).message


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_flipped_bit_of_the_header_is_found_on_opening(tmp_path: Path, at: int) -> None:
    path = make(tmp_path / "s.h5")
    with h5py.File(path) as file:
        size = len(file["header"])
    flip(path, "header", at % size)
    with pytest.raises(InfluenceError, match="the checksum of its header does not match") as caught:
        Store.open(path)
    assert "--overwrite" in caught.value.hint


@pytest.mark.parametrize("name", ["spectrum", "basis"])
def test_a_flipped_bit_of_a_side_array_is_found_with_a_fix_that_can_work(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s.h5")
    flip(path, name, 9)
    with Store.open(path) as store, pytest.raises(InfluenceError, match=f"the checksum of its {name} does") as caught:
        store.array(name)
    # It is part of no block: to compute blocks again leaves it as it is.
    assert "--overwrite" in caught.value.hint
    assert "--repair" not in caught.value.hint


@pytest.mark.parametrize("name", ["summary", "summary_xxh3"])
def test_a_flipped_bit_of_the_summary_forgets_it(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s.h5")
    flip(path, name, 3)
    with Store.open(path) as store:
        assert store.summary() is None


SIDE = {
    "spectrum": SPECTRUM,
    "layers/layer1.0.conv1/q_in": BASIS,
    "layers/layer1.0.conv1/q_out": BASIS.T,
    "layers/fc/kept": np.array([True, False]),
    "none": np.zeros((0, 4), dtype=np.float32),
    "half": np.ones((2, 3), dtype=np.float16),
    "number": np.float64(2.5),
}


def test_side_arrays_have_any_name_and_shape(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", arrays=SIDE)
    with Store.open(path) as store:
        assert store.names() == sorted(SIDE)
        assert store.names("layers/") == [
            f"layers/{name}" for name in ("fc/kept", "layer1.0.conv1/q_in", "layer1.0.conv1/q_out")
        ]
        assert store.names("nothing") == []
        for name, values in SIDE.items():
            found = store.array(name)
            assert found.dtype == values.dtype
            assert found.shape == values.shape
            assert np.array_equal(found, values)
        # Neither a group nor what is no side array is one.
        assert store.array("layers") is None
        assert store.array("labels") is None
    assert np.array_equal(scanned(path), all_of("coordinates"))
    with h5py.File(path) as file:
        assert np.array_equal(file["layers/layer1.0.conv1/q_out"], BASIS.T)


@pytest.mark.parametrize("name", ["labels", "header", "scales", "coordinates/one"])
def test_a_side_array_cannot_take_the_place_of_the_rows(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be called {name}"):
        make(tmp_path / "s.h5", arrays={name: SPECTRUM})
    assert list(tmp_path.iterdir()) == []


def test_a_side_array_is_the_file_itself_and_writing_to_it_stays_in_memory(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", arrays={"basis": np.ones((1000, 1000), dtype=np.float32)})
    before = path.read_bytes()
    tracemalloc.start()
    with Store.open(path) as store:
        basis = store.array("basis")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < basis.nbytes / 4
    torch.from_numpy(basis)[0] = 7
    assert basis[0, 0] == 7
    assert basis[1:].min() == 1
    assert path.read_bytes() == before


def test_what_is_mapped_outlives_the_store_but_its_lock_does_not(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    with Store.open(path) as store:
        basis, (_, rows) = store.array("basis"), next(store.scan())
    with Store.open(path, write=True) as store:
        store.clear(np.arange(3))
    assert np.array_equal(basis, BASIS)
    assert np.array_equal(rows, all_of("coordinates"))


def test_a_store_with_many_side_arrays_guards_what_lies_between_them(tmp_path: Path) -> None:
    """The seal names every place between data sets: with many it is larger than 4 kB."""
    arrays = {f"layers/{number}/q": np.full(3, number) for number in range(400)}
    path = make(tmp_path / "s.h5", arrays=arrays)
    with Store.open(path) as store:
        assert store.names("layers/") == sorted(arrays)
        assert all(np.array_equal(store.array(name), values) for name, values in arrays.items())
        assert store.damaged().tolist() == []
    with h5py.File(path) as file:
        assert file.userblock_size > 4096
        end = file["layers/399/q"].id.get_offset()
    seal = path.read_bytes().rstrip(b"\0").index(b"\n", 100)
    assert seal > 4096
    for place in (5000, seal, end - 1):
        flip_byte(path, place)
        with pytest.raises(InfluenceError, match="is damaged"):
            Store.open(path)
        flip_byte(path, place)
    Store.open(path).__exit__(None, None, None)


@pytest.mark.parametrize(("k", "at"), [(2**14, 0), (8, None)])
def test_many_bytes_of_coordinates_begin_at_a_large_page(tmp_path: Path, k: int, at: int | None) -> None:
    layout = Layout(512, k, 2, 64)
    create(tmp_path / "s.h5", layout, fingerprint={}, facts={}, labels=np.zeros(512), indices=np.arange(512), arrays={})
    with h5py.File(tmp_path / "s.h5") as file:
        place = file["coordinates"].id.get_offset()
    assert place % 64 == 0
    assert at is None or place % 2**21 == at


@pytest.mark.parametrize("dtype", HALF_STEP)
def test_a_store_without_coordinates_holds_the_rest(tmp_path: Path, dtype: str) -> None:
    path, layout = tmp_path / "s.h5", Layout(N, 0, CLASSES, BLOCK, dtype)
    create(path, layout, fingerprint={}, facts={}, labels=LABELS, indices=INDICES, arrays={"layers/fc/q": BASIS})
    with Store.open(path, write=True) as store:
        with pytest.raises(InfluenceError, match="not complete"):
            next(store.scan())
        for block in range(layout.blocks):
            store.write(block, example_rows(block, layout))
        store.write_summary(np.array([1.5]))
    with Store.open(path) as store:
        assert store.layout == layout
        assert np.array_equal(store.column("labels"), LABELS)
        assert np.array_equal(
            store.column("outputs"), np.concatenate([example_rows(b, layout).outputs for b in range(3)])
        )
        assert np.array_equal(store.array("layers/fc/q"), BASIS)
        assert store.summary().tolist() == [1.5]
        assert store.damaged().tolist() == []
        # Every row is there, and empty.
        for parts in (list(store.scan()), list(store.map(lambda where, rows: (where, rows)))):
            assert [(where, rows.shape) for where, rows in parts] == [(slice(0, N), (N, 0))]
            assert parts[0][1].dtype == np.float32
    flip(path, "losses", 4 * BLOCK)
    assert "block 1 does not match" in error_of(path).message
    with Store.open(path) as store:
        assert store.damaged().tolist() == [1]


FUZZ = """
import os, signal, sys
from collections import Counter
from pathlib import Path

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.store.store import Store

path, places = Path(sys.argv[1]), [int(word) for word in sys.argv[2].split(",")]


def everything():
    with Store.open(path) as store:
        summary = store.summary()
        numbers = [part.copy() for _, part in store.scan()]
        numbers += [store.column(name) for name in ("losses", "outputs", "labels", "indices", "state")]
        numbers += [store.array("spectrum"), store.array("basis")]
        if summary is not None:
            numbers.append(summary)
        return [store.layout, store.fingerprint, store.facts, [(x.tolist() if x is not None else x) for x in numbers]]


def outcome():
    try:
        found = everything()
    except InfluenceError as error:
        return "an error"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    whole = found[:3] == good[:3] and found[3] in (good[3], good[3][:-1])
    return "no change" if whole else "OTHER NUMBERS"


raw, good, seen = path.read_bytes(), everything(), {}
for place in places:
    changed = bytearray(raw)
    changed[place] ^= 1
    path.write_bytes(changed)
    # HDF5 itself can crash on damaged metadata; each try has a process of its own.
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        os.write(there, outcome().encode()[:500])
        os._exit(0)
    os.close(there)
    said = os.read(here, 1000).decode() or "a crash"
    os.close(here)
    os.waitpid(child, 0)
    seen.setdefault(said, []).append(place)
for said, at in seen.items():
    print(len(at), said, at[:3])
"""


@pytest.mark.slow  # region by region: tests/store/test_store_faults.py
def test_a_flipped_bit_outside_the_data_sets_is_an_error(tmp_path: Path) -> None:
    """Also in HDF5's own records of names, types and places, which lie outside the data sets."""
    path = make(tmp_path / "s.h5")
    inside = np.zeros(path.stat().st_size, dtype=bool)
    with h5py.File(path) as file:
        for values in file.values():
            start = values.id.get_offset()
            inside[start : start + values.nbytes] = True
    # Bytes of zero are mostly reserved space.
    outside = np.flatnonzero(~inside & (np.frombuffer(path.read_bytes(), dtype=np.uint8) != 0))
    chosen = np.random.default_rng(0).choice(outside, min(len(outside), 250), replace=False)
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), ",".join(map(str, chosen))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes = [line.split(maxsplit=1)[1].partition(" [")[0] for line in done.stdout.splitlines()]
    assert set(outcomes) == {"an error"}, done.stdout


# Several pieces for several threads: 40 blocks of 8 rows, 20 kB each.
WIDE = Layout(317, 640, 2, 8)


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a store that is mapped in pieces of up to 2 blocks, and worked on a block at a time."""
    monkeypatch.setattr(scan, "PIECE_BYTES", 60_000)
    monkeypatch.setattr(scan, "PART_BYTES", 20_480)
    path = tmp_path / "wide.h5"
    labels, indices = np.zeros(WIDE.n, int), np.arange(WIDE.n)
    create(path, WIDE, fingerprint={}, facts={}, labels=labels, indices=indices, arrays={})
    with Store.open(path, write=True) as store:
        for block in range(WIDE.blocks):
            store.write(block, example_rows(block, WIDE))
    return path


def scan_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("scan")]


@pytest.mark.parametrize("threads", [None, 1, 2, 3])
def test_map_gives_the_same_bits_whatever_the_number_of_threads(wide: Path, threads: int | None) -> None:
    s_test = torch.randn(10, WIDE.k, generator=torch.Generator().manual_seed(0))

    def product(where: slice, rows: np.ndarray) -> tuple[slice, torch.Tensor]:
        return where, s_test @ torch.from_numpy(rows).T

    with Store.open(wide) as store:
        first, again = list(store.map(product, threads=1)), list(store.map(product, threads=threads))
        rows = torch.from_numpy(np.concatenate([part for _, part in store.scan()]))
    assert [where for where, _ in first] == [where for where, _ in again] == [WIDE.rows(b) for b in range(WIDE.blocks)]
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(first, again, strict=True))
    values = torch.cat([part for _, part in first], dim=1)
    torch.testing.assert_close(values, s_test @ rows.T, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_map_of_some_blocks_reads_and_verifies_these_alone(tmp_path: Path, dtype: str) -> None:
    path = make(tmp_path / "s.h5", dtype)
    whole = scanned(path)
    with Store.open(path) as store:
        assert store.checksums().shape == (3,)
        place = store._parts[0].places["coordinates"]
        found = list(store.map(lambda where, rows: (where, rows.copy()), blocks=[0, 2]))
    assert [where for where, _ in found] == [slice(0, 4), slice(8, 10)]
    assert all(np.array_equal(rows, whole[where]) for where, rows in found)
    content = bytearray(path.read_bytes())
    content[place.start + 5 * place.row_bytes] ^= 1  # in block 1
    path.write_bytes(content)
    with Store.open(path) as store:
        assert len(list(store.map(lambda *_: None, blocks=[0, 2]))) == 2
        with pytest.raises(InfluenceError, match="block 1"):
            list(store.map(lambda *_: None, blocks=[1]))


def test_map_works_on_several_pieces_at_one_time(wide: Path) -> None:
    meet = threading.Barrier(3, timeout=60)

    def wait(where: slice, rows: np.ndarray) -> str:
        if where.start < 3 * 16:
            meet.wait()
        return threading.current_thread().name

    with Store.open(wide) as store:
        assert len(set(store.map(wait, threads=3))) == 3


def test_torch_has_one_thread_and_no_autograd_inside_map_only(wide: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    s_test = torch.ones(1, WIDE.k, requires_grad=True)

    def inside(where: slice, rows: np.ndarray) -> tuple[int, bool]:
        return torch.get_num_threads(), (s_test @ torch.from_numpy(rows).T).requires_grad

    try:
        with Store.open(wide) as store:
            for found in store.map(inside, threads=2):
                assert found == (1, False)
                assert torch.get_num_threads() == 2
                assert torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


@pytest.mark.parametrize("error", [ValueError("no"), Stop(), KeyboardInterrupt()])
def test_an_error_in_work_ends_map_after_the_results_before_it(wide: Path, error: BaseException) -> None:
    done: list[int] = []

    def fail(where: slice, rows: np.ndarray) -> int:
        if where.start == 96:
            raise error
        return where.start

    with Store.open(wide) as store, pytest.raises(type(error)):
        done.extend(store.map(fail, threads=3))
    # 16 rows a piece: all pieces before that of row 96.
    assert done == list(range(0, 96, 8))
    assert scan_threads() == []


def test_damage_ends_map_and_names_the_block(wide: Path) -> None:
    flip(wide, "coordinates", 21 * 8 * 4 * WIDE.k + 5)
    seen: list[int] = []
    with (
        Store.open(wide) as store,
        pytest.raises(InfluenceError, match="checksum of block 21 does not match") as caught,
    ):
        seen.extend(store.map(lambda where, rows: where.start, threads=3))
    assert "--repair" in caught.value.hint
    assert scan_threads() == []


def test_damaged_rows_are_never_worked_on(wide: Path) -> None:
    flip(wide, "coordinates", 21 * 8 * 4 * WIDE.k + 5)
    worked: set[int] = set()
    with Store.open(wide) as store, pytest.raises(InfluenceError):
        list(store.map(lambda where, rows: worked.add(where.start), threads=2))
    assert 20 * 8 in worked
    assert 21 * 8 not in worked


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_whoever_stops_early_leaves_no_thread_and_little_done(wide: Path, stop: type[BaseException]) -> None:
    begun: list[int] = []

    def work(where: slice, rows: np.ndarray) -> int:
        begun.append(where.start)
        return where.start

    with Store.open(wide) as store:
        parts = store.map(work, threads=2)
        assert [next(parts) for _ in range(3)] == [0, 8, 16]
        if stop is GeneratorExit:
            parts.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                parts.throw(KeyboardInterrupt)
        assert scan_threads() == []
        # A few pieces ahead of the result that was taken, not all 20.
        assert len(begun) <= 2 * 7
        assert np.concatenate([part for _, part in store.scan()]).shape == (WIDE.n, WIDE.k)


SLOW = """
import sys, time
from pathlib import Path

from influence_cli.store.store import Store


def work(where, rows):
    print("in work", flush=True)
    time.sleep(0.2)


with Store.open(Path(sys.argv[1])) as store:
    try:
        for _ in store.map(work, threads=2):
            pass
    except KeyboardInterrupt:
        import threading

        # A thread that has finished its work may still be on its way out.
        for _ in range(100):
            if threading.active_count() == 1:
                break
            time.sleep(0.1)
        print("stopped, threads:", threading.active_count(), flush=True)
"""


def test_ctrl_c_ends_map(wide: Path) -> None:
    process = fork_server.Popen([sys.executable, "-c", SLOW, str(wide)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in work\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "stopped, threads: 1"
    assert process.returncode == 0


def test_map_of_a_store_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", fill=False)
    with Store.open(path) as store, pytest.raises(InfluenceError, match="not complete"):
        next(store.map(lambda where, rows: None))


def test_in_order_takes_pieces_as_it_needs_them() -> None:
    taken = []

    def pieces() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = in_order(lambda number: number * number, pieces(), 2)
    assert taken == []
    assert next(results) == 0
    assert len(taken) <= 6
    assert list(results) == [number * number for number in range(1, 100)]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, keep: float) -> None:
    path = make(tmp_path / "s.h5")
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(InfluenceError, match="is not a readable HDF5 file, or it is truncated") as caught:
        Store.open(path)
    assert str(path) in caught.value.message
    assert "--overwrite" in caught.value.hint


def test_a_file_that_is_not_hdf5_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.h5").write_text("hello\n" * 1000)
    with pytest.raises(InfluenceError, match="is not a readable HDF5 file"):
        Store.open(tmp_path / "s.h5")


def test_an_hdf5_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["coordinates"] = np.ones((4, 4))
    with pytest.raises(InfluenceError, match="is an HDF5 file, but not an influence store") as caught:
        Store.open(tmp_path / "s.h5")
    # Somebody else's data: nothing that overwrites it is advised.
    assert "gradients.store" in caught.value.hint
    assert "--overwrite" not in caught.value.hint


def test_a_newer_version_asks_for_an_update(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"influence-store 1\n", b"influence-store 2\n", 1))
    with pytest.raises(InfluenceError, match="is a store of version 2, but this influence reads up to 1") as caught:
        Store.open(path)
    assert caught.value.hint == "update influence"


def test_a_missing_store_names_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InfluenceError, match="there is no store") as caught:
        Store.open(tmp_path / "s.h5")
    assert "influence gradients" in caught.value.hint


@pytest.mark.parametrize("name", ["coordinates", "flags"])
def test_a_missing_data_set_is_told(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        del file[name]
    with pytest.raises(InfluenceError, match=r"damaged: the HDF5 metadata of .* has changed|is truncated"):
        Store.open(path)


DENIED = """
import os, sys
from pathlib import Path

from influence_cli.errors import InfluenceError
from influence_cli.store.store import Store

if os.geteuid() == 0:
    os.setuid(65534)
try:
    Store.open(Path(sys.argv[1]))
except InfluenceError as error:
    print(error.message, "|", error.hint)
"""


def test_a_store_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    path.chmod(0)
    said = fork_server.run(
        [sys.executable, "-c", DENIED, str(path)], capture_output=True, text=True, check=True
    ).stdout.lower()
    assert "permission" in said
    assert "truncated" not in said
    assert "--overwrite" not in said


Other = namedtuple("Other", ["process", "release"])
HOLD = """
import sys
import h5py

with h5py.File(sys.argv[1], sys.argv[2]) as file:
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Path, str], Other]]:
    """Open an HDF5 file in another process, until it is released."""
    started = []

    def hold(path: Path, mode: str) -> Other:
        process = fork_server.Popen(
            [sys.executable, "-c", HOLD, str(path), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "open\n"
        return Other(process, lambda: process.communicate(timeout=60))

    yield hold
    for process in started:
        if process.poll() is None:
            process.communicate(timeout=60)


@pytest.mark.parametrize(("theirs", "write"), [("r+", False), ("r+", True), ("r", True)])
def test_a_store_open_elsewhere_is_in_use(
    tmp_path: Path, elsewhere: Callable[[Path, str], Other], theirs: str, write: bool
) -> None:
    path = make(tmp_path / "s.h5")
    other = elsewhere(path, theirs)
    with pytest.raises(InfluenceError, match="is in use by another process") as caught:
        Store.open(path, write=write)
    assert str(path) in caught.value.message
    assert "wait" in caught.value.hint
    other.release()
    with Store.open(path, write=write) as store:
        assert store.done().all()


def test_many_can_read_at_one_time(tmp_path: Path, elsewhere: Callable[[Path, str], Other]) -> None:
    path = make(tmp_path / "s.h5")
    elsewhere(path, "r")
    assert np.array_equal(scanned(path), all_of("coordinates"))


def test_a_store_that_another_process_is_making_is_left_to_it(
    tmp_path: Path, elsewhere: Callable[[Path, str], Other]
) -> None:
    """Two runs begin at one time: the second is told so, and the first finds its file where it left it."""
    path = tmp_path / "s.h5"
    part = make(tmp_path / "first.h5").rename(tmp_path / "s.h5.part")
    before = part.read_bytes()
    other = elsewhere(part, "r+")
    try:
        make(path)
        said = "made under another name, which is as good"
    except InfluenceError as error:
        said = error.message
    other.release()
    assert "in use by another process" in said or path.exists()
    assert part.read_bytes() == before


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        InfluenceError, match=r"s\.h5 needs [\d.]+ kB, but the disk has 100 B free: [\d.]+ kB more"
    ) as caught:
        make(tmp_path / "s.h5")
    for way_out in ("gradients.layers", "float16", "gradients.store"):
        assert way_out in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_is_replaced_counts_until_the_new_store_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "s.h5")
    size = path.stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    check_space(path, 100)
    with pytest.raises(InfluenceError, match=r"the disk has 100 B free: 1 B more is needed") as caught:
        check_space(path, 101)
    assert f"remove {path} first" in caught.value.hint
    with pytest.raises(InfluenceError) as caught:
        check_space(path, size + 100)
    assert f"remove {path} first" in caught.value.hint
    with pytest.raises(InfluenceError) as caught:
        check_space(path, size + 101)
    assert "remove" not in caught.value.hint
    with pytest.raises(InfluenceError) as caught:
        check_space(tmp_path / "other.h5", 101)
    assert "remove" not in caught.value.hint


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InfluenceError, match=f"there is no folder {tmp_path / 'nowhere'}"):
        make(tmp_path / "nowhere" / "s.h5")


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_store_that_is_not_finished_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    path = make(tmp_path / "s.h5")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises((InfluenceError, KeyboardInterrupt)) as caught:
        make(path)
    if isinstance(stop, OSError):
        assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


FULL = """
import resource, signal, sys
from pathlib import Path

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.store.store import Rows, Store

path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Store.open(path, write=True) as store:
    layout = store.layout
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    for block in range(layout.blocks):
        values = np.full((layout.block, layout.k), block + 1, dtype=np.float32)
        try:
            store.write(block, Rows(values, values[:, 0], values[:, :2], np.ones(len(values)), block))
        except InfluenceError as error:
            print(error.message, "|", error.hint)
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_write_that_fails_is_told_and_its_block_is_not_done(tmp_path: Path) -> None:
    """A limit on the file's size stands in for a disk that fails: writes past the middle of the coordinates do."""
    path, layout = tmp_path / "s.h5", Layout(400, 16, 2, 20)
    create(path, layout, fingerprint={}, facts={}, labels=np.zeros(400, int), indices=np.arange(400), arrays={})
    with h5py.File(path) as file:
        limit = file["coordinates"].id.get_offset() + file["coordinates"].nbytes // 2
    done = fork_server.run(
        [sys.executable, "-c", FULL, str(path), str(limit)], capture_output=True, text=True, check=False
    )
    assert "failed" in done.stdout, done.stderr[:2000]
    assert "kept" in done.stdout
    with Store.open(path) as store:
        finished = store.done()
        assert store.damaged().tolist() == []
    assert finished.sum() <= layout.blocks / 2
    # Whatever is marked as done is there.
    with h5py.File(path) as file:
        for block in np.flatnonzero(finished):
            assert (file["coordinates"][layout.rows(int(block))] == block + 1).all()


@pytest.mark.parametrize("dtype", HALF_STEP)
def test_any_hdf5_tool_reads_it(tmp_path: Path, dtype: str) -> None:
    path = make(tmp_path / "s.h5", dtype)
    stored = scanned(path)
    with h5py.File(path) as file:
        assert file.attrs["format"] == "influence-store"
        assert file.attrs["version"] == 1
        rows = file["coordinates"]
        assert rows.dtype == dtype
        # Contiguous and not compressed: what maps into memory, and scans at the speed of the disk.
        assert rows.chunks is None
        assert rows.compression is None
        values = rows[:N].astype(np.float32)
        if dtype != "float32":
            values = values * file["scales"][:N][:, None]
        assert np.array_equal(values, stored)
        assert file["flags"][:].tolist() == [1, 1, 1]
        assert np.array_equal(file["labels"][:N], LABELS)
        assert np.array_equal(file["indices"][:N], INDICES)
        assert np.array_equal(file["losses"][:N], all_of("losses"))
        assert np.array_equal(file["outputs"][:N], all_of("outputs"))
        assert np.array_equal(file["spectrum"], SPECTRUM)
        assert np.array_equal(file["basis"], BASIS)
        header = json.loads(file["header"][:].tobytes())
    assert header["fingerprint"] == FINGERPRINT
    assert header["layout"] == {"n": N, "k": K, "classes": CLASSES, "block": BLOCK, "dtype": dtype}


@pytest.mark.parametrize(
    ("n", "block", "blocks", "last"), [(10, 4, 3, slice(8, 10)), (8, 4, 2, slice(4, 8)), (1, 256, 1, slice(0, 1))]
)
def test_a_layout_counts_blocks_rows_and_bytes(n: int, block: int, blocks: int, last: slice) -> None:
    layout = Layout(n, 7, 5, block, "float16")
    assert layout.blocks == blocks
    assert layout.padded == blocks * block
    assert layout.rows(blocks - 1) == last
    # 7 float16, 5 float32 outputs, a float32 loss and scale, two int64, one uint8.
    assert layout.bytes() == layout.padded * (14 + 20 + 4 + 4 + 16 + 1)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (123_456, "123 kB"), (1.9e9, "1.9 GB")],
)
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
