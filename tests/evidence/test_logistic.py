"""The logistic readout without an example, against fits that are really made without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.evidence import logistic
from influence_cli.evidence.logistic import leave_one_out_logistic


def made(n: int, q: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + q)
    targets = torch.randint(0, classes, (n,), generator=generator)
    components = torch.randn(n, q, generator=generator)
    components[:, :classes] += torch.nn.functional.one_hot(targets, classes)
    return components, targets


def fitted(components: Tensor, targets: Tensor, classes: int, n: int, keep: Tensor) -> Tensor:
    """Minimise (1/n)Σ_keep ℓ + (ridge/2)‖W‖² by L-BFGS in float64: the objective of design section 1, n unchanged."""
    phi = torch.cat([components.double(), torch.ones(len(components), 1, dtype=torch.float64)], dim=1)
    weights = torch.zeros(classes, phi.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weights], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        losses = torch.nn.functional.cross_entropy(phi[keep] @ weights.T, targets[keep], reduction="sum") / n
        total = losses + logistic.RIDGE / 2 * weights.square().sum()
        total.backward()
        return total

    search.step(loss)
    return (phi @ weights.T).detach()


def test_one_newton_step_is_near_a_fit_without_the_example() -> None:
    n, classes = 60, 3
    components, targets = made(n, 4, classes)
    found = leave_one_out_logistic(components, targets, classes).double()
    everything = fitted(components, targets, classes, n, torch.arange(n)).log_softmax(dim=1)
    errors, moves = [], []
    for i in range(0, n, 5):
        without = fitted(components, targets, classes, n, torch.arange(n) != i)[i].log_softmax(dim=0)
        errors.append(float((found[i] - without).norm()))
        moves.append(float((everything[i] - without).norm()))
    # A step of first order: what it misses is a small part of how far the output moves.
    assert sum(errors) < 0.1 * sum(moves)


def test_the_label_itself_has_hardly_a_say() -> None:
    components, targets = made(200, 4, 3)
    changed = targets.clone()
    changed[7] = (changed[7] + 1) % 3
    one, other = (leave_one_out_logistic(components, y, 3) for y in (targets, changed))
    assert float((one[7] - other[7]).abs().max()) < 0.02


def test_it_finds_a_flipped_label() -> None:
    components, targets = made(200, 6, 3)
    components[:, :3] += 3 * torch.nn.functional.one_hot(targets, 3)
    targets[11] = (targets[11] + 1) % 3
    found = leave_one_out_logistic(components, targets, 3)
    assert int(found.gather(1, targets[:, None])[:, 0].argmin()) == 11
    assert found.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 200, abs=1e-5)


def test_fewer_components_are_used_where_the_hessian_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    components, targets = made(60, 6, 3)
    monkeypatch.setattr(logistic, "WEIGHTS", 15)
    narrow = leave_one_out_logistic(components, targets, 3)
    torch.testing.assert_close(narrow, leave_one_out_logistic(components[:, :4], targets, 3))
    monkeypatch.setattr(logistic, "WEIGHTS", 4)
    with pytest.raises(InfluenceError, match="allows up to 2 classes, but there are 3"):
        leave_one_out_logistic(components, targets, 3)
