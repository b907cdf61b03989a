"""``influence convert`` makes weights of what only running can read, elsewhere, and only of what is trusted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Command

SOURCE = """
from torch import nn

open("imported", "w").close()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.tied = self.fc
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a module of a user, and a file of its whole model."""
    (tmp_path / "user_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import user_net  # type: ignore[import-not-found]

    torch.save({"model": None, "ema": user_net.Net().half(), "epoch": 3}, "best.pt")
    del sys.modules["user_net"]
    (tmp_path / "imported").unlink()
    return tmp_path


@pytest.mark.slow
def test_a_whole_model_becomes_weights_in_a_process_of_its_own(influence: Command, folder: Path) -> None:
    done = influence("convert", "best.pt", "-o", "best.safetensors", "--trust", cwd=folder)
    assert done.out == ""
    assert "wrote best.safetensors (4 tensors, " in done.err
    assert "from ema, user_net.Net" in done.err
    assert "next: model.checkpoint: best.safetensors" in done.err
    assert (folder / "imported").exists()
    assert "user_net" not in sys.modules
    state = load_file("best.safetensors")
    assert state.keys() == {"fc.weight", "fc.bias", "tied.weight", "tied.bias"}
    assert state["fc.weight"].dtype == torch.float16
    assert not list(folder.glob("*.part"))


def test_without_trust_nothing_is_run_and_it_says_what_trust_means(influence: Command, folder: Path) -> None:
    done = influence("convert", "best.pt", "-o", "best.safetensors", cwd=folder, code=2)
    assert "error: best.pt can only be converted by running the code that it holds" in done.err
    assert "the same command with --trust" in done.err
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"best.pt", "user_net.py"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("missing.pt", "-o", "a.safetensors"), "missing.pt is not there"),
        (("best.pt", "-o", "a.pt"), "the weights are written as .safetensors"),
        (("best.pt", "-o", "no/a.safetensors"), "there is no folder no"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    influence: Command, folder: Path, words: tuple[str, ...], message: str
) -> None:
    done = influence("convert", *words, "--trust", cwd=folder, code=2)
    assert message in done.err
    assert not (folder / "imported").exists()
