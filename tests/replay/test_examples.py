"""Training examples by row: from memory or from their files, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.config.load import load_config
from influence_cli.data import batches
from influence_cli.model.task import load_tasks
from influence_cli.replay.examples import Examples
from tests.support.recipe_project import N, make


def test_what_does_not_fit_the_memory_is_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exclude = tmp_path / "exclude.csv"
    exclude.write_text("index\n3\n40\n")
    project = make(tmp_path / "project")
    config = load_config(project / "influence.yaml", [f"train.exclude={exclude}"])
    (task,) = load_tasks(config, trained=False)
    rows = np.array([57, 2, 3, 39])

    held = Examples(task.train, torch.float64, task.device)
    assert held.held is not None
    monkeypatch.setattr(batches, "HELD_SHARE", 0.0)
    read = Examples(task.train, torch.float64, task.device)

    assert read.held is None
    assert torch.equal(held.take(rows)[0], read.take(rows)[0])
    assert held.take(rows)[0].dtype == torch.float64
    assert held.take(rows)[1].tolist() == read.take(rows)[1].tolist() == [2, 0, 0, 2]
    assert len(task.train) == N - 2
