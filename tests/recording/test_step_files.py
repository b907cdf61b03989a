"""Steps on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.recording.optimizers import Settings
from influence_cli.recording.step_files import Step, StepFiles, write_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8])
def test_steps_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    inputs = torch.randn(3, 1, 2, 2).mul(50).to(dtype)
    settings = Settings((0.1, 0.02), (0.0, 1e-4), 0.9, 0.99, 1e-8, 17)
    first = Step(np.array([5, 0, 5]), settings, 1.5, (0.25, -0.5), torch.get_rng_state(), None, inputs)
    second = Step(np.array([7]), settings, 2.5, (0.125, 0.5))
    write_steps(tmp_path, 0, [first])
    write_steps(tmp_path, 1, [second, second])

    files = StepFiles(tmp_path)

    assert files.count == 3
    assert [files.rows(step).tolist() for step in range(3)] == [[5, 0, 5], [7], [7]]
    assert files.settings(2) == settings
    assert files.columns["norm"].tolist() == [1.5, 2.5, 2.5]
    kept = files.tensor("inputs", 0)
    assert kept is not None
    assert kept.dtype == dtype
    assert torch.equal(kept, inputs)
    random = files.tensor("random", 0)
    assert random is not None
    assert torch.equal(random, torch.get_rng_state())
    assert files.tensor("inputs", 1) is None
    assert files.tensor("cuda", 0) is None
