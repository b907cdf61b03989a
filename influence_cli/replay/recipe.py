"""``training.recipe``: how a run trains. The only file of this package that reads a config.

Order, rates and random numbers of every step depend on the recipe and its seed alone, so any step can be taken again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.config.schema import Config, RecipeConfig
from influence_cli.data.transforms import build_steps
from influence_cli.errors import InfluenceError
from influence_cli.model.outputs import Loss
from influence_cli.precompute.prepared import schedule_of
from influence_cli.runtime.seeds import seed_of
from influence_cli.steps.rule import Rule
from influence_cli.steps.schedule import Schedule

# The purposes of seeds, so that different purposes never share one.
START, ORDER, NOISE, AUGMENT = 1, 2, 3, 4


@dataclass(frozen=True)
class Recipe:
    """A training, decided.

    Attributes:
        settings: as the config gives them.
        examples: n, of the training set.
        augment: a random transform of one input, or None.
    """

    settings: RecipeConfig
    examples: int
    augment: Callable[[Any], Any] | None = field(default=None, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        """Count the batches of an epoch; the last one may be smaller."""
        return -(-self.examples // self.settings.batch)

    @property
    def steps(self) -> int:
        """Count the steps, T."""
        return self.steps_per_epoch * self.settings.epochs

    @property
    def dtype(self) -> torch.dtype:
        """Give the type of all numbers of the run."""
        return torch.float64 if self.settings.precision == "float64" else torch.float32

    def rows(self, step: int) -> np.ndarray:
        """Give the training examples of a step: int64 [b]."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        size = self.settings.batch
        return _order(self.settings.seed, epoch, self.examples)[batch * size : (batch + 1) * size]

    def seed(self, purpose: int, *numbers: int) -> int:
        """Give the seed of a purpose."""
        return seed_of(self.settings.seed, purpose, *numbers)

    @property
    def schedule(self) -> Schedule:
        """Give the rates of all steps."""
        return schedule_of(self.settings, self.examples)

    def rate(self, step: int) -> float:
        """Give η of a step."""
        return self.schedule.rate(step)

    def rule(self, step: int) -> Rule:
        """Give the optimiser's step."""
        given = self.settings
        first, second = given.betas or (0.9, 0.999)
        sgd = given.optimizer == "sgd"
        return Rule(
            given.optimizer,
            self.rate(step),
            step,
            momentum=(given.momentum or 0.0) if sgd else first,
            second=second,
            nesterov=given.nesterov,
            eps=given.eps,
            eps_root=given.eps_root,
            decay=given.weight_decay,
            clip=given.clip,
        )

    def trained_loss(self, loss: Loss) -> Loss:
        """Give the loss that is trained: the config's, with ``label_smoothing`` if the recipe has it."""
        smoothing = self.settings.label_smoothing
        if not smoothing:
            return loss

        def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)

        return smoothed

    def described(self) -> str:
        """Describe it for a fingerprint: everything that changes a byte of the run."""
        return f"{self.settings.model_dump_json()} n {self.examples}"


def make_recipe(config: Config, examples: int) -> Recipe:
    """Decide the recipe of a config.

    Args:
        config: with a section ``training.recipe``.
        examples: n.

    Raises:
        InfluenceError: there is none, or its keys contradict each other.
    """
    training = config.training
    if training is None or training.recipe is None:
        raise InfluenceError(
            f"{config.path.name}: there is no training.recipe",
            "add training: {recipe: {optimizer: sgd, lr: 0.1, momentum: 0.9, batch: 250, epochs: 20}}, and "
            "influence train runs it",
        )
    given = training.recipe

    def where(key: str) -> str:
        return config.where("training", "recipe", key)

    if given.optimizer == "sgd" and given.betas is not None:
        raise InfluenceError(f"{where('betas')}: betas are Adam's; sgd takes momentum", "momentum: 0.9")
    if given.optimizer != "sgd" and (given.momentum is not None or given.nesterov):
        key = "nesterov" if given.momentum is None else "momentum"
        raise InfluenceError(f"{where(key)}: {key} is for sgd; {given.optimizer} takes betas", "betas: [0.9, 0.999]")
    if given.nesterov and not given.momentum:
        raise InfluenceError(f"{where('nesterov')}: nesterov needs momentum", "momentum: 0.9")
    if given.schedule == "one-cycle" and given.warmup:
        raise InfluenceError(f"{where('warmup')}: one-cycle has its own warm-up", "leave warmup out")
    if given.label_smoothing and (config.loss.factory != "cross_entropy" or config.loss.args):
        raise InfluenceError(
            f"{where('label_smoothing')}: label_smoothing goes with cross_entropy, not with {config.loss.factory}",
            "leave it out, or smooth the labels in your own loss",
        )
    if config.train.weights is not None:
        raise InfluenceError(
            f"{config.where('train', 'weights')}: a recipe trains on every example alike", "leave train.weights out"
        )
    augment = build_steps(
        given.augment, config.folder, lambda number: config.where("training", "recipe", "augment", number)
    )
    return Recipe(given, examples, augment)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(examples)
