"""Train the output layer of a network to the minimum of its convex objective, by Newton steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_cli.curvature.choice import MAX_PARAMETERS
from influence_cli.data.batches import readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TestFacts
from influence_cli.influence.test_gradients import selected_batches
from influence_cli.influence.test_selection import Selected
from influence_cli.model.task import Task, only_task
from influence_cli.precompute.prepared import Prepared
from influence_cli.retrain.newton import Outputs, Problem, make_problem, minimise, outputs_of, start_of
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import check_whole
from influence_cli.runtime.terminal import Terminal

BATCH = 256


def is_convex(prepared: Prepared) -> bool:
    """Say whether the tracked parameters are an output layer under a convex loss, small enough for Newton steps."""
    choice, task = prepared.choice, prepared.task
    # The hinge is convex but has no curvature for a Newton step.
    return choice.output is not None and task.convex_loss and task.smooth_loss and choice.network.size <= MAX_PARAMETERS


def by_newton(prepared: Prepared, retraining: Retraining) -> bool:
    """Say whether examples are left out by Newton steps; if not, the training function leaves them out.

    An output layer under a convex loss needs no training function. But ``smooth_hinge`` replaces the hinge that a model
    was trained with: leaving out means retraining with the hinge, if the config names a function for that. It trains
    the whole model, so all of it must be tracked.
    """
    stands_in = prepared.task.loss_name.split(" ")[0] == "smooth_hinge" and retraining.has_training
    size = sum(weight.numel() for weight in prepared.task.model.parameters())
    return is_convex(prepared) and not (stands_in and prepared.choice.network.size == size)


def one_task(tasks: Sequence[Task], option: str) -> Task:
    """Refuse several checkpoints, and a list that is not all of the training set."""
    task = only_task(tasks, f"{option} retrains one checkpoint")
    check_whole(task)
    return task


def check_trainable(retraining: Retraining, selected: Sequence[Selected]) -> None:
    """Report a mistake in the training function before any work, and refuse test examples that it cannot handle."""
    retraining.check()
    if any(item.file is not None for item in selected):
        raise InfluenceError(
            "an image file as TEST needs an output layer under a convex loss",
            "give indices of the test set",
        )


@dataclass(frozen=True)
class NewtonRecord:
    """How far the output layer was from its minimum, and is now.

    Attributes:
        gradient_norm_before: of the objective at the checkpoint.
        gradient_norm_after: after Newton steps.
    """

    gradient_norm_before: float
    gradient_norm_after: float


@dataclass(frozen=True)
class AtMinimum:
    """An output layer at the minimum of its objective, and its view of the test examples.

    Attributes:
        problem: the objective.
        w: its minimum W [C, d].
        tests: the test examples; their targets are the explained ones.
        newton: how it came there.
    """

    problem: Problem
    w: Tensor
    tests: Outputs
    newton: NewtonRecord


def at_minimum(
    prepared: Prepared,
    selected: Sequence[Selected],
    tests: Sequence[TestFacts],
    terminal: Terminal,
) -> AtMinimum:
    """Train the output layer to its minimum, and run the test examples up to it."""
    layer = prepared.choice.output
    if layer is None:
        raise ValueError("an output layer is required")
    problem, w, newton = to_minimum(prepared, layer, terminal)
    return AtMinimum(problem, w, explained_outputs(prepared, layer, selected, tests, terminal), newton)


def to_minimum(prepared: Prepared, layer: nn.Linear, terminal: Terminal) -> tuple[Problem, Tensor, NewtonRecord]:
    """Train the output layer to its minimum by Newton steps in float64.

    Returns:
        The objective, its minimum W [C, d], and the gradient norms before and after.
    """
    task, network = prepared.task, prepared.choice.network
    with terminal.status("training the output layer to its minimum (Newton)"):
        batches = readable_batches(task.train, task.train.indices, BATCH, skip=False)
        problem = make_problem(network, layer, batches, task.objective.over(network))
        w, before, after = minimise(problem, start_of(network, layer, problem.examples.a))
    terminal.say(f"gradient norm {before:.1e} at the checkpoint, {after:.1e} after Newton steps in float64")
    return problem, w, NewtonRecord(before, after)


def explained_outputs(
    prepared: Prepared,
    layer: nn.Linear,
    selected: Sequence[Selected],
    tests: Sequence[TestFacts],
    terminal: Terminal,
) -> Outputs:
    """Run test examples up to the output layer; their targets are the explained classes."""
    batches = (batch for batch, _ in selected_batches(prepared.task, selected, BATCH, terminal, skip=False))
    outputs = outputs_of(prepared.choice.network, layer, batches)
    outputs.targets.copy_(torch.tensor([test.target for test in tests]))
    return outputs
