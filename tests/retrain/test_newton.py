"""newton: against LBFGS and a plain loop of autograd, under several losses, with and without parts tracked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from influence_cli.data.batches import Batch
from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network
from influence_cli.retrain.newton import (
    Outputs,
    Problem,
    losses_under,
    make_problem,
    minimise,
    outputs_of,
    start_of,
    without_each,
    without_groups,
)

N, D, C, L2 = 40, 5, 3, 0.02
cross_entropy = partial(nn.functional.cross_entropy, reduction="none")


def smooth_hinge(outputs: Tensor, targets: Tensor, t: float = 0.01) -> Tensor:
    """Give t·log(1 + exp((1 − s)/t)) of s = ±(f₁ − f₀): curvature near the margin alone."""
    margin = (2.0 * targets - 1) * (outputs[:, 1] - outputs[:, 0])
    return t * nn.functional.softplus((1 - margin) / t)


def case(
    loss: nn.Module | partial[Tensor] | object, classes: int = C, seed: int = 0
) -> tuple[Network, nn.Linear, Batch]:
    torch.manual_seed(seed)
    layer = nn.Linear(D, classes)
    x = torch.randn(N, D)
    y = (x[:, :classes] + 0.8 * torch.randn(N, classes)).argmax(dim=1)
    network = make_network(track(layer, loss, ("*",), "here"), x[:2])  # type: ignore[arg-type]
    return network, layer, Batch(x, y, torch.arange(N).numpy())


def by_lbfgs(network: Network, layer: nn.Linear, batch: Batch, without: int | None) -> Tensor:
    """Minimise (1/n) Σ_{j≠i} ℓ + l2/2 ‖W‖² over the tracked parameters by LBFGS in float64: the losses of all."""
    weight = layer.weight.detach().double().clone()
    bias = layer.bias.detach().double().clone()
    tracked = [value.requires_grad_() for value, name in ((weight, "weight"), (bias, "bias")) if name in network.names]
    x, y = batch.inputs.double(), batch.targets
    kept = torch.ones(N, dtype=torch.float64)
    if without is not None:
        kept[without] = 0
    loss = network.loss.double() if isinstance(network.loss, nn.Module) else network.loss
    optimizer = torch.optim.LBFGS(
        tracked, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (kept * loss(x @ weight.T + bias, y)).sum() / N
        value = value + L2 / 2 * sum((p.square().sum() for p in tracked), torch.zeros(()))
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        found: Tensor = loss(x @ weight.T + bias, y)
    return found


def solved(network: Network, layer: nn.Linear, batch: Batch) -> tuple[Problem, Tensor]:
    problem = make_problem(network, layer, [batch], L2)
    w, before, after = minimise(problem, start_of(network, layer, problem.examples.a))
    assert before > 1e-3
    assert after < 1e-13
    return problem, w


@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        (cross_entropy, C),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1, reduction="none"), C),
        (smooth_hinge, 2),
    ],
)
def test_leaving_one_out_equals_lbfgs(loss: object, classes: int) -> None:
    network, layer, batch = case(loss, classes)
    problem, w = solved(network, layer, batch)
    rows = torch.tensor([0, 7, 8, 39])
    tests = outputs_of(network, layer, [batch])
    found = losses_under(problem, without_each(problem, w, rows), tests)
    assert torch.allclose(losses_under(problem, w[None], tests)[0], by_lbfgs(network, layer, batch, None), atol=1e-7)
    for row, losses in zip(rows.tolist(), found, strict=True):
        assert torch.allclose(losses, by_lbfgs(network, layer, batch, row), atol=1e-6)


@pytest.mark.parametrize("tracked", ["weight", "bias"])
def test_what_is_not_tracked_stays_as_it_is(tracked: str) -> None:
    network, layer, batch = case(cross_entropy)
    network = replace(network, names=(tracked,))
    problem, w = solved(network, layer, batch)
    tests = outputs_of(network, layer, [batch])
    found = losses_under(problem, without_each(problem, w, torch.tensor([3])), tests)[0]
    assert torch.allclose(found, by_lbfgs(network, layer, batch, 3), atol=1e-7)


def test_many_are_left_out_at_one_time_and_the_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    network, layer, batch = case(cross_entropy)
    problem, w = solved(network, layer, batch)
    rows, seen = torch.arange(N), []
    whole = without_each(problem, w, rows)
    monkeypatch.setattr("influence_cli.retrain.newton.TOGETHER", 7)
    monkeypatch.setattr("influence_cli.retrain.newton.PIECE", 100)
    cut = without_each(problem, w, rows, seen.append)
    assert sum(seen) == N
    assert torch.allclose(whole, cut, atol=1e-9)


def test_groups_are_left_out_whether_they_settle_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with the common Hessian serve small groups; half of the examples has Newton steps of its own."""
    network, layer, batch = case(cross_entropy)
    problem, w = solved(network, layer, batch)
    groups = [torch.arange(0, 3), torch.arange(0, N // 2), torch.tensor([5]), torch.arange(1, N, 2)]
    found = without_groups(problem, w, groups, "abcd")
    for rows, own in zip(groups, found, strict=True):
        kept = torch.ones(N, dtype=torch.bool)
        kept[rows] = False
        every = problem.examples
        examples = Outputs(every.a[kept], every.fixed[kept], every.targets[kept])
        alone, _, _ = minimise(Problem(examples, problem.loss, L2 * N / int(kept.sum())), w)
        assert torch.allclose(own, alone, atol=1e-6)
    assert torch.allclose(found[2], without_each(problem, w, torch.tensor([5]))[0], atol=1e-7)
    monkeypatch.setattr("influence_cli.retrain.newton.TOGETHER", 3)
    monkeypatch.setattr("influence_cli.retrain.newton.PIECE", 100)
    assert torch.allclose(without_groups(problem, w, groups, "abcd"), found, atol=1e-6)


def test_without_l2_the_directions_that_no_example_bends_are_left_alone() -> None:
    """Adding the same to the outputs of all classes changes nothing: the Hessian has no inverse, the minimum exists."""
    torch.manual_seed(1)
    network, layer, batch = case(cross_entropy)
    batch = replace(batch, targets=torch.randint(0, C, (N,)))
    problem = make_problem(network, layer, [batch], 0.0)
    w, _, after = minimise(problem, start_of(network, layer, problem.examples.a))
    assert after < 1e-12
    ws = without_each(problem, w, torch.tensor([2, 5]))
    change = losses_under(problem, ws, problem.examples) - losses_under(problem, w[None], problem.examples)
    assert float(change[0, 2]) > 0
    assert float(change[1, 5]) > 0


def test_a_loss_without_curvature_is_refused() -> None:
    """Newton steps on the hinge itself lead nowhere: its Hessian is zero."""

    def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
        return (1 - (2.0 * targets - 1) * (outputs[:, 1] - outputs[:, 0])).clamp_min(0)

    network, layer, batch = case(hinge, 2)
    problem = make_problem(network, layer, [batch], L2)
    with pytest.raises(InfluenceError, match="did not reach a minimum") as caught:
        minimise(problem, start_of(network, layer, problem.examples.a))
    assert "training" in caught.value.hint
