"""Compute the missing blocks of a store, in order; each is complete on disk before the next one is finished.

One thread writes while this one reads the next examples and computes all but their last batch, so disk and device work
at the same time. A block's rows are written first and its flag last, so a kill loses at most one computed block.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from influence_cli.curvature.coordinates import Basis, coordinates
from influence_cli.data.batches import Batch, read_batches, refuse_unreadable
from influence_cli.data.split import rows_of
from influence_cli.errors import InfluenceError, Stopped, human_bytes
from influence_cli.model.network import Network
from influence_cli.model.sample_weights import plain_losses
from influence_cli.model.task import Task, measure_loading
from influence_cli.passes.finite import check_gradients
from influence_cli.precompute.row_check import RowCheck, checked_rows, make_row_check, rows_or_autograd
from influence_cli.runtime import distributed, exchange
from influence_cli.runtime.memory import is_out_of_memory
from influence_cli.runtime.terminal import Advance, Terminal, duration
from influence_cli.store.store import READ, SKIPPED, Rows, Store, block_sums


@dataclass
class Filled:
    """What has been computed so far.

    Attributes:
        blocks: how many blocks are written.
        total: the sum of their rows, and of the squared norms: float64 [k + 1].
        skipped: why examples were left out.
        by_autograd: the modules whose gradients were wrong in a block, which autograd then computed; how many blocks.
    """

    blocks: int
    total: np.ndarray
    skipped: list[str]
    by_autograd: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class FileBlocks:
    """Blocks to compute in one file of a store.

    Attributes:
        path: the file.
        todo: block numbers in it, rising.
        indices: positions in the data set of all its rows.
    """

    path: Path
    todo: np.ndarray
    indices: np.ndarray


def fill_store(
    task: Task, network: Network, basis: Basis, path: Path, todo: np.ndarray, terminal: Terminal, *, skip: bool
) -> None:
    """Compute blocks of a store and write them; the processes of a job take the shards of a store one after another.

    Args:
        task: model and data.
        network: the tracked parameters.
        basis: of the coordinates; None for raw gradients.
        path: the store.
        todo: block numbers, rising; the same in every process.
        terminal: progress; skipped examples are listed there.
        skip: continue without unreadable examples (their rows are zero and marked).

    Raises:
        InfluenceError: an example cannot be read or has no finite loss or gradient; disk or memory is full.
        Stopped: Ctrl-C; the blocks before it are kept.
    """
    with Store.open(path) as store:
        layout, files = store.layout, store.shards or [(path, range(store.layout.blocks))]
    distributed.barrier()  # no process still reads what another one is about to write
    check = make_row_check(network, basis)
    filled, started = Filled(0, np.zeros(layout.k + 1), []), time.perf_counter()
    jobs = [(file, blocks, unfilled) for file, blocks in files if len(unfilled := todo[np.isin(todo, blocks)])]
    count = sum(len(task.train.indices[layout.rows(int(block))]) for block in todo)
    try:
        with terminal.progress(count, f"gradients of {path.name}") as bar:
            advance = distributed.counted(bar)
            for number in distributed.turns(len(jobs)):
                file, blocks, unfilled = jobs[number]
                measure_loading(task, terminal)
                indices = task.train.indices[layout.span(blocks)]
                part = FileBlocks(file, unfilled - blocks.start, indices)
                fill_blocks(task, check, part, filled, advance, skip=skip)
    except KeyboardInterrupt:
        done = layout.blocks - len(todo) + filled.blocks
        kept = f"{done} of {layout.blocks} blocks" if distributed.size() == 1 else "finished blocks"
        raise Stopped(f"{path}: {kept} are kept; run the same command to resume") from None
    for reason in filled.skipped:
        terminal.warn(f"skipped: {reason}")
    for module, count in filled.by_autograd.items():
        terminal.warn(
            f"layer {module}: its gradients differed from autograd's in {count:,} blocks; autograd computed them"
        )
    distributed.hear(terminal.warnings, terminal.warn)
    finished = sum(distributed.gathered(filled.blocks))
    exchange.sum_array(filled.total)
    if distributed.is_first():
        with Store.open(path) as store:
            size, readable = store.size(), store.readable()
        # Rounded rows are summed by a scan, so that a resumed store has the same bytes.
        if finished == layout.blocks and layout.dtype == "float32":
            with Store.open(path, write=True, rows=False) as store:
                store.write_summary(filled.total / max(1, readable))
        spent = duration(time.perf_counter() - started)
        terminal.say(f"wrote {finished} of {layout.blocks} blocks of {path} ({human_bytes(size)}) in {spent}")
    distributed.barrier()


def fill_blocks(
    task: Task,
    check: RowCheck,
    part: FileBlocks,
    filled: Filled,
    advance: Advance,
    *,
    skip: bool,
) -> None:
    """Compute blocks of one file and write them.

    Args:
        task: model and data.
        check: the tracked parameters, the basis of the coordinates, and what some rows are compared with.
        part: which blocks.
        filled: collects what was computed.
        advance: called with the number of finished examples.
        skip: continue without unreadable examples.
    """
    path, todo, indices = part.path, part.todo, part.indices
    with Store.open(path, write=True) as store, ThreadPoolExecutor(1) as writer:
        layout, size = store.layout, int(store.facts["batch"])
        positions = [indices[layout.rows(int(block))] for block in todo]
        pending: Future[None] | None = None
        block = todo[0]

        def written() -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
                pending = None
                filled.blocks += 1

        store.write_labels(task.train.labels[indices], indices)
        try:
            batches = read_batches(task.train, np.concatenate(positions), layout.block, task.loading)
            for block, block_indices, batch in zip(todo, positions, batches, strict=True):
                if not skip:
                    refuse_unreadable(batch)
                filled.skipped += [reason for _, reason in batch.unreadable]
                rows, culprit = block_rows(task, check, batch, size, block_indices, advance, written)
                filled.by_autograd.update([culprit] if culprit else [])
                written()
                pending = writer.submit(store.write, int(block), rows)
                filled.total += block_sums(rows.coordinates)
            written()
        except KeyboardInterrupt:
            _settle(pending)
            filled.blocks += pending is not None and pending.exception() is None
            raise
        except (MemoryError, RuntimeError) as error:
            _settle(pending)
            if not is_out_of_memory(error):
                raise
            raise InfluenceError(
                f"out of memory in block {int(block)} of {path} with batches of {size}",
                "finished work is kept: free memory, or lower gradients.block, which limits the batch "
                "(influence gradients --overwrite -s gradients.block=N)",
            ) from error


def _settle(pending: Future[None] | None) -> None:
    """Wait for the block that is being written and ignore its errors: another error is being raised already."""
    if pending is not None:
        pending.exception()


def block_rows(
    task: Task,
    check: RowCheck,
    batch: Batch,
    size: int,
    indices: np.ndarray,
    advance: Advance,
    before_last: Callable[[], None],
) -> tuple[Rows, str]:
    """Compute the rows of one block, and check some of them (precompute/row_check.py).

    Args:
        task: model and data.
        check: the tracked parameters, the basis of the coordinates, and what some rows are compared with.
        batch: the readable examples of the block.
        size: examples at once; always the same for a store, so that the same block gives the same bytes.
        indices: all positions of the block, unreadable ones included (their rows are zero).
        advance: called with the number of finished examples.
        before_last: called before the last examples are computed.

    Returns:
        The rows, and the module whose gradients autograd had to compute; empty if none.
    """
    network, basis = check.network, check.basis
    checked, culprit = checked_rows(len(batch)), ""
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(batch), size):
        part = slice(start, start + size)
        if part.stop >= len(batch):
            before_last()
        values, losses, outputs = coordinates(network, basis, batch.inputs[part], batch.targets[part])
        losses = plain_losses(network.loss, outputs, batch.targets[part], losses)
        piece = Batch(batch.inputs[part], batch.targets[part], batch.indices[part])
        some = checked[(checked >= start) & (checked < part.stop)] - start
        values, wrong = rows_or_autograd(check, piece, values, some)
        culprit = culprit or wrong
        check_gradients(task.train, piece, losses, values)
        pieces.append((_host(values), _host(losses), _host(outputs)))
        advance(len(piece))
    width = network.size if basis is None else basis.width
    place = rows_of(indices, batch.indices)
    rows, all_losses, all_outputs = (
        _rows_in_place([piece[column] for piece in pieces], place, (len(indices), *shape))
        for column, shape in enumerate(((width,), (), (len(task.classes),)))
    )
    state = np.full(len(indices), SKIPPED, dtype=np.uint8)
    state[place] = READ
    return Rows(rows, all_losses, all_outputs, state, batch.digest()), culprit


def _host(values: Tensor) -> np.ndarray:
    return np.asarray(values.float().cpu().numpy())


def _rows_in_place(pieces: list[np.ndarray], place: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put computed rows in their places, zeros elsewhere; a whole block is not copied again."""
    if len(place) == shape[0]:
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    whole = np.zeros(shape, dtype=np.float32)
    if pieces:
        whole[place] = np.concatenate(pieces)
    return whole
