"""`influence verify --lds` on other subsets than halves, and in the same run, beside trainings done by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from influence_cli.metrics import spearman
from influence_cli.model.task import Task
from influence_cli.retrain.retraining import Retraining
from influence_cli.runtime.seeds import seed_of
from tests.conftest import Command
from tests.retrain.test_strongest import inputs
from tests.support.small_project import with_training

DAMPING = ("-s", "curvature.damping=0.0", "-s", "curvature.method=explicit")


class WholeBatch:
    """A run of whole batches, step by step: softmax regression to its minimum."""

    def __init__(self, project: Path) -> None:
        self.x, self.y = inputs(project / "train")
        self.done: dict[bytes, nn.Module] = {}

    def train_without(self, rows: np.ndarray, repeat: int, progress: Callable[[float], None]) -> nn.Module:
        key = repeat.to_bytes() + rows.tobytes()
        if key not in self.done:
            self.done[key] = self.trained(rows, repeat)
        progress(1.0)
        return self.done[key]

    def trained(self, rows: np.ndarray, repeat: int) -> nn.Module:
        torch.manual_seed(repeat)
        model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        weights = torch.ones(len(self.x))
        weights[torch.from_numpy(rows)] = 0
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=80, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(self.x), self.y, reduction="none")
            penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
            loss = (weights * losses).sum() / len(losses) + 0.005 * penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return model.eval()


@pytest.fixture
def run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> WholeBatch:
    """The tiny project's training, as if the config had a recipe for it."""
    with_training(tiny)
    steps = WholeBatch(tiny)
    monkeypatch.setattr(Retraining, "check_steps", lambda *_: None)

    def given(_self: Retraining, _task: Task) -> WholeBatch:
        return steps

    monkeypatch.setattr(Retraining, "steps", given)
    return steps


def measured(project: Path, model: nn.Module, *, margin: bool) -> np.ndarray:
    x, y = inputs(project / "test")
    with torch.no_grad():
        logs = model(x).double().log_softmax(1).gather(1, y[:, None])[:, 0]
    return (-logs + (1 - logs.exp()).log() if margin else -logs).numpy()


@pytest.mark.parametrize("measure", ["loss", "margin"])
@pytest.mark.quick("loss")
def test_the_same_run_is_compared_in_order_and_in_size(
    influence: Command, tiny: Path, run: WholeBatch, tmp_path: Path, measure: str
) -> None:
    words = ("verify", "--lds", "--same-run", "--drop", 2, "--subsets", 9, "--measure", measure, *DAMPING)
    is_margin = measure == "margin"
    done = influence(*words, "-o", "run.jsonl", *(() if is_margin else ("--plot", "run.svg")), cwd=tiny)
    (row,) = [json.loads(line) for line in (tiny / "run.jsonl").read_text().splitlines()]
    influence("rank", "0:6", "--matrix", tmp_path / "m.h5", *DAMPING, "-q", cwd=tiny)
    with h5py.File(tmp_path / "m.h5") as file:
        scores = file["influence"][:].astype(np.float64)
    dropped = [np.sort(np.random.default_rng([seed_of(0, 7, 2), s]).choice(24, 2, replace=False)) for s in range(9)]
    base = run.train_without(np.empty(0, np.int64), 0, lambda _: None)
    before = measured(tiny, base, margin=is_margin)
    after = [run.train_without(rows, 0, lambda _: None) for rows in dropped]
    actual = np.array([measured(tiny, model, margin=is_margin) for model in after]).T - before[:, None]
    predicted = np.array([scores[:, rows].sum(axis=1) for rows in dropped]).T
    if is_margin:
        predicted /= 1 - np.exp(-measured(tiny, base, margin=False))[:, None]
    pairs = list(zip(predicted, actual, strict=True))
    assert row["lds"] == pytest.approx(np.mean([spearman(*pair) for pair in pairs]), abs=1e-2)
    assert row["pearson"] == pytest.approx(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]), abs=1e-3)
    assert row["slope"] == pytest.approx(np.mean([x @ y / (x @ x) for x, y in pairs]), abs=1e-2)
    for name in ("pearson", "slope"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["pearson"] > 0.95
    assert row["slope"] == pytest.approx(1, abs=0.4)
    assert (row["left_out"], row["measure"], row["repeats"], row["subsets"]) == (2, measure, 1, 9)
    facts = json.loads((tiny / "run.jsonl.run.json").read_text())
    assert facts["trained"] == {"left_out": 2, "measure": measure, "same_run": True}
    assert is_margin or "the same run without 2 images, 6 test examples" in (tiny / "run.svg").read_text()
    assert f"Pearson {row['pearson']:.3f}" in done.err
    assert sorted(path.name for path in (tiny / "influence.retrained").iterdir()) == ["from-start"]
    assert "10 of 10 retrainings are already in" in influence(*words, cwd=tiny).err
    # The run with all images and a set of them are those of another command too.
    assert "1 of 7 retrainings are already in" in influence("verify", "--top", 3, "--tests", 3, *DAMPING, cwd=tiny).err


def test_larger_subsets_have_a_folder_of_their_own(influence: Command, tiny: Path) -> None:
    with_training(tiny)
    words = ("verify", "--lds", "--subsets", 4, "--repeats", 1, *DAMPING)
    (row,) = [json.loads(line) for line in influence(*words, "--drop", "25%", cwd=tiny).out.splitlines()]
    assert (row["left_out"], row["pearson"], row["slope"]) == (6, None, None)
    folder = tiny / "influence.retrained"
    assert len(list((folder / "without-6").glob("subset_*_0.npz"))) == 4
    # Half is half, however it is written.
    influence(*words, "--drop", "50%", cwd=tiny)
    assert "4 of 4 retrainings are already in influence.retrained/halves" in influence(*words, cwd=tiny).err


def test_a_retraining_of_an_earlier_release_is_done_again_for_its_margin(influence: Command, tiny: Path) -> None:
    with_training(tiny)
    words = ("verify", "--lds", "--subsets", 3, "--repeats", 1, *DAMPING)
    influence(*words, cwd=tiny)
    path = tiny / "influence.retrained" / "halves" / "half_00001_0.npz"
    with np.load(path) as file:
        old = {name: file[name] for name in ("losses", "right", "seconds")}
    np.savez(path, **old)
    assert "3 of 3 retrainings are already in" in influence(*words, cwd=tiny).err
    assert "2 of 3 retrainings are already in" in influence(*words, "--measure", "margin", cwd=tiny).err
    with np.load(path) as file:
        assert np.array_equal(file["losses"], old["losses"])
        assert "margins" in file.files
