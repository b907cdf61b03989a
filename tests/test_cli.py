"""cli: help without torch, data apart from talk, and an exit code that scripts can rely on, however a command ends."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import typer

import influence_cli
from influence_cli.__main__ import main
from influence_cli.cli import app
from tests.conftest import Command, edit, run_influence
from tests.support import fork_server

INFLUENCE = [sys.executable, "-m", "influence_cli"]
COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:[34][0-8]|9[0-7]|10[0-7])[;m]")
# Each in a fork of a Python that has loaded the command line and nothing else.
NO_TORCH = """
import json, os, sys, tempfile

from influence_cli.cli import app

for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.chdir(tempfile.mkdtemp(dir="."))
        out = os.dup(1)
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        code = None
        try:
            app(words)
        except SystemExit as ended:
            code = ended.code
        loaded = sorted({"torch", "torchvision", "h5py"} & set(sys.modules))
        os.write(out, json.dumps([words, code, loaded]).encode() + b"\\n")
        os._exit(0)
    os.wait()
"""
SLOW = """
import time
from pathlib import Path
from torchvision.datasets import ImageFolder


class Slow(ImageFolder):
    def __getitem__(self, index):
        if index > 100:
            Path(self.root, "..", "reading").touch()
            time.sleep(0.05)
        return super().__getitem__(index)
"""
LOSS = """
import torch


