"""How much memory and time the precomputation will take, from a measurement of seconds, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from influence_cli.curvature.choice import Choice
from influence_cli.data import Batch
from influence_cli.layers import example_gradients, micro_batch
from influence_cli.task import Task


@dataclass(frozen=True)
class Estimate:
    """What filling the store will take on this machine.

    Attributes:
        seconds: curvature and gradients together; right within a factor of two or so.
        memory: peak bytes beside the model and the data set.
    """

    seconds: float
    memory: int


def estimate(task: Task, choice: Choice, batch: Batch) -> Estimate:
    """Time a few example gradients and one matrix product, and carry them on to all of the work.

    Args:
        task: model and data.
        choice: curvature and tracked parameters.
        batch: a few training examples.
    """
    p, n, classes = choice.network.size, len(task.train), len(task.classes)
    example = _seconds_an_example(choice, batch)
    rate = _operations_a_second(task.device)
    seconds = n * example
    memory = 3 * 4 * p * micro_batch(choice.network, 256)
    if choice.has_basis:
        if choice.output is not None:
            width = choice.output.in_features + 1
            seconds += n * example + classes * (classes + 1) * n * width**2 / rate
        elif choice.matrix == "ggn":
            seconds += n * example * classes + 2 * n * classes * p**2 / rate
        else:
            seconds += 2 * n * p * example
        # Eigenvectors in float64 at half the rate, about 10 p³ operations; then the projection on all of them.
        seconds += 20 * p**3 / rate + 2 * n * p**2 / rate
        memory += 4 * 8 * p**2
    return Estimate(seconds, memory)


def _seconds_an_example(choice: Choice, batch: Batch) -> float:
    repeat = -(-32 // len(batch))
    inputs = torch.cat([batch.inputs] * repeat)[:32]
    targets = batch.targets.repeat(repeat)[:32]
    best = float("inf")
    for _ in range(2):  # the first call also warms up
        started = time.perf_counter()
        example_gradients(choice.network, inputs, targets)[1].cpu()
        best = min(best, time.perf_counter() - started)
    return best / 32


def _operations_a_second(device: torch.device) -> float:
    matrix = torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
