"""Evidence about labels that does not use them: the class of an example by everything except its own label.

Three opinions, each a log-probability of every class: a leave-one-out readout of all layers, the vote of the nearest
neighbours in the readout's leading components, and the model itself where it has not memorised its training labels.
``combined`` is their weighted sum, normalised: p ∝ Π pₖ^w. The model has not seen the labels of a test set, so all
three are out of sample there, and the weights are fitted by likelihood.

Features of other networks (``features.py``) make a readout and neighbours each. They have not seen the labels either,
and ``pooling.py`` weighs the networks against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import readable_batches
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.evidence.activations import ALL, Activations, activations, with_all
from influence_cli.evidence.features import Features
from influence_cli.evidence.guessing import beats_guessing
from influence_cli.evidence.mapped import (
    add_,
    chosen,
    divide_,
    is_on_disk,
    large,
    likeliest,
    log_softmax_,
    picked,
    row_parts,
    softmax,
)
from influence_cli.evidence.opinions import Opinions, enough, form_opinions, left_out, no_readout, opinions_of_others
from influence_cli.evidence.pooling import WITH_MODEL, WITHOUT, among_networks, combined, pool
from influence_cli.evidence.trajectory import earlier_probabilities
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.model.task import Task, measure_loading
from influence_cli.passes.finite import refuse_not_finite
from influence_cli.passes.probe import look
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal

# A model whose loss on its training labels is below this share of the leave-one-out loss has memorised them.
MEMORISED = 0.75
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
        trajectory: float32 [n, C], probabilities averaged over all checkpoints; None for a single one.
        judge: the readout that counts most.
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
    trajectory: np.ndarray | None = None
    judge: str = "readout"


def gather_evidence(
    tasks: Sequence[Task],
    split: Split,
    terminal: Terminal,
    *,
    skip: bool,
    logistic: bool = False,
    obstacle: InfluenceError | None = None,
    features: Sequence[Features] = (),
    trajectory: bool = False,
) -> Evidence | None:
    """Run each checkpoint forward over a split once, and compute the opinions.

    Each process of a job runs it over a part; the first one computes the opinions, None in the others.

    Args:
        tasks: one task per checkpoint; only the last one of a run is used, except for its trajectory.
        split: whose labels; the training split's may be memorised.
        terminal: progress, the diagnosis, warnings.
        skip: continue without unreadable examples.
        logistic: fit the logistic readout as well.
        obstacle: why there is to be no readout, if that is known already.
        features: of other networks; in the first process only.
        trajectory: run the earlier checkpoints of a run too, and average all probabilities.

    Raises:
        InfluenceError: outputs or losses that are not finite.
    """
    summary: dict[str, float] = {}
    opinions: dict[str, Tensor] = {}
    first: Opinions | None = None
    model: Tensor | None = None
    soft: Tensor | None = None
    losses, fits = [], []
    earlier, tasks = [task for task in tasks if not task.explained], [task for task in tasks if task.explained]
    for number, task in enumerate(tasks):
        look(task, terminal)
        here, activations = _forward(task, split, terminal, skip=skip, first=number == 0)
        judged = enough(activations.targets, len(task.classes))
        obstacle = obstacle or no_readout(activations.targets, here.hidden.shape[1], judged, task.classes)
        judged = judged | (obstacle is not None)
        targets = torch.from_numpy(activations.targets[judged])
        if obstacle is None:
            if number == 0 and not judged.all():
                terminal.warn(left_out(activations.targets, judged, task.classes))
            one = form_opinions(
                _judged(here, judged).hidden,
                targets,
                len(task.classes),
                terminal,
                device=task.device,
                what="activations",
                logistic=logistic,
            )
            if one is not None:
                _add_share(summary, one.summary, len(tasks))
                opinions = {name: add_(opinions.get(name), each) for name, each in one.log_probabilities.items()}
                first = first or replace(one, log_probabilities={})
        if distributed.is_first():
            losses.append(_losses(task, split, activations))
            soft = add_(soft, softmax(activations.outputs))
            outputs = activations.outputs if judged.all() else chosen(activations.outputs, _rows(judged))
            if not task.softmax_loss:
                fits.append(_fit_by_loss(task, outputs, targets))
            model = add_(model, log_softmax_(outputs))
        del here
    before = earlier_probabilities(earlier, split, terminal, skip=skip) if earlier and trajectory else None
    distributed.hear(terminal.warnings, terminal.warn)
    if not distributed.is_first() or model is None or soft is None:
        return None
    if len(tasks) > 1:
        divide_(soft, len(tasks))
        for mean in (model, *opinions.values()):
            log_softmax_(divide_(mean, len(tasks)))
    facts = TrainingFacts(
        activations.indices,
        activations.targets,
        soft.numpy(),
        torch.stack(losses).mean(dim=0).numpy(),
        np.ones(len(activations.indices), dtype=bool),
        likeliest(soft).numpy(),
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
        trajectory=_trajectory(soft, before, len(earlier) + len(tasks)) if trajectory else None,
    )
    as_softmax = _loss(model, targets)
    fit = sum(fits) / len(fits) if fits else as_softmax
    summary |= {"model_loss": fit, "model_accuracy": _accuracy(model, targets)}
    if obstacle is not None or first is None:
        return evidence
    weighed = _weighed(evidence, opinions, model, targets, split.name, terminal)
    if features:
        indices, device = activations.indices[judged], tasks[0].device
        others = opinions_of_others(features, indices, targets, len(tasks[0].classes), terminal, device=device)
        weighed, first = _among_networks(weighed, first, others, targets, terminal)
    if not weighed.memorised and abs(fit - as_softmax) > DIFFERS * as_softmax:
        terminal.say(
            f"The model's own opinion takes its outputs for the logits of a softmax (loss {as_softmax:.3f}); "
            f"as {tasks[0].loss_name} reads them the loss is {fit:.3f}."
        )
    return replace(
        weighed,
        # Neighbours are numbered among all rows.
        nearest=_in_place(first.nearest if judged.all() else _rows(judged)[first.nearest], judged, -1),
        similarity=_in_place(first.similarity, judged, np.nan),
        distance=_in_place(first.distance, judged, np.nan),
    )


def _weighed(
    evidence: Evidence, opinions: dict[str, Tensor], model: Tensor, targets: Tensor, on: str, terminal: Terminal
) -> Evidence:
    """Decide whether the model is heard, and combine the opinions [m, C] of the m judged examples."""
    readout, summary = opinions["readout"], evidence.summary
    right = likeliest(readout) == targets
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


def _among_networks(
    weighed: Evidence, first: Opinions, others: dict[str, Opinions], targets: Tensor, terminal: Terminal
) -> tuple[Evidence, Opinions]:
    """Weigh other networks against the model's own layers.

    Returns:
        The evidence, ``combined`` of all networks; the opinions whose neighbours are shown, those that count most.
    """
    own = {name: torch.from_numpy(values) for name, values in weighed.log_probabilities.items()}
    if not weighed.judged.all():
        own = {name: chosen(values, _rows(weighed.judged)) for name, values in own.items()}
    heard = {name: each.log_probabilities for name, each in others.items()}
    total, shares = among_networks(own, heard, targets, memorised=weighed.memorised)
    told = ", ".join(f"{name or 'the model'} {share:.0%}" for name, share in shares.items())
    terminal.say(f"Weights, by how well each predicts a label without having seen it: {told}.")
    log_probabilities = {"combined": total} | {
        f"{kind}:{name}": values for name, each in others.items() for kind, values in each.log_probabilities.items()
    }
    heaviest = max(shares, key=lambda name: (shares[name], not name))
    shown = [name for name in others if name == heaviest and len(others[name].nearest)]
    evidence = replace(
        weighed,
        log_probabilities=weighed.log_probabilities
        | {name: _in_place(values, weighed.judged, np.nan) for name, values in log_probabilities.items()},
        summary=weighed.summary | {f"weight:{name or 'model'}": share for name, share in shares.items()},
        judge=f"readout:{shown[0]}" if shown else "readout",
    )
    return evidence, others[shown[0]] if shown else first


def _trajectory(soft: Tensor, before: Tensor | None, count: int) -> np.ndarray | None:
    """Average the probabilities over all checkpoints, in the place of the earlier ones; None for a single one."""
    if count < 2:
        return None
    return np.asarray((soft if before is None else divide_(add_(before, soft), count)).numpy())


def _add_share(total: dict[str, float], part: dict[str, float], share: int) -> None:
    """Add one checkpoint's part of the mean of each value."""
    for name, value in part.items():
        total[name] = total.get(name, 0.0) + value / share


