"""A curvature with its complete store: what every command that scores works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from influence_cli.checkpoints.optimizer_state import adam_slowness
from influence_cli.config.schema import Config, RecipeConfig
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.coordinates import Basis, coordinates
from influence_cli.curvature.damping import Damping, TrainingTime, adam_time
from influence_cli.curvature.spectrum import Spectrum
from influence_cli.errors import near_path
from influence_cli.model.task import Task
from influence_cli.runtime.terminal import Advance
from influence_cli.steps.schedule import Schedule


@dataclass(frozen=True)
class InverseSettings:
    """What the config says of λ, solvers and several checkpoints: what comes after this package reads no config.

    Attributes:
        damping: ``auto``, ``training`` or λ.
        tolerance: at which relative residual a solver stops; None for its own.
        max_iterations: after how many iterations it stops; None for its own number.
        ensemble: ``mean``, ``tracin`` or ``source``: what several checkpoints are to each other.
        time: η · steps that this checkpoint stands for.
        segments: of SOURCE, over all checkpoints; None for one each.
        training: how far training went, for ``training``; None for any other λ.
    """

    damping: float | str = "auto"
    tolerance: float | None = None
    max_iterations: int | None = None
    ensemble: str = "mean"
    time: float = 1.0
    segments: int | None = None
    training: TrainingTime | None = None

    def given_damping(self, given: float | str, groups: Sequence[str]) -> float | str | Damping:
        """Give ``auto`` or λ as it is, and for ``training`` the λ of each group of coordinates, by name."""
        if given != "training":
            return given
        if self.training is None:
            raise ValueError("curvature.damping is training, but η·K is not known")
        return self.training.damping(groups)


@dataclass(frozen=True)
class RunSummary:
    """What is known of a training run that gives influence itself.

    Attributes:
        steps: of the run.
        agreement: r of what it predicts and what trainings without 1% gave; None where that was not measured.
        slope: of what they gave on what it predicts.
        verdict: both in a sentence.
    """

    steps: int
    agreement: float | None
    slope: float | None
    verdict: str


class Effects(Protocol):
    """Influence from another source than gradients and a curvature: a training run that is replayed."""

    @property
    def summary(self) -> RunSummary:
        """Give what is known of the run."""

    def on_margins(self) -> Effects:
        """Give the same of margins with their sign changed in place of losses."""

    def slopes(self, inputs: Tensor, targets: Tensor, advance: Advance) -> np.ndarray:
        """Give the derivatives of the losses of test examples in the weights of the training examples [m, n]."""

    def mean_slopes(self, inputs: Tensor, targets: Tensor, advance: Advance) -> np.ndarray:
        """Give the derivatives of their mean loss [n]."""

    def slopes_of(self, row: int, inputs: Tensor, targets: Tensor) -> np.ndarray:
        """Give the derivatives of the losses of test examples in the weight of one training example [m]."""

    def takes_as_it_is(self, row: int, image: Tensor) -> bool:
        """Say whether every step that takes a training image takes these very numbers: no other, none augmented."""

    def image_slopes(
        self, row: int, inputs: Tensor, targets: Tensor, advance: Advance
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give the derivatives of the losses of test examples in the weight of a training image, and in its numbers.

        Returns:
            [m], and [m, …] in the shape of an input.
        """

    def rises_with(self, row: int, image: Tensor, inputs: Tensor, targets: Tensor, advance: Advance) -> np.ndarray:
        """Train again with another image in the place of a training image: the rise of the losses [m] that happens."""


@dataclass(frozen=True)
class Prepared:
    """A curvature and, unless it is used on the fly, a complete store.

    Attributes:
        task: one checkpoint and its data.
        choice: the curvature in use.
        path: the store.
        basis: of the coordinates, on the task's device; None for raw gradients.
        spectrum: Λ of the coordinates; None without a basis.
        on_the_fly: no rows are stored: every coordinate is available, and scores come from a layer pass.
        batch: examples that go through the layer pass at once.
        gradient_norm: ‖∇R + l2·θ̂‖ over the tracked parameters (with a basis per layer: its kept coordinates): 0 at a
            minimum; None on the fly.
        seconds: what this call spent on curvature and gradients.
        settings: how its inverse curvature is made.
        effects: what gives influence in the place of gradients and curvature; None for these.
    """

    task: Task
    choice: Choice
    path: Path
    basis: Basis
    spectrum: Spectrum | None
    on_the_fly: bool
    batch: int
    gradient_norm: float | None
    seconds: float
    settings: InverseSettings
    effects: Effects | None = None

    def coordinates(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the coordinates [b, k] of some examples' gradients, their losses [b] and outputs [b, C]."""
        return coordinates(self.choice.network, self.basis, inputs, targets)

    @property
    def has_one_l2(self) -> bool:
        """Say whether λ₂ is the same for all tracked parameters."""
        return isinstance(self.task.objective.over(self.choice.network), float)

    @property
    def l2(self) -> float:
        """Give the λ₂ that is added to every Λ: 0 where it differs between parameters, because Λ then contains it."""
        l2 = self.task.objective.over(self.choice.network)
        return l2 if isinstance(l2, float) else 0.0

    @property
    def width(self) -> int:
        """Count the numbers in a row."""
        return self.choice.network.size if self.basis is None else self.basis.width


def settings_of(config: Config, number: int) -> InverseSettings:
    """Give what is asked of the inverse curvature of a checkpoint."""
    curvature, model = config.curvature, config.model
    return InverseSettings(
        curvature.damping,
        curvature.tolerance,
        curvature.max_iterations,
        model.ensemble,
        model.times()[number],
        model.segments,
    )


def training_time(config: Config, number: int, task: Task) -> TrainingTime | None:
    """Give η·K of a checkpoint's training, where ``curvature.damping`` is ``training``.

    With an Adam state in the checkpoint, each layer has the rate lr / mean(√v̂ + ε). A recipe of SGD says its own rates.

    Raises:
        InfluenceError: the state is not that of the model's parameters.
    """
    if config.curvature.damping != "training":
        return None
    recipe = None if config.training is None else config.training.recipe
    if recipe is not None and not config.model.learning_rates:
        # Under momentum β plain gradient descent has the rate η/(1 − β). The recipe's loss is the plain mean.
        return TrainingTime(schedule_of(recipe, len(task.train)).time() / (1 - (recipe.momentum or 0.0)))
    # A step along the trainer's mean is n/D of one along the plain mean.
    time = config.model.times()[number] / task.objective.factor
    source = config.model.sources[number]
    where = config.where("curvature", "damping")
    slowness = None if source is None else adam_slowness(source.file, task.model, where)
    return TrainingTime(time) if slowness is None else adam_time(time, *slowness)


def schedule_of(recipe: RecipeConfig, examples: int) -> Schedule:
    """Give the rates of a recipe's steps on n examples."""
    epoch = -(-examples // recipe.batch)
    return Schedule(recipe.schedule, recipe.lr, epoch * recipe.epochs, round(recipe.warmup * epoch))


def store_paths(config: Config) -> list[Path]:
    """Name the store of every checkpoint."""
    return [store_path(config, number) for number in range(config.model.count)]


def store_path(config: Config, number: int) -> Path:
    """Name the store of a checkpoint: the configured name, with the checkpoint's number if there are several."""
    path = near_path(config.gradients.store)
    if config.model.count == 1:
        return path
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
