"""What is changed in a fork of fork_server.py before its command begins."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from influence_cli import metrics
from influence_cli.curvature import ekfac
from influence_cli.demo import project
from influence_cli.evidence import plan
from influence_cli.metrics import bootstrap_lds
from influence_cli.precompute import fill_store, fit_file
from influence_cli.retrain import training
from influence_cli.runtime import disk

# Pieces of work: what is called, and its argument that says which one it is.
WORK = {
    "block": (fill_store, "block_rows", lambda words: int(words[4][0])),
    "covariances": (ekfac, "_add_covariances", lambda words: int(words[2].indices[0])),
    "eigenvalues": (ekfac, "_add_eigenvalues", lambda words: int(words[2].indices[0])),
    "training": (training.Again, "outcomes", lambda words: 0),
}
CLONE_NEWNET = 0x40000000
# Training and test images of a small demo.
DEMO = 800, 300


def be_rank(log: str, rank: int, job: dict[str, Any]) -> None:
    """Note every piece of work that is done, and end this process at the one where it is to end (ranks.py)."""
    fit_file.SAVE_EVERY = -1.0
    if job.get("files"):
        plan.MEMORY = plan.PER_EXAMPLE = 0
    if job.get("late", [None])[0] == rank:
        time.sleep(job["late"][1])

    def wrap(name: str) -> None:
        holder, function, which = WORK[name]
        own, begun = getattr(holder, function), 0

        def call(*words: Any, **how: Any) -> Any:
            nonlocal begun
            if job.get("kill") == [rank, name, begun]:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.get("interrupt") == [name, begun]:
                os.kill(os.getpid(), signal.SIGINT)
            begun += 1
            time.sleep(job.get("pause", 0))
            result = own(*words, **how)
            with Path(log).open("a") as file:
                file.write(f"{name} {which(words)}\n")
            return result

        setattr(holder, function, call)

    for name in WORK:
        wrap(name)


def be_victim(log: str) -> None:
    """Write a byte to a file whenever a piece of work has come to its end (tests/support/kill_forks.py)."""
    fit_file.SAVE_EVERY = -1.0
    training.time = SimpleNamespace(perf_counter=lambda: 0.0)  # a file of a retraining has its seconds
    metrics.bootstrap_lds = partial(bootstrap_lds, draws=10)

    def wrap(holder: object, name: str) -> None:
        own = getattr(holder, name)

        def call(*words: object, **how: object) -> object:
            result = own(*words, **how)
            with Path(log).open("ab", buffering=0) as file:
                file.write(b".")
            return result

        setattr(holder, name, call)

    for holder, *names in (
        (fill_store, "block_rows"),
        (ekfac, "_add_covariances", "_add_eigenvalues", "_decompose_layer"),
        (training.Again, "outcomes"),
        (disk, "unlink"),
    ):
        for name in names:
            wrap(holder, name)


def be_on(host: str) -> None:
    """Enter a network namespace, as `ip netns exec` does."""
    with Path("/var/run/netns", host).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")


def be_small_demo() -> None:
    """Have `influence demo` take fewer images, the same share of every class."""
    images, labels = project.read_images()
    kept = np.r_[: DEMO[0], project.TRAIN : project.TRAIN + DEMO[1]]
    project.read_images = lambda: (images[kept], labels[kept])
    project.TRAIN = DEMO[0]