def _rows(judged: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(judged))


def _judged(here: Activations, judged: np.ndarray) -> Activations:
    """Restrict this process's part to the examples that are judged, of a mask of all."""
    if judged.all():
        return here
    start = sum(distributed.gathered(len(here.indices))[: distributed.rank()])
    mask = judged[start : start + len(here.indices)]
    return replace(
        here,
        features=chosen(here.features, _rows(mask)),
        indices=here.indices[mask],
        targets=here.targets[mask],
        hashes=here.hashes[mask],
    )


def _in_place(values: Tensor, rows: np.ndarray, other: float) -> np.ndarray:
    """Give values [m, …] of some of n rows as an array [n, …], the other rows filled."""
    if rows.all():
        return values.numpy()
    if values.ndim < 2:
        whole = np.full(len(rows), other, dtype=values.numpy().dtype)
        whole[rows] = values.numpy()
        return whole
    table, at = large(len(rows), values.shape[1], values.dtype), np.cumsum(rows) - 1
    for part in row_parts(*table.shape):
        known = rows[part]
        table[part] = other
        table[part][torch.from_numpy(known)] = values[torch.from_numpy(at[part][known])]
    return table.numpy()


def _forward(
    task: Task, split: Split, terminal: Terminal, *, skip: bool, first: bool
) -> tuple[Activations, Activations]:
    """Run a checkpoint over the examples: what ``with_all`` gives."""
    fits = int(FREE_SHARE * available_bytes(torch.device("cpu"))) // (4 * max(1, len(split)))
    most = ALL if is_on_disk() else distributed.smallest(min(ALL, max(1, fits)))
    indices = split.indices[distributed.share(len(split))]
    if most < ALL and first:
        terminal.detail(f"memory is short: at most {most:,} activations per example")
    with terminal.progress(len(indices), "activations of every layer") as advance:
        measure_loading(task, terminal)
        batches = readable_batches(
            split, indices, 256, task.loading, skip=skip, tell=terminal.warn if first else lambda _: None
        )
        some = len(indices) or distributed.size() == 1
        here = activations(task.model, batches, task.device, advance, most, split.title, len(indices)) if some else None
    return with_all(here)


