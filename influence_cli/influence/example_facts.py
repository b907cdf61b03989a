"""What is known about training and test examples besides their scores: labels, predictions, losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from influence_cli.data.batches import readable_batches
from influence_cli.data.split import rows_of
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import exchange
from influence_cli.store.store import READ, Store, predicted_classes


@dataclass(frozen=True)
class TestFacts:
    """What is known about a test example after its gradient pass.

    Attributes:
        index: position in the test set, or None for a file.
        path: its file, or None.
        label: the class used as its label, or None for a file without one.
        predicted: the model's class (several checkpoints: by mean probability).
        target: the class whose loss is explained.
        loss: that loss (several checkpoints: the mean).
        confidence: the probability of the predicted class (several checkpoints: the mean).
        probability: of the class whose loss is explained.
    """

    index: int | None
    path: str | None
    label: int | None
    predicted: int
    target: int
    loss: float
    confidence: float
    probability: float

    def title(self) -> str:
        """Name it in a message: ``test example 17 (data/test/cat/3.png)``, or its file alone."""
        if self.index is None:
            return str(self.path)
        return f"test example {self.index}" + (f" ({self.path})" if self.path else "")


@dataclass(frozen=True)
class TrainingFacts:
    """What is known about the examples of a split, averaged over checkpoints.

    Attributes:
        indices: int64 [n], positions in the data set.
        labels: int64 [n].
        probabilities: float32 [n, C], softmax of the outputs; [0, C] of a store, which would fill the memory with them.
        losses: float32 [n].
        read: bool [n]; False where an example could not be read.
        classes: int64 [n], the model's class of each example if it is known already; None if probabilities are given.
    """

    indices: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray
    read: np.ndarray
    classes: np.ndarray | None = None

    @cached_property
    def predicted(self) -> np.ndarray:
        """Give the model's class of each example."""
        return np.asarray(self.probabilities.argmax(axis=1)) if self.classes is None else self.classes


def explained(stores: Sequence[Prepared]) -> list[Prepared]:
    """Give the checkpoints whose mean makes the predictions: all of independent models, the last of one run."""
    return [prepared for prepared in stores if prepared.task.explained]


def stored_facts(stores: Sequence[Prepared]) -> TrainingFacts:
    """Read labels, losses and the model's class of all training examples from the stores."""
    stores = explained(stores)
    with ExitStack() as stack:
        opened = [stack.enter_context(Store.open(prepared.path)) for prepared in stores]
        for store in opened:
            store.require_complete()  # another process may have rebuilt it since
        first = opened[0]
        losses = sum((store.column("losses") for store in opened[1:]), first.column("losses")) / len(opened)
        none = np.empty((0, first.layout.classes), dtype=np.float32)
        indices, labels, read = first.column("indices"), first.column("labels"), first.column("state") == READ
        return TrainingFacts(indices, labels, none, losses, read, predicted_classes(opened))


def empty_facts(task: Task) -> TrainingFacts:
    """Make facts of the training examples for a pass over them to fill in."""
    split, n = task.train, len(task.train)
    return TrainingFacts(
        split.indices,
        split.labels[split.indices],
        np.zeros((n, len(task.classes)), dtype=np.float32),
        np.zeros(n, dtype=np.float32),
        np.zeros(n, dtype=bool),
    )


def add_up(facts: TrainingFacts) -> None:
    """Give every process of a job the facts that each has filled in."""
    exchange.sum_array(facts.losses)
    exchange.sum_array(facts.probabilities)
    facts.read[:] = exchange.sum_array(facts.read.astype(np.uint8)) > 0


def passed_facts(task: Task) -> TrainingFacts:
    """Fill in the facts of the training examples by a pass forwards."""
    facts = empty_facts(task)
    for batch in readable_batches(task.train, task.train.indices, 256, task.loading, skip=False):
        rows = rows_of(task.train.indices, batch.indices)
        with torch.no_grad():
            outputs = logits_of(task.model(batch.inputs.to(task.device)))
            facts.losses[rows] = task.loss(outputs, batch.targets.to(task.device)).float().cpu().numpy()
            facts.probabilities[rows] = outputs.softmax(dim=1).float().cpu().numpy()
        facts.read[rows] = True
    return facts


def training_facts(stores: Sequence[Prepared]) -> TrainingFacts:
    """Give what is known about the training examples: from the stores, or empty, to be filled in on the fly."""
    if stores[0].effects is not None:
        return passed_facts(stores[0].task)
    if stores[0].on_the_fly:
        return empty_facts(stores[0].task)
    return stored_facts(stores)
