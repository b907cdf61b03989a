"""Make the file of a store, or room in it for more rows, before any gradient is computed.

All processes of a job (runtime/distributed.py) fit the curvature together, and the first one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli.config.schema import Config
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.coordinates import Basis, coordinates
from influence_cli.data.batches import Batch
from influence_cli.data.split import take
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.model.data_fingerprint import data_fingerprint, with_contents
from influence_cli.model.network import Network
from influence_cli.model.task import Task
from influence_cli.passes.batch_size import plan_batch
from influence_cli.precompute.budget import check_budget, choose_coordinates, most_columns, row_bytes, store_layout
from influence_cli.precompute.cost import estimate
from influence_cli.precompute.decide import describe_network
from influence_cli.precompute.fingerprint import differing
from influence_cli.precompute.fit import fit_curvature
from influence_cli.precompute.fit_file import fit_files
from influence_cli.precompute.fitted import Fitted, first_columns, open_basis, stored_curvature
from influence_cli.runtime import disk, distributed, exchange
from influence_cli.runtime.locks import claim, is_claimed
from influence_cli.runtime.memory import halving
from influence_cli.runtime.terminal import Terminal, duration
from influence_cli.store.layout import create
from influence_cli.store.shards import create_sharded, extend, remove_orphans
from influence_cli.store.store import Store

# Shards per process, if several fill a store: the others wait for a slow one for at most one shard.
SHARDS = 8


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only process, or job of several, that makes or fills a store.

    Raises:
        InfluenceError: another one is working on it; the folder is not writable, or not shared by all hosts.
    """
    with claim(path) if distributed.is_first() else nullcontext():
        distributed.barrier()
        if not all(distributed.gathered(is_claimed(path))):
            raise InfluenceError(
                f"{path} is not in a folder that all processes of this job share",
                "set gradients.store to a file system that all hosts share",
            )
        yield


def has_rows(path: Path) -> bool:
    """Say whether there is a store with rows: a curvature that is used on the fly has none."""
    if not path.exists():
        return False
    with Store.open(path, rows=False) as store:
        return bool(store.facts.get("rows", True))


def make_store(
    config: Config,
    task: Task,
    choice: Choice,
    batch: Batch,
    path: Path,
    wanted: dict[str, str],
    terminal: Terminal,
    *,
    skip: bool,
) -> None:
    """Announce, fit the curvature if there is one, choose the coordinates within the budget, and lay the file out."""
    size, budget = choice.network.size, config.gradients.budget
    most = min(row_bytes(config, task, choice), budget)
    check_budget(config, task, choice)
    disk.check_space(path, most)
    examples = distributed.smallest(plan_batch(choice.network, batch.inputs, 0, config.gradients.block))
    width = most_columns(config, task, choice)
    plan = estimate(task, choice, batch, size=examples, block=config.gradients.block, width=width)
    several = f" on {distributed.size()} processes" if distributed.size() > 1 else ""
    terminal.say(
        f"making {path}: {len(task.train):,} training examples, {size:,} parameters, at most "
        f"{human_bytes(most)}, about {duration(plan.seconds / distributed.size())}{several}"
    )
    fitted, examples = halving_alone(
        lambda count: curvature_of(task, choice, path, wanted, terminal, count, skip=skip), examples, terminal.warn
    )
    distributed.from_first(lambda: _lay_out(config, task, choice, batch, path, wanted, fitted, terminal))
    remove_fits(path)


def _lay_out(
    config: Config,
    task: Task,
    choice: Choice,
    batch: Batch,
    path: Path,
    wanted: dict[str, str],
    fitted: Fitted,
    terminal: Terminal,
) -> None:
    """Choose the coordinates within the budget, try a whole batch, and make the file."""
    size = choice.network.size
    chosen = choose_coordinates(config, task, choice, fitted)
    k = size if chosen is None else len(chosen)
    if choice.is_joint:
        fitted = first_columns(fitted, k)
    basis = (
        open_basis(fitted, choice, chosen, task.device, task.objective.over(choice.network))[0]
        if choice.has_basis
        else None
    )
    examples = plan_batch(choice.network, batch.inputs, k, config.gradients.block)
    # A whole batch is tried before the file exists, so that a store's batch size always fits the memory.
    _, examples = halving(lambda count: _trial(choice, basis, batch, count), examples, terminal.warn)
    create_store(config, task, choice.network, path, wanted, fitted, Columns(chosen, k), examples)
    with Store.open(path) as store:
        reserved = human_bytes(store.size())
    terminal.detail(f"{path}: {reserved} reserved, {k:,} numbers per row, batches of {examples:,}")


@dataclass(frozen=True)
class Columns:
    """What a row of a store holds.

    Attributes:
        kept: which coordinates, rising; None for all of them.
        count: how many.
    """

    kept: np.ndarray | None
    count: int


