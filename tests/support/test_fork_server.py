"""The fork server: what it forks behaves as a process of its own that `subprocess` has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import fork_server

CODE = """
import os, sys
print(sys.argv, __name__, sys.stdout.name, sys.stdin.name, sys.stderr.mode)
print(os.getcwd(), os.environ.get("GIVEN"), os.environ.get("HOME"), sys.stdin.read())
sys.stderr.write("told\\n")
sys.exit(int(sys.argv[1]))
"""
LOCALE = {name: os.environ[name] for name in fork_server.AT_START if name in os.environ}
KINDS = pytest.mark.parametrize("kind", [subprocess, fork_server], ids=["a process", "a fork"])


@KINDS
def test_words_streams_environment_folder_and_exit_code_arrive(tmp_path: Path, kind: object) -> None:
    done = kind.run(
        [sys.executable, "-c", CODE, "3", "é"], cwd=tmp_path, env=LOCALE | {"GIVEN": "1"}, input="in",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stdout == f"['-c', '3', 'é'] __main__ <stdout> <stdin> w\n{tmp_path} 1 None in\n"
    assert done.stderr == "told\n"


@KINDS
@pytest.mark.parametrize(
    ("code", "ended", "told"),
    [
        ("pass", 0, ""),
        ("raise SystemExit('words')", 1, "words\n"),
        ("import sys; sys.exit()", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import atexit, os; atexit.register(os.write, 2, b'last')", 0, "last"),
        ("import threading, os; threading.Timer(0.1, os.write, (2, b'last')).start()", 0, "last"),
    ],
)
def test_it_ends_as_python_ends(kind: object, code: str, ended: int, told: str) -> None:
    done = kind.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == ended
    assert done.stderr.endswith(told)
    assert bool(done.stderr) == bool(told)


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_what_is_left_in_a_buffer_is_written_at_the_end_or_complained_of(unbuffered: dict[str, str]) -> None:
    """As by a process: only of one that buffers the exit code is Python's own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | unbuffered
    code = "import os, sys; sys.stdout.write('rows'); os.close(1)"
    process, fork = (
        kind.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        for kind in (subprocess, fork_server)
    )
    assert process.returncode == (0 if unbuffered else 120)
    assert (fork.returncode, fork.stdout, fork.stderr[-40:]) == (
        process.returncode,
        process.stdout,
        process.stderr[-40:],
    )


@KINDS
def test_ctrl_c_and_sigkill_reach_it(kind: object) -> None:
    words = [sys.executable, "-c", "import time\nprint('here', flush=True)\ntime.sleep(60)"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with kind.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "here\n"
            assert process.poll() is None
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert process.returncode == -number
        assert out == ""
        assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


@KINDS
def test_waiting_has_an_end(kind: object) -> None:
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with kind.Popen(words) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        kind.run(words, timeout=0.1)


def test_a_fork_that_nobody_holds_any_more_is_killed() -> None:
    process = fork_server.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
    out = process.stdout
    process.stdout = None
    del process
    assert out.read() == b""  # which it does when the last process that could write has ended
    out.close()


def test_forks_know_nothing_of_each_other(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    leave = "import sys, torch, mine; torch.manual_seed(5); sys.modules['left'] = mine"
    look = "import sys, torch; print('left' in sys.modules, 'mine' in sys.modules, torch.initial_seed() == 5)"
    assert fork_server.run([sys.executable, "-c", leave], cwd=tmp_path).returncode == 0
    done = fork_server.run([sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["False"] * 3


@pytest.mark.slow
def test_the_locale_is_that_of_the_environment() -> None:
    code = "import sys; print(sys.getfilesystemencoding(), sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors)"
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    told = [
        kind.run([sys.executable, "-c", code], env={**os.environ, **more}, capture_output=True, text=True).stdout
        for more in ({}, plain)
        for kind in (subprocess, fork_server)
    ]
    assert told[0] == told[1] != told[2] == told[3]


def test_a_shell_starts_forks_by_name_in_pipes_and_with_closed_streams(tmp_path: Path) -> None:
    line = (
        "influence --version | cat; influence nonsense 2>&1; echo $?; influence --version >&-; echo $?; "
        "influence --version <&- >&- 2>&-; echo $?"
    )
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=fork_server.path(os.environ), capture_output=True, text=True
    )
    version, *refusal, first, second, third = done.stdout.splitlines()
    assert version.startswith("influence ")
    assert refusal[0] == "error: no such command 'nonsense'"
    assert (first, second, third) == ("2", "2", "2")


def test_many_at_once_are_told_apart() -> None:
    code = "import sys, time; time.sleep(float(sys.argv[1]) / 50); sys.exit(int(sys.argv[1]))"
    started = [fork_server.Popen([sys.executable, "-c", code, str(number)]) for number in (7, 1, 4, 2)]
    begun = time.monotonic()
    assert [one.wait() for one in started] == [7, 1, 4, 2]
    assert time.monotonic() - begun < 60
