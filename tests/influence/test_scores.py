"""The sign, the unit and the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence_cli.curvature.damping import Damping
from influence_cli.curvature.spectrum import effective_dimension, joint
from influence_cli.errors import InfluenceError
from influence_cli.influence.inverse import Identity, Spectral
from influence_cli.influence.scores import (
    Running,
    effect,
    influence,
    perturbation,
    preconditioned,
    removal,
    require_finite,
    strongest,
)


def test_influence_equals_a_dense_solve() -> None:
    torch.manual_seed(0)
    a = torch.randn(30, 8, dtype=torch.float64)
    h = a.T @ a / 30
    values, basis = torch.linalg.eigh(h)
    g_train, g_test = torch.randn(20, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    shift = 0.07
    inverse = torch.linalg.inv(h + shift * torch.eye(8, dtype=torch.float64))
    s_test = preconditioned(g_test @ basis, values, shift)
    assert torch.allclose(influence(s_test, g_train @ basis, 20), g_test @ inverse @ g_train.T / 20)
    expected = torch.einsum("ip,pq,iq->i", g_train, inverse, g_train) / 20
    spectrum = joint(values, size=8, trace=float(values.sum()), smallest=float(values[0]))
    spectral = Spectral(spectrum, Damping((0.05,), "given"), l2=0.02)
    assert torch.allclose(removal(spectral.self_influence(g_train @ basis), 20), expected)


def test_a_change_is_one_example_removed_and_another_put_in() -> None:
    torch.manual_seed(1)
    s_test, before, after = (torch.randn(3, 8, dtype=torch.float64) for _ in range(3))
    expected = influence(s_test, before, 20) - influence(s_test, after, 20)
    assert torch.allclose(perturbation(s_test @ (after - before).T, 20), expected)


def test_identity_has_no_spectrum() -> None:
    rows = torch.tensor([[1.0, 2.0]])
    assert float(removal(Identity().self_influence(rows), 5)) == 1.0
    assert float(influence(Identity().apply(rows), rows, 5)) == 1.0


def test_a_point_that_pulls_the_test_loss_down_is_helpful() -> None:
    """One parameter, squared loss: a training point on the side of the test point helps it."""
    theta, train, test = 0.0, torch.tensor([1.0, -1.0]), 0.5
    g_train, g_test = (theta - train)[:, None], torch.tensor([[theta - test]])
    values = influence(preconditioned(g_test, torch.ones(1), 0.0), g_train, 2)[0]
    assert [effect(float(value)) for value in values] == ["helpful", "harmful"]
    # Retraining without the first: theta = −0.5·(2/1)… with the same n: (1/2)·(θ+1) = 0, so θ = −1.
    assert float(values[0]) == pytest.approx(0.25)


def test_zero_is_neither() -> None:
    assert effect(0.0) == "neither"
    found = strongest(np.array([0.0, 1.0, -2.0, np.nan]), None)
    assert found.helpful.tolist() == [1]
    assert found.harmful.tolist() == [2]
    assert found.harmful_values.tolist() == [-2.0]


def test_ties_go_by_position_and_top_is_a_prefix_of_all() -> None:
    values = np.array([1.0, 3.0, 3.0, 2.0, -1.0, -1.0])
    assert strongest(values, None).helpful.tolist() == [1, 2, 3, 0]
    assert strongest(values, 1).helpful.tolist() == [1]
    assert strongest(values, 2).harmful.tolist() == [4, 5]
    random = np.random.default_rng(0).integers(-5, 5, 200).astype(float)
    for k in (1, 7, 50):
        some, every = strongest(random, k), strongest(random, None)
        assert some.helpful.tolist() == every.helpful[:k].tolist()
        assert some.harmful.tolist() == every.harmful[:k].tolist()


@pytest.mark.parametrize("count", [1, 3, 20, None])
def test_streaming_gives_what_sorting_all_of_it_gives(count: int | None) -> None:
    values = np.random.default_rng(1).integers(-6, 7, (5, 90)).astype(np.float32)
    values[:, 11] = np.nan
    running = Running(5, count)
    for start in range(0, 90, 17):
        running.add(np.arange(start, min(90, start + 17)), values[:, start : start + 17])
    for row, found in zip(values, running.results(), strict=True):
        helpful = sorted((i for i in range(90) if row[i] > 0), key=lambda i: (-row[i], i))[:count]
        harmful = sorted((i for i in range(90) if row[i] < 0), key=lambda i: (row[i], i))[:count]
        assert found.helpful.tolist() == helpful
        assert found.harmful.tolist() == harmful
        assert found.helpful_values.tolist() == row[helpful].tolist()
        assert found.harmful_values.tolist() == row[harmful].tolist()


def test_effective_dimension() -> None:
    assert effective_dimension(torch.tensor([1.0, 1.0, 0.0]), 1.0) == pytest.approx(1.0)


def test_a_number_that_is_not_finite_goes_no_further() -> None:
    with pytest.raises(InfluenceError, match="the influence of example 1 on test 0 is NaN or infinite"):
        require_finite(torch.tensor([[1.0, float("nan")]]), "influence", lambda t, i: f"example {i} on test {t}")
