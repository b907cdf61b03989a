"""locks: taken, given up, and done without where a system has none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from influence_cli.errors import InfluenceError
from influence_cli.runtime import locks
from tests.support import relabel_project, small_project

ROOT = Path(__file__).parents[2]
# Other libraries have loaded what they need of their own; then commands run as on a system without fcntl.
WITHOUT = """
import contextlib, json, sys, traceback
import torch, torchvision.datasets, torchvision.transforms.v2, torch.utils.data, h5py, pandas

sys.modules["fcntl"] = None
from influence_cli.cli import app

for folder, words in json.loads(sys.argv[1]):
    with contextlib.chdir(folder):
        try:
            app(words)
        except SystemExit as ended:
            print(ended.code or 0, flush=True)
"""


@pytest.mark.parametrize(
    "every", [pytest.param(True, marks=pytest.mark.slow, id="every"), pytest.param(False, id="some")]
)
def test_every_command_runs_where_there_is_no_fcntl(tmp_path: Path, every: bool) -> None:
    project = small_project.with_training(small_project.make(tmp_path / "project"))
    images = relabel_project.make(tmp_path / "images")
    before = relabel_project.tree(images)
    relabel_project.decide(images, (0, "relabel", "plain"), (9, "drop"))
    lines = (
        "gradients",
        "rank 0",
        "mislabels",
        "groups 0:6",
        "select --keep 0.8 -o kept.csv",
        "perturb 0 --test 0",
        "verify 0 --loo 4",
        "verify --lds --subsets 4 --repeats 1 --tests 3",
    )
    lines = lines if every else (*lines[:2], lines[-1])
    commands = [(str(project), [*line.split(), "-q"]) for line in lines]
    commands.append((str(images), ["relabel", "decisions.csv", "--apply-moves"]))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(commands)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0"] * len(commands), done.stderr
    assert "warning: this system has no file locks: two commands that train in influence.retrained" in done.stderr
    assert len(list(project.rglob("half_*.npz"))) == 4
    assert relabel_project.tree(images) != before


def test_readers_share_a_lock_and_a_writer_is_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "store.h5"
    path.touch()
    with path.open("r+b", buffering=0) as one, path.open("r+b", buffering=0) as other:
        locks.lock(one, path, alone=False)
        locks.lock(other, path, alone=False)
        with pytest.raises(InfluenceError, match=r"store\.h5 is in use by process 7"):
            locks.lock(other, path, alone=True, who="process 7")
        locks.unlock(one)
        assert locks.take(other, alone=True)
        assert not locks.take(one, alone=False)
    with path.open("r+b", buffering=0) as again:
        assert locks.take(again, alone=True), "a lock ends with its file"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EBADF])
def test_a_file_system_without_locks_is_worked_on_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    told: list[str] = []
    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr("fcntl.lockf", fail)
    monkeypatch.setattr(locks, "tell", told.append)
    with (tmp_path / "store.h5").open("wb", buffering=0) as raw:
        assert locks.take(raw, alone=True)
        assert locks.take_byte(raw, 3, wait=False)
        locks.give_byte(raw, 3)
        assert not locks.hold(raw)
    assert len(told) == 2
    assert f"store.h5 is used without a lock ({os.strerror(code)})" in told[0]


def test_locks_hold_on_a_usual_file_system(tmp_path: Path) -> None:
    with (tmp_path / "claims").open("wb", buffering=0) as raw:
        assert locks.hold(raw)


def test_a_store_is_read_where_hdf5_finds_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    from influence_cli.store import header

    class Lockless(h5py.File):
        def __init__(self, *words: object, **how: object) -> None:
            if how.get("locking") is not False:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            super().__init__(*words, **how)

    with h5py.File(tmp_path / "store.h5", "w") as file:
        file["x"] = 1
    monkeypatch.setattr(header.h5py, "File", Lockless)
    monkeypatch.setattr(header, "_read_seal", lambda _: b"")
    monkeypatch.setattr(header, "_check_seal", lambda *_: 0)
    monkeypatch.setattr(header, "_read_settled", lambda *_: {})
    monkeypatch.setattr(header, "_read_header", lambda file, *_: {"x": int(file["x"][()])})
    raw, file, read = header.open_file(tmp_path / "store.h5")
    with raw, file:
        assert read == {"x": 1, "end": 0, "settled": {}}
