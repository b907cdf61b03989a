"""Which processes read the data: this one between batches, or others while the model computes. A short probe decides.

With r seconds to read and transform an example, m seconds for its pass through the model on p threads, and c cores,
one example takes (`seconds_each`)

    r + m                               without loader processes: one after the other
    max(r / w, m · p / min(p, c − w))   with w of them: the slower of the two, the model on the cores that are left

The w with the least time is chosen; it is 0 unless the saving over the whole data set is clear. A model on a GPU uses
one core (p = 1). Results do not depend on w: batches have the same order and the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import ALONE, Loading, read_batches
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError, human_bytes, near_path
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes, halving
from influence_cli.runtime.terminal import Terminal

# Examples that are read for the measurement, and seconds after which it ends: at least a few of them.
MOST, LEAST, SECONDS = 64, 8, 0.4
# Examples that go through the model at a time, and how many times its pass forward a pass forward and backward takes:
# two more products of the same size a layer.
BATCH, BOTH_WAYS = 32, 3
# Loader processes have to save this share of the time, and this many seconds of a pass over the data: they take a
# fraction of a second to start, and a copy of each batch.
SHARE, SAVED = 0.2, 2.0
# Examples of a batch as most passes have it, batches that a process has ready, and the share of the memory for those.
USUAL, READY, ROOM = 256, 4, 0.25
SHARED = Path("/dev/shm")  # where torch passes tensors between processes
QUOTA = Path("/sys/fs/cgroup/cpu.max")
# For the trial: processes that have read no example after so long count as hanging.
PATIENCE = 60
# Examples that they read in it.
TRIED = 5


def plan_loading(
    split: Split, forward: Callable[[Tensor], Tensor], device: torch.device, seed: int, terminal: Terminal
) -> Loading:
    """Measure reading and the model on a few examples, and plan the loader processes.

    Args:
        split: the examples.
        forward: runs the model on inputs on ``device``.
        device: of the model.
        seed: chooses the examples: consecutive ones, as a pass reads them.
        terminal: shows the plan (``-v``), and a warning if processes would be faster but cannot be used.
    """
    n, cores = len(split), cores_here()
    if sys.platform != "linux" or cores < 2 or n <= 2 * BATCH:
        return ALONE
    read, inputs = _reading(split, seed)
    if inputs is None or n * read < SAVED:
        return ALONE
    on_gpu = device.type != "cpu"
    threads = 1 if on_gpu else min(torch.get_num_threads(), cores)
    passing = BOTH_WAYS * _forward_seconds(forward, inputs, device)
    workers = best_workers(read, passing, cores, threads, n)
    speeds = f"one example takes {1e3 * read:.3g} ms to read and {1e3 * passing:.3g} ms in the model"
    if not workers:
        terminal.detail(f"reading in this process: {speeds}, {cores} cores")
        return ALONE
    batch = USUAL * inputs[0].numel() * inputs.element_size()
    room = _room()
    workers, ready = fit(workers, batch, room)
    planned = Loading(workers, ready * USUAL, pin=device.type == "cuda")
    if workers:
        obstacle = _obstacle(split, planned)
    else:
        obstacle = (
            f"a batch takes {human_bytes(batch)}, and {SHARED} or free memory has room for only {human_bytes(room)} "
            "(in a container: --shm-size)"
        )
    if obstacle:
        terminal.warn(f"loader processes would be faster, but {obstacle}: reading in this process; {speeds}")
        return ALONE
    terminal.detail(f"{workers} loader processes, {ready} batches ready in each: {speeds}, {cores} cores")
    return planned


def seconds_each(read: float, passing: float, cores: int, threads: int, workers: int) -> float:
    """Predict the seconds that an example takes, by the formula above.

    Args:
        read: to read and transform one, in one process.
        passing: in the model, on ``threads`` threads.
        cores: of this process and its loader processes.
        threads: of the model; 1 of one on a GPU, which keeps one core busy.
        workers: loader processes, fewer than cores.
    """
    if not workers:
        return read + passing
    return max(read / workers, passing * threads / min(threads, cores - workers))


def best_workers(read: float, passing: float, cores: int, threads: int, n: int) -> int:
    """Choose the fewest loader processes within 5% of the least time; 0 if they save too little.

    Args:
        read: seconds to read an example.
        passing: seconds of its pass through the model.
        cores: that this process may use.
        threads: of the model.
        n: examples of the data set.
    """
    times = [seconds_each(read, passing, cores, threads, workers) for workers in range(cores)]
    best = min(times)
    workers = next(number for number, seconds in enumerate(times) if seconds <= 1.05 * best)
    saved = times[0] - times[workers]
    return workers if saved >= SHARE * times[0] and n * saved >= SAVED else 0


def fit(workers: int, batch: int, room: int) -> tuple[int, int]:
    """Choose the loader processes, and the batches that each keeps ready, so that all of them fit.

    Args:
        workers: the number wanted.
        batch: bytes of a batch.
        room: bytes for batches on their way.

    Returns:
        Processes, 0 where no two batches fit, and batches ready in each.
    """
    places = room // max(1, batch)
    if places < 2:
        return 0, 0
    workers = min(workers, places)
    return workers, min(READY, places // workers)


def cores_here() -> int:
    """Count the cores that this process may use: affinity and quota, shared with the job's processes on this host."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = QUOTA.read_text().split()
        cores = min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        pass  # no quota: the file is missing or says max
    return max(1, math.floor(cores / distributed.on_this_host()))


