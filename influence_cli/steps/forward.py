"""The steps of a run, taken again: with other weights or another image, and with the derivative of a change beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import Run, State, Taken

Advance = Callable[[int], None]


def ignore(_count: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Moment:
    """The state before a step, and the gradient [p] that it took."""

    state: State
    gradient: Tensor


def take_step(
    network: TrainedNetwork, state: State, taken: Taken, weights: Tensor | None = None
) -> tuple[State, Tensor, Tensor]:
    """Take one step: the state after it, the gradient [p] of the batch's mean loss, and the losses [b] before it."""
    gradient, losses, buffers = network.gradient(state, taken.inputs, taken.targets, weights)
    parameters, slots = taken.rule.step(state.parameters, state.slots, gradient)
    return State(parameters, slots, buffers), gradient, losses


def run_again(
    network: TrainedNetwork, run: Run, weights: np.ndarray, advance: Advance = ignore, state: State | None = None
) -> State:
    """Run the whole training again with other weights of the examples.

    Order, randomness and divisors stay: an example of weight 0 is missing in its batches, and no other example takes
    its place.

    Args:
        network: that is trained.
        run: the steps.
        weights: [n]; 1 for an example as it was, 0 for one that is left out.
        advance: called with the steps done since the last call.
        state: where it starts; by default where the run did.

    Returns:
        The state at the end.
    """
    state = run.state(0) if state is None else state
    given = torch.from_numpy(weights).to(state.parameters)
    for step in range(run.steps):
        taken = run.taken(step)
        with run.randomness(step):
            state, _, _ = take_step(network, state, taken, given[torch.from_numpy(taken.rows)])
        advance(1)
    return state


def moments(network: TrainedNetwork, run: Run, start: int, stop: int) -> Iterator[Moment]:
    """Rebuild the states before steps ``start`` to ``stop`` from the kept one before ``start``."""
    state = run.state(start)
    for step in range(start, stop):
        taken = run.taken(step)
        with run.randomness(step):
            after, gradient, _ = take_step(network, state, taken)
        yield Moment(state, gradient)
        state = after


@dataclass(frozen=True)
class WithImage:
    """A run whose steps take another image; it is a ``Run`` for going forwards: its first state is the run's.

    Attributes:
        run: as it was.
        row: of the training image.
        image: what its steps take in its place [...], in the shape of an input.
    """

    run: Run
    row: int
    image: Tensor

    @property
    def examples(self) -> int:
        """Give n."""
        return self.run.examples

    @property
    def steps(self) -> int:
        """Give T."""
        return self.run.steps

    @property
    def kept(self) -> Sequence[int]:
        """Give the start alone: no later state is known."""
        return (0,)

    def state(self, step: int) -> State:
        """Give the first state."""
        if step != 0:
            raise ValueError("a run with another image has only its first state")
        return self.run.state(0)

    def taken(self, step: int) -> Taken:
        """Give what a step takes."""
        taken = self.run.taken(step)
        changed = torch.from_numpy(taken.rows == self.row)
        if not changed.any():
            return taken
        inputs = taken.inputs.clone()
        inputs[changed.to(inputs.device)] = self.image.to(inputs)
        return replace(taken, inputs=inputs)

    def randomness(self, step: int) -> AbstractContextManager[None]:
        """Put the global generators as they were when the step ran its network."""
        return self.run.randomness(step)


def follow_weights(
    network: TrainedNetwork, run: Run, weights: np.ndarray, advance: Advance = ignore
) -> tuple[State, State]:
    """Give the derivative of the last state along changes of the examples' weights, forwards through the run.

    Args:
        network: that was trained.
        run: the steps.
        weights: [K, n], a direction per row: −1 where an example is left out.
        advance: called with the steps done since the last call.

    Returns:
        The last state, and its derivative: every vector of it is [K, …].
    """
    state = run.state(0)
    given = torch.from_numpy(weights).to(state.parameters)
    moved = State(*_zeros(state, len(given)))
    kept_share = network.kept_share.to(state.buffers)
    for step in range(run.steps):
        taken = run.taken(step)
        rows = torch.from_numpy(taken.rows)
        with run.randomness(step):
            after, gradient, _ = take_step(network, state, taken)
        with run.randomness(step):
            slope, _ = network.products(state, taken, moved.parameters)
        with run.randomness(step):
            slope = slope + network.example_gradient(state, taken, given[:, rows] / len(rows))
        buffers = kept_share * moved.buffers
        if network.mixes_examples:
            with run.randomness(step):
                buffers = buffers + network.push_averages(state, taken, moved.parameters)
        parameters, slots = taken.rule.push(
            state.parameters, state.slots, gradient, (moved.parameters, moved.slots, slope)
        )
        state, moved = after, State(parameters, slots, buffers)
        advance(1)
    return state, moved


def _zeros(state: State, count: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    def zeros(vector: Tensor) -> Tensor:
        return vector.new_zeros(count, len(vector))

    return zeros(state.parameters), tuple(zeros(slot) for slot in state.slots), zeros(state.buffers)
