"""Streams as they may be found: closed, full, of another encoding, narrow; and Ctrl-C at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from influence_cli.cli import app
from influence_cli.errors import quoted
from influence_cli.runtime.stdio import stdin_lines
from tests.conftest import Command, Ended, edit
from tests.support import fork_server

INFLUENCE = [sys.executable, "-m", "influence_cli"]
COMMANDS = [("rank", "3", "--top", "2"), ("mislabels", "--top", "2"), ("check",)]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
# A data set that is read slowly (for rank: once its store has begun), and says so.
SLOW = """
import sys
import time
from pathlib import Path
from torchvision.datasets import ImageFolder


class Slow(ImageFolder):
    def __getitem__(self, index):
        project = Path(self.root).parent
        if index > 150 and ("rank" not in sys.argv or (project / "influence.h5").exists()):
            (project / "reading").touch()
            time.sleep(0.05)
        return super().__getitem__(index)
"""
# A data set whose library prints by the numbers of the streams.
TALKING = """
import contextlib
import os
from torchvision.datasets import ImageFolder


class Talking(ImageFolder):
    def __getitem__(self, index):
        for number in (1, 2):
            with contextlib.suppress(OSError):
                os.write(number, b"reading " * 9)
        return super().__getitem__(index)
"""


def variables(**more: str) -> dict[str, str]:
    """Give an environment without what changes how Python or the command writes."""
    left_out = ("INFLUENCE_", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "COLUMNS", "LINES", "PYTHONUNBUFFERED")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def shell(line: str, cwd: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a line of a shell, in which `influence` is a fork."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        capture_output=True,
        env=fork_server.path(variables() if environment is None else environment),
    )
    found = Ended(done.returncode, *(part.decode("utf-8", "surrogateescape") for part in (done.stdout, done.stderr)))
    for sign in ("Traceback", "Exception ignored", "unexpected error"):
        assert sign not in found.err
    return found


def error_of(err: str) -> str:
    """Give the one error line."""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


# --- closed


@pytest.mark.parametrize("words", [*COMMANDS, ("--version",), ("rank", "--help")], ids=" ".join)
@pytest.mark.quick("rank*")
def test_a_closed_stdout_is_an_error_before_any_work(trained: Path, words: tuple[str, ...]) -> None:
    before = set(trained.iterdir())
    done = shell(f"influence {' '.join(words)} >&-", trained)
    assert done.code == 2
    assert re.match("error: stdout (is closed|cannot be written)", error_of(done.err))
    assert set(trained.iterdir()) == before


def test_with_a_file_for_the_rows_every_stream_may_be_closed(influence: Command, project: Path) -> None:
    """The first file opened would be stdout by its number: what a library prints must not go into the store."""
    (project / "talking.py").write_text(TALKING)
    edit(
        project,
        "torchvision.datasets.ImageFolder\n  args: {root: train}",
        "./talking.py:Talking\n  args: {root: train}",
    )
    done = shell("influence rank 3 --top 2 -o rows.jsonl <&- >&- 2>&-", project)
    assert done.code == 0
    assert len((project / "rows.jsonl").read_text().splitlines()) == 4
    assert (project / "rows.jsonl.run.json").exists()
    assert "every checksum is right and every example is unchanged" in influence("gradients", "--fsck", cwd=project).err


def test_a_closed_stdin_is_an_empty_list(influence: Command, stored: Path) -> None:
    assert "no test example is selected by -" in influence("rank", "-", cwd=stored, code=2).err


# --- full


@needs_full
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_full_stdout_is_an_error(
    influence: Command, stored: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    with FULL.open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        err = influence(*words, cwd=stored, code=2).err
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left in the buffer, on closing
    assert error_of(err) == "error: stdout cannot be written: No space left on device"


@pytest.fixture(scope="module")
def results(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two results to compare, which takes a process that needs no torch."""
    folder = tmp_path_factory.mktemp("results")
    with contextlib.chdir(stored):
        for name in ("one.csv", "two.csv"):
            with pytest.raises(SystemExit):
                app(["mislabels", "--signal", "loss", "--all", "-q", "-o", str(folder / name)])
    return folder


@needs_full
@pytest.mark.parametrize("words", ["compare one.csv two.csv", "--version", "--help", "rank --help"])
def test_a_full_stdout_leaves_nothing_to_complain_of_at_the_end(results: Path, words: str) -> None:
    done = shell(f"influence {words} > /dev/full", results)
    assert done.code == 2
    assert error_of(done.err) == "error: stdout cannot be written: No space left on device"


@needs_full
def test_a_full_stderr_does_not_stop_the_work(results: Path) -> None:
    said = shell("influence compare one.csv two.csv", results)
    assert said.err
    done = shell("influence compare one.csv two.csv 2> /dev/full", results)
    assert (done.code, done.out) == (said.code, said.out)


