"""Trainings from the start without some examples, beside the same training with all of them.

Both have the same seed and the same start, so that only the examples differ. A training function decides its own
batches: without an example all that follow it move up. A run that is trained step by step (``Steps``) keeps its order:
an example that is left out has the weight 0 in its batches, and their divisor stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from influence_cli.data.batches import Batch
from influence_cli.model.guard import settle_as
from influence_cli.model.task import Task
from influence_cli.retrain.retraining import Retraining, Steps
from influence_cli.retrain.training import (
    FROM_START,
    MEANING,
    Again,
    check_whole,
    example_outcomes,
    held_batches,
    job_of,
)
from influence_cli.runtime.jobs import Arrays, Job, do_all, open_folder
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal

NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class FromStart:
    """Trains from the start, and keeps what comes out.

    Attributes:
        retraining: of the run.
        task: its data.
        by: the run step by step, or what every retraining by the training function reads.
        tests: the test examples.
        folder: of the results.
    """

    retraining: Retraining
    task: Task
    by: Steps | Again
    tests: Iterable[Batch]
    folder: Path

    def outcomes(
        self, left_out: Sequence[np.ndarray], repeats: int, *, needs: str, terminal: Terminal, what: str
    ) -> list[list[Arrays]]:
        """Train with all examples, and without each of some sets of them.

        Args:
            left_out: rows of the examples in use.
            repeats: trainings of each; the same seeds for all sets.
            needs: an array that every result must have.
            terminal: progress.
            what: the bar's title.

        Returns:
            By repeat: what is measured with all examples, then without each set, in order.
        """
        sets = [NOTHING, *left_out]
        keys = [(repeat, rows) for repeat in range(repeats) for rows in sets]
        jobs = [_job(repeat, rows) for repeat, rows in keys]
        of = dict(zip(jobs, keys, strict=True))

        def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
            return self._run(*of[job], progress)

        results = do_all(self.folder, jobs, run_one, terminal, what, needs=needs)
        return [results[start : start + len(sets)] for start in range(0, len(results), len(sets))]

    def _run(self, repeat: int, rows: np.ndarray, progress: Callable[[float], None]) -> Arrays:
        task, n = self.task, len(self.task.train)
        what = f"the training without {len(rows):,} examples" if len(rows) else "the training with all examples"
        if not isinstance(self.by, Again):
            started = time.perf_counter()
            model = self.by.train_without(rows, repeat, progress)
            settle_as(model, task.model)
            outcomes = example_outcomes(task, model, self.tests, task.test_split(), f"{what}, repeat {repeat}")
            return {**outcomes, "seconds": np.array(time.perf_counter() - started)}
        seed = seed_of(self.retraining.seed, FROM_START, repeat)
        # The objective of all examples minus some.
        l2 = task.objective.trainer_l2(task.objective.without(rows, n))
        kept = np.delete(np.arange(n), rows)
        model = self.retraining.fresh_model(seed, task.device)
        return self.by.outcomes(model, kept, l2, seed, f"{what} (seed {seed})", progress)


def from_start(retraining: Retraining, task: Task) -> FromStart:
    """Get ready to train from the start, and refuse what cannot be.

    Raises:
        InfluenceError: nothing in the config trains, a part of the training set, or a folder of another run.
    """
    check_whole(task)
    steps = retraining.steps(task)
    by = retraining.again(task) if steps is None else steps
    folder = retraining.folder / "from-start"
    open_folder(folder, partial(retraining.made_of, task), MEANING)
    tests = by.tests if isinstance(by, Again) else held_batches(task.labelled_tests())
    return FromStart(retraining, task, by, tests, folder)


def _job(repeat: int, rows: np.ndarray) -> Job:
    """Name a training by what it leaves out: another command that leaves out the same uses it too."""
    if not len(rows):
        return job_of("all", repeat, 0)
    digest = xxhash.xxh3_64_intdigest(np.sort(rows).astype(np.int64).tobytes())
    return job_of(f"without_{digest:016x}", repeat, digest % 2**31 + 2**31)
