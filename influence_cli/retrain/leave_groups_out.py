"""Retrain without whole groups of training examples, to measure what their removal really does to test losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TestFacts
from influence_cli.influence.test_selection import Selected
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.group_files import Grouping
from influence_cli.retrain.leave_one_out import Omission, trained_changes
from influence_cli.retrain.newton import losses_under, without_groups
from influence_cli.retrain.output_layer import NewtonRecord, at_minimum, by_newton, check_trainable, one_task
from influence_cli.retrain.retraining import Retraining
from influence_cli.runtime.terminal import Terminal, or_silent

WHAT = "retraining without one group"


@dataclass(frozen=True)
class GroupsLeftOut:
    """What leaving groups out does.

    Attributes:
        changes: the rise of each test loss, float64 [groups, tests].
        newton: of the minimum that Newton steps started from; None where the training function left groups out.
    """

    changes: np.ndarray
    newton: NewtonRecord | None


def check_retrain(
    stores: Sequence[Prepared], selected: Sequence[Selected], grouping: Grouping, retraining: Retraining
) -> None:
    """Refuse what cannot be retrained, before the work.

    Raises:
        InfluenceError: several checkpoints, a part of the training set, or a missing training function.
    """
    one_task([prepared.task for prepared in stores], "--retrain")
    if not by_newton(stores[0], retraining):
        check_trainable(retraining, selected)
    if len(grouping.names) < 2:
        raise InfluenceError("--retrain leaves out one group, but there is only one")


def leave_groups_out(
    prepared: Prepared,
    selected: Sequence[Selected],
    tests: Sequence[TestFacts],
    grouping: Grouping,
    groups: Sequence[int],
    *,
    retraining: Retraining,
    repeats: int = 1,
    terminal: Terminal | None = None,
) -> GroupsLeftOut:
    """Retrain without each of some groups, in the manner of ``leave_one_out``.

    Args:
        prepared: what was prepared for the one checkpoint.
        selected: which test examples.
        tests: what is known of them.
        grouping: which group each training example belongs to.
        groups: numbers of those to leave out.
        retraining: how it is trained again, where the objective is not that of a convex output layer.
        repeats: trainings of each by the training function, averaged.
        terminal: progress.
    """
    terminal = or_silent(terminal)
    rows = [np.flatnonzero(grouping.members == group) for group in groups]
    names = [grouping.names[group] for group in groups]
    if by_newton(prepared, retraining):
        minimum = at_minimum(prepared, selected, tests, terminal)
        device = minimum.w.device
        with terminal.progress(len(rows), WHAT) as advance:
            left_out = [torch.from_numpy(members).to(device) for members in rows]
            ws = without_groups(minimum.problem, minimum.w, left_out, names, advance)
        both = [losses_under(minimum.problem, w, minimum.tests) for w in (ws, minimum.w[None])]
        return GroupsLeftOut((both[0] - both[1]).cpu().numpy(), minimum.newton)
    # Named by the left-out examples: another column with the same members uses the same training.
    hashes = [xxhash.xxh3_64_intdigest(members.astype(np.int64).tobytes()) for members in rows]
    omissions = [
        Omission(f"without_group_{digest:016x}", digest % 2**31 + 2**31, members, f"without the group {name}")
        for name, members, digest in zip(names, rows, hashes, strict=True)
    ]
    return GroupsLeftOut(trained_changes(retraining, prepared.task, tests, omissions, repeats, terminal, WHAT), None)
