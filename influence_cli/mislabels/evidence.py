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
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.mislabels.activations import ALL, Activations, activations, join_activations
from influence_cli.mislabels.logistic import leave_one_out_logistic
from influence_cli.mislabels.neighbours import distance, nearest, vote
from influence_cli.mislabels.readout import FLOOR, leave_one_out
from influence_cli.model.task import Task, measure_loading
from influence_cli.passes.finite import refuse_not_finite
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal

# A model whose loss on its training labels is below this share of the leave-one-out loss has memorised them.
MEMORISED = 0.75
# The weight of each opinion, with the model and without: three make up a mean, which is calibrated; of two a little
# more ranks better. Fixed on label noise of Fashion-MNIST (bench/results/mislabels.md).
WITH_MODEL, WITHOUT = 1 / 3, 2 / 3
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
            empty where there is no readout.
        nearest: int64 [n, k], rows of the nearest other examples, nearest first; [n, 0] without a readout.
        similarity: float32 [n, k], the cosine.
        distance: float32 [n], mean distance to the nearest of them; [0] without a readout.
        hashes: uint64 [n], of the model's input.
        memorised: whether the model's own opinion is left out of ``combined``, because it has memorised the labels.
        summary: accuracy and mean loss of model and readout, ridge, temperature, dimension; by name.
        obstacle: why there is no readout, or None.
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


@dataclass(frozen=True)
class _Readouts:
    """Log-probabilities [n, C] of one checkpoint's readouts, on the CPU, and the neighbours that voted."""

    log_probabilities: dict[str, Tensor]
    nearest: Tensor
    similarity: Tensor
    distance: Tensor


def gather_evidence(
    tasks: Sequence[Task], split: Split, terminal: Terminal, *, skip: bool, logistic: bool = False
) -> Evidence | None:
    """Run each checkpoint forward over a split once, and compute the opinions.

    Each process of a job runs it over a part; the first one computes the opinions, None in the others.

    Args:
        tasks: one task per checkpoint; only the last one of a run is used.
        split: whose labels; the training split's may be memorised.
        terminal: progress, the diagnosis, warnings.
        skip: continue without unreadable examples.
        logistic: fit the logistic readout as well.

    Raises:
        InfluenceError: outputs or losses that are not finite.
    """
    summary: dict[str, float] = {}
    readouts: list[_Readouts] = []
    models, losses, soft, fits = [], [], [], []
    obstacle: InfluenceError | None = None
    tasks = [task for task in tasks if task.explained]
    for number, task in enumerate(tasks):
        joined = _forward(task, split, terminal, skip=skip, first=number == 0)
        if joined is None:
            continue
        activations = joined
        targets = torch.from_numpy(activations.targets)
        losses.append(_losses(task, split, activations, targets))
        models.append(activations.outputs.log_softmax(dim=1))
        if not task.softmax_loss:
            fits.append(_fit_by_loss(task, activations.outputs, targets))
        soft.append(activations.outputs.softmax(dim=1))
        obstacle = _obstacle(activations, task.classes)
        if obstacle is None:
            readouts.append(_readouts(activations, task, summary, len(tasks), terminal, logistic=logistic))
    distributed.hear(terminal.warnings, terminal.warn)
    if not distributed.is_first():
        return None
    model = torch.stack(models).mean(dim=0).log_softmax(dim=1)
    facts = TrainingFacts(
        activations.indices,
        activations.targets,
        torch.stack(soft).mean(dim=0).numpy(),
        torch.stack(losses).mean(dim=0).numpy(),
        np.ones(len(activations.indices), dtype=bool),
    )
    as_softmax = _loss(model, targets)
    fit = sum(fits) / len(fits) if fits else as_softmax
    summary |= {"model_loss": fit, "model_accuracy": _accuracy(model, targets)}
    none = np.empty((len(targets), 0), dtype=np.float32)
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
    )
    if obstacle is not None:
        return evidence
    log_probabilities = {
        name: torch.stack([each.log_probabilities[name] for each in readouts]).mean(dim=0).log_softmax(dim=1)
        for name in readouts[0].log_probabilities
    }
    readout = log_probabilities["readout"]
    summary |= {"readout_loss": _loss(readout, targets), "readout_accuracy": _accuracy(readout, targets)}
    memorised = split.name == "train" and summary["model_loss"] < MEMORISED * summary["readout_loss"]
    terminal.say(_diagnosis(split.name, memorised=memorised))
    terminal.detail(_compared(summary))
    if not memorised and abs(fit - as_softmax) > DIFFERS * as_softmax:
        terminal.say(
            f"The model's own opinion takes its outputs for the logits of a softmax (loss {as_softmax:.3f}); "
            f"as {tasks[0].loss_name} reads them the loss is {fit:.3f}."
        )
    heard = torch.stack([readout, log_probabilities["neighbours"], *([] if memorised else [model])])
    weights = torch.full((len(heard),), WITHOUT if memorised else WITH_MODEL)
    if split.name != "train":
        weights = pool(heard, targets)
        summary |= dict(zip(("readout_weight", "neighbours_weight", "model_weight"), weights.tolist(), strict=True))
    log_probabilities = {"combined": torch.einsum("k,knc->nc", weights, heard).log_softmax(dim=1), **log_probabilities}
    return replace(
        evidence,
        log_probabilities={name: values.numpy() for name, values in log_probabilities.items()},
        nearest=readouts[0].nearest.numpy(),
        similarity=readouts[0].similarity.numpy(),
        distance=readouts[0].distance.numpy(),
        memorised=memorised,
    )


