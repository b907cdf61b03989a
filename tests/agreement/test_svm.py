"""A linear SVM trained with the hinge: its exact minimum, and influence by the smooth hinge beside leaving out.

bench/paper/hinge.py does the same with all of MNIST's 1 and 7.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from influence_cli.metrics import pearson, slope
from tests.conftest import Command

CONFIGS = Path(__file__).parents[2] / "configs"
# Of the demo's images: T-shirt and shirt, which look alike.
PAIR = (0, 6)
TRAIN, TEST = 300, 100
DATA = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def model():
    return nn.Linear(196, 2, bias=False)


def part(file):
    saved = torch.load(file)
    return TensorDataset(saved["x"], saved["y"])
"""
CONFIG = """
model: {factory: ./data.py:model, checkpoint: model.pt}
loss: {factory: smooth_hinge, args: {temperature: 0.001}}
l2: 0.02
train: {dataset: ./data.py:part, args: {file: train.pt}}
test: {dataset: ./data.py:part, args: {file: test.pt}}
"""
# The same, with a model of configs/svm.py and what trains it.
TRAINED = """
model: {{factory: {configs}/svm.py:linear_svm, args: {{pixels: 196}}, checkpoint: model.pt}}
training: {{factory: {configs}/svm.py:train}}
"""


@pytest.fixture
def svm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(CONFIGS))
    monkeypatch.delitem(sys.modules, "svm", raising=False)
    import svm

    return svm


def pairs() -> tuple[Tensor, Tensor]:
    """Read 400 images of two classes, pooled to 14 × 14: float64 [400, 196], −1 or 1."""
    from influence_cli.demo.project import read_images

    images, labels = read_images()
    chosen = np.flatnonzero(np.isin(labels, PAIR))[: TRAIN + TEST]
    x = torch.nn.functional.avg_pool2d(torch.from_numpy(images[chosen] / 255.0)[:, None], 2).flatten(1)
    return x, torch.from_numpy(2.0 * (labels[chosen] == PAIR[1]) - 1)


def lay_out(folder: Path, svm: Any, config: str) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Write data and config of a project; give x, y, the SVM's minimum and the margins of the test examples."""
    x, y = pairs()
    (folder / "data.py").write_text(DATA)
    (folder / "influence.yaml").write_text(config)
    for name, rows in (("train", slice(TRAIN)), ("test", slice(TRAIN, None))):
        torch.save({"x": x[rows].float(), "y": (y[rows] > 0).long()}, folder / f"{name}.pt")
    whole = svm.minimise_hinge(x[:TRAIN], y[:TRAIN], 0.01)
    return x, y, whole, y[TRAIN:] * (x[TRAIN:] @ whole.w)


def test_the_minimum_of_the_hinge_satisfies_its_conditions(svm: Any) -> None:
    x, y = (values[:TRAIN] for values in pairs())
    found = svm.minimise_hinge(x, y, 0.01)
    assert 0 <= found.gap <= 1e-14
    margin = y * (x @ found.w)
    on = (found.alpha > 0) & (found.alpha < 1)
    assert 5 < int(on.sum()) < TRAIN
    assert float((margin[on] - 1).abs().max()) < 1e-12
    assert float(margin[found.alpha == 1].max()) < 1 + 1e-12
    assert float(margin[found.alpha == 0].min()) > 1 - 1e-12
    # No step in any direction goes down.
    generator = torch.Generator().manual_seed(0)

    def objective(w: Tensor) -> float:
        return float((1 - y * (x @ w)).clamp_min(0).mean() + 0.005 * w @ w)

    least = objective(found.w)
    for _ in range(50):
        step = torch.randn(196, generator=generator, dtype=torch.float64)
        assert objective(found.w + 1e-4 * step / step.norm()) > least


def test_leaving_out_from_a_start_equals_training_without(svm: Any) -> None:
    x, y = (values[:TRAIN] for values in pairs())
    whole = svm.minimise_hinge(x, y, 0.01)
    inside = int((whole.alpha == 1).nonzero()[0])
    kept = torch.arange(TRAIN) != inside
    warm = svm.minimise_hinge(x, y, 0.01, start=whole.alpha, without=inside)
    # n stays: the same as fewer examples and a larger penalty.
    cold = svm.minimise_hinge(x[kept], y[kept], 0.01 * TRAIN / (TRAIN - 1))
    assert float((warm.w - cold.w).norm()) < 1e-9
    assert float((warm.w - whole.w).norm()) > 1e-3


def test_the_two_scores_of_the_model_differ_by_the_margin(svm: Any) -> None:
    w = torch.linspace(-1, 1, 784)
    x = torch.rand(3, 1, 28, 28)
    outputs = svm.as_model(w)(x)
    assert torch.allclose(outputs[:, 1] - outputs[:, 0], x.flatten(1) @ w, atol=1e-4)


