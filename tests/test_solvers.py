"""Solvers against torch.linalg.solve: plain matrices, no model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.solvers import conjugate_gradients, lanczos, lissa, power_iteration


def problem(size: int = 60, condition: float = 300.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite matrix, right sides, and the solutions."""
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    matrix = (
        q @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)) @ q.T
    )
    v = torch.randn(3, size, dtype=torch.float64)
    return matrix.float(), v.float(), torch.linalg.solve(matrix, v.T).T.float()


def distance(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def test_conjugate_gradients() -> None:
    matrix, v, exact = problem()
    x, info = conjugate_gradients(lambda u: u @ matrix, v)
    assert distance(x, exact) < 1e-4
    assert info.converged
    assert info.residual <= 1e-5
    assert 0 < info.iterations <= 120


def test_conjugate_gradients_say_when_they_stop_early() -> None:
    matrix, v, _ = problem(condition=1e5)
    _, info = conjugate_gradients(lambda u: u @ matrix, v, max_iterations=3)
    assert not info.converged
    assert info.iterations == 3
    assert info.residual > info.tolerance


def test_conjugate_gradients_refuse_an_indefinite_matrix() -> None:
    with pytest.raises(InfluenceError, match=r"direction of curvature -0\.5"):
        conjugate_gradients(lambda u: u * torch.tensor([1.0, -0.5]), torch.tensor([[0.0, 1.0]]))


def test_conjugate_gradients_take_a_zero_right_side() -> None:
    x, info = conjugate_gradients(lambda u: 2 * u, torch.zeros(2, 4))
    assert torch.equal(x, torch.zeros(2, 4))
    assert info.converged


def noisy(matrix: Tensor, seed: int = 1) -> Iterator[Tensor]:
    """Unbiased mini-batch matrices: A plus symmetric noise of its own size's tenth."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        noise = torch.randn(matrix.shape, generator=generator) * 0.01
        yield matrix + (noise + noise.T) / 2


def test_lissa_reaches_the_size_not_only_the_order() -> None:
    matrix, v, exact = problem(condition=50)
    batches = noisy(matrix)
    x, info = lissa(lambda u: u @ next(batches), lambda u: u @ matrix, v, scale=1.5, tolerance=1e-3)
    assert info.converged
    assert distance(x, exact) < 1e-2


def test_lissa_doubles_a_scale_that_is_too_small() -> None:
    matrix, v, exact = problem(condition=20)
    x, info = lissa(lambda u: u @ matrix, lambda u: u @ matrix, v, scale=0.2, tolerance=1e-4)
    assert info.scale is not None
    assert info.scale > 0.4
    assert distance(x, exact) < 1e-2


def test_lissa_never_returns_garbage() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(InfluenceError, match="grows at any scale"):
        lissa(lambda u: u @ matrix, lambda u: u @ matrix, torch.ones(1, 2), scale=2.0)


def test_power_iteration_finds_the_largest_eigenvalue() -> None:
    matrix, v, _ = problem(condition=100)
    assert power_iteration(lambda u: u @ matrix, 60, like=v, iterations=200) == pytest.approx(1.0, rel=1e-3)


def test_lanczos_finds_the_ends_and_the_mean() -> None:
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))
    values = torch.cat([torch.tensor([-0.7, 5.0]).double(), torch.rand(198, dtype=torch.float64)])
    matrix = (q @ torch.diag(values) @ q.T).float()
    smallest, mean, largest = lanczos(lambda u: u @ matrix, 200, like=matrix, iterations=40)
    assert smallest == pytest.approx(-0.7, abs=1e-3)
    assert largest == pytest.approx(5.0, abs=1e-3)
    assert mean == pytest.approx(float(values.mean()), rel=0.3)