# --- stdin, locale and home


def test_stdin_is_utf_8_in_every_locale_and_other_bytes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n".encode() + b"\xff\n"), encoding="ascii"))
    assert list(stdin_lines()) == ["é\n", "\udcff\n"]


def test_a_list_on_stdin_may_hold_names_that_are_not_utf_8(influence: Command, stored: Path, tmp_path: Path) -> None:
    picture = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    shutil.copy(next((stored / "test" / "Bag").iterdir()), picture)
    done = influence("rank", "-", "--top", 1, cwd=stored, stdin=f"{picture}\tBag\n")
    assert [json.loads(line)["test_path"] for line in done.out.splitlines()] == [picture] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\udcff\udcfe.png", "stdin:1: '\\xff\\xfe.png': no such file or index"),
        ("3\t\udcff", "stdin:1: there is no class '\\xff'"),
        ("\x1b" * 5000, ": no such file or index"),
    ],
)
def test_a_list_that_is_not_text_is_told_in_a_line(influence: Command, stored: Path, line: str, message: str) -> None:
    err = influence("rank", "-", cwd=stored, code=2, stdin=f"{line}\n").err
    assert message in error_of(err)
    assert len(error_of(err)) < 800


def test_what_is_quoted_is_printable_and_short() -> None:
    assert quoted("dog\t\udcff") == r"'dog\t\xff'"
    assert quoted("x" * 121) == f"'{'x' * 120}'… (121 characters)"


def bare() -> dict[str, str]:
    """Give what cron or a container leaves of an environment: no home, and a locale that is ASCII."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    ascii_only = {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    return kept | ascii_only | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.quick("rank*")
def test_it_needs_no_home_no_locale_no_terminal_and_no_stdin(stored: Path, words: tuple[str, ...]) -> None:
    done = shell(f"setsid -w influence {' '.join(words)} <&-", stored, bare())
    assert done.code == 0, done.err
    assert all(isinstance(json.loads(line), dict) for line in done.out.splitlines())
    assert done.err.isascii()
    assert "\x1b" not in done.err


# --- a narrow terminal


@pytest.mark.parametrize(
    ("words", "counts"),
    [(COMMANDS[0], {"helpful": 2, "harmful": 2}), (COMMANDS[1], {".png": 2})],
    ids=["rank", "mislabels"],
)
@pytest.mark.quick("rank*")
def test_twenty_columns_of_ascii_without_colour_lose_no_row(
    stored: Path, words: tuple[str, ...], counts: dict[str, int]
) -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    process = fork_server.Popen(
        [*INFLUENCE, *words], cwd=stored, stdin=there, stdout=there, stderr=there,
        env=bare() | {"NO_COLOR": "1", "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(there)
    shown = b""
    try:
        while part := os.read(here, 65536):
            shown += part
    except OSError:  # how a terminal ends on Linux
        os.close(here)
    assert process.wait() == 0, shown
    assert shown.isascii()
    text = shown.decode()
    assert "Traceback" not in text
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3|4|9|10)[0-7]m", text)
    assert {word: text.count(word) for word in counts} == counts


# --- Ctrl-C


def interruptible() -> None:
    """Take Ctrl-C even where the tests run in the background of a shell, which ignores it for its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("words", "kept"),
    [(("rank", "3"), r"[12] of 5 blocks are kept"), (("mislabels",), "finished work is kept")],
    ids=["rank", "mislabels"],
)
def test_ctrl_c_in_the_work_ends_it_with_130_and_says_what_is_kept(
    project: Path, words: tuple[str, ...], kept: str
) -> None:
    (project / "slow.py").write_text(SLOW)
    edit(project, "torchvision.datasets.ImageFolder\n  args: {root: train}", "./slow.py:Slow\n  args: {root: train}")
    process = fork_server.Popen(
        [*INFLUENCE, *words, "-o", "rows.csv", "--report", "page.html"], cwd=project, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=variables(),
    )  # fmt: skip
    while not (project / "reading").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("interrupted: ")]
    assert re.search(kept, line)
    assert "Traceback" not in err
    assert not [*project.glob("*.part"), *project.glob("rows.csv*"), *project.glob("page.html")]


@pytest.mark.parametrize(
    ("module", "message"),
    [("typer", "interrupted before the command started\n"), ("torch", "interrupted: finished work is kept")],
)
def test_ctrl_c_while_modules_load_ends_with_130(trained: Path, tmp_path: Path, module: str, message: str) -> None:
    (tmp_path / f"{module}.py").write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\n")
    shutil.copy(trained / "influence.yaml", tmp_path)
    done = subprocess.run(
        [*INFLUENCE, "rank", "3"], cwd=tmp_path, capture_output=True, text=True, env=variables(),
        preexec_fn=interruptible,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
