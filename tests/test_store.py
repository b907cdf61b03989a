"""store: what is written comes back, damage never passes for data, and any HDF5 tool can read the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_cli import store_scan as store_module
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.store import READ, SKIPPED, Rows, Store
from influence_cli.store_file import Layout, check_space, create

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


def make(path: Path, dtype: str = "float32", fill: bool = True) -> Path:
    layout = Layout(N, K, CLASSES, BLOCK, dtype)
    arrays = {"spectrum": SPECTRUM, "basis": BASIS}
    create(path, layout, fingerprint=FINGERPRINT, facts=FACTS, labels=LABELS, indices=INDICES, arrays=arrays)
    if fill:
        with Store.open(path, write=True) as store:
            for block in range(layout.blocks):
                store.write(block, example_rows(block))
            store.write_summary(np.arange(K + 1) / 3)
    return path


def scanned(path: Path) -> np.ndarray:
    with Store.open(path) as store:
        result = np.full((store.layout.n, store.layout.k), np.nan, dtype=np.float32)
        for where, part in store.scan():
            result[where] = part
        return result


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


def all_of(part: str) -> np.ndarray:
    return np.concatenate([getattr(example_rows(block), part) for block in range(3)])


def error_of(path: Path) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        scanned(path)
    return caught.value


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_everything_written_comes_back(tmp_path: Path, dtype: str) -> None:
    path = make(tmp_path / "s.h5", dtype)
    coordinates = all_of("coordinates")
    found = scanned(path)
    if dtype == "float32":
        assert np.array_equal(found, coordinates)
    else:
        # A row of float16 is rounded to 11 bits of its largest number, however large or small that is.
        largest = np.abs(coordinates).max(axis=1, keepdims=True)
        assert (np.abs(found - coordinates) <= largest * 2.0**-11 * 1.001).all()
        assert not np.array_equal(found, coordinates)
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
    dtype=st.sampled_from(["float32", "float16"]),
    group=st.sampled_from([1, 200, 10**6]),
)
def test_any_shape_comes_back_in_order(n: int, k: int, block: int, dtype: str, group: int) -> None:
    layout = Layout(n, k, 3, block, dtype)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "s.h5"
        patch.setattr(store_module, "PIECE_BYTES", group)
        create(path, layout, fingerprint={}, facts={}, labels=np.zeros(n, int), indices=np.arange(n), arrays={})
        with Store.open(path, write=True) as store:
            for number in reversed(range(layout.blocks)):
                store.write(number, example_rows(number, layout))
            parts = [(where.start, where.stop, part.copy()) for where, part in store.scan()]
    assert [start for start, _, _ in parts] == [0, *[stop for _, stop, _ in parts[:-1]]]
    assert parts[-1][1] == n
    wanted = np.concatenate([example_rows(number, layout).coordinates for number in range(layout.blocks)])
    found = np.concatenate([part for _, _, part in parts])
    assert found.dtype == np.float32
    allowed = 0 if dtype == "float32" else np.abs(wanted).max(axis=1, keepdims=True) * 2.0**-11 * 1.001
    assert (np.abs(found - wanted) <= allowed).all()


def test_float16_keeps_rows_of_zeros(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", "float16", fill=False)
    empty = Rows(np.zeros((4, K)), np.zeros(4), np.zeros((4, CLASSES)), np.full(4, SKIPPED), 0)
    with Store.open(path, write=True) as store:
        for block in range(3):
            store.write(block, empty if block < 2 else example_rows(2))
    assert not scanned(path)[:8].any()


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


def test_clear_forgets_blocks_and_the_summary(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    with Store.open(path, write=True) as store:
        store.clear(np.array([0, 2]))
        assert store.done().tolist() == [False, True, False]
        assert store.summary() is None
        store.write(2, example_rows(2))
        store.write(0, example_rows(0))
    assert np.array_equal(scanned(path), all_of("coordinates"))


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "1.h5"), make(tmp_path / "2.h5", fill=False)
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
    assert f"is damaged: the checksum of block {block} does not fit" in error.message
    assert str(path) in error.message
    assert "--repair" in error.hint
    with Store.open(path) as store:
        assert store.damaged().tolist() == [block]


@pytest.mark.parametrize(("name", "width"), [("checksums", 8), ("inputs", 8)])
@pytest.mark.parametrize("block", [0, 2])
def test_a_flipped_bit_of_what_guards_a_block_is_found(tmp_path: Path, name: str, width: int, block: int) -> None:
    path = make(tmp_path / "s.h5")
    flip(path, name, block * width)
    assert f"the checksum of block {block} does not fit" in error_of(path).message


@pytest.mark.parametrize(("name", "width"), [("coordinates", 6), ("scales", 4)])
def test_a_flipped_bit_of_a_float16_row_is_found(tmp_path: Path, name: str, width: int) -> None:
    path = make(tmp_path / "s.h5", "float16")
    flip(path, name, 5 * width)
    assert "the checksum of block 1 does not fit" in error_of(path).message


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
    with pytest.raises(InfluenceError, match="the checksum of its header does not fit") as caught:
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


FUZZ = """
import os, signal, sys
from collections import Counter
from pathlib import Path

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.store import Store

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


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, keep: float) -> None:
    path = make(tmp_path / "s.h5")
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(InfluenceError, match="is not a readable HDF5 file, or it is cut short") as caught:
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
    with pytest.raises(InfluenceError, match="is an HDF5 file, but no influence store") as caught:
        Store.open(tmp_path / "s.h5")
    # Somebody else's data: nothing that overwrites it is advised.
    assert "gradients.store" in caught.value.hint
    assert "--overwrite" not in caught.value.hint


def test_a_newer_version_asks_for_an_update(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"influence-store 1\n", b"influence-store 2\n", 1))
    with pytest.raises(InfluenceError, match="is a store of version 2, this influence reads up to 1") as caught:
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
    with pytest.raises(InfluenceError, match=r"damaged: what HDF5 keeps about .* has changed|is cut short"):
        Store.open(path)


DENIED = """
import os, sys
from pathlib import Path

from influence_cli.errors import InfluenceError
from influence_cli.store import Store

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
    said = subprocess.run(
        [sys.executable, "-c", DENIED, str(path)], capture_output=True, text=True, check=True
    ).stdout.lower()
    assert "permission" in said
    assert "cut short" not in said
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
        process = subprocess.Popen(
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
    with pytest.raises(InfluenceError, match=r"s\.h5 needs \d+ B, the disk has 100 B free") as caught:
        make(tmp_path / "s.h5")
    for way_out in ("gradients.layers", "float16", "gradients.store"):
        assert way_out in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_is_replaced_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "s.h5")
    size = path.stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    check_space(path, size)
    with pytest.raises(InfluenceError):
        check_space(path, size + 1)
    with pytest.raises(InfluenceError):
        check_space(tmp_path / "other.h5", 1)


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
from influence_cli.store import Rows, Store

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
    done = subprocess.run(
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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_hdf5_tool_reads_it(tmp_path: Path, dtype: str) -> None:
    path = make(tmp_path / "s.h5", dtype)
    with h5py.File(path) as file:
        assert file.attrs["format"] == "influence-store"
        assert file.attrs["version"] == 1
        rows = file["coordinates"]
        assert rows.dtype == dtype
        # Contiguous and not compressed: what maps into memory, and scans at the speed of the disk.
        assert rows.chunks is None
        assert rows.compression is None
        values = rows[:N].astype(np.float32)
        if dtype == "float16":
            values = values * file["scales"][:N][:, None]
        assert np.array_equal(values, scanned(path))
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