def pool(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Find the weights of a log-linear pool, p ∝ Π pₖ^wₖ, that make the targets likeliest, w ≥ 0.

    The negative log-likelihood is convex in w: its slope is the mean of E_p[log pₖ] − log pₖ(target), its curvature
    the mean covariance under p. Newton steps; an opinion whose weight would be negative is left out.

    Args:
        log_probabilities: [k, n, C], k sources.
        targets: int64 [n].

    Returns:
        w [k].
    """
    logs = log_probabilities.double()
    heard = torch.ones(len(logs), dtype=torch.bool)
    weights = torch.full((len(logs),), 1 / len(logs), dtype=torch.float64)
    given = torch.stack([each[torch.arange(len(targets)), targets] for each in logs])
    for _ in range(50):
        soft = torch.einsum("k,knc->nc", weights, logs).softmax(dim=1)
        mean = (soft * logs).sum(dim=2)
        slope = (mean - given).mean(dim=1)
        curve = torch.einsum("nc,knc,lnc->kl", soft, logs, logs) / len(targets) - mean @ mean.T / len(targets)
        step = torch.zeros_like(weights)
        curve = curve[heard][:, heard] + 1e-9 * torch.eye(int(heard.sum()), dtype=torch.float64)
        step[heard] = torch.linalg.solve(curve, slope[heard])
        following = weights - step
        if bool((following < 0).any()) and int(heard.sum()) > 1:
            heard[int(following.argmin())] = False
            weights = torch.where(heard, weights, 0)
            continue
        weights = following.clamp_min(0)
        if float(step.abs().max()) < 1e-6:
            break
    return weights.float()


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
    log_probabilities = {"readout": readout.log_probabilities, "neighbours": vote(rows, similarity, targets, classes)}
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


def _obstacle(activations: Activations, classes: Sequence[str]) -> InfluenceError | None:
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
    rare = np.flatnonzero((counts > 0) & (counts < 3))
    if len(rare):
        named = ", ".join(f"{classes[int(c)]} ({counts[c]})" for c in rare[:6]) + (", …" if len(rare) > 6 else "")
        return InfluenceError(
            f"the leave-one-out readout needs at least 3 examples per class; these have fewer: {named}",
            "use --signal loss or self-influence, or list them under exclude",
        )
    return None


def _compared(summary: dict[str, float]) -> str:
    return (
        f"given labels: the model has accuracy {summary['model_accuracy']:.1%} and loss {summary['model_loss']:.3f}, "
        f"the readout without the label {summary['readout_accuracy']:.1%} and {summary['readout_loss']:.3f}"
    )


def _diagnosis(split: str, *, memorised: bool) -> str:
    if split != "train":
        return "The model was not trained on these labels, so its loss counts as evidence."
    if memorised:
        return "The model has memorised its labels; ranking by similar images instead."
    return "The model has not memorised its labels, so its loss counts as evidence."