def _reading(split: Split, seed: int) -> tuple[float, Tensor | None]:
    """Measure the median seconds that an example takes to read; give the inputs of the first one's shape."""
    count = min(MOST, len(split))
    start = int(np.random.default_rng(seed).integers(len(split) - count + 1))
    seconds: list[float] = []
    inputs: list[Tensor] = []
    for index in split.indices[start : start + count]:
        before = time.perf_counter()
        try:
            inputs.append(to_input(split, raw_item(split, int(index))[0], ""))
        except InfluenceError:
            continue  # the pass names it
        seconds.append(time.perf_counter() - before)
        if len(seconds) >= LEAST and sum(seconds) > SECONDS:
            break
    if not inputs:
        return 0.0, None
    # Not the mean: the first row of a row group takes the time of the others too.
    return statistics.median(seconds), torch.stack([one for one in inputs if one.shape == inputs[0].shape])


def _forward_seconds(forward: Callable[[Tensor], Tensor], inputs: Tensor, device: torch.device) -> float:
    """Measure the seconds that an example takes forward."""

    def run(batch: int) -> float:
        part = inputs[:batch].to(device)
        before = time.perf_counter()
        with torch.no_grad():
            forward(part).cpu()  # which waits for the device
        return (time.perf_counter() - before) / len(part)

    first, batch = halving(run, min(BATCH, len(inputs)), lambda _: None)
    return first if first * batch > SECONDS else run(batch)


def _room() -> int:
    """Count the bytes that prefetched batches may take: of memory, and of the place where torch passes them on."""
    room = ROOM * available_bytes(torch.device("cpu"))
    try:
        status = os.statvfs(SHARED)
        room = min(room, 0.75 * status.f_bavail * status.f_frsize / distributed.on_this_host())
    except OSError:
        pass  # no such place: torch passes them on elsewhere
    return int(room)


def _offsets() -> dict[int, tuple[str, int]]:
    """Give the path and the place of every file that this process reads from: forked processes share the place.

    A log that stdout or stderr goes to moves as well, by whatever is said meanwhile.
    """
    places = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            number = int(link.name)
            flags = int(Path(f"/proc/self/fdinfo/{number}").read_text().split("flags:")[1].split()[0], 8)
            if stat.S_ISREG(os.fstat(number).st_mode) and number > 2 and flags & os.O_ACCMODE != os.O_WRONLY:
                places[number] = (str(link.readlink()), os.lseek(number, 0, os.SEEK_CUR))
    return places


def _obstacle(split: Split, planned: Loading) -> str:
    """Read examples from all over the set in loader processes, before anything depends on them; say what is wrong."""
    few = split.indices[np.linspace(0, len(split) - 1, TRIED).astype(np.int64)]
    # First, because a data set may open its file when it is first read; and from the end, so that a file that is shared
    # with the processes is at another place after them.
    here = list(read_batches(split, few[::-1], 1))[::-1]
    before = _offsets()
    try:
        there = list(read_batches(split, few, 1, replace(planned, pin=False), PATIENCE))
    except InfluenceError as error:
        return error.message
    moved = [path for number, (path, place) in _offsets().items() if before.get(number, (path, place)) != (path, place)]
    if moved:
        return f"they would read {near_path(Path(moved[0]))} through one open file, and move each other's place in it"
    same = [mine.digest() == other.digest() for mine, other in zip(here, there, strict=True)]
    return "" if all(same) else "they read different pixels than this process"
