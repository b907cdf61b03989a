"""Nothing lost, no one let in: every fault that a store can meet, injected, and what is left of it after a rerun."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from influence_cli.errors import InfluenceError
from influence_cli.model import data_fingerprint
from influence_cli.precompute import fill_store, fit_file, make_store, staleness
from influence_cli.runtime import disk, locks
from influence_cli.runtime.locks import claim
from influence_cli.store import layout
from influence_cli.store.layout import Layout, create
from influence_cli.store.store import READ, Rows, Store
from tests.conftest import Command, edit
from tests.support.copies import copied
from tests.support.small_project import BLOCK, BLOCKS, EKFAC, MODEL, N, flip, make

MEMORY = """
import os

import torch


def make():
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for number in os.environ.get("EDITED", "").split():
        images[int(number)] = 0
    return torch.utils.data.TensorDataset(images, torch.arange(24) % 3)
"""


@pytest.fixture(scope="module")
def small(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with a complete store; do not change it."""
    folder = make(tmp_path_factory.mktemp("small") / "project")
    from influence_cli.cli import app

    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        app(["gradients", "-q"])
    assert not ended.value.code
    return folder


@pytest.fixture
def filled(small: Path, tmp_path: Path) -> Iterator[Path]:
    """The project with its complete store, which a test may change."""
    with copied(small, tmp_path / "project") as folder:
        yield folder


@pytest.fixture
def empty(filled: Path) -> Path:
    """The project without its store."""
    (filled / "influence.h5").unlink()
    return filled


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of every block that was computed to its end, in this order."""
    rows, found = fill_store.block_rows, []

    def count(*args: object) -> Rows:
        result = rows(*args)
        found.append(int(args[4][0]))
        return result

    monkeypatch.setattr(fill_store, "block_rows", count)
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Read the store and all that lies beside it, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.glob("influence.h5*") if path.suffix != ".lock"}


def advised(err: str) -> list[str]:
    """Take the command out of an error's hint."""
    found = re.search(r"^  .*?influence (gradients(?: --[a-z]+)+)", err, re.MULTILINE)
    assert found, err
    return found[1].split()


# --- the order of writes


def test_no_flag_reaches_the_disk_before_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut: of what was written since the last flush, any part is there and any part is not."""
    path, layout = tmp_path / "s.h5", Layout(10, 3, 2, 4)
    create(path, layout, fingerprint={}, facts={}, labels=np.arange(10), indices=np.arange(10), arrays={})
    order: list[tuple[int, bytes] | None] = []
    write_at, flush = disk.write_at, disk.flush

    def write(raw: BinaryIO, place: int, values: np.ndarray) -> None:
        order.append((place, np.ascontiguousarray(values).tobytes()))
        write_at(raw, place, values)

    def flushed(raw: BinaryIO) -> None:
        order.append(None)
        flush(raw)

    base = path.read_bytes()
    monkeypatch.setattr(disk, "write_at", write)
    monkeypatch.setattr(disk, "flush", flushed)
    generator = np.random.default_rng(0)
    with Store.open(path, write=True) as store:
        for block in range(3):
            count = layout.rows(block).stop - layout.rows(block).start
            values = generator.normal(size=(count, 3)).astype(np.float32)
            store.write(block, Rows(values, values[:, 0], values[:, :2], np.full(count, READ), block))
    assert order.count(None) == 6
    assert order[-1] is None
    held = bytearray(base)
    for until in (place for place, item in enumerate(order) if item is None):
        since = max((place + 1 for place in range(until) if order[place] is None), default=0)
        loose = [item for item in order[since:until] if item is not None]
        for chosen in [[item] for item in loose] + [[other for other in loose if other is not item] for item in loose]:
            disturbed = bytearray(held)
            for place, content in chosen:
                disturbed[place : place + len(content)] = content
            path.write_bytes(disturbed)
            with Store.open(path) as store:
                assert store.damaged().tolist() == []
        for place, content in loose:
            held[place : place + len(content)] = content


# --- corruption


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Name every region of a store's bytes that is in use: the seal, the data sets, what HDF5 keeps between them."""
    content = path.read_bytes()
    with h5py.File(path) as file:
        found = {name: (data.id.get_offset(), data.nbytes) for name, data in file.items()}
        room = file.userblock_size
    found["seal"] = (0, content.index(b"\0"))
    extents, at = sorted((start, size) for name, (start, size) in found.items() if name != "seal"), room
    for number, (start, size) in enumerate([*extents, (len(content), 0)]):
        if content[at:start].strip(b"\0"):
            found[f"metadata {number}"] = (at, start - at)
        at = start + size
    attribute = content.index(b"version", room)
    return found | {"attribute": (attribute, 7)}


