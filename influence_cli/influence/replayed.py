"""Influence from a training run that is replayed: of single test losses, and of their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TestFacts
from influence_cli.influence.scores import require_finite, weight_removal
from influence_cli.influence.test_gradients import explained_tests
from influence_cli.influence.test_selection import Selected, at_position, refuse_without_label
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Effects
from influence_cli.runtime.terminal import Terminal


def replayed_groups(
    task: Task, effects: Effects, selected: Sequence[Selected], target: str, terminal: Terminal, *, skip: bool
) -> Iterator[tuple[list[TestFacts], np.ndarray]]:
    """Give test examples in groups, with the influence of all training examples on each: float64 [m, n].

    Raises:
        InfluenceError: none of them could be read, or a number is not finite.
    """
    some = False
    for tests, inputs, targets in explained_tests(task, selected, target, terminal, skip=skip):
        some = some or bool(tests)
        with terminal.progress(len(tests), "replaying the run, per test image") as advance:
            values = weight_removal(effects.slopes(inputs, targets, advance))
        _require_finite(task, values)
        yield tests, values
    if not some:
        raise InfluenceError("none of the selected test examples could be read")


def replayed_mean(
    task: Task, effects: Effects, selected: Sequence[Selected], target: str, terminal: Terminal, *, skip: bool
) -> tuple[list[TestFacts], np.ndarray]:
    """Give the facts of test examples, and the influence of all training examples on their mean loss: float64 [n].

    Raises:
        InfluenceError: none of them could be read, or a number is not finite.
    """
    tests, inputs, targets = _read(task, selected, target, terminal, skip=skip)
    with terminal.progress(1, "replaying the run") as advance:
        values = weight_removal(effects.mean_slopes(inputs, targets, advance))
    _require_finite(task, values[None])
    return tests, values


def replayed_tests(
    task: Task, effects: Effects, row: int, target: str, terminal: Terminal, *, skip: bool
) -> tuple[list[TestFacts], np.ndarray]:
    """Give all test examples, and the influence of one training example on each: float64 [m]."""
    split = task.test_split()
    everything = [at_position(split, int(i)) for i in split.indices]
    refuse_without_label(everything[:1], split, target)
    tests, inputs, targets = _read(task, everything, target, terminal, skip=skip)
    with terminal.status("following one image through the run"):
        values = weight_removal(effects.slopes_of(row, inputs, targets))
    require_finite(values, "influence", lambda test: tests[test].title())
    return tests, values


def _read(
    task: Task, selected: Sequence[Selected], target: str, terminal: Terminal, *, skip: bool
) -> tuple[list[TestFacts], Tensor, Tensor]:
    parts = list(explained_tests(task, selected, target, terminal, skip=skip))
    if not parts:
        raise InfluenceError("none of the selected test examples could be read")
    tests = [test for some, _, _ in parts for test in some]
    return tests, torch.cat([inputs for _, inputs, _ in parts]), torch.cat([targets for _, _, targets in parts])


def _require_finite(task: Task, values: np.ndarray) -> None:
    require_finite(values, "influence", lambda _test, row: task.train.title(int(task.train.indices[row])))