def create_store(
    config: Config,
    task: Task,
    network: Network,
    path: Path,
    wanted: dict[str, str],
    fitted: Fitted,
    columns: Columns | None,
    batch: int,
) -> None:
    """Lay the file out, without rows if there are no columns; each of several processes gets its own shards."""
    columns, rows = columns or Columns(None, 0), columns is not None
    what: dict[str, Any] = {
        "fingerprint": wanted,
        "facts": fitted.facts | {"rows": rows, "batch": batch, "network": describe_network(network)},
        "labels": task.train.labels[task.train.indices],
        "indices": task.train.indices,
        "arrays": fitted.arrays | ({} if columns.kept is None else {"kept": columns.kept}),
    }
    if rows and distributed.size() > 1:
        create_sharded(path, store_layout(config, task, columns.count), count=SHARDS * distributed.size(), **what)
    else:
        create(path, store_layout(config, task, columns.count), **what)
        remove_orphans(path)


def curvature_of(
    task: Task, choice: Choice, path: Path, wanted: dict[str, str], terminal: Terminal, batch: int, *, skip: bool
) -> Fitted:
    """Take the curvature from the store's file if it fits, otherwise fit it."""
    if not choice.has_basis:
        return Fitted()
    fitted = known_curvature(choice, path, wanted)
    if fitted is not None:
        terminal.detail(f"reusing the curvature in {path}")
        return fitted
    return fit_curvature(task, choice, path, wanted, terminal, batch, skip=skip)


def known_curvature(choice: Choice, path: Path, wanted: dict[str, str]) -> Fitted | None:
    """Take the curvature from the store's file; None if it does not fit, or if a process does not see it."""
    stored = stored_curvature(path, wanted, choice)
    return stored if all(distributed.gathered(stored is not None)) else None


def halving_alone(work: Callable[[int], Fitted], batch: int, tell: Callable[[str], Any]) -> tuple[Fitted, int]:
    """Fit with a batch size, halving it while memory runs out; only with a single process."""
    if distributed.size() > 1:
        return work(batch), batch
    return halving(work, batch, tell)


def handed_round(fitted: Fitted) -> Fitted:
    """Give every process the curvature of the first one, because eigenvectors from other machines have other signs."""
    if distributed.size() == 1:
        return fitted
    arrays = {name: torch.from_numpy(np.array(values)) for name, values in fitted.arrays.items()}
    arrays = arrays if distributed.is_first() else {}
    exchange.hand_round(arrays)
    facts = distributed.from_first(lambda: fitted.facts)
    return Fitted({name: tensor.numpy() for name, tensor in arrays.items()}, facts)


def remove_fits(path: Path) -> None:
    """Remove the files of unfinished fits, of this job and of jobs with other numbers of processes."""
    distributed.barrier()
    if distributed.is_first():
        for file in fit_files(path):
            disk.remove(file)


def _trial(choice: Choice, basis: Basis, batch: Batch, count: int) -> None:
    repeat = -(-count // len(batch))
    inputs = batch.inputs.repeat(repeat, *(1,) * (batch.inputs.ndim - 1))[:count]
    coordinates(choice.network, basis, inputs, batch.targets.repeat(repeat)[:count])


def has_grown(task: Task, path: Path, wanted: dict[str, str]) -> bool:
    """Say whether the only change since a store was made is new training examples at the end."""
    with Store.open(path, rows=False) as store:
        stored, n = store.fingerprint, store.layout.n
    if n >= len(task.train) or not set(differing(stored, wanted)) <= {"count", "labels", "files", "examples"}:
        return False
    first = take(task.train, task.train.indices[:n])
    before = with_contents(data_fingerprint(first), stored, first)
    return not set(before).intersection(differing(stored, {**stored, **before}))


def extend_store(config: Config, task: Task, path: Path, wanted: dict[str, str], terminal: Terminal) -> None:
    """Make room for training examples that come after those of the store."""
    with Store.open(path) as store:
        old = store.layout
    layout = replace(old, n=len(task.train))
    terminal.say(
        f"{path}: adding {layout.n - old.n:,} training examples that come after its {old.n:,}; the other gradients are "
        "kept, and the curvature is not fitted again (influence gradients --overwrite does that)"
    )
    if config.train.n is None:
        terminal.warn(
            f"the checkpoint is treated as trained on all {layout.n:,} examples; if it was not, set train.n={old.n} or "
            "retrain it"
        )
    extend(
        path,
        layout,
        count=SHARDS * distributed.size() if distributed.size() > 1 else 1,
        fingerprint=wanted,
        labels=task.train.labels[task.train.indices],
        indices=task.train.indices,
    )
