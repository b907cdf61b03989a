"""Give a complete store: choose the curvature, fit it, make the file, compute missing blocks, check existing ones.

``prepare`` is the only entry point: every command that needs a curvature or a store calls it, so one command suffices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from influence_cli.config.schema import Config
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.coordinates import Basis, Blocks, Joint, vector_coordinates
from influence_cli.curvature.spectrum import Spectrum
from influence_cli.data.batches import Batch
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.model.network import flatten
from influence_cli.model.task import Task
from influence_cli.passes.batch_size import plan_batch
from influence_cli.passes.layers import UnevenError
from influence_cli.passes.probe import checkpoint_warnings, other_order
from influence_cli.precompute.decide import decide
from influence_cli.precompute.fill_store import fill_store
from influence_cli.precompute.fingerprint import compare, fingerprint
from influence_cli.precompute.fitted import Fitted, open_basis
from influence_cli.precompute.make_store import (
    alone,
    create_store,
    curvature_of,
    extend_store,
    halving_alone,
    handed_round,
    has_grown,
    has_rows,
    known_curvature,
    make_store,
    remove_fits,
)
from influence_cli.precompute.prepared import (
    InverseSettings,
    Prepared,
    settings_of,
    store_path,
    store_paths,
    training_time,
)
from influence_cli.precompute.staleness import changed_blocks, check_code, known_files
from influence_cli.runtime import disk, distributed
from influence_cli.runtime.terminal import Terminal, or_silent
from influence_cli.store.store import READ, SKIPPED, Store, block_sums, predicted_classes


@dataclass(frozen=True)
class Upkeep:
    """What is done to a store that exists already.

    Attributes:
        overwrite: replace its rows; a curvature that still fits is reused.
        fsck: verify every checksum and read every example again, to compare it with the data of the store.
        repair: recompute damaged (and, with ``fsck``, changed) blocks.
    """

    overwrite: bool = False
    fsck: bool = False
    repair: bool = False


def prepare_all(
    config: Config,
    tasks: Sequence[Task],
    terminal: Terminal | None = None,
    *,
    upkeep: Upkeep = Upkeep(),
    skip_unreadable: bool = False,
    on_the_fly: bool = False,
) -> list[Prepared]:
    """Give the curvature and the complete store of every checkpoint, as ``prepare`` does for one."""
    terminal = or_silent(terminal)
    return [
        prepare(config, number, task, terminal, upkeep=upkeep, skip_unreadable=skip_unreadable, on_the_fly=on_the_fly)
        for number, task in enumerate(tasks)
    ]


def all_complete(config: Config) -> bool:
    """Say whether the store of every checkpoint exists with all its rows; prepare checks whether it fits."""
    return all(_is_complete(path) for path in store_paths(config))


def prepare(
    config: Config,
    number: int,
    task: Task,
    terminal: Terminal | None = None,
    *,
    upkeep: Upkeep = Upkeep(),
    skip_unreadable: bool = False,
    on_the_fly: bool = False,
) -> Prepared:
    """Give the curvature and a complete store for one checkpoint: reuse, resume or make it.

    Where an example takes a way through the model that the probe did not show, the layers on it are left to autograd,
    and the work begins again.

    Args:
        config: the run's config.
        number: which of its checkpoints.
        task: that checkpoint and its data.
        terminal: progress and warnings.
        upkeep: what is done to an existing store; by default it is used, and what is missing is computed.
        skip_unreadable: continue without unreadable examples, and list them.
        on_the_fly: fit the curvature, but store no rows.

    Raises:
        InfluenceError: the store belongs to another run, is too large for budget or disk, is damaged, an example
            cannot be read or has no finite loss.
    """
    terminal, path = or_silent(terminal), store_path(config, number)
    slow: tuple[str, ...] = ()
    while True:
        try:
            return _prepare(
                config,
                number,
                task,
                terminal,
                upkeep=upkeep,
                skip_unreadable=skip_unreadable,
                on_the_fly=on_the_fly,
                slow=slow,
            )
        except UnevenError as error:
            # Coordinates of a basis per layer belong to its layers; and the other processes know nothing of it.
            if distributed.size() > 1 or path.exists() or not set(error.names).difference(slow):
                raise
            remove_fits(path)
            slow = (*slow, *error.names)
            terminal.warn(f"{error.message}: autograd computes its gradients, one example at a time (slower)")


def _prepare(
    config: Config,
    number: int,
    task: Task,
    terminal: Terminal,
    *,
    upkeep: Upkeep,
    skip_unreadable: bool,
    on_the_fly: bool,
    slow: tuple[str, ...],
) -> Prepared:
    started = time.perf_counter()
    path, settings = store_path(config, number), _settings(config, number, task)
    choice, batch = decide(config, task, terminal, None if upkeep.overwrite else path, slow)
    wanted = fingerprint(task, choice, config.gradients.store_dtype)
    wanted = distributed.from_first(lambda: known_files(task, path, wanted, terminal, fresh=upkeep.overwrite))
    if on_the_fly:
        without = _without_rows(config, number, task, choice, batch, wanted, terminal, skip=skip_unreadable)
        return replace(without, settings=settings)
    makes, grows, writes = distributed.from_first(lambda: _to_do(task, path, wanted, upkeep))
    # The writer is alone from here on, so that two that start together do not both fit the curvature.
    with alone(path) if writes else nullcontext():
        if makes:
            make_store(config, task, choice, batch, path, wanted, terminal, skip=skip_unreadable)
        elif grows:
            distributed.from_first(lambda: _extend(config, task, choice, path, wanted, terminal))
        todo = distributed.from_first(lambda: _todo(task, choice, path, wanted, terminal, upkeep))
        basis, spectrum = stored_basis(path, choice, task)
        if len(todo):
            remove_fits(path)  # a kill can leave it next to a store with the whole curvature
            fill_store(task, choice.network, basis, path, todo, terminal, skip=skip_unreadable)
    prepared = _prepared(task, choice, path, basis, spectrum, settings, started)
    return _remark(prepared, terminal, a_run=config.model.is_one_run)


def _settings(config: Config, number: int, task: Task) -> InverseSettings:
    """Give what is asked of the inverse; a step along the trainer's mean is n/D of one along the plain mean."""
    settings = settings_of(config, number)
    time = settings.time / task.objective.factor
    return replace(settings, time=time, training=training_time(config, number, task))


