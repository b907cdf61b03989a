"""A training run in memory, small enough for finite differences of whole trainings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.steps.forward import take_step
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.rule import Rule
from influence_cli.steps.run import State, Taken


@dataclass
class SmallRun:
    """Random images of three classes, in batches of five with a last one of two, for ``epochs`` epochs."""

    network: TrainedNetwork
    rule: dict[str, Any]
    epochs: int = 3
    examples: int = 12
    kept: Sequence[int] = ()
    augmented: bool = False
    states: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(5)
        dtype = next(self.network.model.parameters()).dtype
        self.images = torch.randn(self.examples, 1, 6, 6, generator=draw, dtype=dtype)
        self.labels = torch.randint(0, 3, (self.examples,), generator=draw)
        self.batches = [b for _ in range(self.epochs) for b in torch.randperm(self.examples, generator=draw).split(5)]
        self.kept = self.kept or range(self.steps + 1)
        state = self.network.first_state(Rule(number=0, rate=0.1, **self.rule).slots)
        for step in range(self.steps + 1):
            if step in self.kept:
                self.states[step] = state
            if step < self.steps:
                with self.randomness(step):
                    state, _, _ = take_step(self.network, state, self.taken(step))

    @property
    def steps(self) -> int:
        return len(self.batches)

    def state(self, step: int) -> State:
        return self.states[step]

    def taken(self, step: int) -> Taken:
        rows = self.batches[step]
        inputs = self.images[rows]
        if self.augmented:
            inputs = inputs.roll(step % 3, dims=-1)
        rate = 0.05 * (1 + np.cos(np.pi * step / self.steps))
        return Taken(rows.numpy(), inputs, self.labels[rows], Rule(number=step, rate=rate, **self.rule))

    @contextmanager
    def randomness(self, step: int) -> Iterator[None]:
        with torch.random.fork_rng():
            torch.manual_seed(step)
            yield


def small_network(*, norm: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> TrainedNetwork:
    """Make a CNN of 200 parameters, smooth in all of them."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.GELU(), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(16, 3)).to(dtype).train()
    return TrainedNetwork(
        model, lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none")
    )


def measure(network: TrainedNetwork, run: SmallRun, state: State) -> Tensor:
    """Give two losses in eval mode at a state, differentiable in it."""
    outputs = network.measure(state.parameters, state.buffers, run.images[:2].flip(-1))
    return network.loss(outputs, run.labels[:2])


def end_of(network: TrainedNetwork, run: SmallRun) -> State:
    """Give the derivatives of ``measure`` at the run's last state."""
    last = run.state(run.steps)
    theta = last.parameters.detach().clone().requires_grad_(True)
    buffers = last.buffers.detach().clone().requires_grad_(True)
    values = measure(network, run, State(theta, last.slots, buffers))
    rows = [torch.autograd.grad(value, (theta, buffers), retain_graph=True, allow_unused=True) for value in values]
    by_buffers = [b if b is not None else torch.zeros_like(buffers) for _, b in rows]
    parameters = torch.stack([theta_ for theta_, _ in rows])
    slots = tuple(torch.zeros_like(parameters) for _ in last.slots)
    return State(parameters, slots, torch.stack(by_buffers))
