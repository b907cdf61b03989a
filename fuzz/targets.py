"""What is fuzzed: one function a target, from bytes to nothing.

A target returns, or raises InfluenceError with one line to show; any other exception is a failure, and so are data
that are not what was stored. tests/system/test_fuzz.py runs them on made-up inputs, fuzz/run.py by coverage.
"""

from __future__ import annotations

import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import xxhash
import yaml

from influence_cli.config.load import load_config
from influence_cli.data.label_files import read_indices, read_labels, read_truth
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, one_line, printable
from influence_cli.influence.test_selection import select_tests
from influence_cli.relabel.decisions import DECISIONS, read_decisions
from influence_cli.store.layout import FORMAT, SEAL_BYTES, VERSION, Layout, create
from influence_cli.store.store import READ, Rows, Store

CLASSES = ("cat", "dog", "=owl")
PATHS = tuple(f"data/train/{CLASSES[number % 3]}/{number}.png" for number in range(9))
LAYOUT = Layout(n=5, k=3, classes=2, block=2)


@functools.cache
def folder() -> Path:
    """Make a folder for the files of this process, which ends with it."""
    import atexit

    made = Path(tempfile.mkdtemp(prefix="influence-fuzz-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def check_error(error: InfluenceError) -> None:
    """Fail unless an error is a line that can be shown."""
    for text in (error.message, error.hint):
        shown = one_line(text)
        assert len(shown.splitlines()) <= 1, shown
        shown.encode()
    assert error.message.strip()


def config(data: bytes) -> None:
    """Load a config: the YAML, and after each zero byte an override."""
    text, *overrides = data.split(b"\0")
    path = folder() / "influence.yaml"
    path.write_bytes(text)
    try:
        found = load_config(path, [item.decode("utf-8", "surrogateescape") for item in overrides[:4]])
    except InfluenceError as error:
        check_error(error)
        return
    files = [source.file for source in found.model.sources if source is not None]
    assert all(item.is_absolute() for item in (*files, found.gradients.store))
    # Both are written into results.
    json.dumps(found.resolved()).encode()
    yaml.safe_dump(found.resolved(), sort_keys=False, allow_unicode=True)
    assert printable(found.where("train", "args")).startswith(("--set", printable(str(path))))


def _split(name: str = "test") -> Split:
    labels = np.arange(9, dtype=np.int64) % 3
    paths = tuple(str(folder() / path) for path in PATHS)
    return Split(name, [None] * 9, None, labels, np.delete(np.arange(9), 4), paths, CLASSES, None, "influence.yaml:9")


def tests(data: bytes) -> None:
    """Resolve TEST arguments: one a line, and after a zero byte the list on stdin."""
    words, _, lines = data.decode("utf-8", "surrogateescape").partition("\0")
    split = _split()
    try:
        found = select_tests(
            words.split("\n"), split, CLASSES, lambda: np.array([1, 5]), lines.splitlines(keepends=True)
        )
    except InfluenceError as error:
        check_error(error)
        return
    assert found
    for item in found:
        assert (item.index is None) != (item.file is None)
        assert item.index in (None, *split.indices)
        assert item.label in (None, 0, 1, 2)


def decisions(data: bytes) -> None:
    """Read a file of decisions."""
    path, split = _written(data, "decisions.csv"), _split("train")
    try:
        found = read_decisions(path, split, CLASSES, folder())
    except InfluenceError as error:
        check_error(error)
        return
    for row in found.rows:
        assert row.index in split.indices
        assert row.decision in DECISIONS
        assert row.label == split.labels[row.index]
        assert (row.new_label in (0, 1, 2)) == (row.decision == "relabel")
    assert len({row.index for row in found.rows}) == len(found.rows)


def labels(data: bytes) -> None:
    """Read a file of labels, of positions and of the truth: a ``.npy`` where it begins like one, else a ``.csv``."""
    path, split = _written(data, "labels.npy" if data[:1] == b"\x93" else "labels.csv"), _split("train")
    readers: Sequence[Callable[[], np.ndarray]] = (
        lambda: read_labels(path, split.labels, CLASSES, "train.labels", split.paths),
        lambda: read_indices(path, 9, "train.exclude", split.paths) % 3,
        lambda: read_truth(path, split.labels, CLASSES).wrong.astype(np.int64),
    )
    for read in readers:
        try:
            found = read()
        except InfluenceError as error:
            check_error(error)
        else:
            assert len(found) <= 9
            assert ((found >= 0) & (found < 3)).all()


def _written(data: bytes, name: str) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


@functools.cache
def whole_store() -> tuple[bytes, np.ndarray]:
    """Make a small store, complete, and give its bytes and its coordinates."""
    path = folder() / "whole.h5"
    coordinates = np.arange(15, dtype=np.float32).reshape(5, 3)
    create(
        path,
        LAYOUT,
        fingerprint={"model": "m", "data": "d"},
        facts={"rank": 3},
        labels=np.arange(5) % 2,
        indices=np.arange(5),
        arrays={"spectrum": np.array([3.0, 2.0, 1.0])},
    )
    with Store.open(path, write=True) as made:
        for block in range(LAYOUT.blocks):
            rows = coordinates[LAYOUT.rows(block)]
            state = np.full(len(rows), READ, dtype=np.uint8)
            made.write(block, Rows(rows, rows[:, 0], rows[:, :2], state, 7 + block))
    return path.read_bytes(), coordinates


@functools.cache
def _header_place() -> tuple[int, int]:
    whole_store()
    with h5py.File(folder() / "whole.h5") as file:
        return file["header"].id.get_offset(), len(file["header"])


def edited(data: bytes) -> bytes:
    """Change the whole store as the input says: three bytes of place, one of what to do, one of value."""
    content, at = bytearray(whole_store()[0]), 0
    while at + 5 <= len(data):
        high, low, deed, value = struct.unpack_from(">BHBB", data, at)
        place, at = ((high << 16) + low) % (len(content) + 1), at + 5
        if deed < 128:
            content[place : place + 1] = bytes([value])
        elif deed < 192:
            content[place : place + 1] = bytes([(content[place] if place < len(content) else 0) ^ (1 << value % 8)])
        elif deed < 216:
            content[place:place] = data[at : at + value % 16]
            at += value % 16
        elif deed < 240:
            del content[place : place + value]
        else:
            del content[place:]
    return bytes(content)


def forged(data: bytes, header: bool) -> bytes:
    """Put the input in the place of the header, or of the facts in the seal, with the checksums that fit."""
    content = bytearray(whole_store()[0])
    if header:
        start, size = _header_place()
        old = xxhash.xxh3_64_intdigest(content[start : start + size])
        text = data[:size].ljust(size)
        content[start : start + size] = text
        for order in ("<Q", ">Q"):
            new = struct.pack(order, xxhash.xxh3_64_intdigest(text))
            content = bytearray(bytes(content).replace(struct.pack(order, old), new))
        _, body, _ = bytes(content[:SEAL_BYTES]).split(b"\n", 2)
        facts = json.loads(body)
        state = xxhash.xxh3_64()
        for begin, end in facts["metadata"]:
            state.update(content[begin:end])
        data = json.dumps(facts | {"xxh3": state.hexdigest()}).encode()
    body = data[: SEAL_BYTES - 100].replace(b"\n", b" ")
    text = f"{FORMAT} {VERSION}\n".encode() + body + f"\n{xxhash.xxh3_64_hexdigest(body)}\n".encode()
    content[:SEAL_BYTES] = text.ljust(SEAL_BYTES, b"\0")
    return bytes(content)


def store(data: bytes) -> None:
    """Open a store and read all of it. The first byte says what the rest is: a file, edits of one, forged facts."""
    kind, rest = data[:1], data[1:]
    content = {
        b"F": lambda: rest,
        b"S": lambda: forged(rest, header=False),
        b"H": lambda: forged(rest, header=True),
    }.get(kind, lambda: edited(rest))()
    read_store(content, trusted=kind in b"SH")


def read_store(content: bytes, *, trusted: bool = False) -> None:
    """Read a store whole; rows whose checksums fit have to be those that were written, unless these were forged."""
    path, coordinates = folder() / "store.h5", whole_store()[1]
    path.write_bytes(content)
    try:
        with Store.open(path) as opened:
            assert isinstance(opened.layout.n, int)
            opened.done()
            opened.digests()
            opened.summary()
            for name in ("losses", "outputs", "labels", "indices", "state"):
                assert len(opened.column(name)) == opened.layout.n
            for name in opened.names():
                opened.array(name)
            damaged = opened.damaged()
            rows = np.concatenate([part.copy() for _, part in opened.scan()])
            assert not len(damaged)
            if not trusted:
                assert np.array_equal(rows, coordinates)
    except InfluenceError as error:
        check_error(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": config,
    "tests": tests,
    "decisions": decisions,
    "labels": labels,
    "store": store,
}
YAML = b"""\
model: {factory: ./model.py:build, args: {n: 3}, checkpoint: [a.pt, b.pt]}
loss: {factory: ./losses.py:mine, args: {}}
l2: 1e-4
train:
  dataset: torchvision.datasets.ImageFolder
  args: {root: data/train}
  labels: labels.csv
  exclude: null
  n: 9
  transform: [ToImage, {Normalize: {mean: [0.5], std: [0.25]}}]
test: {dataset: d.D, args: {root: "data/test"}}
gradients: {store: s.h5, layers: ["*"], budget: 8GB, store_dtype: int8, block: 64}
curvature: {method: cg, matrix: ggn, damping: 0.1, tolerance: 0.01, max_iterations: 5}
device: cpu
seed: 0
"""
SEEDS: dict[str, Sequence[bytes]] = {
    "config": (
        YAML,
        YAML + b"\0l2=0.5\0train.transform.0=ToImage\0gradients.store=x.h5\0loss=cross_entropy",
        b"model: {factory: a.b, checkpoint: c}\ntrain:\n  dataset: d.e\n",
        b"a: &x [1]\nb: *x\n",
        b"a: !!python/name:os.system\n",
    ),
    "tests": (b"0\n1:3\nmisclassified", b"-\x000\tcat\n1:3\tdog\nmisclassified\n", b":\n3:\n", b"-\x00x.png\t=owl\r\n"),
    "decisions": (
        b"index,path,label,decision,new_label\n0,,cat,relabel,dog\n1,data/train/dog/1.png,dog,keep,\n5,,'=owl,drop,\n",
        b"\xef\xbb\xbfindex,label,decision\r\n2,=owl,unsure\r\n",
    ),
    "labels": (
        b"index,label\n0,dog\n3,2\n",
        b"label\n" + b"cat\n" * 9,
        b"index,path,true_label\n1,data/train/dog/1.png,cat\n",
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<i8', 'fortran_order': False, 'shape': (9,), }".ljust(117)
        + b"\n"
        + bytes(72),
    ),
    "store": (
        b"E",
        b"E\x00\x00\x10\x00\x01",
        b'S{"bytes": 100, "metadata": [[0, 10]], "xxh3": ""}',
        b'H{"layout": {"n": 5, "k": 3, "classes": 2, "block": 2, "dtype": "float32"}, "fingerprint": {}, "facts": {}}',
    ),
}
