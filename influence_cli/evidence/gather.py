"""Evidence about labels that does not use them: the class of an example by everything except its own label.

Three opinions, each a log-probability of every class: a leave-one-out readout of all layers, the vote of the nearest
neighbours in the readout's leading components, and the model itself where it has not memorised its training labels.
``combined`` is their weighted sum, normalised: p ∝ Π pₖ^w. The model has not seen the labels of a test set, so all
three are out of sample there, and the weights are fitted by likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.data.batches import readable_batches
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.evidence.activations import ALL, Activations, activations, join_activations
from influence_cli.evidence.guessing import beats_guessing
from influence_cli.evidence.logistic import leave_one_out_logistic
from influence_cli.evidence.neighbours import distance, nearest, vote
from influence_cli.evidence.pooling import combined, pool
from influence_cli.evidence.readout import FLOOR, leave_one_out, log_softmax_
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.model.task import Task, measure_loading
from influence_cli.passes.finite import refuse_not_finite
from influence_cli.passes.probe import look
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal

# A model whose loss on its training labels is below this share of the leave-one-out loss has memorised them.
MEMORISED = 0.75
# The weight of each opinion, with the model and without: three make up a mean, which is calibrated; of two a little
# more ranks better. Fixed on label noise of Fashion-MNIST (bench/results/mislabels.md).
WITH_MODEL, WITHOUT = 1 / 3, 2 / 3
# A leave-one-out readout of a class with fewer examples has one or none to go by.
FEWEST = 3
# Share of the free memory for the activations; the regression needs twice as much again.
FREE_SHARE = 0.25
# Numbers that another loss than a cross-entropy is computed from, to see how well it fits; a difference worth a word.
FIT_NUMBERS, DIFFERS = 2**26, 0.25


@dataclass(frozen=True)
class Evidence:
    """What one forward pass over a split says about its labels, averaged over checkpoints.

    Attributes:
        facts: labels, the model's probabilities and losses, of the examples that could be read.
        log_probabilities: float32 [n, C] by source: ``combined``, ``readout``, ``neighbours``, ``logistic``;
            empty where there is no readout. NaN for an example that is not judged.
        nearest: int64 [n, k], rows of the nearest other examples, nearest first; [n, 0] without a readout, −1 for an
            example that is not judged.
        similarity: float32 [n, k], the cosine.
        distance: float32 [n], mean distance to the nearest of them; [0] without a readout.
        hashes: uint64 [n], of the model's input.
        memorised: whether the model's own opinion is left out of ``combined``, because it has memorised the labels.
        summary: accuracy and mean loss of model and readout, ridge, temperature, dimension; by name.
        obstacle: why there is no readout, or None.
        judged: bool [n], False for the examples of a class that has too few of them for a readout.
        informed: whether the readout is better than guessing.
    """

    facts: TrainingFacts
    log_probabilities: dict[str, np.ndarray]
    nearest: np.ndarray
    similarity: np.ndarray
    distance: np.ndarray
    hashes: np.ndarray
    memorised: bool
    summary: dict[str, float]
    obstacle: InfluenceError | None
    judged: np.ndarray
    informed: bool = True


@dataclass(frozen=True)
class _Readouts:
    """Log-probabilities [n, C] of one checkpoint's readouts, on the CPU, and the neighbours that voted."""

    log_probabilities: dict[str, Tensor]
    nearest: Tensor
    similarity: Tensor
    distance: Tensor