def _to_do(task: Task, path: Path, wanted: dict[str, str], upkeep: Upkeep) -> tuple[bool, bool, bool]:
    """Say whether a store must be made, whether it must grow, and whether anything must be written."""
    makes = upkeep.overwrite or not has_rows(path)
    grows = not makes and has_grown(task, path, wanted)
    return makes, grows, makes or grows or upkeep.repair or not _is_complete(path)


def _extend(config: Config, task: Task, choice: Choice, path: Path, wanted: dict[str, str], terminal: Terminal) -> None:
    """Make room for new examples, once the code is known to be that of the old ones."""
    check_code(task, choice, path, wanted, partial(_basis_of, path, choice, task), terminal)
    extend_store(config, task, path, wanted, terminal)


def _todo(
    task: Task, choice: Choice, path: Path, wanted: dict[str, str], terminal: Terminal, upkeep: Upkeep
) -> np.ndarray:
    """Compare a store with model and data, and list the blocks to compute: missing ones and damaged ones."""
    with Store.open(path) as store:
        compare(store.fingerprint | store.settled, wanted, str(path), task.code.folder)
        done = np.flatnonzero(store.done())
        missing = np.flatnonzero(~store.done())
        bad = store.damaged(done if upkeep.fsck or upkeep.repair else done[:1])
    read_anew = changed_blocks(task, path, terminal) if upkeep.fsck else bad[:0]
    # Where every block is read differently, the code may be the cause: its numbers tell.
    left = bad if len(np.union1d(bad, read_anew)) == len(done) else np.union1d(bad, read_anew)
    opened = partial(_basis_of, path, choice, task)
    check_code(task, choice, path, wanted, opened, terminal, thorough=upkeep.fsck, without=left)
    bad = np.union1d(bad, read_anew)
    if len(bad) and not upkeep.repair:
        raise InfluenceError(
            f"{path}: {len(bad)} damaged blocks: {', '.join(map(str, bad[:8]))}",
            f"influence gradients {'--fsck ' if upkeep.fsck else ''}--repair recomputes them",
        )
    if len(bad):
        terminal.say(f"recomputing {len(bad)} damaged blocks of {path}: {', '.join(map(str, bad[:8]))}")
        with Store.open(path, write=True) as store:
            store.clear(bad)
    return np.union1d(missing, bad)


def _is_complete(path: Path) -> bool:
    if not has_rows(path):
        return False
    with Store.open(path) as store:
        return bool(store.done().all())


def stored_basis(path: Path, choice: Choice, task: Task, *, whole: bool = False) -> tuple[Basis, Spectrum | None]:
    """Open the basis of a store's coordinates, or (``whole``) of all coordinates with a stored curvature."""
    if not choice.has_basis:
        return None, None
    with Store.open(path, rows=False) as store:
        names = [*store.names("factor."), *store.names("basis"), *store.names("spectrum")]
        arrays = {name: values for name in names if (values := store.array(name)) is not None}
        chosen = None if whole else store.array("kept")
    return open_basis(Fitted(arrays, store.facts), choice, chosen, task.device, task.objective.over(choice.network))


