"""What is announced before `mislabels` starts holds: memory against the measured peak, and too little is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from influence_cli.evidence import plan
from tests.conftest import Command
from tests.support.small_project import refusal

# 1,500 examples of 500 classes, three each, none of them wrong; a model that knows them by heart.
PROJECT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

C = {classes}


def points(seed):
    middle = 3 * torch.randn(C, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(C).repeat_interleave(3)
    return middle[y] + torch.randn(3 * C, 8, generator=torch.Generator().manual_seed(seed)), y


def train():
    return TensorDataset(*points(1))


class Known(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, C)
        self.x, self.y = points(1)

    def forward(self, x):
        known = self.y[torch.cdist(x, self.x).argmin(dim=1)]
        return 20 * nn.functional.one_hot(known, C).float() + 0 * self.head(x)


def build():
    return Known()
"""
CONFIG = """
model: {factory: ./project.py:build, checkpoint: model.pt}
train: {dataset: ./project.py:train}
"""
# The peak of the command after the same one on a project of few classes, which loads all that it needs, in bytes.
PEAK = """
import contextlib, sys
from pathlib import Path
from influence_cli.cli import app


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def run(folder):
    with contextlib.chdir(folder):
        try:
            app(["mislabels", "-v", "--top", "1"])
        except SystemExit as ended:
            assert not ended.code, ended.code


run("few")
before = peak()
run("many")
print(peak() - before)
"""


def made(folder: Path, classes: int) -> Path:
    import torch

    folder.mkdir()
    (folder / "project.py").write_text(PROJECT.format(classes=classes))
    (folder / "influence.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    torch.save({"head.weight": torch.randn(classes, 8), "head.bias": torch.zeros(classes)}, folder / "model.pt")
    return folder


def announced(text: str) -> float:
    """Read the memory of the last announcement, in bytes."""
    number, unit = re.findall(r"about ([\d.]+) (kB|MB|GB) of memory", text)[-1]
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.slow
def test_the_peak_is_within_what_is_announced(tmp_path: Path) -> None:
    made(tmp_path / "few", 20)
    made(tmp_path / "many", 800)
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    need = announced(done.stderr)
    peak = int(done.stdout.splitlines()[-1])
    assert need / 3 < peak < 1.3 * need


def test_no_estimate_is_made_where_the_evidence_contradicts_most_labels(influence: Command, tmp_path: Path) -> None:
    folder = made(tmp_path / "many", 500)
    done = influence("mislabels", "--top", 1, cwd=folder)
    assert "no estimate of wrong labels: the evidence contradicts" in done.err
    assert "labels are wrong" not in done.err
    assert "next: influence mislabels --report mislabels.html" in done.err
    said = refusal(influence, folder, "mislabels", "--top", "auto")
    assert "--top auto: the number of wrong labels cannot be estimated here: the evidence contradicts" in said


def test_too_little_memory_is_refused_before_the_work(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda _: 10_000)
    said = refusal(influence, tiny, "mislabels")
    assert re.search(r"judging 24 labels of 3 classes takes about [\d.]+ MB, but 10.0 kB of cpu memory is free", said)
    assert "--signal loss" in said
    done = influence("mislabels", "--signal", "loss", cwd=tiny)
    assert "warning: no readout: judging 24 labels" in done.err
