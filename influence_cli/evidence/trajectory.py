"""The checkpoints of one run: their probabilities, averaged over the run.

A label that was learned late, and only by heart, has little probability in the mean over the checkpoints, whatever the
last of them says. The margin of this mean is the strongest recipe of a study that takes such methods apart
(arXiv 2510.16211).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_cli.data.batches import readable_batches
from influence_cli.data.split import Split
from influence_cli.evidence.mapped import large, release
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task, measure_loading
from influence_cli.runtime import distributed, exchange
from influence_cli.runtime.terminal import Terminal

BATCH = 256


def earlier_probabilities(tasks: Sequence[Task], split: Split, terminal: Terminal, *, skip: bool) -> Tensor | None:
    """Sum the probabilities of the checkpoints before the last one, in one pass over the examples.

    The processes of a job share the pass; None in all but the first.

    Args:
        tasks: of these checkpoints.
        split: the examples.
        terminal: progress.
        skip: continue without unreadable examples.

    Returns:
        float32 [n, C] of the examples that could be read, in order.
    """
    indices = split.indices[distributed.share(len(split))]
    whole: Tensor | None = None
    count = 0
    with terminal.progress(len(indices), f"outputs of {len(tasks)} earlier checkpoints") as advance, torch.no_grad():
        measure_loading(tasks[0], terminal)
        for batch in readable_batches(split, indices, BATCH, tasks[0].loading, skip=skip):
            outputs = [logits_of(task.model(batch.inputs.to(task.device))) for task in tasks]
            total = torch.stack([each.softmax(dim=1) for each in outputs]).sum(dim=0).cpu()
            whole = large(len(indices), total.shape[1]) if whole is None else whole
            whole[count : count + len(total)] = total
            count += len(total)
            advance(len(batch))
    return exchange.rows_to_first(None if whole is None else whole[:count], large, release)