@pytest.mark.slow
def test_the_smooth_hinge_predicts_leaving_out_and_the_hinge_does_not(
    influence: Command, tmp_path: Path, svm: Any
) -> None:
    x, y, whole, margins = lay_out(tmp_path, svm, CONFIG)
    torch.save({"weight": torch.stack([-whole.w / 2, whole.w / 2]).float()}, tmp_path / "model.pt")
    test = int(margins.argmin())

    found = {}
    for t, loss in (("0.001", []), ("0", ["-s", "loss=hinge", "-s", "gradients.store=hinge.h5"])):
        done = influence("rank", test, "--all", *loss, cwd=tmp_path)
        found[t] = np.zeros(TRAIN)
        for row in map(json.loads, done.out.splitlines()):
            found[t][row["index"]] = row["influence"]

    most = np.argsort(-np.abs(found["0.001"]))[:25]
    others = np.random.default_rng(0).choice(np.setdiff1d(np.arange(TRAIN), most), 25, replace=False)
    chosen = np.concatenate([most, others])
    actual = []
    for index in map(int, chosen):
        w = svm.minimise_hinge(x[:TRAIN], y[:TRAIN], 0.01, start=whole.alpha, without=index).w
        actual.append(max(0.0, 1 - float(y[TRAIN + test] * (x[TRAIN + test] @ w))) - (1 - float(margins[test])))
    r = {t: pearson(values[chosen], np.array(actual)) for t, values in found.items()}
    assert r["0.001"] >= 0.95
    # The hinge's own derivatives know nothing of what the examples on the margin hold in place.
    assert r["0"] < 0.6
    assert 0.6 < slope(found["0.001"][chosen], np.array(actual)) < 1.1


@pytest.mark.slow  # `make bench-paper-hinge` does it for 100 images; tests/commands/test_verify.py has the rest
def test_verify_leaves_out_of_the_hinge_what_the_smooth_hinge_explains(
    influence: Command, tmp_path: Path, svm: Any
) -> None:
    """The training function is what trained the model, and the loss that explains it has another minimum."""
    _, *rest = CONFIG.strip().splitlines()
    config = TRAINED.format(configs=CONFIGS) + "\n".join(rest) + "\n"
    x, y, whole, margins = lay_out(tmp_path, svm, config)
    torch.save(svm.as_model(whole.w).state_dict(), tmp_path / "model.pt")
    test = int(margins.argmin())

    def verified(name: str, *words: object) -> tuple[Any, list[dict[str, str]], str]:
        done = influence("verify", test, "--loo", 40, "-o", f"{name}.csv", *words, cwd=tmp_path)
        rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        return json.loads((tmp_path / f"{name}.csv.run.json").read_text()), rows, done.err

    run, rows, err = verified("smooth")
    assert "newton" not in run
    assert len(list((tmp_path / "influence.retrained" / "without").glob("*.npz"))) == 41
    for row in rows:
        w = svm.minimise_hinge(x[:TRAIN], y[:TRAIN], 0.01, start=whole.alpha, without=int(row["index"])).w
        change = max(0.0, 1 - float(y[TRAIN + test] * (x[TRAIN + test] @ w))) - (1 - float(margins[test]))
        # Far inside the margin the smooth hinge is the hinge; the images of the project are in float32.
        assert float(row["actual"]) == pytest.approx(change, abs=1e-6)
    assert run["fits"][0]["all"]["r"] > 0.95
    assert re.search("influence is (accurate|proportional|roughly right) here", err)

    # Groups are left out in the same way.
    sites = np.arange(TRAIN) % 4
    (tmp_path / "sites.csv").write_text("index,site\n" + "".join(f"{i},{site}\n" for i, site in enumerate(sites)))
    done = influence("groups", test, "--metadata", "sites.csv", "--retrain", cwd=tmp_path)
    for group in map(json.loads, done.out.splitlines()):
        kept = torch.from_numpy(sites != int(group["group"]))
        w = svm.minimise_hinge(x[:TRAIN][kept], y[:TRAIN][kept], 0.01 * TRAIN / int(kept.sum())).w
        change = max(0.0, 1 - float(y[TRAIN + test] * (x[TRAIN + test] @ w))) - (1 - float(margins[test]))
        assert float(group["actual"]) == pytest.approx(change, abs=1e-5)

    # The hinge's own derivatives; nothing deep is to blame.
    run, _, err = verified("hinge", "-s", "loss=hinge", "-s", "gradients.store=hinge.h5")
    assert run["fits"][0]["all"]["r"] < 0.8
    assert "influence does not predict retraining here" in err

    # Without a training function it is the smooth hinge that is minimised, by Newton steps.
    _edit_out_training(tmp_path)
    run, _, _ = verified("newton")
    assert "newton" in run


def _edit_out_training(project: Path) -> None:
    path = project / "influence.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("training")))
