"""`influence select`: which training images the test set does not need, and the result of training without them.

The usefulness of a training example is its mean influence on the test examples: the rise of their mean loss if it is
removed. The least useful are left out first; below zero, removing helps. A run that is replayed gives it for all
training examples at once; in rounds, the recipe trains on what is left before more is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import xxhash

from influence_cli.config.schema import Config
from influence_cli.data.split import take
from influence_cli.errors import InfluenceError
from influence_cli.influence.self_influence import harm_to_tests
from influence_cli.model.task import Task, build_model
from influence_cli.precompute.prepared import Prepared
from influence_cli.replay.prepare import prepare_run
from influence_cli.replay.trained import train_recorded
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import (
    CHOSEN,
    KEPT,
    MEANING,
    check_whole,
)
from influence_cli.runtime.jobs import Arrays, Job, do_all, open_folder
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal, or_silent

# Ways to choose the examples to leave out; ``all`` leaves nothing out. The first needs a run that can be replayed.
REPLAY, INFLUENCE, LOSS, RANDOM = BY = ("replay", "influence", "loss", "random")
EVERYTHING = "all"


@dataclass(frozen=True)
class Kept:
    """Test accuracy after training on the examples that one way to choose keeps.

    Attributes:
        by: the way.
        examples: how many are kept.
        accuracies: float64 [repeats], one per training; the same seeds for every way.
        losses: float64 [repeats], the mean loss of the test examples, in its units.
    """

    by: str
    examples: int
    accuracies: np.ndarray
    losses: np.ndarray


def kept_rows(least_useful_first: np.ndarray, keep: float) -> np.ndarray:
    """Leave out the first 1 − keep of an order of all n rows.

    Returns:
        The other rows, rising; their number is keep · n, rounded to the nearest.

    Raises:
        InfluenceError: none would be kept, or none left out.
    """
    n = len(least_useful_first)
    count = round(keep * n)
    if not 0 < count < n:
        raise InfluenceError(
            f"--keep {keep:g} of {n:,} training examples keeps {'none' if count == 0 else 'all'}",
            "give a share that leaves some in and some out, such as --keep 0.8",
        )
    return np.sort(least_useful_first[n - count :])


def order_by(by: str, usefulness: np.ndarray, losses: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Order the training examples, first the ones to leave out; every class loses the same share; ties by position.

    Otherwise one class would lose most: the mean test gradient depends on classes, and the effects of many removals
    from one class do not add up like those of single ones.

    Args:
        by: ``replay`` or ``influence``: the least useful; ``loss``: the largest loss; ``random``.
        usefulness: mean influence on the test examples [n].
        losses: of the training examples [n].
        labels: int64 [n].
        seed: of ``random``.
    """
    draws = np.random.default_rng(seed).random(len(losses))
    value = {LOSS: -losses, RANDOM: draws}.get(by, usefulness)
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        share[members[np.argsort(value[members], kind="stable")]] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((value, share))


@dataclass(frozen=True)
class Rounds:
    """What was left out in rounds.

    Attributes:
        order: int64 [n], rows of the training examples, first those that were left out.
        usefulness: float64 [n], of each example in the last round that it was part of.
    """

    order: np.ndarray
    usefulness: np.ndarray


def check_parts(n: int, keep: float, rounds: int) -> int:
    """Count the examples of n that are left out, in some rounds.

    Raises:
        InfluenceError: a round would leave nothing out; or none would be kept, or none left out.
    """
    total = n - len(kept_rows(np.arange(n), keep))
    if rounds > total:
        raise InfluenceError(
            f"--rounds {rounds}: --keep {keep:g} leaves out {total:,} training examples, fewer than rounds",
            f"give at most --rounds {total}",
        )
    return total


def leave_out_in_rounds(
    usefulness: np.ndarray, labels: np.ndarray, keep: float, rounds: int, again: Callable[[np.ndarray], np.ndarray]
) -> Rounds:
    """Leave out the least useful examples in equal parts, and measure what is left again after each but the last.

    Args:
        usefulness: of all training examples [n].
        labels: int64 [n].
        keep: share that is kept in the end.
        rounds: how many parts.
        again: gives the usefulness of the rows that are left.

    Raises:
        InfluenceError: a round would leave nothing out; or none would be kept, or none left out.
    """
    n, usefulness, order = len(labels), usefulness.copy(), np.empty(0, dtype=np.int64)
    total = check_parts(n, keep, rounds)
    for number in range(1, rounds + 1):
        left = np.setdiff1d(np.arange(n), order)
        if number > 1:
            usefulness[left] = again(left)
        first = left[order_by(REPLAY, usefulness[left], np.zeros(len(left)), labels[left], 0)]
        last = number == rounds
        order = np.concatenate([order, first if last else first[: round(total * number / rounds) - len(order)]])
    return Rounds(order, usefulness)


