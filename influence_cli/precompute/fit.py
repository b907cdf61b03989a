"""Fit the basis and the spectrum of a curvature, or take them from the store's file; nothing else makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.arnoldi import top_eigenvectors
from influence_cli.curvature.blocks import Block, describe, to_arrays
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.ekfac import STAGES, Thinning, Watch, catch_up, fit, remainders
from influence_cli.curvature.explicit import curvature_matrix, eigenbasis
from influence_cli.curvature.fisher_draws import EMPIRICAL, EXACT, ROOT, SAMPLED
from influence_cli.curvature.kronecker_plan import SAMPLED_AT_LEAST, factor_bytes, make_plan, sample_sizes
from influence_cli.curvature.operator import hold, mean_product
from influence_cli.curvature.progress import Progress
from influence_cli.data.batches import Batch, read_batches, refuse_unreadable
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.model.task import Task, measure_loading, set_precision, training_batches
from influence_cli.passes.finite import refuse_culprit, refuse_product
from influence_cli.passes.layers import forward
from influence_cli.precompute.fit_file import fit_path, load_progress, saving
from influence_cli.precompute.fitted import Fitted, curvature_fingerprint
from influence_cli.runtime import disk, distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Advance, Terminal

# Directions left out of an explicit basis carry less than this share of the summed self-influence.
DROPPED_SHARE = 1e-7
# Examples at once for an exact matrix.
BATCH = 256


def fit_curvature(
    task: Task, choice: Choice, path: Path, wanted: Mapping[str, str], terminal: Terminal, batch: int, *, skip: bool
) -> Fitted:
    """Fit the curvature of a method that has a basis.

    The file of an unfinished fit stays; the caller removes it when the store holds the curvature.

    Args:
        task: model and data.
        choice: the curvature, and the parameters that count.
        path: of the store; the file of an unfinished fit is next to it.
        wanted: the store's fingerprint.
        terminal: progress and warnings.
        batch: examples at once.
        skip: continue without unreadable examples.

    Raises:
        InfluenceError: entries that are not finite, factors larger than the memory, an unreadable example.
        Stopped: Ctrl-C; finished batches are kept.
    """
    fingerprint = curvature_fingerprint(wanted, choice)
    facts: dict[str, Any] = {"curvature": fingerprint, "method": choice.method}
    if choice.is_layered:
        blocks = _fit_layers(task, choice, path, fingerprint, terminal, batch, skip=skip)
        for text in remainders(blocks):
            terminal.warn(text)
        return Fitted(to_arrays(blocks), facts | {"blocks": describe(blocks), "smallest": 0.0})
    if choice.method == "arnoldi":
        return _fit_arnoldi(task, choice, terminal, facts, batch, skip=skip)
    matrix, what = _compute_matrix(task, choice, path, fingerprint, terminal, skip=skip)
    if not distributed.is_first():
        return Fitted(facts=facts)  # the first process decomposes it, and writes the store
    l2 = task.objective.over(choice.network)
    if not isinstance(l2, float):
        matrix.diagonal().add_(l2.to(matrix))
    with terminal.status(f"eigenvectors of the {what} matrix"):
        basis, spectrum = eigenbasis(matrix)
    # A hinge has slope without curvature: only l2 + λ divides there, so no direction can be left out.
    k = len(spectrum)
    if task.curved_loss and isinstance(l2, float):
        k = _enough(spectrum, max(l2, 0.0))
    elif task.curved_loss and not isinstance(l2, float):
        k = _determined(spectrum, basis, l2)
    arrays = {"spectrum": spectrum[:k].cpu().numpy(), "basis": basis[:, :k].float().cpu().numpy()}
    if not isinstance(l2, float):
        spectrum = spectrum[:k]  # the rest is rounding
    smallest = float(spectrum[-1])
    return Fitted(arrays, facts | {"smallest": smallest, "trace": float(spectrum.sum()), "largest": float(spectrum[0])})


def _fit_layers(
    task: Task,
    choice: Choice,
    path: Path,
    fingerprint: Mapping[str, str],
    terminal: Terminal,
    batch: int,
    *,
    skip: bool,
) -> list[Block]:
    network, file = choice.network, fit_path(path)
    need, free = factor_bytes(network), available_bytes(task.device)
    if need > free:
        raise InfluenceError(
            f"curvature {choice.method} over {network.size:,} parameters needs {human_bytes(need)} of memory for its "
            f"factors, but {human_bytes(free)} is free",
            "track fewer layers (gradients.layers), or use curvature.method: identity",
        )
    how = choose_draws(task, choice, terminal)
    fit_fingerprint = dict(fingerprint) | {"seed": str(task.seed), "method": choice.method}
    progress = load_progress(file, fit_fingerprint)
    # Progress is counted in batches: resume with the same size, or start over if that does not fit the memory.
    sizes = distributed.gathered(None if progress is None else int(progress.arrays["batch"]))
    known = [size for size in sizes if size is not None and size <= batch]
    if progress is not None and int(progress.arrays["batch"]) not in known[:1]:
        progress = None
    batch = known[0] if known else batch
    if progress is not None:
        terminal.say(f"resuming with the factors in {file}: {progress.stage}, {progress.examples:,} examples done")
    begun = progress or Progress(STAGES[0], arrays={"seed": torch.tensor(task.seed), "batch": torch.tensor(batch)})
    catch_up(begun)
    layers, part = len(make_plan(network).layers), distributed.size()
    measure_loading(task, terminal)
    sample, thinning = _sample(task, choice)
    totals = {"covariances": len(sample) // part, "eigenvectors": layers // part}
    bars = _Bars(terminal, choice.method, totals, len(task.train) // part, progress)
    last: list[Batch] = []

    def batches(stage: str, start: int) -> Iterator[Batch]:
        for part in _batches(task, sample if stage == "covariances" else task.train.indices, start, batch, skip=skip):
            last[:] = [part]
            yield part

    fit_batches = partial(fit, network, how=how, seed=task.seed, corrected=choice.method == "ekfac")

    def is_finite(part: Batch) -> bool:
        try:
            with distributed.apart():
                fit_batches(lambda _stage, start: [part][start:])
        except FloatingPointError:
            return False
        return True

    try:
        with saving(file, fit_fingerprint, terminal) as save, bars:
            return fit_batches(batches, thinning=thinning, progress=begun, watch=Watch(save, bars.report))
    except FloatingPointError:
        refuse_culprit(task.train, network, last, is_finite, "curvature")


def _batches(task: Task, indices: np.ndarray, start: int, size: int, *, skip: bool) -> Iterator[Batch]:
    """Read training examples from a batch on; a batch without a readable one counts too.

    Processes of a job take turns; the batches are the same for any number of processes.
    """
    if distributed.size() > 1:
        turns = range(distributed.rank() * size, len(indices), distributed.size() * size)
        indices = np.concatenate([indices[:0], *(indices[at : at + size] for at in turns)])
    for part in read_batches(task.train, indices[start * size :], size, task.loading):
        if not skip:
            refuse_unreadable(part)
        yield part


class _Bars:
    """One progress bar per stage of the fit."""

    def __init__(
        self, terminal: Terminal, method: str, totals: dict[str, int], examples: int, progress: Progress | None
    ) -> None:
        self._terminal, self._totals = terminal, totals
        self._examples, self._stage = examples, ""
        self._open: AbstractContextManager[Advance] | None = None
        self._begun = 0 if progress is None else progress.examples
        self._method = {"ekfac": "EK-FAC", "kfac": "K-FAC"}[method]
        self._advance: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def report(self, stage: str, count: int) -> None:
        """Take finished examples or layers of a stage."""
        if stage != self._stage:
            self._close()
            self._stage = stage
            total = self._totals.get(stage, self._examples)
            self._open = self._terminal.progress(
                total, f"{self._method}, stage {STAGES.index(stage) + 1} of 3: {stage}"
            )
            self._advance = self._open.__enter__()
            if self._begun and stage != "eigenvectors":
                self._advance(self._begun)
            self._begun = 0
        self._advance(count)

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def _sample(task: Task, choice: Choice) -> tuple[np.ndarray, Thinning]:
    """Choose the examples of the covariances, seeded, and which fraction of them each layer uses.

    K-FAC's are also its eigenvalues: all of them, for every layer.
    """
    indices = task.train.indices
    if choice.method == "kfac":
        return indices, Thinning(order=indices)
    batch = next(training_batches(task, skip=True, size=8))
    tape = forward(choice.network, batch.inputs)
    calls = tape.backward(torch.ones_like(tape.outputs))
    sizes = sample_sizes(choice.network, calls, len(indices))
    count = max(sizes.values(), default=min(len(indices), SAMPLED_AT_LEAST))
    chosen = np.sort(np.random.default_rng(task.seed).choice(indices, count, replace=False))
    return chosen, Thinning({number: count // size for number, size in sizes.items()}, chosen)


def choose_draws(task: Task, choice: Choice, terminal: Terminal) -> str:
    """Choose the draws: labels from the model for cross-entropy, a root of ∇²ℓ for another convex loss."""
    if choice.matrix == "empirical":
        return EMPIRICAL
    if task.loss_name == "cross_entropy":
        # If the outputs are linear in the parameters, all labels cost hardly more than one.
        return EXACT if choice.output is not None else SAMPLED
    if task.convex_loss:
        return ROOT
    if task.train.weights is not None:
        raise InfluenceError(
            f"loss {task.loss_name} is not convex in the outputs: curvature {choice.method} would square train.weights",
            "use curvature.method: explicit or cg, with curvature.matrix: hessian",
        )
    terminal.warn(
        f"loss {task.loss_name} is not convex in the outputs: curvature {choice.method} uses the empirical Fisher "
        "(given labels), which does not approximate the Hessian; use a convex loss for scores with a unit"
    )
    return EMPIRICAL


def _fit_arnoldi(
    task: Task, choice: Choice, terminal: Terminal, facts: dict[str, Any], batch: int, *, skip: bool
) -> Fitted:
    network = choice.network
    measure_loading(task, terminal)
    examples = hold(training_batches(task, skip=skip), task.device, batch)
    like = next(network.model.parameters()).detach()
    l2 = task.objective.over(network)
    product = mean_product(network, examples, choice.matrix, 0.0 if isinstance(l2, float) else l2.to(like))
    free = available_bytes(task.device)
    with terminal.progress(0, "Arnoldi: products with the curvature") as advance:
        try:
            pairs = top_eigenvectors(product, network.size, like=like, seed=task.seed, free=free, on_product=advance)
        except FloatingPointError:
            refuse_product(task.train, network, training_batches(task, skip=skip), choice.matrix)
    terminal.say(
        f"arnoldi: {len(pairs.values)} eigenpairs from {pairs.products} products, relative residual at most "
        f"{pairs.residual:.1e}"
    )
    return Fitted(
        {"spectrum": pairs.values.cpu().numpy(), "basis": pairs.vectors.float().cpu().numpy()},
        facts | {"smallest": pairs.smallest, "trace": pairs.trace, "largest": float(pairs.values[0])},
    )


def _compute_matrix(
    task: Task, choice: Choice, path: Path, fingerprint: Mapping[str, str], terminal: Terminal, *, skip: bool
) -> tuple[Tensor, str]:
    """Give the exact matrix, and its name for people."""
    what = f"{'GGN' if choice.matrix == 'ggn' else 'Hessian'} {choice.network.size:,} × {choice.network.size:,}"
    file, fit_fingerprint = fit_path(path), dict(fingerprint) | {"method": choice.method}
    progress = load_progress(file, fit_fingerprint) or Progress("matrix")
    if progress.done:
        terminal.say(f"resuming with the matrix in {file}: {progress.examples:,} examples done")
    # TF32 would round eigenvalues below zero: that precision is for gradients.
    set_precision("float32")
    measure_loading(task, terminal)
    try:
        count = len(task.train) // distributed.size()
        with saving(file, fit_fingerprint, terminal) as save, terminal.progress(count, what) as advance:
            advance(progress.examples)
            batches = _batches(task, task.train.indices, progress.done, BATCH, skip=skip)
            matrix = curvature_matrix(
                choice.network, batches, choice.matrix, choice.output, advance, progress=progress, save=save
            )
    finally:
        set_precision(choice.network.precision)
    if not bool(matrix.isfinite().all()):
        disk.remove(file)  # nothing to resume from
        refuse_product(task.train, choice.network, training_batches(task, skip=skip), choice.matrix)
    return matrix, what


def _determined(spectrum: Tensor, basis: Tensor, l2: Tensor) -> int:
    """Count the directions of H + diag(l2), largest first, without those at the end that nothing determines.

    Along these there is neither curvature nor l2: the shift that is common to unpenalised biases of a softmax, for one.
    No gradient of a cross-entropy has a component there.
    """
    k, floor = len(spectrum), 1e-6 * float(spectrum[0].abs())
    penalty = l2.to(basis) @ basis.square()
    least = 1e-3 * float(l2[l2 > 0].min())
    while k > 1 and abs(float(spectrum[k - 1])) <= floor and float(penalty[k - 1]) <= least:
        k -= 1
    return k


def _enough(spectrum: Tensor, shift: float) -> int:
    """Count the directions worth keeping: the rest, by Λ/(Λ + shift), is below a share of the effective dimension.

    No training gradient of a cross-entropy has a component along a direction of GGN eigenvalue 0, so nothing is lost.
    A negative eigenvalue is always kept, so that a pole stays visible.
    """
    if float(spectrum[-1]) < -1e-6 * float(spectrum[0].abs()):
        return len(spectrum)
    positive = spectrum.clamp_min(0)
    floor = max(shift, 1e-9 * float(spectrum[0].clamp_min(0)), 1e-300)
    parts = positive / (positive + floor)
    total = float(parts.sum())
    tail = parts.flip(0).cumsum(0).flip(0)
    return max(1, int((tail > DROPPED_SHARE * total).sum()))
