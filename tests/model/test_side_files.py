"""Which files that code opens a store depends on besides the examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_cli.config.load import load_config
from influence_cli.model.task import load_tasks
from tests.conftest import edit

DATA = """
import json
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

HERE = Path(__file__).parent


class Data(ImageFolder):
    def __init__(self, root, table, extra=None):
        super().__init__(root)
        json.loads(Path(table).read_text())
        Path("cache.txt").write_text("made here")
        Path("cache.txt").read_text()
        open("/proc/self/status").close()
        self.gain = None

    def __getitem__(self, index):
        self.gain = np.load(HERE / "gain.npy") if self.gain is None else self.gain
        return super().__getitem__(index)
"""
LOSS = """
import torch
from pathlib import Path


def mine(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


Path(__file__).with_name("weights.txt").read_text()
"""


def test_arrays_tables_and_files_of_arguments_count_images_and_outside_files_do_not(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    (tiny / "data.py").write_text(DATA)
    (tiny / "losses.py").write_text(LOSS)
    np.save(tiny / "gain.npy", np.array(1.0))
    for name in ("table.json", "extra.h5", "weights.txt"):
        (tiny / name).write_text("{}")
    edit(
        tiny,
        "torchvision.datasets.ImageFolder\n  args: {root: train}",
        "./data.py:Data\n  args: {root: train, table: table.json, extra: extra.h5}",
    )
    edit(tiny, "l2: 0.01", "l2: 0.01\nloss: ./losses.py:mine")
    (task,) = load_tasks(load_config(tiny / "influence.yaml"))
    names = sorted(path.relative_to(tiny).as_posix() for path in task.side_files)
    assert names == ["extra.h5", "gain.npy", "table.json", "weights.txt"]


def test_a_folder_of_images_has_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    assert load_tasks(load_config(tiny / "influence.yaml"))[0].side_files == ()
