"""How much memory and time `influence mislabels` takes, from a measurement of a second, before it starts."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from influence_cli.data.batches import read_batches
from influence_cli.data.split import Split, spread
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.evidence.activations import ALL, activations
from influence_cli.evidence.approximate import EXACT, PROBES, SAMPLED, STEPS, is_exact, lists_of
from influence_cli.evidence.mapped import CHUNK, HELD
from influence_cli.evidence.neighbours import HELD as SIMILARITIES
from influence_cli.evidence.neighbours import HELD_GPU, NEIGHBOURS
from influence_cli.evidence.readout import COLUMNS, COMPONENTS, RIDGES, TRIED
from influence_cli.model.task import Task
from influence_cli.precompute.cost import operations_a_second
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal, duration

# Examples that are measured.
MEASURED = 8
# What helps where there is too little of something.
NO_READOUT = "--signal loss or margin needs no readout; train.exclude: FILE leaves examples out"
ELSEWHERE = "TMPDIR=FOLDER in front of the command puts them elsewhere; train.exclude: FILE leaves examples out"
# Told before it starts if it takes more; otherwise with -v alone.
LARGE, LONG = 5 * 10**8, 60.0
# In memory up to these bytes and so many per example, in addition to the program, the model and the data set; above
# that the large arrays go to temporary files.
MEMORY, PER_EXAMPLE = 2 * 10**9, 3_000
# Of what is found per example: neighbours, components, signals, and the copies that the searches and the order take.
EACH = 2_000


@dataclass(frozen=True)
class Needs:
    """What judging the labels takes of this machine, in bytes.

    Attributes:
        memory: the peak in addition to the model and the data set, in the process that judges.
        on_device: of the model's device; 0 on the CPU.
        disk: of temporary files.
    """

    memory: int
    on_device: int
    disk: int


@dataclass(frozen=True)
class Plan:
    """What judging the labels of a split will take on this machine.

    Attributes:
        whole: with everything in memory.
        lean: with the large arrays in temporary files.
        seconds: right within a factor of three or so.
        exact: of these, for comparing all examples with all, and what faiss would take; both 0 where that is not done.
    """

    whole: Needs
    lean: Needs
    seconds: float
    exact: tuple[float, float] = (0.0, 0.0)


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
    products, passes = operations_a_second(torch.device("cpu")) / 2, _passes_a_second()
    tried = min(n * classes, TRIED)
    every = (2 * n**2 * min(width, COMPONENTS)) / products + 3 * n**2 / passes
    # Centres, the lists of all vectors, and the lists that queries read, four times as many as at first.
    lists = lists_of(n)
    vectors = STEPS * SAMPLED * lists**2 + n * lists + 4 * PROBES * n**2 / lists
    by_lists = 4 * vectors * 2 * min(width, COMPONENTS) / products
    compares = is_exact(n, task.device)
    # The processes of a job share the passes, the readout and the neighbours.
    shared = n * example + 4 * n * width**2 / products + (every if compares else by_lists)
    shared += len(RIDGES) * (2 * n * width * min(classes, 256) / products + 60 * tried / passes)
    alone = 20 * width**3 / products + 100 * n * classes / passes
    seconds = checkpoints * (shared / distributed.size() + alone) + 25 * classes**3 / products
    long = compares and n > EXACT and task.device.type == "cpu"
    return Plan(
        _whole(task, n, classes, width, checkpoints, rare=rare),
        _lean(task, n, classes, width, checkpoints, rare=rare),
        seconds,
        (every, by_lists) if long else (0.0, 0.0),
    )


def _whole(task: Task, n: int, classes: int, width: int, checkpoints: int, *, rare: bool) -> Needs:
    # Float32 [n, C] and [n, d]; lists of neighbours with their similarities, components and their unit vectors.
    outputs, features = 4 * n * classes, 4 * n * width
    near = n * (2 * 12 * NEIGHBOURS + 3 * 4 * min(width, COMPONENTS))
    tried, held, similar = (
        4 * min(n * most, limit) for most, limit in ((classes, TRIED), (classes, HELD), (n, SIMILARITIES))
    )
    ridges = 4 * tried + 3 * held + 8 * 3 * width**2
    stages = (
        # the activations; of the readout ΦQ, its outputs, and what the ridges are chosen by
        outputs + 2 * features + max(ridges, outputs + 4 * held),
        # then the neighbours' similarities, or their vote
        2 * outputs + features + near + max(3 * similar, outputs),
        # the model's probabilities and outputs, all opinions and the combined one
        5 * outputs + features + near + 8 * held,
        # the noise: its parts; tables of classes and their inverse
        4 * outputs + near + 2 * tried + 8 * held + 8 * 8 * classes**2,
    )
    more = (outputs + features if rare else 0) + (3 * outputs if checkpoints > 1 else 0)
    device = 0 if task.device.type == "cpu" else outputs * 2 + 2 * features + near + max(ridges, 12 * HELD_GPU)
    return Needs(int(max(stages)) + more, device, 0)


def _lean(task: Task, n: int, classes: int, width: int, checkpoints: int, *, rare: bool) -> Needs:
    # Activations in float16; ΦQ, and opinions beside the model's probabilities and outputs, in float32.
    kept, opinion = 2 * n * (width + classes), 4 * n * classes
    files = kept + max(4 * n * width + (5 if checkpoints > 1 else 1) * opinion, 5 * opinion)
    files += (kept + 3 * opinion if rare else 0) + (2 * opinion if distributed.size() > 1 else 0)
    rows = -(-min(n * classes, TRIED) // classes)
    columns = classes * max(1, min(len(RIDGES), COLUMNS // classes))
    constant = max(
        4 * 3 * CHUNK * width + 8 * 6 * width**2 + 4 * 2 * rows * columns + 4 * 4 * HELD,
        4 * 4 * SIMILARITIES,
        8 * 8 * HELD + 8 * 8 * classes**2,
    )
    device = 0 if task.device.type == "cpu" else constant + 4 * 4 * n * COMPONENTS + 12 * HELD_GPU
    return Needs(constant + n * EACH, device, files)


def announce(
    plan: Plan | None, task: Task, split: Split, folder: Path, terminal: Terminal, *, logistic: bool = False
) -> tuple[InfluenceError | None, Path | None]:
    """Say what the work will take, before it starts.

    Args:
        plan: in the first process of a job; None in the others, or without one.
        task: one of the checkpoints.
        split: whose labels are judged.
        folder: where temporary files may be made.
        terminal: takes the announcement.
        logistic: whether the logistic readout is wanted, which needs everything in memory: files are then made only if
            memory is short.

    Returns:
        The reason why there can be no readout, if neither memory nor disk suffice; and the folder where the large
        arrays go, None for memory. Every process of a job gets the same.
    """
    message, hint, on_disk = distributed.from_first(
        lambda: _decided(plan, task, split, folder, terminal, logistic=logistic)
    )
    return (InfluenceError(message, hint) if message else None), (folder if on_disk else None)


def _decided(
    plan: Plan | None, task: Task, split: Split, folder: Path, terminal: Terminal, *, logistic: bool
) -> tuple[str, str, bool]:
    """Announce it, and decide: what there is too little of, what helps, and whether files are made."""
    if plan is None:
        return "", "", False
    what = f"judging {len(split):,} labels of {len(task.classes):,} classes"
    short, no_files = bool(_lacking(plan.whole, task)), _no_files(plan.lean.disk, folder)
    large = plan.whole.memory > MEMORY + PER_EXAMPLE * len(split)
    on_disk = short or (large and not logistic and not no_files and not _lacking(plan.lean, task))
    needs = plan.lean if on_disk else plan.whole
    text, hint = f"{what}: about {human_bytes(needs.memory)} of memory and {duration(plan.seconds)}", NO_READOUT
    if on_disk:
        text += f", and {human_bytes(needs.disk)} of disk for temporary files in {folder}"
        text += ": memory is short" if short else ""
    is_much = on_disk or needs.memory > LARGE or plan.seconds > LONG
    (terminal.say if is_much else terminal.detail)(text)
    lacking = _lacking(needs, task)
    if on_disk and not lacking:
        lacking, hint = no_files, ELSEWHERE
    if lacking:
        return f"{what} takes about {lacking}", hint, False
    if plan.exact[0]:
        terminal.say(
            f"{duration(plan.exact[0])} of this are for comparing all images with all; with faiss it is about "
            f"{duration(plan.exact[1])}: pip install 'influence-cli[index]'"
        )
    return "", "", on_disk


def _lacking(needs: Needs, task: Task) -> str:
    """Say what there is too little of, nothing if it suffices."""
    for need, device in ((needs.memory, torch.device("cpu")), (needs.on_device, task.device)):
        free = available_bytes(device)
        if need > free:
            return f"{human_bytes(need)}, but {human_bytes(free)} of {device.type} memory is free"
    return ""


def _no_files(need: int, folder: Path) -> str:
    """Say why temporary files of so many bytes cannot be made in a folder, nothing if they can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{human_bytes(need)} of temporary files, which cannot be made in {folder}: {error.strerror}"
    if need > free:
        return f"{human_bytes(need)} of temporary files, but {folder} has {human_bytes(free)} free"
    return ""


def _passes_a_second() -> float:
    """Measure the numbers per second of a pass with a logarithm."""
    matrix = torch.ones(512, 512)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float(matrix.log_softmax(dim=1)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 512**2 / best
