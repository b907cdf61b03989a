"""Try transforms on a few images: the right one gives the most right answers.

The images are drawn across the classes, since data are sorted by class. All transforms see the same images: first all
of them a few, then the best three up to 256.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError, describe
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task
from influence_cli.runtime.terminal import Terminal
from influence_cli.setup.guesses import TransformGuess

SCREENED, SAMPLE, FINALISTS = 32, 256, 3
# Images in memory at a time, as they are in their files.
CHUNK = 16
# A large model on a small machine: after so many seconds the images so far must do, at least as many as screened.
SECONDS = 60.0
# Another transform is preferred where it is better by so many standard errors.
CLEARLY = 2.0


@dataclass(frozen=True)
class Outcome:
    """What the model says of the images under one transform.

    Attributes:
        transform: the transform.
        predicted: int64 [n], the output with the largest logit of each image.
        labels: int64 [n], the output that its label means.
        losses: float64 [n].
    """

    transform: TransformGuess
    predicted: np.ndarray
    labels: np.ndarray
    losses: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Say of each image whether the model is right: bool [n]."""
        right: np.ndarray = self.predicted == self.labels
        return right

    @property
    def accuracy(self) -> float:
        """Give the share of right answers, in [0, 1]."""
        return float(self.right.mean())


@dataclass(frozen=True)
class Trial:
    """What came of trying transforms.

    Attributes:
        outcomes: of those that were tried on all images, the likeliest first.
        dropped: of those that were tried on the first images alone.
        reason: why the first transform failed under which the model fails; empty if none did.
    """

    outcomes: list[Outcome]
    dropped: list[Outcome]
    reason: str


