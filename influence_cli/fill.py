"""Compute the missing blocks of a store, in order; each is complete on disk before the next is begun."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.choice import Choice
from influence_cli.data import Batch, read_batches, readable_batches, refuse_unreadable
from influence_cli.errors import Stopped, human_bytes
from influence_cli.layers import example_gradients, micro_batch
from influence_cli.probe import check_finite
from influence_cli.store import READ, SKIPPED, Rows, Store, block_sums
from influence_cli.task import Task
from influence_cli.terminal import Advance, Terminal, duration


def fill_blocks(task: Task, choice: Choice, path: Path, todo: np.ndarray, terminal: Terminal, skip: bool) -> None:
    """Compute blocks and write them, rows first, flag after.

    Args:
        task: model and data.
        choice: the tracked parameters.
        path: the store.
        todo: block numbers, rising.
        terminal: progress; skipped examples are listed there.
        skip: go on without examples that cannot be read (their rows are zero and marked).

    Raises:
        InfluenceError: an example cannot be read or has no finite loss or gradient; the disk is full.
        Stopped: Ctrl-C; the blocks before it are kept.
    """
    indices = task.train.indices
    with Store.open(path, write=True) as store:
        layout = store.layout
        basis = store.array("basis")
        projection = None if basis is None else torch.from_numpy(basis).to(task.device)
        order = np.concatenate([indices[layout.rows(int(block))] for block in todo])
        finished = 0
        # Rounded rows are summed by a scan, so that a resumed store is the same to the byte.
        total = np.zeros(layout.k + 1) if len(todo) == layout.blocks and layout.dtype == "float32" else None
        skipped: list[tuple[int, str]] = []
        started = time.perf_counter()
        try:
            with terminal.progress(len(order), f"gradients of {path.name}") as advance:
                for block, batch in zip(
                    todo, read_batches(task.train, order, layout.block, workers(task)), strict=True
                ):
                    if not skip:
                        refuse_unreadable(batch)
                    skipped += batch.unreadable
                    rows = block_rows(task, choice, batch, projection, indices[layout.rows(int(block))], advance)
                    store.write(int(block), rows)
                    if total is not None:
                        total += block_sums(rows.coordinates)
                    finished += 1
        except KeyboardInterrupt:
            kept = int(store.done().sum())
            raise Stopped(
                f"{path}: {kept} of {layout.blocks} blocks are done and kept; run the same command to go on"
            ) from None
        if total is not None:
            store.write_summary(total / max(1, store.readable()))
    for _, reason in skipped:
        terminal.warn(f"skipped: {reason}")
    size, spent = human_bytes(path.stat().st_size), duration(time.perf_counter() - started)
    terminal.say(f"wrote {finished} of {layout.blocks} blocks of {path} ({size}) in {spent}")


def block_rows(
    task: Task, choice: Choice, batch: Batch, projection: Tensor | None, indices: np.ndarray, advance: Advance
) -> Rows:
    """Compute the rows of one block.

    Args:
        task: model and data.
        choice: the tracked parameters.
        batch: the readable examples of the block.
        projection: basis P [p, k], or None to keep raw gradients.
        indices: all positions of the block, unreadable ones included (their rows are zero).
        advance: told of finished examples.
    """
    network = choice.network
    step = micro_batch(network, max(1, len(batch)))
    width = network.size if projection is None else projection.shape[1]
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(batch), step):
        part = slice(start, start + step)
        grads, part_losses, part_outputs = example_gradients(network, batch.inputs[part], batch.targets[part])
        piece = Batch(batch.inputs[part], batch.targets[part], batch.indices[part])
        check_finite(task.train, piece, part_losses, grads)
        own = grads if projection is None else grads @ projection
        pieces.append((_host(own), _host(part_losses), _host(part_outputs)))
        advance(len(piece))
    place = np.searchsorted(indices, batch.indices)
    coordinates, losses, outputs = (
        _rows_in_place([piece[column] for piece in pieces], place, (len(indices), *shape))
        for column, shape in enumerate(((width,), (), (len(task.classes),)))
    )
    state = np.full(len(indices), SKIPPED, dtype=np.uint8)
    state[place] = READ
    return Rows(coordinates, losses, outputs, state, batch.digest())


def _host(values: Tensor) -> np.ndarray:
    return np.asarray(values.float().cpu().numpy())


def _rows_in_place(pieces: list[np.ndarray], place: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put computed rows where they belong, zeros elsewhere; a whole block is not copied again."""
    if len(place) == shape[0]:
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    whole = np.zeros(shape, dtype=np.float32)
    if pieces:
        whole[place] = np.concatenate(pieces)
    return whole


def training_batches(task: Task, skip: bool, size: int = 256) -> Iterator[Batch]:
    """Read the training examples once, for the curvature."""
    return readable_batches(task.train, task.train.indices, size, workers(task), skip=skip)


def workers(task: Task) -> int:
    """Choose loader processes: none on a CPU, which they would take from the model; a few beside a GPU."""
    return min(4, os.cpu_count() or 1) if task.device.type == "cuda" else 0
