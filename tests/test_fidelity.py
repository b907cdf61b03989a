"""Influence against real leave-one-out retraining: Koh & Liang 2017, figure 2, on all of MNIST.

Softmax regression (7,850 parameters), l2 0.01, trained to a gradient norm of 1e-9 in float64. For one misclassified
test image, the 50 most influential and 50 random training images are each left out and the model is retrained. This
pins sign and size of `influence rank`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_influence
from torch import Tensor

from influence_cli.metrics import pearson, slope

L2 = 0.01
EACH = 50

CONFIG = """
model:
  factory: ./model.py:build
  checkpoint: model.pt
l2: 0.01
train:
  dataset: torchvision.datasets.MNIST
  args: {{root: {root}, train: true}}
  transform: [ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}]
test:
  dataset: torchvision.datasets.MNIST
  args: {{root: {root}, train: false}}
"""
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
"""


def read(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read MNIST as float64 in [0, 1] with a column of ones."""
    from torchvision.datasets import MNIST

    data = MNIST(root, train=train)
    x = data.data.double().flatten(1) / 255
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1), data.targets


class Regression:
    """min over W [785, 10] of (1/n) Σ_{j≠i} CE_j + l2/2‖W‖², in float64."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.n = x, len(y)
        self.onehot = torch.nn.functional.one_hot(y, 10).double()
        self.y = y
        self.factor: Tensor | None = None

    def gradient(self, w: Tensor, without: int | None = None) -> Tensor:
        residual = (self.x @ w).softmax(dim=1) - self.onehot
        if without is not None:
            residual[without] = 0
        return self.x.T @ residual / self.n + L2 * w

    def factorise(self, w: Tensor) -> None:
        """Keep the Cholesky factor of the exact Hessian at w: [785·10] ordered by class."""
        p = (self.x @ w).softmax(dim=1).float()
        x, d = self.x.float(), self.x.shape[1]
        hessian = torch.zeros(10, d, 10, d, dtype=torch.float64)
        for a in range(10):
            for b in range(a + 1):
                weight = p[:, a] * (float(a == b) - p[:, b])
                block = ((x * weight[:, None]).T @ x).double() / self.n
                hessian[a, :, b, :] = block
                hessian[b, :, a, :] = block.T
        flat = hessian.reshape(10 * d, 10 * d)
        flat.diagonal().add_(L2)
        self.factor = torch.linalg.cholesky(flat)

    def solve(self, w: Tensor, without: int | None = None) -> Tensor:
        """Quasi-Newton with the factor at hand, until the gradient norm is below 1e-9."""
        assert self.factor is not None
        for _ in range(100):
            g = self.gradient(w, without)
            if float(g.norm()) <= 1e-9:
                return w
            step = torch.cholesky_solve(g.T.reshape(-1, 1), self.factor).reshape(10, -1).T
            w = w - step
        raise AssertionError(f"retraining stopped at a gradient norm of {float(g.norm())}")

    def train(self) -> Tensor:
        x = self.x.float()
        w = torch.zeros(self.x.shape[1], 10, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ w, self.y) + L2 / 2 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.factorise(w.detach().double())
        return self.solve(w.detach().double())


@pytest.mark.timeout(900)
def test_rank_equals_leave_one_out_retraining(mnist: Path, tmp_path: Path) -> None:
    x, y = read(mnist, train=True)
    x_test, y_test = read(mnist, train=False)
    problem = Regression(x, y)
    w = problem.train()
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "influence.yaml").write_text(CONFIG.format(root=mnist))
    torch.save({"1.weight": w[:-1].T.float().contiguous(), "1.bias": w[-1].float()}, tmp_path / "model.pt")
    test = int(np.flatnonzero(((x_test @ w).argmax(dim=1) != y_test).numpy())[0])

    run_influence("rank", test, "--all", "-o", "scores.jsonl", cwd=tmp_path)

    estimated = np.zeros(len(y))
    for line in (tmp_path / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        estimated[row["index"]] = row["influence"]
    most = np.argsort(-np.abs(estimated))[:EACH]
    others = np.random.default_rng(0).choice(np.setdiff1d(np.arange(len(y)), most), EACH, replace=False)
    before = test_loss(w, x_test[test], y_test[test])
    for name, chosen in (("most influential", most), ("random", others)):
        actual = np.array([test_loss(problem.solve(w, int(i)), x_test[test], y_test[test]) - before for i in chosen])
        r, b = pearson(estimated[chosen], actual), slope(estimated[chosen], actual)
        print(f"{len(y):,} training images, {EACH} {name}: Pearson r {r:.6f}, slope {b:.4f}")
        assert r >= 0.9999
        assert abs(b - 1) <= 0.01


def test_loss(w: Tensor, x: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy((x @ w)[None], y[None]))


test_loss.__test__ = False  # type: ignore[attr-defined]
