"""retrain_files: every retraining is done once, whoever does it, and a kill at any instant loses only what ran."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from influence_cli.config.source_code import object_hash
from influence_cli.errors import InfluenceError, Stopped
from influence_cli.runtime.jobs import Arrays, Job, count_files, do_all, open_folder, read, turn
from influence_cli.runtime.terminal import Terminal
from tests.support import fork_server

MEANING = {"data": "the data", "seed": "the seed"}
JOBS = [Job(f"job_{number}", 1 + number) for number in range(8)]
WORKER = """
import os, sys, time
from pathlib import Path
import numpy as np
from influence_cli.runtime.jobs import Job, do_all, open_folder
from influence_cli.runtime.terminal import Terminal

folder, name, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
open_folder(folder, lambda _: {"data": "a", "seed": "0"}, {"data": "the data", "seed": "the seed"})
def run(job, progress):
    with open(folder / "log", "a") as file:
        file.write(f"{name} {job.number}\\n")
    progress(0.5)
    time.sleep(pause)
    return {"losses": np.array([job.number, 0.5])}
found = do_all(folder, [Job(f"job_{n}", 1 + n) for n in range(8)], run, Terminal(), "working")
print(*(int(arrays["losses"][0]) for arrays in found))
"""


def number_of(job: Job, progress: Callable[[float], None]) -> Arrays:
    progress(0.5)
    return {"losses": np.array([job.number, 0.5])}


def opened(tmp_path: Path) -> Path:
    open_folder(tmp_path / "kept", lambda _: {"data": "a", "seed": "0"}, MEANING)
    return tmp_path / "kept"


def start(folder: Path, name: str, pause: float) -> fork_server.Popen:
    words = [sys.executable, "-c", WORKER, str(folder), name, str(pause)]
    return fork_server.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log_of(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_a_second_run_does_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = opened(tmp_path)
    first = do_all(folder, JOBS[:3], number_of, Terminal(), "working")
    done: list[str] = []

    def note(job: Job, progress: Callable[[float], None]) -> Arrays:
        done.append(job.name)
        return number_of(job, progress)

    capsys.readouterr()
    again = do_all(folder, JOBS[:5], note, Terminal(), "working")
    assert done == ["job_3", "job_4"]
    assert [int(arrays["losses"][0]) for arrays in again] == [1, 2, 3, 4, 5]
    assert all(np.array_equal(a["losses"], b["losses"]) for a, b in zip(first, again, strict=False))
    assert "3 of 5 retrainings are already in" in capsys.readouterr().err


def test_a_file_that_is_cut_short_is_made_again(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    do_all(folder, JOBS[:2], number_of, Terminal(quiet=True), "working")
    path = folder / "job_0.npz"
    path.write_bytes(path.read_bytes()[:40])
    assert read(folder, JOBS[0]) is None
    assert len(do_all(folder, JOBS[:2], number_of, Terminal(quiet=True), "working")) == 2
    assert read(folder, JOBS[0]) is not None


def test_a_folder_of_something_else_is_named_and_left_alone(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    do_all(folder, JOBS[:1], number_of, Terminal(quiet=True), "working")
    open_folder(folder, lambda _: {"data": "a", "seed": "0"}, MEANING)
    with pytest.raises(InfluenceError) as caught:
        open_folder(folder, lambda _: {"data": "b", "seed": "0"}, MEANING)
    assert "holds retrainings of another run (1); what differs: the data" in caught.value.message
    assert "move" in caught.value.hint
    assert count_files(folder) == 1
    (folder / "made_of.json").write_text("{")
    with pytest.raises(InfluenceError, match="cannot be used"):
        open_folder(folder, lambda _: {"data": "a", "seed": "0"}, MEANING)


def test_what_was_finished_is_kept_when_one_fails_or_is_interrupted(tmp_path: Path) -> None:
    folder = opened(tmp_path)

    def fails(job: Job, progress: Callable[[float], None]) -> Arrays:
        if job.number == 3:
            raise InfluenceError("it failed", "look at it")
        return number_of(job, progress)

    def interrupted(job: Job, progress: Callable[[float], None]) -> Arrays:
        raise KeyboardInterrupt

    with pytest.raises(InfluenceError) as caught:
        do_all(folder, JOBS, fails, Terminal(quiet=True), "working")
    assert caught.value.message == "it failed"
    assert caught.value.hint.startswith("look at it; finished retrainings are kept in ")
    with pytest.raises(Stopped, match=r"finished retrainings are kept in .* \(2\)"):
        do_all(folder, JOBS, interrupted, Terminal(quiet=True), "working")
    # The claim of the one that failed was given back.
    assert len(do_all(folder, JOBS, number_of, Terminal(quiet=True), "working")) == 8


def test_two_processes_take_different_jobs_and_both_have_all_results(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    workers = [start(folder, name, 0.3) for name in "ab"]
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
        assert out.split() == [str(number) for number in range(1, 9)]
    lines = log_of(folder)
    assert sorted(int(number) for _, number in lines) == list(range(1, 9))
    assert {name for name, _ in lines} == {"a", "b"}
    assert not list(folder.glob("*.part"))


def test_a_killed_process_leaves_no_claim_behind(tmp_path: Path) -> None:
    """SIGKILL while a job runs: its claim is free at once, what it had finished stays, and nothing half-written."""
    folder = tmp_path / "kept"
    worker = start(folder, "killed", 0.2)
    deadline = time.monotonic() + 60
    while len(log_of(folder)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    begun = [int(number) for _, number in log_of(folder)]
    kept = {job.number for job in JOBS if read(folder, job) is not None}
    assert kept >= set(begun[:-1])
    done: list[int] = []

    def note(job: Job, progress: Callable[[float], None]) -> Arrays:
        done.append(job.number)
        return number_of(job, progress)

    found = do_all(folder, JOBS, note, Terminal(quiet=True), "working")
    assert [int(arrays["losses"][0]) for arrays in found] == list(range(1, 9))
    assert set(done) == {job.number for job in JOBS} - kept


def test_a_turn_is_one_process_at_a_time(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom influence_cli.runtime.jobs import turn\n"
        "with turn(Path(sys.argv[1]), wait=False) as mine:\n    print(mine)"
    )
    words = [sys.executable, "-c", code, str(folder)]
    with turn(folder, wait=True) as mine:
        assert mine
        assert fork_server.run(words, capture_output=True, text=True, check=True).stdout == "False\n"
    assert fork_server.run(words, capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_hash_of_code_follows_its_file_and_its_arguments_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"

    def made(text: str, rate: float) -> list[str]:
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("mine", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        # As losses are: a function, one with its arguments bound, an object of a class.
        return [
            object_hash(found, {"rate": rate})
            for found in (module.one, functools.partial(module.one, rate=rate), module.Loss())
        ]

    text = "def one(x, rate=1): return x\n\nclass Loss:\n    def __call__(self, x): return x\n"
    first = made(text, 0.1)
    assert made(text, 0.1) == first
    assert first[0] == first[1] != first[2]
    assert all(a != b for a, b in zip(made(text, 0.2), first, strict=True))
    assert all(a != b for a, b in zip(made(text + "# edited\n", 0.1), first, strict=True))
