"""`influence check`: load everything, look at a sample, and say what will happen and what looks wrong."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.config import Config
from influence_cli.data import Split, readable_batches
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.estimate import estimate
from influence_cli.layers import Network, evaluate, example_gradients, flatten, micro_batch
from influence_cli.precompute import decide, row_bytes, store_path
from influence_cli.probe import check_finite, checkpoint_warnings, near_chance
from influence_cli.task import Task, load_tasks
from influence_cli.terminal import Terminal, duration

SAMPLE = 512


@dataclass(frozen=True)
class Finding:
    """One line of the check.

    Attributes:
        item: what was looked at.
        value: a number or a name.
        unit: of the number; empty for a name.
    """

    item: str
    value: object
    unit: str = ""


@dataclass(frozen=True)
class _Measured:
    accuracy: float
    loss: float
    gradient_norm: float
    typical_norm: float
    count: int


def check_run(
    config: Config, *, full: bool = False, terminal: Terminal, skip_unreadable: bool = False
) -> list[Finding]:
    """Load model, checkpoint and data; measure accuracy, loss and gradient on a seeded sample; plan the store.

    Args:
        config: the run's config.
        full: all examples instead of a sample of 512.
        terminal: progress and warnings.
        skip_unreadable: go on without examples that cannot be read.

    Returns:
        Findings in reading order; warnings are in ``terminal.warnings``.

    Raises:
        InfluenceError: whatever would stop the other commands.
    """
    tasks = load_tasks(config)
    findings = _data_findings(tasks[0])
    for number, task in enumerate(tasks):
        if len(tasks) > 1:
            findings.append(Finding("checkpoint", str(task.checkpoint)))
        findings += _task_findings(config, number, task, full, terminal, skip_unreadable)
    return findings


def _data_findings(task: Task) -> list[Finding]:
    findings = [
        Finding("classes", len(task.classes)),
        Finding("training examples", len(task.train), f"of {len(task.train.source)}"),
        Finding("n", task.n, "the checkpoint was trained on"),
    ]
    counts = np.bincount(task.train.labels[task.train.indices], minlength=len(task.classes))
    findings.append(
        Finding("smallest class", int(counts.min()), f"training examples of {task.classes[counts.argmin()]}")
    )
    if task.test is not None:
        findings.append(Finding("test examples", len(task.test), f"of {len(task.test.source)}"))
    return [*findings, Finding("device", str(task.device))]


def _task_findings(
    config: Config, number: int, task: Task, full: bool, terminal: Terminal, skip: bool
) -> list[Finding]:
    choice, batch = decide(config, task, terminal)
    network = choice.network
    findings = [
        Finding("parameters tracked", network.size, f"in {len(network.names)} tensors"),
        Finding("parameters left out", sum(_numel(task, name) for name in network.left_out)),
        Finding("example gradients", "torch.func" if network.vectorised else "a loop of autograd"),
    ]
    train = _measure(task, task.train, choice.network, full, terminal, skip, gradients=True)
    findings += [
        Finding("training accuracy", train.accuracy, f"over {train.count:,} examples"),
        Finding("mean training loss", train.loss, "nats" if task.loss_name == "cross_entropy" else task.loss_name),
        Finding("gradient norm at the checkpoint", train.gradient_norm, "‖∇R + l2·θ‖, 0 at a minimum"),
        Finding("typical gradient norm", train.typical_norm, "of one example"),
    ]
    sampled = train.count if train.count < len(task.train) else None
    for text in checkpoint_warnings(
        train.accuracy, len(task.classes), train.gradient_norm, train.typical_norm, sampled
    ):
        terminal.warn(text)
    if task.test is not None:
        test = _measure(task, task.test, choice.network, full, terminal, skip, gradients=False)
        findings.append(Finding("test accuracy", test.accuracy, f"over {test.count:,} examples"))
        if near_chance(test.accuracy, len(task.classes)) and not near_chance(train.accuracy, len(task.classes)):
            terminal.warn(f"test accuracy {test.accuracy:.1%} is near chance: are the classes of both sets the same?")
    path = store_path(config, number)
    need = min(row_bytes(config, task, choice), config.gradients.budget)
    plan = estimate(task, choice, batch)
    matrix = f" {choice.matrix}" if choice.method != "identity" else ""
    findings += [
        Finding("curvature", f"{choice.method}{matrix}"),
        Finding("store", str(path), "exists" if path.exists() else "not made yet"),
        Finding("store size, at most", need, human_bytes(need)),
        Finding("memory, about", plan.memory, human_bytes(plan.memory)),
        Finding("time to fill it, about", plan.seconds, duration(plan.seconds)),
    ]
    folder = path.parent
    if folder.is_dir() and not path.exists() and shutil.disk_usage(folder).free < need:
        free = human_bytes(shutil.disk_usage(folder).free)
        terminal.warn(f"{folder} has {free} free, the store needs up to {human_bytes(need)}")
    return findings


def _numel(task: Task, name: str) -> int:
    return task.model.get_parameter(name).numel()


def _measure(
    task: Task, split: Split, network: Network, full: bool, terminal: Terminal, skip: bool, *, gradients: bool
) -> _Measured:
    chosen = split.indices
    if not full and len(split) > SAMPLE:
        chosen = np.sort(np.random.default_rng(task.seed).choice(split.indices, SAMPLE, replace=False))
    right, losses, squares, count = 0, 0.0, 0.0, 0
    total = torch.zeros(network.size, dtype=torch.float64)
    step = min(256, micro_batch(network, 256))
    with terminal.progress(len(chosen), f"looking at the {split.name} examples") as advance:
        for batch in readable_batches(split, chosen, step, skip=skip, tell=terminal.warn):
            if gradients:
                grads, part, outputs = example_gradients(network, batch.inputs, batch.targets)
                check_finite(split, batch, part, grads)
                total += grads.sum(dim=0).cpu().double()
                squares += float(grads.double().square().sum())
            else:
                part, outputs = evaluate(network, batch.inputs, batch.targets)
                check_finite(split, batch, part)
            right += int((outputs.argmax(dim=1).cpu() == batch.targets).sum())
            losses += float(part.sum())
            count += len(batch)
            advance(len(batch))
    if not count:
        raise InfluenceError(f"{split.where}: no {split.name} example of the sample could be read")
    theta = flatten([parameter.detach() for parameter in network.parameters().values()]).cpu().double()
    slope = total / count + task.l2 * theta
    return _Measured(right / count, losses / count, float(slope.norm()), float(np.sqrt(squares / count)), count)
