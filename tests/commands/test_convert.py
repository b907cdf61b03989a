"""``influence convert`` makes weights of what only running can read, elsewhere, and only of what is trusted."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

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


def test_a_module_that_is_not_installed_is_one_line(influence: Command, folder: Path) -> None:
    (folder / "user_net.py").unlink()
    done = influence("convert", "best.pt", "-o", "best.safetensors", "--trust", cwd=folder, code=2)
    assert "error: best.pt needs the module user_net, which is not installed" in done.err
    assert len(done.err.splitlines()) == 2
    assert not (folder / "best.safetensors").exists()


@pytest.mark.slow  # a process with torch each
def test_archives_and_what_is_no_model(influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 2)))
    torch.jit.script(model).save("script.pt")
    torch.export.save(torch.export.export(model, (torch.ones(1, 3),)), "program.pt2")
    for file in ("script.pt", "program.pt2"):
        influence("convert", file, "-o", "a.safetensors", "--trust", cwd=tmp_path)
        assert torch.equal(load_file("a.safetensors")["fc.weight"], model.fc.weight)  # type: ignore[arg-type]
    torch.save(model.state_dict(), "plain.pt")
    done = influence("convert", "plain.pt", "-o", "b.safetensors", "--trust", cwd=tmp_path, code=2)
    assert "holds no whole module, so there is nothing to convert" in done.err
    assert not Path("b.safetensors").exists()


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
