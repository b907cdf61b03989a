"""Does a run answer smoothly to its data? Measured: trainings without random 1%, beside what the derivative predicts.

A derivative says what happens when a weight changes a little. Where training is chaotic, a removal sends the run
elsewhere, and the derivative, exact as it is, predicts nothing. The prediction of a few removals for all test examples
needs one pass forwards through the run; what happened, one training each. Both are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from influence_cli.data.split import spread
from influence_cli.model.data_fingerprint import CONTENTS, FILES, data_fingerprint, with_contents
from influence_cli.replay.open import Replayed
from influence_cli.replay.outcomes import loss_changes, outcomes
from influence_cli.runtime import disk
from influence_cli.runtime.jobs import Arrays, Job, do_all, read
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal
from influence_cli.steps.forward import follow_weights, run_again

# Trainings without a random share of the examples, and test examples whose losses are compared.
TRAININGS, SHARE, TESTS = 4, 0.01, 2_000
# What all of it costs, in trainings: these, and four directions that are followed forwards (bench/replay.py cost).
COST = 3 * TRAININGS + 2
# From this agreement on the numbers can be trusted, and below the other one they cannot (bench/results/replay.md).
TRUST, CHAOTIC = 0.9, 0.6
# The purpose of the draws' seed.
DRAW = 11


@dataclass(frozen=True)
class Verdict:
    """How well the derivative of a run predicts trainings without some examples.

    Attributes:
        agreement: r: the mean over test examples of the cosine, over trainings, of predicted and actual change.
        slope: the median over test examples of actual on predicted change: 1 where sizes agree as well.
        left_out: how many examples each training was without.
    """

    agreement: float
    slope: float
    left_out: int

    @property
    def trusted(self) -> bool:
        """Say whether the numbers of a replay can be trusted."""
        return self.agreement >= TRUST

    @property
    def chaotic(self) -> bool:
        """Say whether they say nothing."""
        return not self.agreement >= CHAOTIC

    def sentence(self) -> str:
        """Say it in one sentence."""
        r = f"r {self.agreement:.2f} over {TRAININGS} trainings without {self.left_out:,} random images"
        if self.trusted:
            return f"this run answers to its data ({r}): trust these numbers"
        if self.chaotic:
            return (
                f"this run is chaotic ({r}): a removal sends it elsewhere; use curvature.method: ekfac. Larger "
                "batches, smooth activations, average pooling and a lower rate make a run smooth"
            )
        return (
            f"this run answers to its data in part ({r}): trust the strongest of these numbers alone. Larger batches, "
            "smooth activations, average pooling and a lower rate make a run smoother"
        )


def measure_verdict(replayed: Replayed, terminal: Terminal) -> Verdict:
    """Measure it, or read what was measured before.

    Args:
        replayed: the run.
        terminal: progress; what it costs is said before it starts.
    """
    draws, folder, jobs = _plan(replayed)
    missing = sum(read(folder, job) is None for job in jobs)
    if missing:
        terminal.say(
            f"measuring once whether this run answers smoothly to its data: {TRAININGS} trainings without "
            f"{draws[0].sum():,.0f} random images, and one pass forwards (about {COST} trainings in all), "
            "which are kept"
        )
    disk.make_folder(folder)
    work, terminal = _work(replayed, draws), terminal if missing else Terminal(quiet=True)
    (prediction,) = do_all(folder, jobs[:1], work, terminal, "following the run forwards")
    trainings = do_all(folder, jobs[1:], work, terminal, "trainings without 1%")
    actual = np.stack([arrays["losses"] for arrays in trainings]) - prediction["losses"]
    return judge(prediction["changes"], actual, int(draws[0].sum()))


def kept_verdict(replayed: Replayed) -> Verdict | None:
    """Give the verdict if it is kept, without any work."""
    _, folder, jobs = _plan(replayed)
    if any(read(folder, job) is None for job in jobs):
        return None
    return measure_verdict(replayed, Terminal(quiet=True))


def judge(predicted: np.ndarray, actual: np.ndarray, left_out: int) -> Verdict:
    """Compare predicted with actual changes [trainings, m] of test losses."""
    products = (predicted * actual).sum(axis=0)
    sizes = np.sqrt(np.square(predicted).sum(axis=0) * np.square(actual).sum(axis=0))
    some = sizes > 0
    if not some.any():
        return Verdict(float("nan"), float("nan"), left_out)
    slopes = products[some] / np.square(predicted).sum(axis=0)[some]
    return Verdict(float((products[some] / sizes[some]).mean()), float(np.median(slopes)), left_out)


def _plan(replayed: Replayed) -> tuple[np.ndarray, Path, list[Job]]:
    """Draw what is left out [trainings, n], and name the folder and the jobs: the prediction, then the trainings."""
    task, n = replayed.task, replayed.run.examples
    count = max(1, round(SHARE * n))
    draws = np.zeros((TRAININGS, n))
    for number, left_out in enumerate(draws):
        generator = np.random.default_rng(seed_of(task.seed, DRAW, number))
        left_out[generator.choice(n, count, replace=False)] = 1
    tests = with_contents(data_fingerprint(task.labelled_tests()), {}, task.labelled_tests())
    tests = {part: value for part, value in tests.items() if part != FILES or CONTENTS not in tests}
    key = xxhash.xxh3_64(repr((replayed.record.made_of(), sorted(tests.items()), task.seed)).encode()).hexdigest()
    jobs = [Job("prediction", 1), *(Job(f"without_{number}", 2 + number) for number in range(TRAININGS))]
    return draws, replayed.record.folder / f"verdict-{key}", jobs


def _work(replayed: Replayed, draws: np.ndarray) -> Callable[[Job, Callable[[float], None]], Arrays]:
    task, network, run = replayed.task, replayed.network, replayed.run
    split = task.labelled_tests()
    positions = spread(split, min(TESTS, len(split)))

    def do(job: Job, progress: Callable[[float], None]) -> Arrays:
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            progress(done / run.steps)

        if job.name == "prediction":
            last, moved = follow_weights(network, run, -draws, advance)
            losses, _ = outcomes(task, network, last, positions)
            return {"losses": losses, "changes": loss_changes(task, network, last, moved, positions)}
        last = run_again(network, run, 1 - draws[job.number - 2], advance)
        losses, right = outcomes(task, network, last, positions)
        return {"losses": losses, "right": right}

    return do