def mine(outputs, targets):
    if (targets == 7).any():
        raise ValueError("no sevens here")
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
"""


def environment(**more: str) -> dict[str, str]:
    """Give the variables of a plain terminal: nothing that changes how Python or the command writes."""
    left_out = ("INFLUENCE_", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED", "CLICOLOR", "COLUMNS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return kept | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | more


# --- help


WITHOUT_TORCH: list[tuple[tuple[str, ...], int]] = [
    (("--help",), 0),
    (("-h",), 0),
    (("--version",), 0),
    ((), 2),
    (("--nonsense",), 2),
    *(((name, "--help"), 0) for name in COMMANDS),
    (("init",), 0),
    (("rank", "3"), 2),  # there is no config: said before the wait for torch
    (("rank",), 2),
]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[int, list[str]]]:
    """Give the exit code of each, and which of the heavy modules were loaded in the end."""
    words = json.dumps([words for words, _ in WITHOUT_TORCH])
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, words],
        cwd=tmp_path_factory.mktemp("empty"),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        check=True,
    )
    return {tuple(words): (code, loaded) for words, code, loaded in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(("words", "code"), WITHOUT_TORCH, ids=str)
def test_torch_is_not_imported_for_it(
    without_torch: dict[tuple[str, ...], tuple[int, list[str]]], words: tuple[str, ...], code: int
) -> None:
    assert without_torch[words] == (code, [])


def test_importing_the_package_leaves_torch_out_and_every_public_name_exists() -> None:
    code = "import sys, influence_cli, influence_cli.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in influence_cli.__all__:
        assert getattr(influence_cli, name) is not None, name
    assert influence_cli.select is influence_cli.select_tests  # the old name, for one release
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = influence_cli.nonsense


def test_help_names_every_command_of_the_design(influence: Command, tmp_path: Path) -> None:
    text = influence("--help", cwd=tmp_path).out
    assert set(COMMANDS) >= {"demo", "init", "check", "gradients", "rank", "mislabels"}
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S+ \S+", text, re.MULTILINE), name
    assert "influence demo" in text
    assert influence("-h", cwd=tmp_path).out == text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples_whose_options_exist(influence: Command, tmp_path: Path, name: str) -> None:
    done = influence(name, "--help", cwd=tmp_path)
    assert done.err == ""
    assert influence(name, "-h", cwd=tmp_path).out == done.out
    before, _, after = done.out.partition("Example")
    examples = [line.strip() for line in after.partition("\n\nArguments:")[0].partition("\n\nOptions:")[0].splitlines()]
    runs = [line for line in examples if f"influence {name}" in line]
    assert "Usage:" in before
    assert runs
    for line in runs:
        words = shlex.split(re.split(r"[|>&]", line.partition(f"influence {name}")[2])[0])
        for word in words:
            if word.startswith("-") and word != "-":
                assert re.search(rf"^ +.*{word}\b", after, re.MULTILINE), (line, word)


def test_version_is_that_of_the_package(influence: Command, tmp_path: Path) -> None:
    done = influence("--version", cwd=tmp_path)
    assert done.out == f"influence {importlib.metadata.version('influence-cli')}\n"
    assert done.err == ""


def test_the_installed_script_runs_this() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="influence")
    assert script.load() is main


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    for typed, at, wanted in (("influence ra", 1, "rank"), ("influence rank --aggr", 2, "--aggregate")):
        variables = {"_INFLUENCE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(at)}
        code = "import sys; sys.argv[0] = 'influence'; from influence_cli.cli import main; main()"
        done = fork_server.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment(**variables)
        )
        assert done.stdout.split() == [wanted], done.stderr


# --- exit codes and streams


def test_without_arguments_help_is_shown_and_nothing_is_data(influence: Command, tmp_path: Path) -> None:
    done = influence(cwd=tmp_path, code=2)
    assert done.out == ""
    assert "Usage:" in done.err
    assert "mislabels" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("--nonsense",), ("nonsense",), ("rank", "--nonsense"), ("rank", "0", "--top", "0"), ("rank", "0", "--top"),
        ("mislabels", "--top", "x"), ("rank", "--train", "1.5"), ("gradients", "surplus"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_line_that_is_not_understood_ends_with_2(
    influence: Command, project: Path, words: tuple[str, ...]
) -> None:
    done = influence(*words, cwd=project, code=2)
    assert done.out == ""
    assert [line for line in done.err.splitlines() if line.lower().startswith("error: ")]
    assert not (project / "influence.h5").exists()


@pytest.mark.parametrize("words", [("rank", 3), ("mislabels",), ("check",), ("rank", "--train", 3)])
def test_stdout_is_data_and_stderr_is_all_else(influence: Command, stored: Path, words: tuple[object, ...]) -> None:
    done = influence(*words, cwd=stored)
    assert all(isinstance(json.loads(line), dict) for line in done.out.splitlines())
    assert done.out.endswith("}\n")
    assert done.err
    assert "{" not in done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("words", [("rank", 3), ("mislabels",), ("check",), ("gradients",), ("gradients", "--fsck")])
@pytest.mark.quick("words0", "words1")
def test_quiet_says_nothing_and_gives_the_same_data(
    influence: Command, stored: Path, words: tuple[object, ...]
) -> None:
    quiet = influence(*words, "-q", cwd=stored)
    assert quiet.err == ""
    if words != ("check",):  # which measures times
        assert quiet.out == influence(*words, cwd=stored).out


def test_quiet_still_warns(influence: Command, project: Path) -> None:
    state = torch.load(project / "model.pt")
    torch.save({name: value.roll(1, 0) for name, value in state.items()}, project / "model.pt")
    lines = influence("gradients", "-q", cwd=project).err.splitlines()
    assert lines
    assert all(line.startswith("warning: ") for line in lines)


def test_verbose_says_more(influence: Command, stored: Path) -> None:
    assert len(influence("rank", 3, "-v", cwd=stored).err) > len(influence("rank", 3, cwd=stored).err)


def test_an_error_that_nobody_foresaw_ends_with_2_and_one_line(influence: Command, project: Path) -> None:
    """Exit code 1 is for findings: CI must not take a crash for one."""
    (project / "losses.py").write_text(LOSS)
    edit(project, "l2: 0.01", "l2: 0.01\nloss: {factory: ./losses.py:mine}")
    done = influence("gradients", cwd=project, code=2)
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "no sevens here" in line


@pytest.mark.parametrize(("debug", "shown"), [({}, False), ({"INFLUENCE_DEBUG": "1"}, True)], ids=["plain", "debug"])
def test_debug_shows_the_traceback_of_an_error_and_keeps_its_exit_code(
    tmp_path: Path, debug: dict[str, str], shown: bool
) -> None:
    done = fork_server.run(
        [*INFLUENCE, "check"], cwd=tmp_path, capture_output=True, text=True, env=environment(**debug)
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "there is no config influence.yaml" in done.stderr
    assert ("Traceback" in done.stderr) == shown


@pytest.mark.parametrize(
    ("variables", "words", "read"),
    [
        ({}, (), "influence.yaml"),
        ({"INFLUENCE_CONFIG": "other.yaml"}, (), "other.yaml"),
        ({"INFLUENCE_CONFIG": "other.yaml"}, ("-c", "third.yaml"), "third.yaml"),
        ({}, ("--config", "sub/fourth.yaml"), "sub/fourth.yaml"),
    ],
)
def test_the_config_is_the_one_that_is_named(
    tmp_path: Path, variables: Mapping[str, str], words: tuple[str, ...], read: str
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("influence.yaml", "other.yaml", "third.yaml", "sub/fourth.yaml"):
        (tmp_path / name).write_text("nonsense: 1\n")
    done = fork_server.run(
        [*INFLUENCE, "check", *words], cwd=tmp_path, capture_output=True, text=True, env=environment(**variables)
    )
    assert done.returncode == 2
    assert f"error: {read}:1: unknown key 'nonsense'" in done.stderr


# --- closed pipes


def without_reader(*words: str, cwd: Path, stream: str = "stdout") -> subprocess.CompletedProcess[str]:
    """Run a command whose stdout (or stderr) nobody reads any more; its other stream is kept."""
    here, there = os.pipe()
    os.close(here)
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: there}
        return fork_server.run([*INFLUENCE, *words], cwd=cwd, text=True, env=environment(), **streams)
    finally:
        os.close(there)


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("rank", "--help"), ("init",)], ids=" ".join)
def test_a_reader_of_stdout_that_has_gone_is_no_error(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = without_reader(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for sign in ("Traceback", "Exception", "BrokenPipe", "error"):
        assert sign not in done.stderr


def test_a_reader_of_stderr_that_has_gone_is_no_error(stored: Path) -> None:
    done = without_reader("rank", "3", "--top", "2", cwd=stored, stream="stderr")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 4


def test_head_takes_its_line_and_the_pipeline_succeeds(stored: Path) -> None:
    words = ["bash", "-o", "pipefail", "-c", "influence rank 0:40 --all -q | head -1"]
    shell = fork_server.path(environment())
    done = subprocess.run(words, cwd=stored, capture_output=True, text=True, env=shell)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


# --- interruption and terminals


def test_ctrl_c_ends_with_130_and_a_line(project: Path) -> None:
    (project / "slow.py").write_text(SLOW)
    edit(project, "torchvision.datasets.ImageFolder\n  args: {root: train}", "./slow.py:Slow\n  args: {root: train}")
    process = fork_server.Popen(
        [*INFLUENCE, "check"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    while not (project / "reading").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert err.startswith("interrupted: ")
    assert "Traceback" not in err


def on_terminal(*words: str, cwd: Path, **variables: str) -> tuple[str, int]:
    """Run a command whose stdout and stderr are a terminal; give what it showed and its exit code."""
    here, there = pty.openpty()
    process = fork_server.Popen(
        [*INFLUENCE, *words],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=there,
        stderr=there,
        env=environment(**variables),
    )
    os.close(there)
    shown = b""
    # Reading fails where the other end is closed: that is how a terminal ends on Linux.
    with contextlib.suppress(OSError):
        while part := os.read(here, 65536):
            shown += part
    os.close(here)
    return shown.decode(), process.wait()


def test_a_terminal_gets_progress_and_a_table_and_a_pipe_gets_neither(
    influence: Command, stored: Path, tmp_path: Path
) -> None:
    words = ("rank", "3", "--top", "2", "-s", f"gradients.store={tmp_path / 'new.h5'}")
    shown, code = on_terminal(*words, cwd=stored, NO_COLOR="1")
    assert code == 0
    assert "loading torch" in shown
    assert re.search(r"gradients of new\.h5.*%.*/s", shown)
    assert "wrote 5 of 5 blocks" in shown
    assert "helpful" in shown
    assert "{" not in shown
    assert not COLOUR.search(shown)
    (tmp_path / "new.h5").unlink()
    plain = influence(*words, cwd=stored)
    assert len([json.loads(line) for line in plain.out.splitlines()]) == 4
    assert "wrote 5 of 5 blocks" in plain.err
    for sign in ("loading", "gradients of", "scanning", "\x1b", "\r"):
        assert sign not in plain.err


@pytest.mark.parametrize(
    ("variables", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_colours_are_for_terminals_that_want_them(tmp_path: Path, variables: dict[str, str], colour: bool) -> None:
    shown, code = on_terminal("check", cwd=tmp_path, **variables)
    assert code == 2
    assert "there is no config influence.yaml" in shown
    assert bool(COLOUR.search(shown)) == colour
    assert "\x1b" not in run_influence("check", cwd=tmp_path, code=2).stderr  # a pipe


def test_a_file_name_cannot_move_the_cursor(tmp_path: Path) -> None:
    shown, code = on_terminal("check", "-c", "a\x1b[2Jb\nc.yaml", cwd=tmp_path, NO_COLOR="1")
    assert code == 2
    assert "\x1b[2J" not in shown
    assert r"a\x1b[2Jb\nc.yaml" in shown
