"""Steps of optimisers: equal to torch.optim's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from influence_cli.steps.rule import Rule

CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "sgd": ({"kind": "sgd"}, "SGD", {}),
    "momentum": ({"kind": "sgd", "momentum": 0.9, "decay": 0.01}, "SGD", {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": ({"kind": "sgd", "momentum": 0.8, "nesterov": True}, "SGD", {"momentum": 0.8, "nesterov": True}),
    "adam": (
        {"kind": "adam", "momentum": 0.85, "second": 0.99, "decay": 0.02, "eps": 1e-6},
        "Adam",
        {"betas": (0.85, 0.99), "weight_decay": 0.02, "eps": 1e-6},
    ),
    "adamw": ({"kind": "adamw", "momentum": 0.9, "decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_torch(name: str, clip: float | None) -> None:
    ours, theirs, options = CASES[name]
    draw = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(7, generator=draw, dtype=torch.float64))
    optimizer = getattr(torch.optim, theirs)([parameter], lr=0.05, **options)
    state = parameter.detach().clone()
    slots = tuple(torch.zeros_like(state) for _ in range(Rule(rate=0.05, number=0, **ours).slots))

    for number in range(6):
        gradient = torch.randn(7, generator=draw, dtype=torch.float64)
        parameter.grad = gradient.clone()
        if clip is not None:
            nn.utils.clip_grad_norm_([parameter], clip)
        optimizer.step()
        state, slots = Rule(rate=0.05, number=number, clip=clip, **ours).step(state, slots, gradient)

    assert torch.allclose(state, parameter.detach(), rtol=1e-9, atol=1e-12)


def test_adam_without_eps_root_has_a_finite_derivative_where_no_gradient_has_been() -> None:
    rule = Rule("adam", 0.1, 0, momentum=0.9)
    zeros = torch.zeros(3)

    before = rule.pull(zeros, (zeros, zeros), zeros, (torch.ones(1, 3), (torch.ones(1, 3), torch.ones(1, 3))))

    assert all(torch.isfinite(vector).all() for vector in (before[0], *before[1], before[2]))