def gather_evidence(
    tasks: Sequence[Task],
    split: Split,
    terminal: Terminal,
    *,
    skip: bool,
    logistic: bool = False,
    obstacle: InfluenceError | None = None,
) -> Evidence | None:
    """Run each checkpoint forward over a split once, and compute the opinions.

    Each process of a job runs it over a part; the first one computes the opinions, None in the others.

    Args:
        tasks: one task per checkpoint; only the last one of a run is used.
        split: whose labels; the training split's may be memorised.
        terminal: progress, the diagnosis, warnings.
        skip: continue without unreadable examples.
        logistic: fit the logistic readout as well.
        obstacle: why there is to be no readout, if that is known already.

    Raises:
        InfluenceError: outputs or losses that are not finite.
    """
    summary: dict[str, float] = {}
    opinions: dict[str, Tensor] = {}
    first: _Readouts | None = None
    model: Tensor | None = None
    soft: Tensor | None = None
    losses, fits = [], []
    tasks = [task for task in tasks if task.explained]
    for number, task in enumerate(tasks):
        look(task, terminal)
        joined = _forward(task, split, terminal, skip=skip, first=number == 0)
        if joined is None:
            continue
        activations = joined
        losses.append(_losses(task, split, activations, torch.from_numpy(activations.targets)))
        soft = _added(soft, activations.outputs.softmax(dim=1))
        judged = _enough(activations.targets, len(task.classes))
        obstacle = obstacle or _obstacle(activations, judged, task.classes)
        judged = judged | (obstacle is not None)
        seen = activations if judged.all() else _some(activations, judged)
        targets = torch.from_numpy(seen.targets)
        if not task.softmax_loss:
            fits.append(_fit_by_loss(task, seen.outputs, targets))
        if obstacle is None:
            if number == 0 and not judged.all():
                terminal.warn(_left_out(activations.targets, judged, task.classes))
            one = _readouts(seen, task, summary, len(tasks), terminal, logistic=logistic)
            opinions = {name: _added(opinions.get(name), each) for name, each in one.log_probabilities.items()}
            first = first or replace(one, log_probabilities={})
        model = _added(model, log_softmax_(seen.outputs))
    distributed.hear(terminal.warnings, terminal.warn)
    if not distributed.is_first() or model is None or soft is None:
        return None
    if len(tasks) > 1:
        soft /= len(tasks)
        for mean in (model, *opinions.values()):
            mean /= len(tasks)
            log_softmax_(mean)
    facts = TrainingFacts(
        activations.indices,
        activations.targets,
        soft.numpy(),
        torch.stack(losses).mean(dim=0).numpy(),
        np.ones(len(activations.indices), dtype=bool),
    )
    none = np.empty((len(judged), 0), dtype=np.float32)
    evidence = Evidence(
        facts,
        {},
        none.astype(np.int64),
        none,
        np.empty(0),
        activations.hashes,
        memorised=False,
        summary=summary,
        obstacle=obstacle,
        judged=judged,
    )
    as_softmax = _loss(model, targets)
    fit = sum(fits) / len(fits) if fits else as_softmax
    summary |= {"model_loss": fit, "model_accuracy": _accuracy(model, targets)}
    if obstacle is not None or first is None:
        return evidence
    weighed = _weighed(evidence, opinions, model, targets, split.name, terminal)
    if not weighed.memorised and abs(fit - as_softmax) > DIFFERS * as_softmax:
        terminal.say(
            f"The model's own opinion takes its outputs for the logits of a softmax (loss {as_softmax:.3f}); "
            f"as {tasks[0].loss_name} reads them the loss is {fit:.3f}."
        )
    return replace(
        weighed,
        # Neighbours are numbered among all rows.
        nearest=_in_place(torch.from_numpy(np.flatnonzero(judged))[first.nearest], judged, -1),
        similarity=_in_place(first.similarity, judged, np.nan),
        distance=_in_place(first.distance, judged, np.nan),
    )