def drawn(split: Split, count: int, seed: int) -> np.ndarray:
    """Draw examples across the classes: any first part of them has the classes in nearly equal numbers.

    Args:
        split: the examples.
        count: how many at most.
        seed: of the draw.

    Returns:
        Positions in the data set, int64 [≤ count].
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(split.indices)
    labels = split.labels[order]
    turn = np.zeros(len(order), dtype=np.int64)  # the how manieth of its class an example is
    by_class = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[by_class]) != 0]) if len(order) else np.empty(0, dtype=np.int64)
    turn[by_class] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    chosen: np.ndarray = order[np.argsort(turn, kind="stable")][:count]
    return chosen


def try_transforms(
    task: Task,
    transforms: Sequence[tuple[TransformGuess, Callable[[Any], Any] | None]],
    terminal: Terminal,
    *,
    any_order: bool = False,
) -> Trial:
    """Measure the accuracy of a model under several transforms.

    Args:
        task: model and training examples.
        transforms: each and what was built of it, the likeliest first.
        terminal: progress.
        any_order: whether the order of the outputs is open: then an answer counts as right if it is the one that most
            images of its class get.

    Raises:
        InfluenceError: the model fails under all of them, or no image can be read.
    """
    indices = drawn(task.train, SAMPLE, task.seed)
    tried = {number: _Running(guess, built) for number, (guess, built) in enumerate(transforms)}
    reason, started, count = "", time.monotonic(), 0
    dropped: list[Outcome] = []
    with terminal.progress(len(indices), "trying transforms") as advance:
        for start in range(0, len(indices), CHUNK):
            if count >= SCREENED and time.monotonic() - started > SECONDS:
                break
            images = _images(task.train, indices[start : start + CHUNK])
            for number, running in list(tried.items()):
                try:
                    running.add(task, images)
                except InfluenceError as error:
                    reason = reason or error.message
                    del tried[number]
            if not tried:
                raise InfluenceError(reason)
            count += len(images)
            advance(len(images))
            if start < SCREENED <= start + CHUNK:
                best = sorted(tried, key=lambda number: tried[number].order(any_order=any_order))[:FINALISTS]
                kept = sorted({*best, *(number for number in tried if tried[number].guess.why)})
                dropped = [tried[number].outcome() for number in tried if number not in kept]
                tried = {number: tried[number] for number in kept}
    if not count:
        raise InfluenceError("no training example of those drawn can be read")
    return Trial([running.outcome() for running in tried.values()], dropped, reason)


def choose(outcomes: Sequence[Outcome]) -> Outcome:
    """Choose a transform: the first one, unless a later one is clearly better.

    Better is more right answers on the same images, by more than two standard errors of the difference; or as many, and
    a loss that is lower by so much. Of a transform that a file names only the right answers count.

    Args:
        outcomes: the likeliest first.
    """
    chosen = outcomes[0]
    for other in outcomes[1:]:
        gained, lost = int((other.right & ~chosen.right).sum()), int((chosen.right & ~other.right).sum())
        clearly = CLEARLY * (gained + lost) ** 0.5
        if gained - lost > clearly:
            chosen = other
        elif not chosen.transform.why and lost - gained <= clearly:
            saved = chosen.losses - other.losses
            if saved.mean() > CLEARLY * saved.std() / len(saved) ** 0.5:
                chosen = other
    return chosen


class _Running:
    """The answers under one transform so far."""

    def __init__(self, guess: TransformGuess, transform: Callable[[Any], Any] | None) -> None:
        self.guess, self.transform = guess, transform
        self.predicted: list[int] = []
        self.labels: list[int] = []
        self.losses: list[float] = []

    def order(self, *, any_order: bool) -> tuple[float, float]:
        """Sort by right answers, then by the loss."""
        predicted, labels = np.array(self.predicted), np.array(self.labels)
        right = _matched(predicted, labels) if any_order else int((predicted == labels).sum())
        return -right, float(np.mean(self.losses)) if self.losses and not any_order else 0.0

    def outcome(self) -> Outcome:
        """Give what came of it."""
        return Outcome(self.guess, np.array(self.predicted), np.array(self.labels), np.array(self.losses))

    def add(self, task: Task, images: Sequence[tuple[int, Any]]) -> None:
        """Run some images through the model.

        Raises:
            InfluenceError: the transform or the model fails on them.
        """
        split = replace(task.train, transform=self.transform)
        inputs = [to_input(split, image, split.title(index)) for index, image in images]
        if len({tensor.shape for tensor in inputs}) > 1:
            raise InfluenceError(f"images of several sizes stay so under {self.guess.name}")
        if not inputs:
            return
        labels = torch.from_numpy(split.labels[[index for index, _ in images]]).to(task.device)
        outputs, losses = _answers(task, torch.stack(inputs).to(task.device), labels, self.guess.name)
        self.predicted += outputs.argmax(dim=1).tolist()
        self.labels += labels.tolist()
        self.losses += losses.double().tolist()


def _matched(predicted: np.ndarray, labels: np.ndarray) -> int:
    """Count the answers that are right if each class has an output of its own, the pairs of most images first."""
    pairs, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    right, classes, outputs = 0, set(), set()
    for at in np.argsort(-counts, kind="stable"):
        name, output = pairs[:, at].tolist()
        if name not in classes and output not in outputs:
            classes.add(name)
            outputs.add(output)
            right += int(counts[at])
    return right


def _answers(task: Task, inputs: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    try:
        with torch.no_grad():
            outputs = logits_of(task.model(inputs))
            losses = task.loss(outputs, labels)
    except InfluenceError:
        raise
    except Exception as error:  # any exception of the user's model
        raise InfluenceError(f"the model fails under {name}: {describe(error)}") from error
    return outputs, losses


def _images(split: Split, indices: np.ndarray) -> list[tuple[int, Any]]:
    """Read some images; one that cannot be read is left out here, and reported by the check."""
    images = []
    for index in indices:
        try:
            images.append((int(index), raw_item(split, int(index))[0]))
        except InfluenceError:
            continue  # unreadable: check, which init runs, names it
    return images
