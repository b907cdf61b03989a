"""The selected test examples, read in batches: their gradients' coordinates, and whose loss is explained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import Batch, read_batches, refuse_unreadable
from influence_cli.data.images import file_input
from influence_cli.data.label_files import class_number
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TestFacts
from influence_cli.influence.test_selection import Selected
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task, mean_probabilities
from influence_cli.passes.finite import check_gradients
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal


def check_target(target: str, classes: Sequence[str]) -> None:
    """Refuse a target that is not ``label``, ``predicted`` or a class."""
    if target not in ("label", "predicted"):
        class_number(target, classes, "--target")


def test_gradients(
    stores: Sequence[Prepared], selected: Sequence[Selected], target: str, terminal: Terminal, *, skip: bool
) -> tuple[list[TestFacts], list[Tensor]]:
    """Give the facts of test examples, and their gradients' coordinates under every checkpoint: [m, k] each."""
    tasks = [prepared.task for prepared in stores]
    facts: list[TestFacts] = []
    rows: list[list[Tensor]] = [[] for _ in stores]
    size, share = min(256, min(prepared.batch for prepared in stores)), sum(task.explained for task in tasks)
    items = selected[distributed.share(len(selected))]
    with terminal.progress(len(items), "test gradients") as advance:
        for batch, chosen in selected_batches(tasks[0], items, size, terminal, skip=skip):
            soft = mean_probabilities(tasks, batch.inputs)
            predicted = soft.argmax(dim=1)
            targets = explained_classes(target, tasks[0].classes, chosen, predicted)
            losses = torch.zeros(len(batch))
            for prepared, blocks in zip(stores, rows, strict=True):
                gradients, part, _ = prepared.coordinates(batch.inputs, targets)
                check_gradients(tasks[0].test or tasks[0].train, batch, part, gradients)
                blocks.append(gradients)
                if prepared.task.explained:
                    losses += part.float().cpu() / share
            facts += _test_facts(tasks[0], chosen, soft, targets, losses)
            advance(len(batch))
    coordinates = [torch.cat(blocks) if blocks else torch.empty(0) for blocks in rows]
    if distributed.size() > 1:
        facts = [one for part in distributed.gathered(facts) for one in part]
        parts = zip(*distributed.gathered([each.cpu() for each in coordinates]), strict=True)
        whole = [[part for part in blocks if len(part)] for blocks in parts]
        coordinates = [torch.cat(blocks).to(tasks[0].device) if blocks else torch.empty(0) for blocks in whole]
    return facts, coordinates


def _test_facts(
    task: Task, chosen: Sequence[Selected], soft: Tensor, targets: Tensor, losses: Tensor
) -> list[TestFacts]:
    """Put together what is known about test examples: their probabilities [m, C], targets [m] and losses [m]."""
    split, predicted = task.test, soft.argmax(dim=1)
    return [
        TestFacts(
            item.index,
            str(item.file) if item.file is not None else split.path(item.index or 0) if split else None,
            item.label,
            int(predicted[j]),
            int(targets[j]),
            float(losses[j]),
            float(soft[j, predicted[j]]),
            float(soft[j, targets[j]]),
        )
        for j, item in enumerate(chosen)
    ]


def explained_tests(
    task: Task, selected: Sequence[Selected], target: str, terminal: Terminal, *, skip: bool
) -> Iterator[tuple[list[TestFacts], Tensor, Tensor]]:
    """Read test examples without their gradients: their facts, inputs [m, …] and the classes that are explained [m]."""
    for batch, chosen in selected_batches(task, selected, 256, terminal, skip=skip):
        with torch.no_grad():
            outputs = logits_of(task.model(batch.inputs.to(task.device)))
            soft = outputs.softmax(dim=1).cpu()
            targets = explained_classes(target, task.classes, chosen, soft.argmax(dim=1))
            losses = task.loss(outputs, targets.to(task.device)).cpu()
        yield _test_facts(task, chosen, soft, targets, losses), batch.inputs, targets


def mean_gradients(
    stores: Sequence[Prepared], groups: Sequence[Sequence[Selected]], target: str, terminal: Terminal, *, skip: bool
) -> tuple[list[TestFacts], list[Tensor]]:
    """Give the facts of test examples, and the mean of their gradients under every checkpoint: [1, k] each.

    Args:
        stores: what was prepared for each checkpoint.
        groups: test examples, in groups small enough to hold their gradients.
        target: whose loss is explained.
        terminal: progress, skipped examples.
        skip: continue without unreadable examples.
    """
    seen: list[TestFacts] = []
    sums: list[Tensor] = []
    for group in groups:
        tests, gradients = test_gradients(stores, group, target, terminal, skip=skip)
        seen += tests
        if tests:
            parts = [gradient.sum(dim=0, keepdim=True) for gradient in gradients]
            sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
    return seen, [part / len(seen) for part in sums]


