"""How much memory and time `influence mislabels` takes, from a measurement of a second, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from influence_cli.data.batches import read_batches
from influence_cli.data.split import Split, spread
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.evidence.activations import ALL, activations
from influence_cli.evidence.neighbours import HELD as SIMILARITIES
from influence_cli.evidence.neighbours import NEIGHBOURS
from influence_cli.evidence.readout import COMPONENTS, HELD, RIDGES, TRIED
from influence_cli.model.task import Task
from influence_cli.precompute.cost import operations_a_second
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal, duration

# Examples that are measured; bytes that the libraries take which estimate the noise, once they are loaded.
MEASURED, LIBRARIES = 8, 120 * 10**6
# Told before it starts if it takes more; otherwise with -v alone.
LARGE, LONG = 5 * 10**8, 60.0


@dataclass(frozen=True)
class Plan:
    """What judging the labels of a split will take on this machine.

    Attributes:
        memory: peak bytes in addition to the model and the data set, in the process that judges.
        on_device: bytes of it on the model's device; 0 on the CPU.
        seconds: right within a factor of three or so.
    """

    memory: int
    on_device: int
    seconds: float


def make_plan(task: Task, split: Split, checkpoints: int, *, rare: bool) -> Plan | None:
    """Measure a few examples, and extrapolate to all of the work.

    Args:
        task: one of the checkpoints.
        split: whose labels are judged.
        checkpoints: how many.
        rare: whether some examples are left out, for which the others are copied.

    Returns:
        The plan; None if none of the examples can be read.
    """
    chosen = spread(split, MEASURED)
    started = time.perf_counter()
    batch = next(read_batches(split, chosen, len(chosen)))
    if not len(batch):
        return None
    width = activations(task.model, [batch], task.device, most=ALL, title=split.title).hidden.shape[1]
    example = (time.perf_counter() - started) / len(batch)
    n, classes = len(split), len(task.classes)
    # Float32 [n, C] and [n, d]; lists of neighbours with their similarities, components and their unit vectors.
    outputs, features = 4 * n * classes, 4 * n * width
    near = n * (2 * 12 * NEIGHBOURS + 3 * 4 * min(width, COMPONENTS))
    tried, held, similar = (
        4 * min(n * most, limit) for most, limit in ((classes, TRIED), (classes, HELD), (n, SIMILARITIES))
    )
    ridges = 4 * tried + 3 * held + 8 * 3 * width**2
    stages = (
        # the model's probabilities and outputs; of the readout Φ, ΦQ, its outputs, and what the ridges are chosen by
        2 * outputs + 2 * features + max(ridges, outputs + 4 * held),
        # then the neighbours' similarities, or their vote
        3 * outputs + features + near + max(3 * similar, outputs),
        # all opinions and the combined one
        5 * outputs + features + near + 8 * held,
        # the noise: probabilities in float64 and their comparison with thresholds; tables of classes and their inverse
        4 * outputs + near + max(2 * tried + 8 * held, 2.5 * outputs) + 2 * outputs + 8 * 8 * classes**2 + LIBRARIES,
    )
    more = (outputs + features if rare else 0) + (3 * outputs if checkpoints > 1 else 0)
    device = 0 if task.device.type == "cpu" else outputs * 2 + 2 * features + near + max(ridges, 3 * similar)
    products, passes = operations_a_second(torch.device("cpu")) / 2, _passes_a_second()
    seconds = checkpoints * (
        n * example
        + (4 * n * width**2 + 20 * width**3 + 2 * n**2 * min(width, COMPONENTS)) / products
        + len(RIDGES) * (2 * n * width * min(classes, 256) / products + 60 * tried / 4 / passes)
        + (3 * n**2 + 100 * n * classes) / passes
    )
    seconds += 25 * classes**3 / products
    return Plan(int(max(stages)) + more, device, seconds)


def announce(plan: Plan | None, task: Task, split: Split, terminal: Terminal) -> InfluenceError | None:
    """Say what the work will take, before it starts.

    Returns:
        The reason why there can be no readout, if it takes more memory than is free. Every process of a job gets it.
    """
    short = None
    if plan is not None:
        needs = f"{human_bytes(plan.memory)} of memory and {duration(plan.seconds)}"
        what = f"judging {len(split):,} labels of {len(task.classes):,} classes"
        (terminal.say if plan.memory > LARGE or plan.seconds > LONG else terminal.detail)(f"{what}: about {needs}")
        for need, device in ((plan.memory, torch.device("cpu")), (plan.on_device, task.device)):
            free = available_bytes(device)
            if need > free:
                short = (
                    f"{what} takes about {human_bytes(need)}, but {human_bytes(free)} of {device.type} memory is free"
                )
    if not distributed.smallest(0 if short else 1):
        return InfluenceError(
            short or "another process of this job has too little free memory for a readout",
            "--signal loss or margin needs no readout; train.exclude: FILE leaves examples out",
        )
    return None


def _passes_a_second() -> float:
    """Measure the numbers per second of a pass with a logarithm."""
    matrix = torch.ones(512, 512)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float(matrix.log_softmax(dim=1)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 512**2 / best
