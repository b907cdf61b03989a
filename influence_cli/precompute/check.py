"""`influence check`: load everything, look at a sample, and say what will happen and what looks wrong."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from influence_cli.config.schema import Config
from influence_cli.curvature.kronecker_plan import EXACT_BLOCK, make_plan
from influence_cli.data.batches import Batch, read_batches, readable_batches
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.model.network import Network, evaluate, owner_of
from influence_cli.model.sample_weights import plain_losses
from influence_cli.model.task import Task, load_tasks
from influence_cli.passes.batch_size import plan_batch
from influence_cli.passes.contractions import cheapest, positions
from influence_cli.passes.finite import check_finite
from influence_cli.passes.gradients import example_gradients, summed_gradient
from influence_cli.passes.layers import forward
from influence_cli.passes.probe import checkpoint_warnings, near_chance, other_order
from influence_cli.precompute.budget import most_columns, row_bytes
from influence_cli.precompute.cost import estimate
from influence_cli.precompute.decide import decide
from influence_cli.precompute.overlap import find_overlap
from influence_cli.precompute.prepared import store_path
from influence_cli.precompute.stationarity import Explanation, Part, explain
from influence_cli.runtime.terminal import Terminal, duration, or_silent
from influence_cli.store.store import Store

SAMPLE = 512
# What the gradient of the objective may show that is worth a warning by itself.
SHOWN = ("factor", "plain", "decay", "layers")
# Up to this many parameters, gradients of all sampled examples are computed; beyond, only a few.
EVERY_NORM, FEW_NORMS = 1_000_000, 4


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
class Measured:
    """What a check of some examples of a split gives.

    Attributes:
        accuracy: in [0, 1].
        loss: the mean, in the loss's units.
        gradient_norm: ‖∇R + l2·θ̂‖ over the tracked parameters.
        typical_norm: root mean square of ‖gᵢ‖.
        count: examples.
        parts: the gradient in each tracked parameter.
        order: what ``other_order`` says of the predictions.
    """

    accuracy: float
    loss: float
    gradient_norm: float
    typical_norm: float
    count: int
    parts: tuple[Part, ...] = ()
    order: str = ""


def check_run(
    config: Config,
    *,
    full: bool = False,
    terminal: Terminal | None = None,
    skip_unreadable: bool = False,
    tasks: Sequence[Task] | None = None,
) -> list[Finding]:
    """Load model, checkpoint and data; measure accuracy, loss and gradient on a seeded sample; plan the store.

    Args:
        config: the run's config.
        full: all examples instead of a sample of 512.
        terminal: progress and warnings.
        skip_unreadable: continue without unreadable examples.
        tasks: one per checkpoint; None loads them.

    Returns:
        Findings in reading order; warnings are in ``terminal.warnings``.

    Raises:
        InfluenceError: whatever would stop the other commands.
    """
    terminal = or_silent(terminal)
    tasks = load_tasks(config, terminal) if tasks is None else tasks
    findings = _data_findings(tasks[0])
    if tasks[0].test is not None:
        findings.append(_overlap_finding(tasks[0], tasks[0].test, terminal, full=full))
    for number, task in enumerate(tasks):
        if len(tasks) > 1:
            findings.append(Finding("checkpoint", str(task.checkpoint)))
        findings += _task_findings(config, number, task, full=full, terminal=terminal, skip=skip_unreadable)
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
        none = "; they have no labels" if task.test.is_unlabelled else ""
        findings.append(Finding("test examples", len(task.test), f"of {len(task.test.source)}{none}"))
    return [*findings, Finding("device", str(task.device))]


def _overlap_finding(task: Task, test: Split, terminal: Terminal, *, full: bool) -> Finding:
    with terminal.status("comparing test and training examples"):
        overlap = find_overlap(task.train, test, full=full)
    if text := overlap.warning(task.train, test, f"{len(test):,} test examples", task.classes):
        terminal.warn(text)
    how = "not compared: reading them takes long; --full does" if overlap.compared == "nothing" else ""
    count = None if how else len(overlap.pairs)
    return Finding("test examples among the training examples", count, how or f"by their {overlap.compared}")


def _task_findings(
    config: Config, number: int, task: Task, *, full: bool, terminal: Terminal, skip: bool
) -> list[Finding]:
    choice, batch = decide(config, task, terminal)
    network = choice.network
    findings = [
        Finding("parameters tracked", network.size, f"in {len(network.names)} tensors"),
        Finding("parameters left out", sum(_numel(task, name) for name in network.left_out)),
        Finding("example gradients", _ways(network)),
    ]
    train = measure(task, task.train, network, terminal, full=full, skip=skip, gradients=True)
    findings += [
        Finding("training accuracy", train.accuracy, f"over {train.count:,} examples"),
        Finding("mean training loss", train.loss, "nats" if task.loss_name == "cross_entropy" else task.loss_name),
        Finding("gradient norm at the checkpoint", train.gradient_norm, "‖∇R + l2·θ‖, 0 at a minimum"),
        Finding("typical gradient norm", train.typical_norm, "of one example"),
    ]
    sampled = train.count if train.count < len(task.train) else None
    findings += objective_findings(train.parts)
    explained = explain_objective(task, train)
    # A run's checkpoints need no minimum; where the pattern says what was trained, that is the warning.
    norm = 0.0 if config.model.is_one_run or explained else train.gradient_norm
    if explained and not config.model.is_one_run:
        terminal.warn(explained)
    numbers = (train.accuracy, len(task.classes), norm, train.typical_norm, sampled)
    for text in checkpoint_warnings(*numbers, order=train.order):
        terminal.warn(text)
    if task.test is not None and not task.test.is_unlabelled:
        test = measure(task, task.test, network, terminal, full=full, skip=skip, gradients=False)
        findings.append(Finding("test accuracy", test.accuracy, f"over {test.count:,} examples"))
        if near_chance(test.accuracy, len(task.classes)) and not near_chance(train.accuracy, len(task.classes)):
            terminal.warn(f"test accuracy {test.accuracy:.1%} is near chance: do both sets have the same classes?")
    if choice.method == "replay":  # a record takes the place of the store
        return findings
    path = store_path(config, number)
    need = min(row_bytes(config, task, choice), config.gradients.budget)
    examples = plan_batch(network, batch.inputs, 0 if choice.has_basis else network.size, config.gradients.block)
    width = most_columns(config, task, choice)
    plan = estimate(task, choice, batch, size=examples, block=config.gradients.block, width=width)
    matrix = f" {choice.matrix}" if choice.method not in ("identity", "fisher") else ""
    findings += [
        Finding("curvature", f"{choice.method}{matrix}"),
        Finding("store", str(path), "exists" if path.exists() else "not created yet"),
        Finding("store size, at most", need, human_bytes(need)),
        Finding("examples in a batch", examples, "within the free memory"),
        Finding("memory, about", plan.memory, human_bytes(plan.memory)),
        Finding("time to fill it, about", plan.seconds, duration(plan.seconds)),
    ]
    if choice.is_layered:
        findings += _layer_findings(network, batch, path)
    folder = path.parent
    if folder.is_dir() and not path.exists() and shutil.disk_usage(folder).free < need:
        free = human_bytes(shutil.disk_usage(folder).free)
        terminal.warn(f"{folder} has {free} free, but the store needs up to {human_bytes(need)}")
    return findings


def objective_findings(parts: Sequence[Part]) -> list[Finding]:
    """Give how far each layer is from the minimum: ‖∇R + l2·θ‖, relative to the larger of its two parts."""
    layers: dict[str, list[Part]] = {}
    for part in parts:
        layers.setdefault(owner_of(part.name) or part.name, []).append(part)
    findings = []
    for name, inside in layers.items():
        left, slope, decay, typical = (
            math.hypot(*values)
            for values in zip(*((part.left(), part.slope, part.decay, part.typical) for part in inside), strict=True)
        )
        unit = f"‖∇R + l2·θ‖, relative to the larger of ‖∇R‖ = {slope:.3g} and ‖l2·θ‖ = {decay:.3g}"
        most = max(slope, decay)
        value = left / most if most > 0 else 0.0
        findings.append(Finding(f"objective in {name}", value, f"{unit}; one example: {typical:.3g}"))
    return findings


def explain_objective(task: Task, seen: Measured) -> str:
    """Say which objective was trained where the pattern of the gradient shows it; empty where it does not.

    Args:
        task: model and data.
        seen: of its training examples, with gradients.
    """
    explained = _explanation(task, seen)
    return explained.text if explained.verdict in SHOWN else ""


def _explanation(task: Task, seen: Measured) -> Explanation:
    noise = 2 / math.sqrt(seen.count) if seen.count < len(task.train) else 0.0
    rules, scale = dict(task.objective.rules), task.objective.factor
    return explain(seen.parts, len(task.train), rules, scale=scale, noise=noise)


def objective_hint(config: Config, number: int, task: Task, terminal: Terminal, *, poor: bool) -> str:
    """Say which objective was trained, if the gradient shows it, or what else may be why retraining disagrees.

    Args:
        config: the run's config.
        number: which of its checkpoints was compared.
        task: that checkpoint and its data.
        terminal: progress of one pass over the training examples.
        poor: whether retraining disagrees with influence: then a likely cause is always named.
    """
    network = decide(config, task, Terminal(quiet=True), store_path(config, number))[0].network
    seen = measure(task, task.train, network, terminal, full=True, skip=True, gradients=True)
    explained = _explanation(task, seen)
    if not poor:
        return explained.text if explained.verdict in SHOWN else ""
    if explained.verdict == "minimum":
        return (
            "likely cause: the training function. The checkpoint is at a minimum of the objective in the config, so "
            "loss and l2 fit it; another loss, class weights or weight decay there, or a stop before the minimum?"
        )
    return f"likely cause: {explained.text}" if explained.text else ""


def _ways(network: Network) -> str:
    """Say how example gradients are computed, and of how many parameters."""
    rest = sum(network.model.get_parameter(name).numel() for name in network.rest)
    if not rest:
        return f"layer pass, {len(network.layers)} layers"
    way = "torch.func" if network.vectorised else "a loop of autograd"
    if not network.layers:
        return way
    return f"layer pass, {len(network.layers)} layers; {way} for {rest:,} parameters"


def _layer_findings(network: Network, batch: Batch, path: Path) -> list[Finding]:
    """Give the plan per block of a basis per layer: its factors, the cheaper order, what the store keeps of it."""
    kept = _kept_coordinates(path)
    plan = make_plan(network)
    tape = forward(network, batch.inputs[:2])
    calls = tape.backward(torch.ones_like(tape.outputs))
    findings = []
    for position, number in enumerate(plan.layers):
        layer = network.layers[number]
        tokens = positions(layer, calls[number]) if number < len(calls) else 0
        order = cheapest(max(1, tokens), (layer.outputs, layer.outputs), (layer.width, layer.width))
        text = f"{layer.outputs} ⊗ {layer.width}" + (f", {layer.groups} groups" if layer.groups > 1 else "")
        first = "a and δ rotated first" if order == "sides" else "gradient computed first"
        findings.append(
            Finding(f"layer {layer.name}", text, f"{layer.kind}, {tokens:,} positions, {first}{kept(position)}")
        )
    for position, names in enumerate(plan.loose, start=len(plan.layers)):
        size = sum(network.model.get_parameter(name).numel() for name in names)
        kind = "exact block" if size <= EXACT_BLOCK else "diagonal"
        findings.append(Finding(f"layer {owner_of(names[0]) or names[0]}", f"{size:,}", f"{kind}{kept(position)}"))
    return findings


def _kept_coordinates(path: Path) -> Callable[[int], str]:
    """Count the coordinates of each block that a store keeps, if there is a store."""
    if not path.exists():
        return lambda _: ""
    with Store.open(path) as store:
        chosen, described = store.array("kept"), store.facts.get("blocks")
        if chosen is None or described is None:
            return lambda _: ""
        sizes = [
            len(values.reshape(-1))
            for name in store.names("factor.")
            if name.endswith(".values")
            for values in [store.array(name)]
            if values is not None
        ]
    ends = np.cumsum(sizes)
    counts = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(ends))
    return lambda position: f"; {counts[position]:,} coordinates kept" if position < len(counts) else ""


def _numel(task: Task, name: str) -> int:
    return task.model.get_parameter(name).numel()


def measure(
    task: Task, split: Split, network: Network, terminal: Terminal, *, full: bool, skip: bool, gradients: bool
) -> Measured:
    """Measure a seeded sample of a split, or all of it.

    Args:
        task: model and data.
        split: one of its splits.
        network: the tracked parameters.
        full: all examples instead of a sample of 512.
        terminal: progress, skipped examples.
        skip: continue without unreadable examples.
        gradients: whether the norms are wanted.
    """
    chosen = split.indices
    if not full and len(split) > SAMPLE:
        chosen = np.sort(np.random.default_rng(task.seed).choice(split.indices, SAMPLE, replace=False))
    losses, seen = 0.0, list[tuple[np.ndarray, np.ndarray]]()
    squares = dict.fromkeys(network.slots, 0.0)
    # For a large model a few example gradients must suffice for the typical norm; the mean is still exact.
    each = network.size if gradients and network.size <= EVERY_NORM else 0
    # A large model fills the memory itself: no float64 sum, and one example gradient at a time.
    total = torch.zeros(network.size if gradients else 0, dtype=torch.float64 if each else torch.float32)
    examples = _readable_batch(split, chosen)
    step = 256 if examples is None else plan_batch(network, examples, each, 256)
    normed = 0
    with terminal.progress(len(chosen), f"checking the {split.name} examples") as advance:
        for batch in readable_batches(split, chosen, step, skip=skip, tell=terminal.warn):
            if each:
                grads, part, outputs = example_gradients(network, batch.inputs, batch.targets)
                check_finite(split, batch, part, grads)
                total += grads.sum(dim=0).cpu().double()
                normed += len(batch)
                for name, place in network.slots.items():
                    squares[name] += _square(grads[:, place])
            elif gradients:
                slope, part, outputs = summed_gradient(network, batch.inputs, batch.targets)
                check_finite(split, batch, part)
                total += slope.cpu()
                del slope
                if not normed:
                    normed = min(FEW_NORMS, len(batch))
                    for row in range(normed):
                        _add_squares(squares, network, batch, row)
            else:
                part, outputs = evaluate(network, batch.inputs, batch.targets)
                check_finite(split, batch, part)
            seen.append((batch.labels.numpy(), outputs.argmax(dim=1).cpu().numpy()))
            losses += float(plain_losses(network.loss, outputs, batch.targets, part).sum())
            advance(len(batch))
    if not seen:
        raise InfluenceError(f"{split.where}: no {split.name} example of the sample could be read")
    labels, predicted = (np.concatenate(part) for part in zip(*seen, strict=True))
    count, accuracy = len(labels), float((labels == predicted).mean())
    parts = []
    for name, place in network.slots.items() if gradients else ():
        parameter = network.model.get_parameter(name).detach()
        theta, slope = parameter.reshape(-1).cpu().double(), total[place].double() / count
        l2, typical = task.objective.l2_of(name), math.sqrt(squares[name] / max(1, normed))
        product, plain = float(slope @ theta), parameter.ndim <= 1
        parts.append(Part(name, float(slope.norm()), float(theta.norm()), l2, product, typical, plain))
    norm = math.sqrt(sum(part.left() ** 2 for part in parts))
    typical = math.sqrt(sum(part.typical**2 for part in parts))
    order = other_order(task.classes, labels, predicted) if gradients else ""
    return Measured(accuracy, losses / count, norm, typical, count, tuple(parts), order)


def _add_squares(squares: dict[str, float], network: Network, batch: Batch, row: int) -> None:
    """Add ‖g‖² of one example of a batch, in float64 per parameter, without a copy of all of them."""
    one = example_gradients(network, batch.inputs[row : row + 1], batch.targets[row : row + 1])[0][0]
    for name, place in network.slots.items():
        squares[name] += _square(one[place])


def _square(vector: torch.Tensor) -> float:
    return float(vector.double().square().sum())


def _readable_batch(split: Split, chosen: np.ndarray) -> torch.Tensor | None:
    """Read a few inputs for a measurement; None if none of the first ones can be read."""
    batch = next(read_batches(split, chosen[:2], 2))
    return batch.inputs if len(batch) else None
