"""A run by a recipe: its steps from the recipe, its states from the record; and the training that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from influence_cli.errors import InfluenceError, Stopped
from influence_cli.replay.examples import Examples, augmented
from influence_cli.replay.recipe import NOISE, Recipe
from influence_cli.replay.record import Record, kept_steps
from influence_cli.runtime.seeds import seeded
from influence_cli.steps.forward import Advance, ignore, take_step
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import State, Taken


@dataclass(frozen=True)
class RecipeRun:
    """A run by a recipe, which is a ``Run``.

    Attributes:
        recipe: its steps.
        data: the training examples.
        record: its states.
    """

    recipe: Recipe
    data: Examples
    record: Record

    @property
    def examples(self) -> int:
        """Give n."""
        return self.recipe.examples

    @property
    def steps(self) -> int:
        """Give T."""
        return self.recipe.steps

    @property
    def kept(self) -> Sequence[int]:
        """Give the steps before which a state is kept."""
        return kept_steps(self.steps)

    def state(self, step: int) -> State:
        """Give a kept state."""
        return self.record.read(step, self.data.device)

    def taken(self, step: int) -> Taken:
        """Give what a step took."""
        rows = self.recipe.rows(step)
        inputs, labels = self.data.take(rows)
        inputs = augmented(inputs, rows, self.recipe, step // self.recipe.steps_per_epoch)
        return Taken(rows, inputs, labels, self.recipe.rule(step))

    def randomness(self, step: int) -> AbstractContextManager[None]:
        """Put the global generators as they were when the step ran its network."""
        return seeded(self.recipe.seed(NOISE, step))


def train_run(network: TrainedNetwork, run: RecipeRun, advance: Advance = ignore) -> State:
    """Train by the recipe, from the last kept state on, and keep states on the way.

    Args:
        network: fresh where no state is kept yet.
        run: what to train.
        advance: called with the steps done since the last call.

    Returns:
        The last state.

    Raises:
        InfluenceError: the loss or the parameters are no numbers any more; it names the step.
        Stopped: Ctrl-C; what was kept stays.
    """
    record, steps = run.record, set(run.kept)
    kept = record.kept
    if kept:
        start = kept[-1]
        state = record.read(start, run.data.device)
        advance(start)
    else:
        start, state = 0, network.first_state(run.recipe.rule(0).slots)
        record.write(0, state)
    try:
        for step in range(start, run.steps):
            with run.randomness(step):
                state, _, losses = take_step(network, state, run.taken(step))
            if not torch.isfinite(losses).all():
                raise InfluenceError(
                    f"training diverged: the loss of step {step:,} of {run.steps:,} is not a number",
                    "use a smaller training.recipe.lr, a warmup, or clip: 1.0",
                )
            if step + 1 in steps:
                record.write(step + 1, state)
            advance(1)
    except KeyboardInterrupt:
        last = record.kept[-1]
        raise Stopped(
            f"{record.shown} keeps the first {last:,} of {run.steps:,} steps; run the same command to resume"
        ) from None
    return state
