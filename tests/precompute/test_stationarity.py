"""What the gradient of the objective says, at minima of objectives that the config does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, tanh

from influence_cli.precompute.stationarity import Part, explain

N, L2 = 40, 0.02
Objective = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
SHAPES = {"body.weight": (3, 4), "body.bias": (3,), "head.weight": (3, 3), "head.bias": (3,)}
Y = torch.arange(N) % 3
X = (torch.randn(N, 4, generator=torch.Generator().manual_seed(0)) + 1.5 * one_hot(Y, 4)).double()


def losses(values: Mapping[str, Tensor], x: Tensor = X, y: Tensor = Y) -> Tensor:
    hidden = tanh(x @ values["body.weight"].T + values["body.bias"])
    return cross_entropy(hidden @ values["head.weight"].T + values["head.bias"], y, reduction="none")


def squares(values: Mapping[str, Tensor], *, bare: bool = False) -> Tensor:
    return sum(
        (value.square().sum() for name, value in values.items() if not (bare and name.endswith("bias"))),
        torch.zeros(()),
    )


def trained(objective: Callable[[Mapping[str, Tensor]], Tensor], frozen: Sequence[str] = ()) -> dict[str, Tensor]:
    """Minimise an objective of a small network, some parameters left as they start."""
    generator = torch.Generator().manual_seed(1)
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in SHAPES.items()
    }
    moved = [value for name, value in values.items() if name not in frozen]
    optimizer = torch.optim.LBFGS(
        moved, max_iter=800, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(values)
        value.backward()
        return value

    optimizer.step(closure)
    return {name: value.detach() for name, value in values.items()}


def parts(values: Mapping[str, Tensor], l2: float) -> list[Part]:
    """Measure the gradient example by example, by autograd."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    each = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses(leaves)]
    made = []
    for number, (name, value) in enumerate(values.items()):
        rows = torch.stack([one[number].flatten() for one in each])
        slope, theta = rows.mean(dim=0), value.flatten()
        typical = float(rows.square().sum(dim=1).mean().sqrt())
        plain = value.ndim == 1
        made.append(Part(name, float(slope.norm()), float(theta.norm()), l2, float(slope @ theta), typical, plain))
    return made


@pytest.mark.parametrize(
    ("objective", "l2", "verdict", "line"),
    [
        (lambda v: losses(v).mean() + L2 / 2 * squares(v), L2, "minimum", ""),
        (lambda v: losses(v).sum() + L2 / 2 * squares(v), L2, "factor", f"a summed loss; write l2: {L2 / N:.6g}"),
        (lambda v: 0.25 * losses(v).mean() + L2 / 2 * squares(v), L2, "factor", f"write l2: {4 * L2:.3g}"),
        (
            lambda v: losses(v).mean() + L2 / 2 * squares(v, bare=True),
            L2,
            "plain",
            'write l2: {"*bias": 0, "*": 0.02}',
        ),
        (
            lambda v: 0.5 * losses(v).mean() + L2 / 2 * squares(v, bare=True),
            L2,
            "plain",
            'multiplied by c = 0.5; write l2: {"*bias": 0, "*": 0.04}',
        ),
        (lambda v: losses(v).mean() + L2 / 2 * squares(v), 0.0, "decay", "write l2: 0.02"),
        (
            lambda v: losses(v).mean() + L2 / 2 * squares(v, bare=True),
            0.0,
            "decay",
            'write l2: {"*bias": 0, "*": 0.02}',
        ),
    ],
)
def test_the_objective_that_was_trained_is_named(
    objective: Callable[[Mapping[str, Tensor]], Tensor], l2: float, verdict: str, line: str
) -> None:
    explained = explain(parts(trained(objective), l2), N, {"*": l2})
    assert explained.verdict == verdict, explained.text
    assert line in explained.text


def test_frozen_layers_are_named() -> None:
    frozen = ("body.weight", "body.bias")
    values = trained(lambda v: losses(v).mean() + L2 / 2 * squares(v), frozen)
    explained = explain(parts(values, L2), N, {"*": L2})
    assert explained.verdict == "layers", explained
    assert "far from 0 in body and not in the other layers" in explained.text


def test_an_early_stop_is_no_other_objective() -> None:
    values = trained(lambda v: losses(v).mean() + L2 / 2 * squares(v))
    generator = torch.Generator().manual_seed(2)
    moved = {name: v + 0.5 * torch.randn(v.shape, generator=generator) for name, v in values.items()}
    assert explain(parts(moved, L2), N, {"*": L2}).verdict == "off"


def test_a_sample_decides_nothing_that_its_noise_covers() -> None:
    """The mean over 16 of many examples is known to half of a typical gradient: nothing is said."""
    values = trained(lambda v: losses(v).sum() + L2 / 2 * squares(v))
    assert explain(parts(values, L2), N, {"*": L2}, noise=0.5).verdict == "minimum"
