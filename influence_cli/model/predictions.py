"""What the model predicts of the test examples: which it misclassifies, and its loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influence_cli.data.batches import readable_batches
from influence_cli.model.task import Task, mean_probabilities, measure_loading
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal, or_silent

# A probability that rounds to 0 has no logarithm.
_LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Predicted:
    """How the model (or the mean of several) predicts the test examples.

    Attributes:
        wrong: positions of those that it misclassifies, ascending.
        examples: how many could be read.
        log_loss: the mean of −log of the probability of the label, in nats, whatever loss the model is trained with.
    """

    wrong: np.ndarray
    examples: int
    log_loss: float

    def numbers(self) -> dict[str, float]:
        """Give counts and loss by name."""
        return {"examples": self.examples, "misclassified": len(self.wrong), "log_loss": self.log_loss}


def misclassified(tasks: Sequence[Task], terminal: Terminal | None = None, *, skip: bool = False) -> np.ndarray:
    """Find the test examples that the model (or the mean of several) misclassifies: positions, ascending.

    Raises:
        InfluenceError: one of them cannot be read, unless ``skip`` continues without it.
    """
    return predict_tests(tasks, terminal, skip=skip).wrong


def predict_tests(tasks: Sequence[Task], terminal: Terminal | None = None, *, skip: bool = False) -> Predicted:
    """Predict all test examples.

    Raises:
        InfluenceError: one of them cannot be read, unless ``skip`` continues without it.
    """
    split, terminal = tasks[0].labelled_tests(), or_silent(terminal)
    wrong: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    count, total = 0, 0.0
    share = split.indices[distributed.share(len(split))]
    with terminal.progress(len(share), "predicting the test set") as advance:
        measure_loading(tasks[0], terminal)
        batches = readable_batches(split, share, 256, tasks[0].loading, skip=skip, tell=terminal.warn)
        for batch in batches:
            soft = mean_probabilities(tasks, batch.inputs)
            wrong.append(batch.indices[(soft.argmax(dim=1) != batch.labels).numpy()])
            likely = soft.gather(1, batch.labels[:, None]).double()
            count, total = count + len(batch), total - float(likely.clamp_min(_LEAST).log().sum())
            advance(len(batch))
    parts = distributed.gathered((np.concatenate(wrong), count, total))
    positions, examples = np.concatenate([part[0] for part in parts]), sum(part[1] for part in parts)
    terminal.say(f"{len(positions):,} of {len(split):,} test examples are misclassified")
    return Predicted(positions, examples, sum(part[2] for part in parts) / max(examples, 1))