def _weighed(
    evidence: Evidence, opinions: dict[str, Tensor], model: Tensor, targets: Tensor, on: str, terminal: Terminal
) -> Evidence:
    """Decide whether the model is heard, and combine the opinions [m, C] of the m judged examples."""
    readout, summary = opinions["readout"], evidence.summary
    right = readout.argmax(dim=1) == targets
    summary |= {"readout_loss": _loss(readout, targets), "readout_accuracy": float(right.float().mean())}
    informed = beats_guessing(int(right.sum()), targets.numpy())
    memorised = on == "train" and informed and summary["model_loss"] < MEMORISED * summary["readout_loss"]
    terminal.say(_diagnosis(on, memorised=memorised, informed=informed))
    terminal.detail(_compared(summary))
    heard = [readout, opinions["neighbours"], *([] if memorised else [model])]
    weights = torch.full((len(heard),), WITHOUT if memorised else WITH_MODEL)
    if on != "train":
        weights = pool(heard, targets)
        summary |= dict(zip(("readout_weight", "neighbours_weight", "model_weight"), weights.tolist(), strict=True))
    opinions = {"combined": combined(weights, heard), **opinions}
    return replace(
        evidence,
        log_probabilities={name: _in_place(values, evidence.judged, np.nan) for name, values in opinions.items()},
        memorised=memorised,
        informed=informed,
    )


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _some(activations: Activations, rows: np.ndarray) -> Activations:
    return replace(
        activations,
        features=activations.features[torch.from_numpy(rows)],
        indices=activations.indices[rows],
        targets=activations.targets[rows],
        hashes=activations.hashes[rows],
    )


def _in_place(values: Tensor, rows: np.ndarray, other: float) -> np.ndarray:
    """Give values [m, …] of some of n rows as an array [n, …], the other rows filled."""
    if rows.all():
        return values.numpy()
    whole = np.full((len(rows), *values.shape[1:]), other, dtype=values.numpy().dtype)
    whole[rows] = values.numpy()
    return whole


def _forward(task: Task, split: Split, terminal: Terminal, *, skip: bool, first: bool) -> Activations | None:
    fits = int(FREE_SHARE * available_bytes(torch.device("cpu"))) // (4 * max(1, len(split)))
    most = distributed.smallest(min(ALL, max(1, fits)))
    indices = split.indices[distributed.share(len(split))]
    if most < ALL and first:
        terminal.detail(f"memory is short: at most {most:,} activations per example")
    with terminal.progress(len(indices), "activations of every layer") as advance:
        measure_loading(task, terminal)
        batches = readable_batches(
            split, indices, 256, task.loading, skip=skip, tell=terminal.warn if first else lambda _: None
        )
        some = len(indices) or distributed.size() == 1
        here = activations(task.model, batches, task.device, advance, most, split.title) if some else None
    return join_activations(here)


def _losses(task: Task, split: Split, activations: Activations, targets: Tensor) -> Tensor:
    device = task.device
    with torch.no_grad():
        losses = task.loss(activations.outputs.to(device), targets.to(device)).float().cpu()
    refuse_not_finite(split, activations.indices, losses.isfinite(), "loss")
    return losses


