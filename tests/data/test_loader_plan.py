"""The plan is a function of measured times; what is measured, and what processes read, is checked on real loaders."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from influence_cli.data import loader_plan
from influence_cli.data.batches import ALONE, Loading, read_batches
from influence_cli.data.loader_plan import best_workers, cores_here, fit, plan_loading, seconds_each
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.runtime.terminal import Terminal
from tests.conftest import Command

MANY = 10**6
CPU = torch.device("cpu")


class Numbers:
    """Examples whose every number is their position, read as slowly as is wished."""

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        return torch.full((3,), float(index)), 0


def split_of(source: Any) -> Split:
    n = len(source)
    return Split("train", source, None, np.zeros(n, dtype=np.int64), np.arange(n), None, None, None, "influence.yaml:3")


# The plan, of times


def test_the_time_of_an_example_is_that_of_the_slower_of_both() -> None:
    assert seconds_each(3.0, 2.0, cores=4, threads=4, workers=0) == 5.0
    # One worker reads in 3 s, and leaves the model three of its four cores: 2·4/3 s.
    assert seconds_each(3.0, 2.0, cores=4, threads=4, workers=1) == 3.0
    assert seconds_each(3.0, 2.0, cores=4, threads=4, workers=2) == 4.0
    assert seconds_each(3.0, 2.0, cores=4, threads=4, workers=3) == 8.0
    # A model on one thread, or on a GPU, loses nothing.
    assert [seconds_each(3.0, 2.0, 4, 1, workers) for workers in range(4)] == [5.0, 3.0, 2.0, 2.0]


PLANS = [
    # read, pass, cores, threads: workers
    ((1e-3, 1e-3, 1, 1), 0),  # no other core
    ((1e-4, 1e-2, 16, 16), 0),  # reading is a small share
    ((1e-4, 1e-2, 16, 1), 0),
    ((1e-3, 1e-3, 2, 2), 0),  # the worker takes half of the model's cores
    ((1e-2, 1e-3, 2, 2), 0),  # half of the model's time is little
    ((4e-3, 2e-3, 2, 2), 1),  # 6 ms become 4
    ((1e-3, 1e-3, 2, 1), 1),  # 2 ms become 1
    ((8e-3, 1e-3, 16, 16), 5),  # max(8/5, 16/11): with 6 the model would take as long
    ((8e-3, 1e-3, 16, 1), 8),  # a GPU is kept busy by eight
    ((8e-3, 1e-3, 4, 1), 3),  # as many as there are cores beside its own
    ((1e-1, 1e-6, 64, 1), 60),  # the last few hardly help
]


@pytest.mark.parametrize(("times", "workers"), PLANS)
def test_the_plan_is_the_fewest_processes_of_nearly_the_least_time(
    times: tuple[float, float, int, int], workers: int
) -> None:
    read, passing, cores, threads = times
    found = best_workers(read, passing, cores, threads, MANY)
    assert found == workers
    least = min(seconds_each(*times, other) for other in range(cores))
    if found:
        assert seconds_each(*times, found) <= 1.05 * least
        assert seconds_each(*times, found - 1) > 1.05 * least or found == 1
    else:
        assert least > (1 - loader_plan.SHARE) * (read + passing)


def test_no_process_is_started_for_what_is_soon_done() -> None:
    assert best_workers(4e-3, 2e-3, 2, 2, 2000) == 1
    assert best_workers(4e-3, 2e-3, 2, 2, 900) == 0


FITS = [((4, 10, 1000), (4, 4)), ((4, 100, 1000), (4, 2)), ((4, 300, 1000), (3, 1)), ((4, 501, 1000), (0, 0))]


@pytest.mark.parametrize(("given", "found"), FITS)
def test_batches_on_their_way_fit_in_memory(given: tuple[int, int, int], found: tuple[int, int]) -> None:
    assert fit(*given) == found
    workers, batch, room = given
    assert found[0] <= workers
    assert found[0] * found[1] * batch <= room


def test_cores_are_those_of_the_affinity_and_the_quota_shared_with_the_ranks_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.setattr(loader_plan, "QUOTA", tmp_path / "cpu.max")
    assert cores_here() == 16
    monkeypatch.setattr(loader_plan.distributed, "on_this_host", lambda: 4)
    assert cores_here() == 4
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores_here() == 4
    (tmp_path / "cpu.max").write_text("600000 100000\n")
    assert cores_here() == 1
    monkeypatch.setattr(loader_plan.distributed, "on_this_host", lambda: 2)
    assert cores_here() == 3
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cores_here() == 1


# The probe


def planned(
    source: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cores: int = 2
) -> tuple[Loading, str]:
    """Plan beside a model that takes no time on one thread."""
    monkeypatch.setattr(loader_plan, "cores_here", lambda: cores)
    monkeypatch.setattr(loader_plan, "best_workers", lambda read, *_: 2 if read > 1e-3 else 0)
    found = plan_loading(split_of(source), lambda inputs: inputs, CPU, 0, Terminal(verbose=True))
    return found, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_slow_reading_is_measured_and_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = planned(Numbers(10**5, 2e-3), monkeypatch, capsys)
    assert found == Loading(2, 4 * 256, pin=False)
    assert said.startswith("2 loader processes, 4 batches ready in each: one example takes ")


def test_nothing_is_measured_of_few_examples_or_without_a_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unread(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise AssertionError

    assert planned(Unread(64), monkeypatch, capsys) == (ALONE, "")
    assert planned(Unread(10**6), monkeypatch, capsys, cores=1) == (ALONE, "")
    # Of a set that is read at once, the model is not asked.
    assert planned(Numbers(500, 2e-3), monkeypatch, capsys) == (ALONE, "")


def test_a_set_in_memory_is_read_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loader_plan, "SAVED", 0.0)
    found, said = planned(Numbers(10**5), monkeypatch, capsys)
    assert found == ALONE
    assert said.startswith("reading in this process: one example takes ")


def test_examples_that_cannot_be_read_are_left_to_the_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise OSError("disk says no")

    assert planned(Broken(10**5), monkeypatch, capsys) == (ALONE, "")


def no_fork() -> int:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def here_only(index: int, reader: int = os.getpid()) -> float:  # the process that imports this file
    return float(index if os.getpid() == reader else -1)


class Elsewhere(Numbers):
    """Gives other numbers in another process."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(0)[0] + here_only(index), 0