def replay_again(config: Config, prepared: Prepared, terminal: Terminal) -> Callable[[np.ndarray], np.ndarray]:
    """Give what trains by the recipe on some rows, and replays that run: the usefulness of those rows.

    It is a run of its own on these rows, as the recipe trains on a smaller set, and not the old run with weights of 0:
    that would have smaller batches and so another rate, and it is not what will be trained on the rest. Its record is
    kept in that of the first run.

    Args:
        config: with the recipe.
        prepared: the first run.
        terminal: progress.
    """

    def again(rows: np.ndarray) -> np.ndarray:
        started, split = time.perf_counter(), prepared.task.train
        model = build_model(config).to(prepared.task.device).eval()
        rest = replace(prepared.task, model=model, train=take(split, split.indices[rows]), n=len(rows))
        folder = prepared.path / f"left-{xxhash.xxh3_64_hexdigest(rows.tobytes())[:8]}"
        replayed = train_recorded(config, rest, terminal, f"on the {len(rows):,} images that are left", folder)
        return -harm_to_tests([prepare_run(config, replayed, None, started)], [], terminal, skip=False)

    return again


def split_tests(task: Task, seed: int) -> tuple[Task, Task]:
    """Divide the test set at random into halves: one to choose by, one to measure on.

    Accuracy on the examples used for the choice would be too optimistic.

    Raises:
        InfluenceError: fewer than two test examples.
    """
    test = task.labelled_tests()
    if len(test) < 2:
        raise InfluenceError("--retrain needs at least two test examples: one to choose by, one to measure on")
    order = np.random.default_rng(seed_of(seed, CHOSEN)).permutation(len(test))
    halves = [np.sort(test.indices[part]) for part in np.array_split(order, 2)]
    first, second = (replace(task, test=take(test, part)) for part in halves)
    return first, second


def retrain_kept(
    retraining: Retraining,
    task: Task,
    orders: Callable[[str, int], np.ndarray],
    keep: float,
    repeats: int,
    terminal: Terminal | None = None,
    ways: Sequence[str] = BY,
) -> list[Kept]:
    """Train from scratch on all examples and on those that each way to choose keeps, and measure test accuracy.

    Args:
        retraining: how it is trained again.
        task: its test examples are used for measuring.
        orders: the order of the training rows, by way and repeat.
        keep: share to keep.
        repeats: trainings of each, with different seeds.
        terminal: progress.
        ways: to choose.

    Raises:
        InfluenceError: no training function, one that fails, or a training set of which only a part is listed.
    """
    terminal = or_silent(terminal)
    check_whole(task)
    again = retraining.again(task)
    kept = {
        (by, repeat): np.arange(len(task.train)) if by == EVERYTHING else kept_rows(orders(by, repeat), keep)
        for by in (EVERYTHING, *ways)
        for repeat in range(repeats)
    }
    digest = xxhash.xxh3_64_hexdigest(np.concatenate(list(kept.values())).tobytes())
    folder = retraining.folder / f"kept-{digest[:8]}"
    open_folder(folder, partial(retraining.made_of, task), MEANING)
    jobs = {Job(f"{by}_{repeat}", number): (by, repeat) for number, (by, repeat) in enumerate(kept, start=1)}

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        by, repeat = jobs[job]
        seed, rows = seed_of(retraining.seed, KEPT, repeat), kept[by, repeat]
        what = f"what {by} keeps, repeat {repeat} (seed {seed}, {len(rows):,} examples)"
        return again.outcomes(
            retraining.fresh_model(seed, task.device), rows, task.objective.trainer_l2(), seed, what, progress
        )

    results = dict(
        zip(kept, do_all(folder, list(jobs), run_one, terminal, "retraining on the kept examples"), strict=True)
    )
    return [
        Kept(
            by,
            len(kept[by, 0]),
            np.array([results[by, repeat]["right"].mean() for repeat in range(repeats)]),
            np.array([results[by, repeat]["losses"].mean() for repeat in range(repeats)]),
        )
        for by in (EVERYTHING, *ways)
    ]


def compare_kept(kept: Sequence[Kept]) -> str:
    """Say in one sentence how leaving out by replay, or else by influence, compares with the other ways."""
    means = {each.by: 100 * float(each.accuracies.mean()) for each in kept}
    losses = {each.by: float(each.losses.mean()) for each in kept}
    ways = [each.by for each in kept if each.by != EVERYTHING]
    best = max(ways, key=lambda by: means[by])
    rest = ", ".join(f"{each.by} {means[each.by]:.1f}% (loss {losses[each.by]:.3f})" for each in kept)
    lead = f"{best} chooses best here" if best == ways[0] else f"{best} chooses better than {ways[0]} here"
    return f"{lead}: test accuracy {rest}"
