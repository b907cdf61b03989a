"""Rows alone are on stdout, whatever the code that runs with a command prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from influence_cli.runtime import stdout
from tests.conftest import Command
from tests.support import fork_server

# A model whose file, factory and forward pass print in every way there is.
PRINTING = """
import atexit
import ctypes
import logging
import os
import subprocess
import sys
from torch import nn

kept = sys.stdout
print("imported")
logging.basicConfig(stream=sys.stdout)
atexit.register(print, "at exit")
atexit.register(os.write, 1, b"by number at exit\\n")


class Net(nn.Sequential):
    def forward(self, x):
        print("shape", tuple(x.shape))
        return super().forward(x)


def build():
    print("built")
    os.write(1, b"by number\\n")
    sys.__stdout__.write("by the stream of the start\\n")
    kept.write("kept\\n")
    ctypes.CDLL(None).printf(b"from C\\n")
    logging.warning("logged")
    subprocess.run(["echo", "by a child"])
    return Net(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
"""

LOADING = """
import os
import numpy as np
import torch
from influence_cli.data.batches import Loading, read_batches
from influence_cli.data.split import Split
from influence_cli.runtime import stdout


class Source:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        os.write(1, b"by number\\n")
        print("by name", flush=True)
        return torch.ones(2), 0


split = Split("train", Source(), None, np.zeros(6, np.int64), np.arange(6), None, None, None, "here")
with stdout.rows_apart():
    assert sum(map(len, read_batches(split, split.indices, 1, Loading(workers=1)))) == 6
    print("a row", file=stdout.rows(), flush=True)
"""


def test_what_code_of_the_user_prints_goes_to_stderr(tiny: Path) -> None:
    """By name and by number, from C, and from a stream that was kept: among the rows there is nothing else."""
    (tiny / "model.py").write_text(PRINTING)
    words = [sys.executable, "-m", "influence_cli", "mislabels", "--format", "jsonl", "--top", "3", "-q"]
    done = fork_server.run(words, cwd=tiny, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["rank"] for line in done.stdout.splitlines()] == [1, 2, 3]
    for word in ("imported", "built", "by number", "by the stream", "from C", "kept", "shape (1, 1, 8, 8)"):
        assert word in done.stderr
    for word in ("logged", "by a child", "at exit", "by number at exit"):
        assert word in done.stderr


def test_what_loader_processes_print_goes_to_stderr(tmp_path: Path) -> None:
    done = fork_server.run([sys.executable, "-c", LOADING], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a row\n"
    assert done.stderr.count("by number") == done.stderr.count("by name") == 6


def test_rows_go_to_the_stdout_of_a_command_that_runs_in_another_program(influence: Command, tiny: Path) -> None:
    (tiny / "model.py").write_text(PRINTING)
    before = sys.stdout
    done = influence("rank", 0, "--top", 1, cwd=tiny)
    assert sys.stdout is before
    assert [json.loads(line)["rank"] for line in done.out.splitlines()] == [1, 1]
    assert "imported" in done.err
    assert "shape (1, 1, 8, 8)" in done.err


def test_a_command_in_another_one_has_its_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with stdout.rows_apart():
        kept = stdout.rows()
        with stdout.rows_apart():
            assert stdout.rows() is kept
        assert stdout.rows() is kept
        before, sys.stderr = sys.stderr, sys.stdout  # a program may do that too
        print("said")
        sys.stderr = before
        kept.write("row")
    assert stdout.rows() is sys.stdout
    assert tuple(capsys.readouterr()) == ("row", "said\n")