OBSTACLES: list[tuple[str, Callable[[pytest.MonkeyPatch], Any], str]] = [
    ("fork", lambda patch: patch.setattr(os, "fork", no_fork), "cannot start 2 loader processes: BlockingIOError"),
    (
        "shm",
        lambda patch: patch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=1, f_frsize=4096)),
        "a batch takes 3.1 kB, and /dev/shm or free memory has room for only 3.1 kB (in a container: --shm",
    ),
    ("pixels", lambda patch: None, "they read different pixels than this process"),
]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(("name", "hinder", "said"), OBSTACLES)
def test_what_hinders_loader_processes_is_named_before_the_work(
    name: str,
    hinder: Callable[[pytest.MonkeyPatch], Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hinder(monkeypatch)
    source = (Elsewhere if name == "pixels" else Numbers)(10**5, 2e-3)
    found, told = planned(source, monkeypatch, capsys)
    assert found == ALONE
    assert told.count("\n") == 1
    assert told.startswith("warning: loader processes would be faster, but ")
    assert said in told
    assert ": reading in this process; one example takes" in told


class OneFile:
    """Examples of 64 kB in a file that is opened when the first one is read; without a buffer each read moves it."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.file = path, count, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(2e-3)
        self.file = self.file or self.path.open("rb")
        self.file.seek(index % 8 * 2**16)
        return torch.from_numpy(np.frombuffer(self.file.read(2**16), np.float32).copy()), 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_file_that_processes_would_share_is_read_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "all.bin"
    path.write_bytes(np.arange(2**17, dtype=np.float32).tobytes())
    source = OneFile(path, 10**5)
    found, told = planned(source, monkeypatch, capsys)
    source.file.close()
    assert found == ALONE
    assert f"they would read {path} through one open file, and move each other's place in it" in told


# torch complains that its own loader, half made, has not all that its end looks at.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_second_process_that_cannot_be_started_leaves_no_first(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    fork = os.fork

    def once() -> int:
        if started:
            no_fork()
        started.append(fork())
        return started[0]

    monkeypatch.setattr(os, "fork", once)
    with pytest.raises(InfluenceError, match="cannot start 2 loader processes: BlockingIOError"):
        list(read_batches(split_of(Numbers(40)), np.arange(40), 4, Loading(2)))
    gc.collect()
    for child in multiprocessing.active_children():
        child.join(20)
        assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_processes_that_hang_are_found_in_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if os.getpid() != reader:
                time.sleep(60)
            return super().__getitem__(index)

    reader = os.getpid()
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.05)  # how long the end waits for them
    with pytest.raises(InfluenceError, match=r"influence\.yaml:3: the loader processes stopped responding"):
        list(read_batches(split_of(Hanging(40)), np.arange(40), 4, Loading(2), timeout=0.2))


# In a command


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_store_is_the_same_to_the_byte_whoever_reads(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("gradients", cwd=tiny)
    store = tiny / "influence.h5"
    content = store.read_bytes()
    store.unlink()
    for name, value in (("cores_here", lambda: 3), ("SAVED", 0.0), ("BATCH", 4), ("best_workers", lambda *_: 2)):
        monkeypatch.setattr(loader_plan, name, value)
    done = influence("gradients", "-v", cwd=tiny)
    assert done.err.count("2 loader processes, 4 batches ready in each: one example takes") == 1
    assert store.read_bytes() == content


def test_a_log_that_grows_meanwhile_is_no_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "log").open("w") as log:

        class Said(Numbers):
            def __getitem__(self, index: int) -> tuple[Tensor, int]:
                print("read", file=log, flush=True)
                return super().__getitem__(index)

        assert loader_plan._obstacle(split_of(Said(100)), Loading(2)) == ""
