"""The leave-one-out readout against regressions that are really solved without each example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.evidence.readout import FLOOR, RIDGES, fit_temperature, leave_one_out


def made(n: int, d: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * d)
    targets = torch.randint(0, classes, (n,), generator=generator)
    features = torch.randn(n, d, generator=generator)
    features[:, :classes] += torch.nn.functional.one_hot(targets, classes)
    return features, targets


def without_each(features: Tensor, targets: Tensor, classes: int, ridge: float) -> Tensor:
    """Solve the ridge regression, its intercept not penalised, without one example at a time, in float64."""
    n = len(features)
    phi = ((features - features.mean(dim=0)) / features.std(dim=0)).double()
    phi = torch.cat([phi, torch.ones(n, 1)], dim=1)
    onehot = torch.nn.functional.one_hot(targets, classes).double()
    penalty = n * ridge * torch.eye(phi.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    rows = []
    for i in range(n):
        keep = torch.arange(n) != i
        a, y = phi[keep], onehot[keep]
        rows.append(phi[i] @ torch.linalg.solve(a.T @ a + penalty, a.T @ y))
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (30, 29)])
def test_outputs_are_those_of_regressions_without_the_example(n: int, d: int) -> None:
    features, targets = made(n, d)
    readout = leave_one_out(features, targets, 3)
    torch.testing.assert_close(
        readout.outputs.double(), without_each(features, targets, 3, readout.ridge), rtol=1e-4, atol=1e-5
    )


def test_the_label_itself_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_cli.evidence.readout.RIDGES", (0.1,))
    features, targets = made(40, 6)
    changed = targets.clone()
    changed[7] = (changed[7] + 1) % 3
    one, other = (leave_one_out(features, y, 3) for y in (targets, changed))
    torch.testing.assert_close(one.outputs[7], other.outputs[7], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.outputs[8], other.outputs[8], rtol=1e-4, atol=1e-5)


def test_the_ridge_is_the_likeliest_of_those_tried() -> None:
    features, targets = made(60, 12)
    readout = leave_one_out(features, targets, 3)
    phi = (features - features.mean(dim=0)) / features.std(dim=0)
    mean = float((phi.T @ phi / len(phi)).trace()) / 12
    losses = {}
    for multiple in RIDGES:
        outputs = without_each(features, targets, 3, multiple * mean).float()
        own = fit_temperature(outputs, targets) * outputs
        losses[multiple] = float(torch.nn.functional.cross_entropy(own, targets))
    assert readout.ridge == pytest.approx(min(losses, key=lambda m: losses[m]) * mean, rel=1e-4)
    own = float(torch.nn.functional.nll_loss(readout.log_probabilities, targets))
    assert own == pytest.approx(min(losses.values()), abs=1e-4)


def test_the_ridge_by_squares_leaves_the_smallest_error_without_the_example() -> None:
    features, targets = made(50, 12)
    readout = leave_one_out(features, targets, 3, by_squares=True)
    phi = (features - features.mean(dim=0)) / features.std(dim=0)
    mean = float((phi.T @ phi / len(phi)).trace()) / 12
    onehot = torch.nn.functional.one_hot(targets, 3)
    errors = {m: float((without_each(features, targets, 3, m * mean) - onehot).square().mean()) for m in RIDGES}
    assert readout.ridge == pytest.approx(min(errors, key=lambda m: errors[m]) * mean, rel=1e-4)
    assert readout.ridge != leave_one_out(features, targets, 3).ridge
    assert readout.temperature == pytest.approx(fit_temperature(readout.outputs, targets), rel=1e-3)


def test_leverages_sum_to_the_effective_dimension() -> None:
    features, targets = made(50, 8)
    readout = leave_one_out(features, targets, 3)
    phi = ((features - features.mean(dim=0)) / features.std(dim=0)).double()
    values = torch.linalg.eigvalsh(phi.T @ phi / 50)
    assert readout.dimension == pytest.approx(1 + float((values / (values + readout.ridge)).sum()), rel=1e-4)


def test_the_temperature_maximises_the_likelihood() -> None:
    features, targets = made(80, 3)
    found = fit_temperature(features, targets)
    grid = torch.logspace(-2, 2, 2001)
    losses = torch.stack([torch.nn.functional.cross_entropy(t * features, targets) for t in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), rel=0.01)


def test_outputs_that_say_nothing_have_a_temperature_near_zero() -> None:
    outputs = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert fit_temperature(outputs, torch.tensor([0, 0])) < 1e-3


def test_a_readout_that_interpolates_is_told_and_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_cli.evidence.readout.RIDGES", (1e-12,))
    features, targets = made(30, 200)
    readout = leave_one_out(features, targets, 3)
    assert readout.floored == 30
    assert float(readout.leverage.min()) > 1 - FLOOR
    assert bool(readout.outputs.isfinite().all())
    assert leave_one_out(*made(40, 6), 3).floored == 0


def test_constant_columns_do_not_count() -> None:
    features, targets = made(40, 6)
    wider = torch.cat([features, torch.full((40, 2), 3.0)], dim=1)
    torch.testing.assert_close(
        leave_one_out(wider, targets, 3).outputs, leave_one_out(features, targets, 3).outputs, rtol=1e-4, atol=1e-5
    )


def test_activations_that_are_all_the_same_are_an_error() -> None:
    with pytest.raises(InfluenceError, match="the same"):
        leave_one_out(torch.ones(10, 4), torch.arange(10) % 2, 2)


def test_two_examples_are_too_few() -> None:
    with pytest.raises(InfluenceError, match="at least 3 examples, but there are 2"):
        leave_one_out(torch.randn(2, 4), torch.tensor([0, 1]), 2)
