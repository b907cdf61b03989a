"""The ends of a spectrum, and its size, from products."""

from __future__ import annotations

import pytest
import torch

from influence_cli.solvers.lanczos import lanczos, power_iteration


def test_power_iteration_finds_the_largest_eigenvalue() -> None:
    values = torch.logspace(0, -2, 60)
    like = torch.zeros(1)
    assert power_iteration(lambda u: u * values, 60, like=like, iterations=200) == pytest.approx(1.0, rel=1e-3)


def test_lanczos_finds_the_ends_and_the_mean() -> None:
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))
    values = torch.cat([torch.tensor([-0.7, 5.0]).double(), torch.rand(198, dtype=torch.float64)])
    matrix = (q @ torch.diag(values) @ q.T).float()
    found = lanczos(lambda u: u @ matrix, 200, like=matrix, iterations=40)
    assert found.smallest == pytest.approx(-0.7, abs=1e-3)
    assert found.largest == pytest.approx(5.0, abs=1e-3)
    assert found.mean == pytest.approx(float(values.mean()), rel=0.1)


def test_a_few_large_eigenvalues_do_not_blur_the_mean() -> None:
    values = torch.full((5000,), 1e-3)
    # Each of its own: of an eigenvalue that is there several times a Krylov space holds one direction.
    values[:5] = torch.tensor([50.0, 40.0, 30.0, 20.0, 10.0])
    for seed in range(5):
        found = lanczos(lambda u: u * values, 5000, like=values, seed=seed)
        assert found.mean == pytest.approx(float(values.mean()), rel=0.02)


def test_a_matrix_of_a_few_distinct_eigenvalues_is_known_at_once() -> None:
    values = torch.tensor([2.0, 2.0, -1.0, -1.0, 0.0])
    found = lanczos(lambda u: u * values, 5, like=values)
    assert found.smallest == pytest.approx(-1)
    assert found.largest == pytest.approx(2)
