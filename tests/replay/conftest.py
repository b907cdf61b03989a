"""A project whose run is trained, for the tests that only read it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.support.recipe_project import make


@pytest.fixture(scope="session")
def run_project(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a trained run, and its verdict measured; add replays to it, and change nothing else."""
    folder = make(tmp_path_factory.mktemp("run"))
    from influence_cli.cli import app

    for words in (["train", "-q"], ["check", "-q", "-o", "check.json"]):
        with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
            app(words)
        assert not ended.value.code
    return folder
