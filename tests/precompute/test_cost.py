"""The memory that is announced holds what is measured, and is not far from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Command
from tests.support.small_project import growth

MODEL = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def build(hidden=512):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def data(n=512):
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randn(n, 1, 28, 28, generator=generator), torch.arange(n) % 10)
"""
CONFIG = """
model: {{factory: ./model.py:build, args: {{hidden: {hidden}}}, checkpoint: model.pt}}
l2: 0.01
train: {{dataset: ./model.py:data}}
curvature: {{method: {method}}}
gradients: {{block: 128, layers: {layers}}}
"""


@pytest.mark.parametrize(
    ("method", "hidden", "layers"), [("identity", 256, '["*"]'), ("ekfac", 512, '["*"]'), ("explicit", 256, '["3"]')]
)
@pytest.mark.slow
def test_the_memory_announced_is_that_of_the_peak(
    method: str, hidden: int, layers: str, influence: Command, tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "influence.yaml").write_text(CONFIG.format(method=method, hidden=hidden, layers=layers))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    rows = [json.loads(line) for line in influence("check", cwd=tmp_path).out.splitlines()]
    (announced,) = (row["value"] for row in rows if row["item"] == "memory, about")
    few = ["-s", "train.args={n: 16}", "-s", 'gradients.layers=["3"]', "-s", "gradients.store=few.h5"]
    codes, grown = growth(tmp_path, ["gradients", "-q", "-s", "curvature.method=identity", *few], ["gradients", "-q"])
    assert codes == [0]
    assert 1e6 * grown <= 1.3 * announced + 2e7
    assert announced <= 4 * (1e6 * grown + 5e7)
