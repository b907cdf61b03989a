"""How much memory and time the precomputation will take, from a measurement of seconds, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from influence_cli.curvature.choice import Choice
from influence_cli.curvature.kronecker_plan import EXACT_BLOCK, WIDEST, factor_bytes, make_plan
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, loss_slopes
from influence_cli.model.task import Task
from influence_cli.passes.batch_size import example_bytes
from influence_cli.passes.coverage import COMPARED, NUMBERS
from influence_cli.passes.gradients import add_products, rest_products
from influence_cli.passes.layers import forward
from influence_cli.passes.probe import SAMPLE
from influence_cli.precompute.row_check import DIRECTIONS


@dataclass(frozen=True)
class Estimate:
    """What filling the store will take on this machine.

    Attributes:
        seconds: curvature and gradients together; right within a factor of two or so.
        memory: peak bytes at most, in addition to the model and the data set: what the layer pass holds, the inputs of
            two blocks, the fit of the curvature or the rows of a block, and before that the probe.
    """

    seconds: float
    memory: int


def estimate(task: Task, choice: Choice, batch: Batch, *, size: int, block: int, width: int) -> Estimate:
    """Time a layer pass over a few examples and one matrix product, and extrapolate to all of the work.

    Args:
        task: model and data.
        choice: curvature and tracked parameters.
        batch: a few training examples.
        size: examples that go through the layer pass at once.
        block: rows in a block of the store.
        width: numbers in a row, at most.
    """
    p, n, classes = choice.network.size, len(task.train), len(task.classes)
    timed = min(size, 32)
    example = _seconds_an_example(choice, batch, timed)
    rate = operations_a_second(task.device)
    seconds, fit = n * example, 8 * p
    if choice.is_layered:
        passes, eigenvectors, fit = layered_work(choice.network)
        seconds += 2 * n * (example + 2 * passes / rate) + 40 * eigenvectors / rate
    elif choice.method == "arnoldi":
        seconds += 200 * 3 * n * example
        fit = 4 * 200 * p
    elif choice.is_joint:
        if choice.output is not None:
            columns = choice.output.in_features + 1
            seconds += n * example + classes * (classes + 1) * n * columns**2 / rate
        elif choice.matrix == "ggn":
            seconds += n * example * classes + 2 * n * classes * p**2 / rate
        else:
            seconds += 2 * n * p * example
        # Eigenvectors in float64 at half the rate, about 10 p³ operations; then the projection on all of them.
        seconds += 20 * p**3 / rate + 2 * n * p**2 / rate
        fit = 4 * 8 * p**2
    layer_pass = size * example_bytes(choice.network, batch.inputs)
    inputs = 2 * block * batch.inputs[0].numel() * 4
    # Rows of a block: computed, joined, and written while the next ones are computed. A basis per layer keeps few
    # coordinates; how many is known only after the fit, and its factors are larger.
    rows = 0 if choice.is_layered else 3 * 4 * block * width
    fill = rows + 4 * DIRECTIONS * p + (fit if choice.has_basis else 0)
    probe = 3 * 4 * min(COMPARED * p, NUMBERS) + SAMPLE * batch.inputs[0].numel() * 4
    return Estimate(seconds, max(layer_pass + inputs + max(fit, fill), probe))


def layered_work(network: Network) -> tuple[float, float, int]:
    """Count multiply-adds to rotate an example into the eigenbasis and for the eigenvectors, and the factors' bytes."""
    plan = make_plan(network)
    turns = eigen = 0.0
    for number in plan.layers:
        layer = network.layers[number]
        turns += layer.groups * (layer.width**2 + layer.outputs**2 + layer.width * layer.outputs)
        eigen += layer.groups * sum(min(width, WIDEST) ** 3 for width in (layer.width, layer.outputs))
    for names in plan.loose:
        size = sum(network.model.get_parameter(name).numel() for name in names)
        turns += size**2 if size <= EXACT_BLOCK else size
        eigen += size**3 if size <= EXACT_BLOCK else 0
    return turns, eigen, factor_bytes(network)


def _seconds_an_example(choice: Choice, batch: Batch, size: int) -> float:
    repeat = -(-size // len(batch))
    inputs = torch.cat([batch.inputs] * repeat)[:size]
    targets = batch.targets.repeat(repeat)[:size]
    best = float("inf")
    for _ in range(2):  # the first call also warms up
        started = time.perf_counter()
        tape = forward(choice.network, inputs)
        calls = tape.backward(loss_slopes(choice.network, tape.outputs, targets.to(tape.outputs.device))[1])
        if not choice.has_basis:
            add_products(choice.network, calls, torch.zeros(size, choice.network.size, device=tape.outputs.device))
        if choice.network.rest:
            rest_products(choice.network, inputs, torch.ones_like(tape.outputs))
        float(tape.outputs.detach()[0, 0])
        best = min(best, time.perf_counter() - started)
    return best / size


@cache
def operations_a_second(device: torch.device) -> float:
    """Measure the operations per second of a matrix product in float32, once per process and device."""
    side = 512 if device.type == "cpu" else 1024  # enough to be busy with
    matrix = torch.ones(side, side, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
