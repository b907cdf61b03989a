"""The size of a store: its minimum and maximum, and the coordinates that fit ``gradients.budget``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from influence_cli.config.schema import Config
from influence_cli.curvature.blocks import Block, largest
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.damping import choose_damping
from influence_cli.curvature.kronecker_plan import make_plan, stored_bytes
from influence_cli.curvature.spectrum import layered
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.model.task import Task
from influence_cli.precompute.fitted import Fitted
from influence_cli.store.layout import Layout


def row_bytes(config: Config, task: Task, choice: Choice) -> int:
    """Bound the store's size from above, before the basis is known: all p coordinates, and the basis."""
    size = choice.network.size
    return store_layout(config, task, size).bytes() + (4 * size * size if choice.is_joint else 0)


def most_columns(config: Config, task: Task, choice: Choice) -> int:
    """Bound the numbers per row from above: all p coordinates, or what the budget allows."""
    return max(1, min(choice.network.size, config.gradients.budget // _column_bytes(config, task)))


def store_layout(config: Config, task: Task, k: int) -> Layout:
    """Give the shape of a store with k numbers per row."""
    return Layout(len(task.train), k, len(task.classes), config.gradients.block, config.gradients.store_dtype)


def _column_bytes(config: Config, task: Task) -> int:
    layout = store_layout(config, task, 1)
    return layout.padded * np.dtype(layout.dtype).itemsize


def check_budget(config: Config, task: Task, choice: Choice) -> None:
    """Refuse, before any work, a store that exceeds the budget."""
    where, budget, size = config.where("gradients", "budget"), config.gradients.budget, choice.network.size
    if not choice.has_basis:
        need = row_bytes(config, task, choice)
        if need > budget:
            raise InfluenceError(
                f"{where}: the gradients of {len(task.train):,} examples × {size:,} parameters take "
                f"{human_bytes(need)}, but gradients.budget is {human_bytes(budget)}",
                "track fewer layers (gradients.layers), use store_dtype: float16 or int8, curvature.method: ekfac, "
                "--on-the-fly, or raise the budget",
            )
        return
    columns = _groups(choice)
    basis = 4 * size if choice.is_joint else stored_bytes(choice.network)
    least = store_layout(config, task, 0).bytes() + columns * _column_bytes(config, task) + basis
    if budget < least:
        each = "one coordinate" if choice.is_joint else f"one coordinate per layer ({columns} layers) and the factors"
        raise InfluenceError(
            f"{where}: gradients.budget is {human_bytes(budget)}, but a store of {len(task.train):,} examples "
            f"with {each} takes at least {human_bytes(least)}",
            f"raise it: -s gradients.budget={math.ceil(least / 1e6)}MB, or use --on-the-fly",
        )


def _groups(choice: Choice) -> int:
    plan = make_plan(choice.network)
    return 1 if choice.is_joint else len(plan.layers) + len(plan.loose)


def choose_coordinates(config: Config, task: Task, choice: Choice, fitted: Fitted) -> np.ndarray | None:
    """Choose the coordinates to keep: as many as the effective dimension at ``auto`` damping, within the budget."""
    if not choice.has_basis:
        return None
    room = config.gradients.budget - store_layout(config, task, 0).bytes()
    if choice.is_joint:
        # A coordinate takes one column of all rows, and one of the basis.
        k = min(len(fitted.arrays["spectrum"]), room // (_column_bytes(config, task) + 4 * choice.network.size))
        return np.arange(k)
    blocks = fitted.blocks()
    fits = max(len(blocks), (room - fitted.bytes()) // _column_bytes(config, task))
    l2 = task.objective.over(choice.network)
    least = l2 if isinstance(l2, float) else float(l2.min())
    return largest(blocks, min(coordinates_wanted(blocks, least), fits))


def coordinates_wanted(blocks: Sequence[Block], l2: float) -> int:
    """Count the coordinates that predict retraining: the effective dimension at ``auto`` damping, rounded up to 64."""
    spectrum = layered(blocks, None)
    means = [group.mean for group in spectrum.groups]
    damping = choose_damping("auto", convex=False, l2=l2, matrix="ggn", smallest=0.0, means=means, largest=0.0)
    dimension = spectrum.dimension(damping, l2)[1]
    return min(len(spectrum.values), max(len(blocks), 64 * math.ceil(dimension / 64)))