def _basis_of(path: Path, choice: Choice, task: Task) -> Basis:
    return stored_basis(path, choice, task)[0]


def _without_rows(
    config: Config,
    number: int,
    task: Task,
    choice: Choice,
    batch: Batch,
    wanted: dict[str, str],
    terminal: Terminal,
    *,
    skip: bool,
) -> Prepared:
    """Fit the curvature and keep it in the store's file, without rows."""
    started = time.perf_counter()
    path = store_path(config, number)
    size = distributed.smallest(plan_batch(choice.network, batch.inputs, 0, config.gradients.block))
    known = known_curvature(choice, path, wanted) if choice.has_basis else Fitted()
    if known is not None:
        fitted = known
    else:
        with alone(path):
            fitted, size = halving_alone(
                lambda count: curvature_of(task, choice, path, wanted, terminal, count, skip=skip), size, terminal.warn
            )
            if distributed.is_first() and not has_rows(path):
                disk.check_space(path, fitted.bytes())
                create_store(config, task, choice.network, path, wanted, fitted, None, size)
                terminal.say(f"wrote the curvature to {path} ({human_bytes(path.stat().st_size)}), without rows")
            remove_fits(path)
            fitted = handed_round(fitted)
    l2 = task.objective.over(choice.network)
    basis, spectrum = open_basis(fitted, choice, None, task.device, l2) if choice.has_basis else (None, None)
    return Prepared(
        task,
        choice,
        path,
        basis,
        spectrum,
        on_the_fly=True,
        batch=size,
        gradient_norm=None,
        seconds=time.perf_counter() - started,
        settings=settings_of(config, number),
    )


def _prepared(
    task: Task,
    choice: Choice,
    path: Path,
    basis: Basis,
    spectrum: Spectrum | None,
    settings: InverseSettings,
    started: float,
) -> Prepared:
    with Store.open(path, rows=False) as store:
        batch = int(store.facts["batch"])
    summary = distributed.from_first(lambda: _summary(path))
    mean = torch.from_numpy(summary[:-1]).to(task.device, torch.float32)
    theta = flatten([parameter.detach() for parameter in choice.network.parameters().values()])
    l2 = task.objective.over(choice.network)
    decay = theta * (l2 if isinstance(l2, float) else l2.to(theta))
    if isinstance(basis, Joint):
        slope = basis.vectors @ mean + decay
    elif isinstance(basis, Blocks):
        slope = mean + vector_coordinates(choice.network, basis, decay[None])[0]
    else:
        slope = mean + decay
    seconds = time.perf_counter() - started
    return Prepared(
        task,
        choice,
        path,
        basis,
        spectrum,
        on_the_fly=False,
        batch=batch,
        gradient_norm=float(slope.norm()),
        seconds=seconds,
        settings=settings,
    )


def _summary(path: Path) -> np.ndarray:
    with Store.open(path) as store:
        summary = store.summary()
    return _summarise(path) if summary is None else summary


def _summarise(path: Path) -> np.ndarray:
    """Sum a complete store in one verified scan, as an uninterrupted fill does on the way.

    Returns:
        float64 [k + 1]: the mean coordinates, then the mean of ‖c‖².
    """
    with Store.open(path, write=True) as store:
        total, size = np.zeros(store.layout.k + 1), store.layout.block
        for _, rows in store.scan():
            for start in range(0, len(rows), size):
                total += block_sums(rows[start : start + size])
        total /= max(1, store.readable())
        store.write_summary(total)
    return total


def _remark(prepared: Prepared, terminal: Terminal, *, a_run: bool) -> Prepared:
    """Report what the complete store shows: skipped examples, accuracy near chance, no minimum (a run needs none)."""
    task = prepared.task
    with Store.open(prepared.path) as store:
        state, labels, summary = store.column("state"), store.column("labels"), store.summary()
        predicted = predicted_classes([store])
    skipped = int((state == SKIPPED).sum())
    if skipped:
        terminal.warn(
            f"{skipped} unreadable training example{'s are' if skipped > 1 else ' is'} left out of every ranking"
        )
    read = state == READ
    if not read.any():
        raise InfluenceError(f"{task.train.where}: no training example could be read")
    accuracy = float((predicted == labels)[read].mean())
    order = other_order(task.classes, labels[read], predicted[read])
    typical = float(np.sqrt(summary[-1])) if summary is not None else 0.0
    norm = 0.0 if a_run else prepared.gradient_norm or 0.0
    if norm and task.explained:
        terminal.detail(f"‖∇R + l2·θ‖ = {norm:.3g} over the tracked parameters; a typical gradient is {typical:.3g}")
    if task.explained:
        for text in checkpoint_warnings(accuracy, len(task.classes), norm, typical, order=order):
            terminal.warn(text)
    return prepared
