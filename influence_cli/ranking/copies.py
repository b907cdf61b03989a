"""Says which of the explained test examples are training examples as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.images import file_input
from influence_cli.data.split import raw_item, to_input
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import explained
from influence_cli.influence.test_selection import Selected
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task
from influence_cli.precompute.overlap import Overlap, copies_in_store
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal

# Of so many test examples the first are compared: they are read twice.
COMPARED = 64


def warn_of_copies(stores: Sequence[Prepared], selected: Sequence[Selected], terminal: Terminal) -> None:
    """Warn of test examples whose pixels are those of a training example; one that cannot be read is passed over.

    Args:
        stores: what was prepared for each checkpoint; on the fly there are no outputs to find an example by.
        selected: the test examples; the first ``COMPARED`` are compared.
        terminal: takes the warning.
    """
    if stores[0].on_the_fly or not distributed.is_first():
        return
    prepared = explained(stores)[0]
    task, chosen = prepared.task, selected[:COMPARED]
    read = [(item, *one) for item in chosen if (one := _read(task, item)) is not None]
    if not read:
        return
    copies = copies_in_store(
        prepared.path, task.train, [image for _, image, _ in read], torch.cat([o for *_, o in read])
    )
    pairs = [(item.index, copy) for (item, *_), copy in zip(read, copies, strict=True) if copy is not None]
    files = [(item.file, copy) for (item, *_), copy in zip(read, copies, strict=True) if item.file and copy is not None]
    for file, copy in files[:1]:
        more = f", and {len(files) - 1:,} more of the given files are training examples" if len(files) > 1 else ""
        terminal.warn(
            f"{file} is {task.train.title(copy)}, by its pixels{more}; results on it say little of new images"
        )
    known = np.array([pair for pair in pairs if pair[0] is not None], dtype=np.int64).reshape(-1, 2)
    if len(known) and task.test is not None:
        first = "the first " if len(selected) > COMPARED else ""
        among = f"{first}{len(chosen):,} test example{'' if len(chosen) == 1 else 's'}"
        terminal.warn(Overlap(known, "pixels").warning(task.train, task.test, among, task.classes))


def _read(task: Task, item: Selected) -> tuple[Any, Tensor] | None:
    """Read a raw test image, and run it forward: [1, C]."""
    try:
        if item.file is not None:
            tensor, picture = file_input(task.test or task.train, item.file)
            image: Any = picture
        else:
            split = task.test_split()
            image = raw_item(split, item.index or 0)[0]
            tensor = to_input(split, image, split.title(item.index or 0))
    except InfluenceError:
        return None
    with torch.no_grad():
        return image, logits_of(task.model(tensor[None].to(task.device))).float().cpu()