def gradient_groups(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    size: int,
    target: str,
    *,
    aggregate: bool,
    terminal: Terminal,
    skip: bool,
) -> Iterator[tuple[list[TestFacts], list[Tensor], list[TestFacts | None]]]:
    """Give test examples in groups of at most ``size`` with their gradients, [m, k] under every checkpoint.

    Yields:
        The facts of the examples that could be read, the gradients, and the test example of each gradient row,
        or None for the mean of all, the only group of an aggregate.

    Raises:
        InfluenceError: none of them could be read.
    """
    groups = [selected[start : start + size] for start in range(0, len(selected), size)]
    some = False
    if aggregate:
        tests, means = mean_gradients(stores, groups, target, terminal, skip=skip)
        some = bool(tests)
        if some:
            yield tests, means, [None]
    for group in [] if aggregate else groups:
        tests, gradients = test_gradients(stores, group, target, terminal, skip=skip)
        some = some or bool(tests)
        if tests:
            yield tests, gradients, list(tests)
    if not some:
        raise InfluenceError("none of the selected test examples could be read")


def selected_batches(
    task: Task, selected: Sequence[Selected], size: int, terminal: Terminal, *, skip: bool
) -> Iterator[tuple[Batch, list[Selected]]]:
    """Read the selected test examples in order: runs of positions together, files one by one."""
    run: list[Selected] = []
    for item in [*selected, None]:
        if item is not None and item.file is None and len(run) < size:
            run.append(item)
            continue
        if run:
            yield from _positions(task.test_split(), run, terminal, skip=skip)
            run = []
        if item is not None and item.file is None:
            run = [item]
        elif item is not None and item.file is not None:
            split = task.test or task.train
            try:
                tensor, _ = file_input(split, item.file)
            except InfluenceError as error:
                if not skip:
                    raise InfluenceError(
                        error.message, error.hint or "--skip-unreadable continues without it"
                    ) from error
                terminal.warn(f"skipped: {error.message}")
                continue
            label = item.label if item.label is not None else -1
            yield Batch(tensor[None], torch.tensor([label]), np.array([-1])), [item]


def _positions(
    split: Split, run: list[Selected], terminal: Terminal, *, skip: bool
) -> Iterator[tuple[Batch, list[Selected]]]:
    indices = np.array([item.index for item in run], dtype=np.int64)
    batch = next(read_batches(split, indices, len(indices)))
    if not skip:
        refuse_unreadable(batch)
    for _, reason in batch.unreadable:
        terminal.warn(f"skipped: {reason}")
    gone = {index for index, _ in batch.unreadable}
    chosen = [item for item in run if item.index not in gone]
    if chosen:
        labels = torch.tensor([-1 if item.label is None else item.label for item in chosen])
        yield replace(batch, targets=labels), chosen


def explained_classes(target: str, classes: Sequence[str], chosen: Sequence[Selected], predicted: Tensor) -> Tensor:
    """Choose the class whose loss is explained: the label (a file without one: the predicted class), or as asked."""
    if target == "predicted":
        return predicted
    if target != "label":
        return torch.full_like(predicted, class_number(target, classes, "--target"))
    labels = [int(predicted[j]) if item.label is None else item.label for j, item in enumerate(chosen)]
    return torch.tensor(labels)


# Numbers held at once for a group of test examples: 2²⁷, 512 MB in float32. On the fly, every group costs a pass over
# the training set, so it is up to this share of the free memory; the second one is for a GPU, which is not shared.
GROUP_NUMBERS, FREE_SHARE, GPU_SHARE = 2**27, 1 / 8, 1 / 3


def group_size(stores: Sequence[Prepared], kept: int | None) -> int:
    """Bound the test examples that are processed at once.

    Args:
        stores: what was prepared for each checkpoint.
        kept: training examples kept for each of them; None for all.
    """
    numbers, width = GROUP_NUMBERS, max(prepared.width for prepared in stores)
    if stores[0].on_the_fly:
        width = max(prepared.choice.network.size for prepared in stores)
        device = stores[0].task.device
        share = GPU_SHARE if device.type == "cuda" else FREE_SHARE
        numbers = max(numbers, int(share * available_bytes(device)) // 4)
    return max(1, numbers // (4 * width + 3 * (len(stores[0].task.train) if kept is None else kept)))
