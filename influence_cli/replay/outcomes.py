"""Losses of the test examples at a state, and their change along a change of the state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from influence_cli.data.batches import readable_batches
from influence_cli.model.task import Task
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import State

BATCH = 256


def batches(task: Task, positions: np.ndarray, state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """Read test examples for an evaluation at a state: inputs of its type, and labels."""
    for batch in readable_batches(task.labelled_tests(), positions, BATCH, task.loading, skip=False):
        yield batch.inputs.to(state.parameters), batch.targets.to(task.device)


def outcomes(task: Task, network: TrainedNetwork, state: State, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the losses of test examples at a state, float64 [m], and whether they are predicted correctly [m]."""
    losses, right = [], []
    with torch.no_grad():
        for inputs, labels in batches(task, positions, state):
            outputs = network.measure(state.parameters, state.buffers, inputs)
            losses.append(task.loss(outputs, labels).double().cpu().numpy())
            right.append((outputs.argmax(dim=1) == labels).cpu().numpy())
    return np.concatenate(losses), np.concatenate(right)


def losses_of(task: Task, network: TrainedNetwork, state: State, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """Compute the losses of inputs [m, …] at a state, for the classes [m] whose loss counts: float64 [m]."""
    losses = []
    with torch.no_grad():
        for x, y in zip(torch.split(inputs, BATCH), torch.split(targets, BATCH), strict=True):
            outputs = network.measure(state.parameters, state.buffers, x.to(state.parameters))
            losses.append(task.loss(outputs, y.to(task.device)).double().cpu().numpy())
    return np.concatenate(losses)


def loss_changes(task: Task, network: TrainedNetwork, state: State, moved: State, positions: np.ndarray) -> np.ndarray:
    """Compute the derivatives of test losses at a state along K changes of it: float64 [K, m]."""
    parts = [
        changes_of(task, network, state, moved, inputs, labels) for inputs, labels in batches(task, positions, state)
    ]
    return np.concatenate(parts, axis=1)


def changes_of(
    task: Task, network: TrainedNetwork, state: State, moved: State, inputs: Tensor, targets: Tensor
) -> np.ndarray:
    """Do the same for inputs [m, …] and the classes [m] whose loss counts."""
    columns = []
    for x, y in zip(torch.split(inputs, BATCH), torch.split(targets, BATCH), strict=True):

        def losses(parameters: Tensor, buffers: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return task.loss(network.measure(parameters, buffers, x.to(state.parameters)), y.to(task.device))

        point = (state.parameters, state.buffers)
        rows = [
            jvp(losses, point, (parameters, buffers))[1]
            for parameters, buffers in zip(moved.parameters, moved.buffers, strict=True)
        ]
        columns.append(torch.stack(rows).double().cpu().numpy())
    return np.concatenate(columns, axis=1)


def outcome_line(task: Task, network: TrainedNetwork, state: State) -> str:
    """Say in a line how good a state is on the test set."""
    losses, right = outcomes(task, network, state, task.labelled_tests().indices)
    return f"test accuracy {right.mean():.1%}, mean loss {losses.mean():.4g} nats, over {len(right):,} images"
