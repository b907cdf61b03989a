"""What the process of a conversion does with each kind of file, run here, where it costs no start of torch."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from influence_cli.checkpoints.convert import main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)


class Learner:
    """A trainer with a model, as fastai's."""

    def __init__(self) -> None:
        self.model = Net()
        self.opt = None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(file: str) -> dict[str, Any]:
    main(Path(file), Path("out.safetensors.part"), Path("report.json"))
    report: dict[str, Any] = json.loads(Path("report.json").read_text())
    return report


def test_the_module_of_a_mapping_a_trainer_or_an_archive_is_written(folder: Path) -> None:
    net = Net()
    torch.save({"epoch": 1, "model": None, "ema": net.half(), "teacher": Net()}, "ultralytics.pt")
    report = run("ultralytics.pt")
    assert report == {"tensors": 2, "source": f"ema, {Net.__module__}.Net", "others": ["teacher"]}
    learner = Learner()
    torch.save(learner, "export.pkl")
    assert run("export.pkl")["tensors"] == 2
    assert torch.equal(load_file("out.safetensors.part")["fc.weight"], learner.model.fc.weight)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 2)))
    torch.jit.script(model).save("script.pt")
    assert run("script.pt")["tensors"] == 2
    assert load_file("out.safetensors.part")["fc.weight"].tolist() == model.state_dict()["fc.weight"].tolist()


@pytest.mark.slow
def test_an_exported_program_is_written(folder: Path) -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 2)))
    torch.export.save(torch.export.export(model, (torch.ones(1, 3),)), "program.pt2")
    assert run("program.pt2")["source"] == "an exported program"
    assert load_file("out.safetensors.part")["fc.weight"].tolist() == model.state_dict()["fc.weight"].tolist()


def test_what_cannot_be_converted_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Net().state_dict(), "plain.pt")
    assert run("plain.pt")["error"] == "plain.pt holds no whole module, so there is nothing to convert"
    module = ModuleType("gone_from_here")
    monkeypatch.setitem(sys.modules, "gone_from_here", module)
    kind = type("Gone", (nn.Module,), {"__module__": "gone_from_here"})
    module.Gone = kind  # type: ignore[attr-defined]
    torch.save(kind(), "gone.pt")
    del module.Gone
    assert run("gone.pt")["error"] == "gone.pt needs the class Gone of the program that made it"
    monkeypatch.delitem(sys.modules, "gone_from_here")
    report = run("gone.pt")
    assert report["error"] == "gone.pt needs the module gone_from_here, which is not installed"
    assert "install it" in report["hint"]
    Path("text.pt").write_text("hello")
    assert run("text.pt")["error"].startswith("text.pt cannot be converted: ")
    assert not Path("out.safetensors.part").exists()
