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
import ctypes
import os
import sys
from torch import nn

kept = sys.stdout
print("imported")


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
    return Net(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
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
