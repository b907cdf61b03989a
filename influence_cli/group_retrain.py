"""Train again without whole groups of training examples: what their removal really does to test losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from influence_cli.config import Config
from influence_cli.errors import InfluenceError
from influence_cli.facts import TestFacts
from influence_cli.group_files import Grouping
from influence_cli.loo import AtMinimum, Omission, at_minimum, check_trainable, is_convex, one_task, trained_changes
from influence_cli.newton import Outputs, Problem, losses_under, minimise
from influence_cli.precompute import Prepared
from influence_cli.selection import Selected
from influence_cli.terminal import Terminal

WHAT = "retraining without one group"


def check_retrain(stores: Sequence[Prepared], selected: Sequence[Selected], grouping: Grouping, config: Config) -> None:
    """Refuse what cannot be trained again, before the work.

    Raises:
        InfluenceError: several checkpoints, a part of the training set, no training function where one is needed.
    """
    one_task([prepared.task for prepared in stores], "--retrain")
    if not is_convex(stores[0]):
        check_trainable(config, selected)
    if len(grouping.names) < 2:
        raise InfluenceError("--retrain leaves a group out, and there is only one")


def leave_groups_out(
    prepared: Prepared,
    selected: Sequence[Selected],
    tests: Sequence[TestFacts],
    grouping: Grouping,
    groups: Sequence[int],
    *,
    config: Config,
    repeats: int = 1,
    terminal: Terminal,
    run: dict[str, Any],
) -> np.ndarray:
    """Train again without each of some groups, in the manner of ``leave_one_out``.

    Args:
        prepared: what was prepared for the one checkpoint.
        selected: which test examples.
        tests: what is known of them.
        grouping: which group each training example belongs to.
        groups: numbers of those to leave out.
        config: names the training function, where the objective is not that of a convex output layer.
        repeats: trainings of each by the training function, averaged.
        terminal: progress.
        run: takes the facts of the run.

    Returns:
        The rise of each test loss, float64 [groups, tests].
    """
    rows = [np.flatnonzero(grouping.members == group) for group in groups]
    names = [grouping.names[group] for group in groups]
    if is_convex(prepared):
        found, changes = at_minimum(prepared, selected, tests, terminal, run), []
        with terminal.progress(len(rows), WHAT) as advance:
            for name, own in zip(names, rows, strict=True):
                changes.append(newton_change(found, own, name).cpu().numpy())
                advance(1)
        return np.array(changes)
    # Named by who is left out: another column with the same members goes by the same training.
    hashes = [xxhash.xxh3_64_intdigest(own.astype(np.int64).tobytes()) for own in rows]
    omissions = [
        Omission(f"without_group_{digest:016x}", digest % 2**31 + 2**31, own, f"without the group {name}")
        for name, own, digest in zip(names, rows, hashes, strict=True)
    ]
    return trained_changes(config, prepared.task, tests, omissions, repeats, terminal, WHAT)


def newton_change(found: AtMinimum, rows: np.ndarray, name: str) -> Tensor:
    """Minimise (1/n) Σ_{j not in the group} ℓ + l2/2 ‖W‖² with the same n, and give the rise of each test loss [m].

    Raises:
        InfluenceError: without the group there is no minimum.
    """
    problem = found.problem
    kept = torch.ones(problem.n, dtype=torch.bool)
    kept[torch.from_numpy(rows)] = False
    own = Outputs(*(part[kept.to(part.device)] for part in vars(problem.examples).values()))
    # The objective of those that are left, over their number, has the same minimum with l2·n/(their number).
    part = Problem(own, problem.loss, problem.l2 * problem.n / own.targets.shape[0])
    try:
        w, _, _ = minimise(part, found.w)
    except InfluenceError as error:
        raise InfluenceError(f"--retrain without the group {name}: {error.message}", error.hint) from error
    change = losses_under(problem, torch.stack([w, found.w]), found.tests)
    return change[0] - change[1]