def _losses(task: Task, split: Split, activations: Activations) -> Tensor:
    device, outputs, targets = task.device, activations.outputs, torch.from_numpy(activations.targets)
    losses = torch.empty(len(targets))
    for rows in row_parts(*outputs.shape):
        with torch.no_grad():
            losses[rows] = task.loss(outputs[rows].to(device).float(), targets[rows].to(device)).float().cpu()
    refuse_not_finite(split, activations.indices, losses.isfinite(), "loss")
    return losses


def _fit_by_loss(task: Task, outputs: Tensor, targets: Tensor) -> float:
    """Give the mean −log p(y) as the loss reads the outputs: p(c) ∝ exp(−ℓ(f, c)), over some of the examples.

    For cross-entropy p is the softmax. A loss with a scale or a margin of its own reads the outputs otherwise, and how
    well they fit the labels shows in that loss alone.
    """
    count, classes = outputs.shape
    step = max(1, count * classes**2 // FIT_NUMBERS)
    rows = torch.arange(0, count, step)
    f, y = chosen(outputs, rows).to(task.device).float(), targets[rows]
    with torch.no_grad():
        columns = [task.loss(f, torch.full((len(f),), c, device=f.device)) for c in range(classes)]
    return _loss((-torch.stack(columns, dim=1).float().cpu()).log_softmax(dim=1), y)


def _loss(log_probabilities: Tensor, targets: Tensor) -> float:
    return float(-picked(log_probabilities, targets).mean())


def _accuracy(log_probabilities: Tensor, targets: Tensor) -> float:
    return float((likeliest(log_probabilities) == targets).float().mean())


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
