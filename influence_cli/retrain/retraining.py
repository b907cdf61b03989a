"""What the config says of training again: a config enters this file, ``recipe_training`` and ``lds`` alone.

It does because a fresh model is made by the config's factory, and a kept retraining is recognised by what made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from influence_cli.checkpoints.libraries import is_adapter, with_adapter
from influence_cli.checkpoints.load import in_float32
from influence_cli.config.schema import Config
from influence_cli.errors import InfluenceError
from influence_cli.model.fingerprint import splits_fingerprint, training_fingerprint
from influence_cli.model.task import Task, build_model
from influence_cli.replay.recipe import make_recipe
from influence_cli.retrain.recipe_training import RecipeSteps, recipe_training
from influence_cli.retrain.training import (
    Again,
    Training,
    fresh_model,
    held_batches,
    load_training,
    training_pairs,
)


class Steps(Protocol):
    """A training that is run step by step."""

    def train_without(self, rows: np.ndarray, repeat: int, progress: Callable[[float], None]) -> nn.Module:
        """Train without some of the examples in use.

        Args:
            rows: int64, those that have the weight 0; empty for none.
            repeat: 0 for the run itself, its seed, order and start; others for other ones.
            progress: called with the finished share, in [0, 1].

        Returns:
            The trained model, in eval mode.
        """


@dataclass(frozen=True)
class Retraining:
    """How models are trained again: the training function, fresh models, and where the results are kept.

    Attributes:
        config: of the run.
    """

    config: Config

    @property
    def folder(self) -> Path:
        """Name the folder of the retrainings: beside the store, ``influence.retrained`` for ``influence.h5``."""
        store = self.config.gradients.store
        return store.with_name(f"{store.stem}.retrained")

    @property
    def seed(self) -> int:
        """Give the seed of the run, from which those of all trainings are made."""
        return self.config.seed

    @property
    def has_training(self) -> bool:
        """Say whether the config names a training function."""
        return self.config.training is not None

    @cached_property
    def training(self) -> Training:
        """Import the training function and check its signature.

        Raises:
            InfluenceError: the config names none, it does not exist, or it cannot be called.
        """
        return load_training(self.config)

    def check(self) -> None:
        """Tell a mistake in the training function, before any work.

        Raises:
            InfluenceError: as of ``training``.
        """
        if self.has_function:
            _ = self.training

    @property
    def has_function(self) -> bool:
        """Say whether a training function retrains, or else its absence is to be reported: not if there is a recipe."""
        return not self.has_recipe or bool(self.config.training and self.config.training.factory)

    @property
    def has_recipe(self) -> bool:
        """Say whether the config describes a training that is run step by step."""
        return self.config.training is not None and self.config.training.recipe is not None

    def steps(self, task: Task) -> Steps | None:
        """Give the training that is run step by step; None where the config has no recipe."""
        return RecipeSteps(self.config, task) if self.has_recipe else None

    def check_steps(self, option: str) -> None:
        """Refuse what only a training that is run step by step can do, before any work.

        Raises:
            InfluenceError: the config has no recipe.
        """
        if not self.has_recipe:
            raise InfluenceError(
                f"{option} leaves examples out of the batches that they were in, which needs training.recipe: a "
                "training function decides its own batches",
                "describe the training in the config, training: {recipe: …}; or train from other seeds, without "
                f"{option}",
            )

    def fresh_model(self, seed: int, device: torch.device) -> nn.Module:
        """Make an untrained model whose start depends on the seed alone."""
        return fresh_model(self.config, seed, device)

    def trained_model(self, task: Task) -> nn.Module:
        """Make the model of a checkpoint anew, for a training that continues from it: not every model can be copied."""
        model = build_model(self.config)
        if is_adapter(task.checkpoint):
            model = with_adapter(model, task.checkpoint, self.config.where("model", "checkpoint"))
        model = in_float32(model).to(task.device)
        model.load_state_dict(task.model.state_dict())
        return model

    def again(self, task: Task) -> Again:
        """Import the training function, and read what every retraining reads."""
        training = self.training if self.has_function else recipe_training(self.config, task)
        return Again(task, training, training_pairs(task.train), held_batches(task.labelled_tests()))

    def made_of(self, task: Task, recorded: Mapping[str, str]) -> dict[str, str]:
        """Describe what retrainings depend on, part by part; a checkpoint is no part of a training from scratch.

        Args:
            task: model and data.
            recorded: what earlier ones were made from; empty if there are none.
        """
        config = self.config
        return {
            **splits_fingerprint(task, recorded),
            **training_fingerprint(config, task),
            "training": " ".join(self._trained_by(task)),
            "l2": repr(task.objective.trainer_l2()),
            "seed": str(config.seed),
        }

    def _trained_by(self, task: Task) -> list[str]:
        """Describe what the config says of training: a recipe, a function, or both."""
        recipe = [make_recipe(self.config, len(task.train)).described()] if self.has_recipe else []
        return [self.training.name, self.training.source, *recipe] if self.has_function else recipe
