"""Does a store still describe this model and this data? Checks beyond the hashes of weights and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from influence_cli.curvature.choice import Choice
from influence_cli.data.batches import read_batches
from influence_cli.errors import InfluenceError
from influence_cli.model.network import evaluate
from influence_cli.model.task import Task, measure_loading
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.store import READ, Store


def check_code(task: Task, choice: Choice, store: Store, block: int) -> None:
    """Recompute a few outputs of an intact block: this reveals changed model code, which no hash covers."""
    rows = np.arange(store.layout.n)[store.layout.rows(block)]
    rows = rows[store.column("state")[rows] == READ][:4]
    if not len(rows):
        return
    batch = next(read_batches(task.train, store.column("indices")[rows], len(rows)))
    if len(batch) != len(rows):
        return
    losses, outputs = evaluate(choice.network, batch.inputs, batch.labels)
    for name, now in (("outputs", outputs), ("losses", losses)):
        then = torch.from_numpy(store.column(name)[rows])
        if not torch.allclose(now.float().cpu(), then, rtol=1e-2, atol=1e-3 * float(then.abs().max()) + 1e-6):
            raise InfluenceError(
                f"{store.path} belongs to another model: the {name} of training example {batch.indices[0]} have "
                "changed since it was made, though the weights are the same",
                "was the code of the model or the loss edited? influence gradients --overwrite rebuilds the store",
            )


def changed_blocks(task: Task, path: Path, terminal: Terminal) -> np.ndarray:
    """Read every example again and list the blocks whose inputs have changed."""
    with Store.open(path) as store:
        layout, digests = store.layout, store.digests()
        done = np.flatnonzero(store.done())
    if not len(done):
        return np.empty(0, dtype=np.int64)
    order = np.concatenate([task.train.indices[layout.rows(int(block))] for block in done])
    changed = []
    with terminal.progress(len(order), "comparing inputs") as advance:
        measure_loading(task, terminal)
        for block, batch in zip(done, read_batches(task.train, order, layout.block, task.loading), strict=True):
            if batch.digest() != int(digests[block]):
                changed.append(block)
            advance(layout.block)
    return np.array(changed, dtype=np.int64)
