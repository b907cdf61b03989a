"""guess_l2: the weight decay of an optimiser, and what it is of the objective."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from influence_cli.setup.inside import Inside
from influence_cli.setup.training import guess_l2


def inside(**content: Any) -> Inside:
    return Inside(Path("runs/model.pt"), content)


def optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    return kind(nn.Linear(2, 2).parameters(), lr=0.1, **options).state_dict()  # type: ignore[call-arg]


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optim"])
def test_the_decay_of_sgd_is_l2(key: str) -> None:
    guess = guess_l2(inside(**{key: optimizer(torch.optim.SGD, weight_decay=5e-4, momentum=0.9)}))
    assert guess.value == 5e-4
    assert guess.why == f"SGD's weight decay, from {key} in model.pt"


def test_the_decay_of_adam_is_l2_and_that_of_adamw_is_not() -> None:
    adam = guess_l2(inside(optimizer_states=[optimizer(torch.optim.Adam, weight_decay=1e-3)]))
    assert (adam.value, adam.why) == (1e-3, "Adam's weight decay, from optimizer_states in model.pt")
    decoupled = guess_l2(inside(optimizer=optimizer(torch.optim.AdamW, weight_decay=0.05)))
    assert decoupled.value == 0
    assert decoupled.why == (
        "AdamW's weight decay 0.05 acts beside the objective, so it is no λ₂; from optimizer in model.pt"
    )


def test_older_files_do_not_tell_adam_from_adamw_but_the_options_may() -> None:
    state = optimizer(torch.optim.AdamW, weight_decay=0.05)
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    assert guess_l2(inside(optimizer=state)).value == 0.05
    assert "0 if the optimiser was AdamW" in guess_l2(inside(optimizer=state)).why
    named = guess_l2(inside(optimizer=state, args=argparse.Namespace(opt="adamw")))
    assert named.value == 0
    assert "AdamW's weight decay 0.05" in named.why


def test_of_several_groups_the_largest_counts() -> None:
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.bias], "weight_decay": 0.0}, {"params": [layer.weight]}]
    state = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4).state_dict()
    guess = guess_l2(inside(optimizer=state))
    assert guess.value == 1e-4
    assert guess.why == "SGD's weight decay (other parameters have less), from optimizer in model.pt"


def test_the_options_say_it_where_there_is_no_optimiser() -> None:
    guess = guess_l2(inside(hyper_parameters={"weight_decay": 2e-4, "optimizer": "SGD"}))
    assert (guess.value, guess.why) == (2e-4, "SGD's weight decay, from the options in model.pt")


@pytest.mark.parametrize("decay", [-1.0, float("nan"), True, "0.1"])
def test_what_is_no_decay_is_not_taken(decay: object) -> None:
    guess = guess_l2(inside(args={"weight_decay": decay}))
    assert guess.value == 0
    assert "has no optimiser" in guess.why


def test_no_decay_is_said() -> None:
    guess = guess_l2(inside(optimizer=optimizer(torch.optim.SGD)))
    assert (guess.value, guess.why) == (0, "no weight decay, from optimizer in model.pt")
