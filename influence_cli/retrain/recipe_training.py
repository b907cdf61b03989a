"""``training.recipe`` for retrainings: the run again without some examples, and the recipe on other examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from influence_cli.config.schema import Config
from influence_cli.model.task import Task, build_model
from influence_cli.replay.examples import augmented
from influence_cli.replay.open import recipe_run, trained_network
from influence_cli.replay.recipe import NOISE, make_recipe
from influence_cli.replay.recipe_run import RecipeRun
from influence_cli.retrain.training import REPEATED, Pairs, Progress, Training
from influence_cli.runtime.seeds import seed_of, seeded
from influence_cli.steps.forward import run_again, take_step
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import State, Taken


@dataclass(frozen=True)
class RecipeSteps:
    """Runs a recipe again without some examples, which is a ``Steps``.

    Attributes:
        config: with a recipe.
        task: its data.
    """

    config: Config
    task: Task
    _starts: dict[int, tuple[TrainedNetwork, RecipeRun, State]] = field(default_factory=dict, repr=False)

    def train_without(self, rows: np.ndarray, repeat: int, progress: Callable[[float], None]) -> nn.Module:
        """Run all steps with weight 0 for some examples; order, randomness and divisors stay."""
        if repeat not in self._starts:
            network, run = recipe_run(self._config_of(repeat), self.task)
            self._starts.clear()
            self._starts[repeat] = network, run, network.first_state(run.recipe.rule(0).slots)
        network, run, start = self._starts[repeat]
        weights, done = np.ones(run.examples), 0
        weights[rows] = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            progress(done / run.steps)

        network.load(run_again(network, run, weights, advance, start))
        # One of the precision of the other models; and the next run needs this one.
        model = build_model(self.config).to(self.task.device)
        model.load_state_dict(network.model.state_dict())
        return model.eval()

    def _config_of(self, repeat: int) -> Config:
        """Give the config of the run itself, or of one from another seed."""
        training = self.config.training
        if repeat == 0 or training is None or training.recipe is None:
            return self.config
        seed = seed_of(training.recipe.seed, REPEATED, repeat)
        recipe = training.recipe.model_copy(update={"seed": seed})
        return self.config.model_copy(update={"training": training.model_copy(update={"recipe": recipe})})


def recipe_training(config: Config, task: Task) -> Training:
    """Make a training function of a recipe: the same optimiser, batches, epochs and schedule on the given examples.

    The recipe's weight decay counts; λ₂ is not used.
    """
    given = make_recipe(config, len(task.train))

    def train(model: nn.Module, data: Pairs, *, seed: int, progress: Progress, **_l2: object) -> nn.Module:
        recipe = replace(given, settings=given.settings.model_copy(update={"seed": seed}), examples=len(data))
        network = trained_network(model.to(recipe.dtype), recipe.trained_loss(task.loss))
        state = network.first_state(recipe.rule(0).slots)
        for step in range(recipe.steps):
            rows = recipe.rows(step)
            pairs = [data[int(row)] for row in rows]
            inputs = torch.stack([x for x, _ in pairs]).to(recipe.dtype).to(task.device)
            labels = torch.tensor([y for _, y in pairs], device=task.device)
            inputs = augmented(inputs, rows, recipe, step // recipe.steps_per_epoch)
            with seeded(recipe.seed(NOISE, step)):
                state, _, _ = take_step(network, state, Taken(rows, inputs, labels, recipe.rule(step)))
            progress(step + 1, recipe.steps)
        network.load(state)
        return model.float()

    return Training(train, "training.recipe", config.where("training", "recipe"), config.folder, given.described())