def _fit_by_loss(task: Task, outputs: Tensor, targets: Tensor) -> float:
    """Give the mean −log p(y) as the loss reads the outputs: p(c) ∝ exp(−ℓ(f, c)), over some of the examples.

    For cross-entropy p is the softmax. A loss with a scale or a margin of its own reads the outputs otherwise, and how
    well they fit the labels shows in that loss alone.
    """
    count, classes = outputs.shape
    step = max(1, count * classes**2 // FIT_NUMBERS)
    f, y = outputs[::step].to(task.device), targets[::step]
    with torch.no_grad():
        columns = [task.loss(f, torch.full((len(f),), c, device=f.device)) for c in range(classes)]
    return _loss((-torch.stack(columns, dim=1).float().cpu()).log_softmax(dim=1), y)


def _readouts(
    activations: Activations, task: Task, summary: dict[str, float], share: int, terminal: Terminal, *, logistic: bool
) -> _Readouts:
    classes, device = len(task.classes), task.device
    targets = torch.from_numpy(activations.targets).to(device)
    with terminal.status(f"leave-one-out readout of {activations.hidden.shape[1]:,} activations"):
        readout = leave_one_out(activations.hidden.to(device), targets, classes)
        # In their place: two copies of all outputs may not fit.
        voiced = log_softmax_(readout.outputs, readout.temperature)
    if readout.floored:
        terminal.warn(
            f"{readout.floored:,} examples have leverage above {1 - FLOOR}: the readout fits them whatever their "
            "label is; it has too many activations for so few examples"
        )
    for name, value in (
        ("ridge", readout.ridge),
        ("temperature", readout.temperature),
        ("dimension", readout.dimension),
        ("activations", float(activations.hidden.shape[1])),
    ):
        summary[name] = summary.get(name, 0.0) + value / share
    with terminal.progress(len(targets), "nearest neighbours") as advance:
        rows, similarity = nearest(readout.components, on_examples=advance)
    log_probabilities = {"readout": voiced, "neighbours": vote(rows, similarity, targets, classes)}
    if logistic:
        with terminal.status("leave-one-out logistic regression"):
            log_probabilities["logistic"] = leave_one_out_logistic(readout.components, targets, classes)
    far = distance(readout.components, rows)
    return _Readouts(
        {name: values.cpu() for name, values in log_probabilities.items()}, rows.cpu(), similarity.cpu(), far.cpu()
    )


def _loss(log_probabilities: Tensor, targets: Tensor) -> float:
    return float(functional.nll_loss(log_probabilities, targets))


def _accuracy(log_probabilities: Tensor, targets: Tensor) -> float:
    return float((log_probabilities.argmax(dim=1) == targets).float().mean())


def _enough(labels: np.ndarray, classes: int) -> np.ndarray:
    """Mark the examples of classes that have enough of them for a readout, bool [n]."""
    return np.asarray(np.bincount(labels, minlength=classes)[labels] >= FEWEST)


def _rare(labels: np.ndarray, judged: np.ndarray, classes: Sequence[str]) -> str:
    counts = np.bincount(labels[~judged], minlength=len(classes))
    rare = np.flatnonzero(counts)
    return ", ".join(f"{classes[int(c)]} ({counts[c]})" for c in rare[:6]) + (", …" if len(rare) > 6 else "")


def _left_out(labels: np.ndarray, judged: np.ndarray, classes: Sequence[str]) -> str:
    return (
        f"the leave-one-out readout needs at least {FEWEST} examples per class; these have fewer and are not judged, "
        f"they come last without a score: {_rare(labels, judged, classes)}"
    )


def _obstacle(activations: Activations, judged: np.ndarray, classes: Sequence[str]) -> InfluenceError | None:
    """Find why there can be no readout."""
    counts = np.bincount(activations.targets, minlength=len(classes))
    if (counts > 0).sum() < 2:
        count = len(activations.targets)
        which = "the only label is" if count == 1 else f"all {count:,} labels are"
        return InfluenceError(
            f"{which} {classes[int(counts.argmax())]}: no label can be suspected",
            "use a data set with two or more classes",
        )
    if not activations.hidden.shape[1]:
        return InfluenceError(
            "the model has no linear layer or convolution whose input could be read",
            "use --signal loss, margin or self-influence",
        )
    if (counts >= FEWEST).sum() < 2:
        return InfluenceError(
            f"the leave-one-out readout needs at least {FEWEST} examples per class, in two classes or more; these have "
            f"fewer: {_rare(activations.targets, judged, classes)}",
            "use --signal loss or self-influence",
        )
    return None


def _compared(summary: dict[str, float]) -> str:
    return (
        f"given labels: the model has accuracy {summary['model_accuracy']:.1%} and loss {summary['model_loss']:.3f}, "
        f"the readout without the label {summary['readout_accuracy']:.1%} and {summary['readout_loss']:.3f}"
    )


def _diagnosis(split: str, *, memorised: bool, informed: bool) -> str:
    if split != "train":
        return "The model was not trained on these labels, so its loss counts as evidence."
    if not informed:
        return (
            "The readout is no better than guessing, so it is not known whether the model has memorised its labels; "
            "the model's loss counts as evidence too."
        )
    if memorised:
        return "The model has memorised its labels; ranking by similar images instead."
    return "The model has not memorised its labels, so its loss counts as evidence."