REGIONS = (
    "seal", "attribute", "header", "flags", "checksums", "inputs", "summary", "summary_xxh3", "spectrum", "basis",
    "kept", "labels", "indices", "losses", "outputs", "state", "coordinates", "metadata",
)  # fmt: skip
# What a run computes again on its way, without an option.
MENDED = ("flags", "summary", "summary_xxh3")
OF_BLOCKS = ("checksums", "inputs", "labels", "indices", "losses", "outputs", "state", "coordinates")


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.quick("checksums*", "labels*", "coordinates*", "seal*", "header*", "spectrum*")
def test_a_flipped_byte_is_told_before_a_number_is_printed(
    influence: Command, filled: Path, small: Path, computed: list[int], region: str
) -> None:
    path, whole = filled / "influence.h5", (small / "influence.h5").read_bytes()
    good = influence("rank", 0, 1, "--top", 3, "--format", "csv", "-q", cwd=filled)
    assert good.err == ""
    named = regions(path)
    assert {name.partition(" ")[0] for name in named} == set(REGIONS)
    for name, (start, size) in named.items():
        if name.partition(" ")[0] != region:
            continue
        used = [at for at in range(start, start + size) if whole[at]] or list(range(start, start + size))
        for at in sorted({used[0], used[len(used) // 2], used[-1]}):
            path.write_bytes(whole)
            flip(path, at)
            computed.clear()
            if region in MENDED:
                assert influence("rank", 0, 1, "--top", 3, "--format", "csv", "-q", cwd=filled).out == good.out
                assert len(computed) == (region == "flags")
                assert path.read_bytes() == whole
                continue
            done = influence("rank", 0, 1, "--top", 3, "--format", "csv", "-q", cwd=filled, code=2)
            assert done.out == ""
            assert len(done.err.splitlines()) == 2
            assert done.err.startswith("error: influence.h5")
            assert "damaged" in done.err
            advice = advised(done.err)
            block = (at - start) * N // size // BLOCK
            if region in OF_BLOCKS:
                assert re.search(f"block {block}|blocks: {block}", done.err), done.err
                assert advice[1:] == ["--repair"]
                assert mended(influence, filled, advice, computed) == [BLOCK * block]
            elif at == used[0] and not name.endswith(("1", "2", "3", "4", "5", "6", "7", "8", "9")):
                # No block's checksum covers it: all is made anew.
                assert len(mended(influence, filled, advice, computed)) == BLOCKS
            else:
                continue
            assert path.read_bytes() == whole


def mended(influence: Command, project: Path, advice: list[str], computed: list[int]) -> list[int]:
    """Follow an error's advice, and give the first row of every block that it computes."""
    computed.clear()
    influence(*advice, "-q", cwd=project)
    return computed


@pytest.mark.parametrize("name", ["mislabels", "gradients"])
@pytest.mark.parametrize("region", ["losses", "labels", "basis", "header", "coordinates"])
def test_no_command_takes_damage_for_data(influence: Command, filled: Path, name: str, region: str) -> None:
    start, size = regions(filled / "influence.h5")[region]
    flip(filled / "influence.h5", start + size // 3 - 1)
    words = ("gradients", "--fsck") if name == "gradients" else (name, "--signal", "self-influence")
    done = influence(*words, cwd=filled, code=2)
    assert done.out == ""
    assert "damaged" in done.err


def test_every_byte_of_the_factors_of_each_layer_is_guarded(influence: Command, empty: Path) -> None:
    influence("gradients", "-q", *EKFAC, cwd=empty)
    path = empty / "influence.h5"
    whole = path.read_bytes()
    factors = {name: place for name, place in regions(path).items() if name.startswith(("factor", "kept"))}
    assert len(factors) >= 3
    with path.open("r+b", buffering=0) as raw, Store.open(path) as store:
        for name, (start, size) in factors.items():
            for at in range(start, start + size):
                os.pwrite(raw.fileno(), bytes([whole[at] ^ 1]), at)
                with pytest.raises(InfluenceError, match=f"damaged: the checksum of its {name}"):
                    store.array(name)
                os.pwrite(raw.fileno(), whole[at : at + 1], at)
            assert store.array(name) is not None
    assert path.read_bytes() == whole
    flip(path, factors["factor.0000.values"][0] + 2)
    done = influence("rank", 0, *EKFAC, cwd=empty, code=2)
    assert "the checksum of its factor.0000.values does not match" in done.err
    assert done.out == ""
    influence(*advised(done.err), *EKFAC, cwd=empty)
    assert path.read_bytes() == whole


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def newer(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"influence-store 1\n", b"influence-store 2\n", 1))


def not_hdf5(path: Path) -> None:
    path.write_text("no store\n" * 1000)


def another_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["rows"] = np.ones(5)


WRONG = [
    (cut_short, "is not a readable HDF5 file, or it is truncated", "--overwrite"),
    (not_hdf5, "is not a readable HDF5 file, or it is truncated", "--overwrite"),
    (another_hdf5, "is an HDF5 file, but not an influence store", "set gradients.store to another name"),
    (newer, "is a store of version 2, but this influence reads up to 1", "update influence"),
]


@pytest.mark.parametrize(("change", "said", "advice"), WRONG, ids=[change.__name__ for change, _, _ in WRONG])
def test_a_file_that_is_no_store_of_ours_is_refused(
    influence: Command, filled: Path, small: Path, change: Callable[[Path], None], said: str, advice: str
) -> None:
    change(filled / "influence.h5")
    before = files(filled)
    for words in (("gradients",), ("rank", 0), ("mislabels", "--signal", "self-influence")):
        done = influence(*words, cwd=filled, code=2)
        assert done.out == ""
        assert said in done.err.splitlines()[-2]
        assert advice in done.err.splitlines()[-1]
        assert files(filled) == before
    if advice == "--overwrite":
        influence(*advised(done.err), cwd=filled)
        assert files(filled) == files(small)


# --- a disk that is full, read-only or gone


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow past so many bytes: to a program it looks like a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def at_block_1(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let something happen once, when block 1 is about to be written."""

    def plan(fault: Callable[[], object]) -> None:
        write, waiting = Store.write, [fault]

        def strike(self: Store, block: int, rows: Rows) -> None:
            if block == 1 and waiting:
                waiting.pop()()
            write(self, block, rows)

        monkeypatch.setattr(Store, "write", strike)

    return plan


def mount(*words: str | Path) -> None:
    """Mount, or skip where that is not allowed."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(empty: Path) -> Iterator[Path]:
    """A disk of 256 kB, mounted at ``disk`` in the project."""
    folder = empty / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


MISSING = r"[\d.]+ k?B more is needed"


def test_a_full_disk_when_the_store_is_made_leaves_nothing(influence: Command, empty: Path, small: Path) -> None:
    with largest_file(20_000):
        done = influence("gradients", cwd=empty, code=2)
    assert re.search(rf"influence\.h5 cannot be created: File too large, {MISSING}\n  free disk space", done.err), (
        done.err
    )
    assert files(empty) == {}
    influence("gradients", cwd=empty)
    assert files(empty) == files(small)


def test_a_full_disk_in_the_midst_of_a_block_keeps_those_before_it(
    influence: Command, empty: Path, small: Path, at_block_1: Callable[[Callable[[], object]], None]
) -> None:
    limits = contextlib.ExitStack()
    start, size = regions(small / "influence.h5")["coordinates"]
    at_block_1(lambda: limits.enter_context(largest_file(start + size // 2)))
    with limits:
        done = influence("gradients", cwd=empty, code=2)
    said = re.search(rf"writing block 1 of influence\.h5 failed: File too large, {MISSING}\n  (.*)", done.err)
    assert said, done.err
    assert "finished work is kept; free disk space and run the same command to resume" in said[1]
    assert "wrote 2 of 3 blocks" in influence("gradients", cwd=empty).err
    assert files(empty) == files(small)


def test_a_full_disk_during_the_fit_costs_no_more_than_its_progress(
    influence: Command, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("gradients", "-q", *EKFAC, cwd=empty)
    whole = files(empty)
    (empty / "influence.h5").unlink()
    monkeypatch.setattr(fit_file, "SAVE_EVERY", -1.0)
    limits, create_ = contextlib.ExitStack(), layout.create

    def make_room(*args: object, **how: object) -> None:
        limits.close()
        create_(*args, **how)

    monkeypatch.setattr(make_store, "create", make_room)
    with limits:
        limits.enter_context(largest_file(1000))
        done = influence("gradients", *EKFAC, cwd=empty)
    warned = [line for line in done.err.splitlines() if line.startswith("warning: influence.h5.fit cannot be written")]
    assert warned
    assert re.search(rf"File too large, {MISSING}; free disk space; if the run is interrupted", warned[0])
    assert files(empty) == whole


def test_a_disk_that_fills_up_says_what_is_missing_and_a_rerun_goes_on(
    influence: Command,
    empty: Path,
    small: Path,
    small_disk: Path,
    at_block_1: Callable[[Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a file system that reserves nothing: elsewhere a store that was made has all its space."""
    monkeypatch.setattr(disk, "reserve", lambda *_: None)
    # Blocks larger than a page of the file system.
    (empty / "model.py").write_text(
        (empty / "model.py").read_text().replace("AvgPool2d(2)", "Identity()").replace("16", "64")
    )
    torch.save({"2.weight": torch.zeros(3, 64), "2.bias": torch.zeros(3)}, empty / "model.pt")
    ballast = small_disk / "ballast"

    def fill_up() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    at_block_1(fill_up)
    words = ("gradients", "-s", "gradients.store=disk/influence.h5")
    words += ("-s", "curvature.method=identity", "-s", "gradients.block=8")
    done = influence(*words, cwd=empty, code=2)
    assert re.search(rf"No space left on device, {MISSING}", done.err), done.err
    kept = int(re.search(r"writing block (\d)", done.err)[1])
    ballast.unlink()
    assert f"wrote {BLOCKS - kept} of {BLOCKS} blocks" in influence(*words, cwd=empty).err
    influence("gradients", *words[3:], cwd=empty)
    assert files(small_disk) == files(empty)


def test_a_disk_that_is_too_small_is_told_before_the_fit(influence: Command, empty: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(250_000))
    done = influence("gradients", "-s", "gradients.store=disk/influence.h5", cwd=empty, code=2)
    assert re.search(rf"influence\.h5 needs [\d.]+ kB, but the disk has [\d.]+ k?B free: {MISSING}\n", done.err), (
        done.err
    )
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.fixture
def read_only(filled: Path) -> Iterator[Callable[[], Path]]:
    """Move the store to a folder ``kept``, and let nobody write there."""
    folder = filled / "kept"
    folder.mkdir()
    (filled / "influence.h5").rename(folder / "influence.h5")

    def close() -> Path:
        if os.geteuid():
            folder.chmod(0o555)
        else:  # permissions do not hold for root
            mount("--bind", folder, folder)
            mount("-o", "remount,ro,bind", folder)
        return folder

    yield close
    if os.geteuid():
        folder.chmod(0o755)
    else:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


KEPT = ("-s", "gradients.store=kept/influence.h5")


def test_a_complete_store_in_a_read_only_folder_serves(
    influence: Command, filled: Path, read_only: Callable[[], Path]
) -> None:
    good = influence("rank", 0, "--format", "csv", *KEPT, cwd=filled).out
    read_only()
    assert influence("rank", 0, "--format", "csv", *KEPT, cwd=filled).out == good
    assert "is complete" in influence("gradients", "--fsck", *KEPT, cwd=filled).err


@pytest.mark.parametrize("state", ["no store", "a block is missing", "a block is damaged"])
def test_a_read_only_folder_is_told_before_any_work(
    influence: Command, filled: Path, read_only: Callable[[], Path], computed: list[int], state: str
) -> None:
    path, words = filled / "kept" / "influence.h5", ("gradients",)
    if state == "no store":
        path.unlink()
    elif state == "a block is missing":
        with Store.open(path, write=True) as store:
            store.clear(np.array([1]))
    else:
        flip(path, regions(path)["losses"][0])
        words = ("gradients", "--repair")
    before = files(read_only())
    done = influence(*words, *KEPT, cwd=filled, code=2)
    assert re.search(
        r"^error: kept/influence\.h5 cannot be created or finished: its folder is not writable "
        r"\((Read-only file system|Permission denied)\)\n  make the folder writable, or set gradients\.store",
        done.err,
        re.MULTILINE,
    ), done.err
    assert "making" not in done.err
    assert computed == []
    assert files(filled / "kept") == before


@pytest.mark.parametrize("fault", ["moved", "removed", "unmounted"])
def test_a_path_that_disappears_is_told_and_what_is_done_is_kept(
    influence: Command,
    empty: Path,
    small: Path,
    at_block_1: Callable[[Callable[[], object]], None],
    request: pytest.FixtureRequest,
    fault: str,
) -> None:
    folder = request.getfixturevalue("small_disk") if fault == "unmounted" else empty / "disk"
    folder.mkdir(exist_ok=True)
    strike = {
        "moved": lambda: folder.rename(empty / "away"),
        "removed": lambda: shutil.rmtree(folder),
        "unmounted": lambda: subprocess.run(["umount", "-l", folder], check=True),
    }
    at_block_1(strike[fault])
    words = ("gradients", "-s", "gradients.store=disk/influence.h5")
    done = influence(*words, cwd=empty, code=2)
    assert (
        "error: disk/influence.h5 disappeared while block 1 was being written: it was moved or removed, or its"
        in done.err
    )
    assert "put it back and run the same command to resume" in done.err
    if fault != "moved":
        if fault == "removed":
            assert "there is no folder disk" in influence(*words, cwd=empty, code=2).err
        return
    assert "there is no folder disk" in influence(*words, cwd=empty, code=2).err
    (empty / "away").rename(folder)
    assert "wrote 2 of 3 blocks" in influence(*words, cwd=empty).err
    assert files(folder) == files(small)


# --- what a store was made of


def sorts_last(project: Path) -> None:
    (project / "train" / "a" / "000.png").rename(project / "train" / "a" / "999.png")


def one_more(project: Path) -> None:
    shutil.copy(project / "train" / "b" / "001.png", project / "train" / "b" / "901.png")


def one_less(project: Path) -> None:
    (project / "train" / "c" / "023.png").unlink()


def another_label(project: Path) -> None:
    (project / "train" / "a" / "000.png").rename(project / "train" / "b" / "000.png")


def other_pixels(project: Path) -> None:
    path = project / "train" / "a" / "000.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def other_weights(project: Path) -> None:
    state = torch.load(project / "model.pt")
    state["2.bias"][1] += 0.01
    torch.save(state, project / "model.pt")


def other_model_code(project: Path) -> None:
    (project / "other.py").write_text(MODEL.replace("AvgPool2d", "MaxPool2d"))
    edit(project, "./model.py:build", "./other.py:build")


def excluded(project: Path) -> None:
    (project / "out.csv").write_text("index\n4\n")
    edit(project, "  transform:", "  exclude: out.csv\n  transform:")


def relabelled(project: Path) -> None:
    (project / "labels.csv").write_text("index,label\n4,c\n")
    edit(project, "  transform:", "  labels: labels.csv\n  transform:")


def resized(project: Path) -> None:
    edit(project, "{Grayscale", "{Resize: {size: [8, 8]}}, {Grayscale")


def unchanged(project: Path) -> None:
    pass


STALE = [
    (sorts_last, (), "the training files (a path, or what one of them holds)"),
    (one_more, (), "the training examples in use (number, order or exclusions)"),
    (one_less, (), "the training examples in use (number, order or exclusions)"),
    (another_label, (), "the training labels"),
    (other_pixels, (), "the training files (a path, or what one of them holds)"),
    (other_weights, (), "the checkpoint's weights"),
    (other_model_code, (), "though the weights are the same"),
    (excluded, (), "the training examples in use (number, order or exclusions)"),
    (relabelled, (), "the training labels"),
    (resized, (), "train.transform"),
    (unchanged, ("-s", "gradients.store_dtype=int8"), "gradients.store_dtype (float32 in the store, int8 now)"),
    (unchanged, ("--precision", "bf16"), "the precision of the layer pass (float32 in the store, bf16 now)"),
    (unchanged, ("-s", "curvature.method=identity"), "the curvature (explicit ggn in the store, raw gradients now)"),
    (unchanged, ("-s", "curvature.matrix=hessian"), "the curvature (explicit ggn in the store, explicit hessian now)"),
]


@pytest.mark.parametrize(
    ("change", "words", "said"), STALE, ids=[f"{change.__name__} {' '.join(words)}" for change, words, _ in STALE]
)
def test_a_store_of_anything_else_is_refused_by_name(
    influence: Command, filled: Path, change: Callable[[Path], None], words: tuple[str, ...], said: str
) -> None:
    before = files(filled)
    change(filled)
    for command in (("gradients",), ("rank", 0), ("mislabels", "--signal", "self-influence")):
        done = influence(*command, *words, cwd=filled, code=2)
        assert done.out == ""
        assert said in done.err
        assert "influence gradients --overwrite" in done.err
        assert files(filled) == before


def test_another_seed_of_the_draws_is_refused(influence: Command, empty: Path) -> None:
    influence("gradients", "-q", *EKFAC, cwd=empty)
    done = influence("rank", 0, *EKFAC, "-s", "seed=3", cwd=empty, code=2)
    assert "what differs: the seed of the curvature's draws (0 in the store, 3 now)\n" in done.err


def test_other_versions_are_refused(influence: Command, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert "the versions of torch or torchvision (torch" in influence("rank", 0, cwd=filled, code=2).err


def test_an_edit_that_keeps_size_and_time_is_found_by_fsck_alone(
    influence: Command, filled: Path, small: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of what is compared on every run: an image that is other pixels under the same name, size and time."""
    monkeypatch.setattr(staleness, "EXAMPLES", 3)  # not this one
    path = filled / "train" / "b" / "013.png"
    status = path.stat()
    other_pixels_of = np.asarray(Image.open(path))[::-1]
    Image.fromarray(other_pixels_of).save(path, compress_level=0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    influence("rank", 0, cwd=filled)
    position = sorted(item.name for item in (filled / "train" / "b").iterdir()).index("013.png") + N // 3
    done = influence("gradients", "--fsck", cwd=filled, code=2)
    assert f"1 damaged blocks: {position // BLOCK}" in done.err
    assert mended(influence, filled, advised(done.err), computed) == [position // BLOCK * BLOCK]
    influence("gradients", "--fsck", cwd=filled)
    assert files(filled) != files(small)


def test_an_edit_in_memory_outside_the_sample_is_found_by_fsck_alone(
    influence: Command, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_fingerprint, "SAMPLED", 4)
    monkeypatch.setattr(staleness, "EXAMPLES", 3)
    (empty / "memory.py").write_text(MEMORY)
    edit(empty, "torchvision.datasets.ImageFolder\n  args: {root: train}", "./memory.py:make")
    text = (empty / "influence.yaml").read_text()
    (empty / "influence.yaml").write_text(re.sub(r"  transform: .*\n", "", text, count=1))
    edit(
        empty,
        "{root: test}",
        "{root: test}\n  transform: [Grayscale, ToImage, {ToDtype: {dtype: float32, scale: true}}]",
    )
    influence("gradients", cwd=empty)
    sampled = np.random.default_rng(0).choice(np.arange(N), 4, replace=False)
    edited = next(number for number in range(BLOCK, 2 * BLOCK) if number not in sampled)
    monkeypatch.setenv("EDITED", str(edited))
    influence("gradients", cwd=empty)
    assert "1 damaged blocks: 1\n" in influence("gradients", "--fsck", cwd=empty, code=2).err
    monkeypatch.setenv("EDITED", f"{edited} {sampled[0]}")
    assert "what differs: the training examples themselves\n" in influence("gradients", cwd=empty, code=2).err


# --- two processes


def test_of_two_that_begin_together_one_is_told_at_once(
    influence: Command, empty: Path, small: Path, computed: list[int]
) -> None:
    """From before the curvature is fitted: neither works for hours in vain, nor takes the other's file away."""
    with claim(empty / "influence.h5"):
        for words in (("gradients",), ("gradients", "--overwrite"), ("rank", 0), ("rank", 0, "--on-the-fly")):
            done = influence(*words, cwd=empty, code=2)
            assert f"error: influence.h5 is in use by process {os.getpid()}\n  wait until that command" in done.err
            assert done.out == ""
        assert computed == []
        assert files(empty) == {}
    influence("gradients", cwd=empty)
    assert files(empty) == files(small)
    assert not (empty / "influence.h5.lock").exists()


def test_a_lock_ends_with_its_process(influence: Command, empty: Path) -> None:
    (empty / "influence.h5.lock").write_text("1\n")
    influence("gradients", cwd=empty)
    assert not (empty / "influence.h5.lock").exists()


def test_a_store_that_is_read_is_not_replaced(influence: Command, filled: Path, small: Path) -> None:
    with Store.open(filled / "influence.h5"):
        done = influence("gradients", "--overwrite", cwd=filled, code=2)
        assert "influence.h5 is in use by another process" in done.err
        influence("rank", 0, cwd=filled)
    assert files(filled) == files(small)


def test_a_lock_on_a_file_that_was_replaced_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, whoever had it has removed it, and the next one has made another."""
    path, file, locked = tmp_path / "s.h5", tmp_path / "s.h5.lock", list[int]()
    lock = locks.lock

    def late(raw: BinaryIO, *args: object, **how: object) -> None:
        if not locked:
            file.unlink()
            file.touch()
        locked.append(os.fstat(raw.fileno()).st_ino)
        lock(raw, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(locks, "lock", late)
    with claim(path):
        assert len(locked) == 2
        assert locked[-1] == file.stat().st_ino


def test_who_waits_for_a_lock_that_is_given_up_gets_one_that_holds(tmp_path: Path) -> None:
    """The file goes with its lock: of any number of threads that want it, one has it at a time."""
    path, inside, most, errors = tmp_path / "s.h5", [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            try:
                with claim(path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except InfluenceError:
                errors[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert list(tmp_path.iterdir()) == []
