"""Fill the store: choose the curvature, make the file, compute the missing blocks, check what is there.

``prepare`` is the only way in: every command that needs the store calls it, so one command is enough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.audit import changed_blocks, check_code
from influence_cli.config import Config
from influence_cli.curvature.choice import Choice, choose_curvature
from influence_cli.curvature.explicit import curvature_matrix, eigenbasis
from influence_cli.data import Batch
from influence_cli.errors import InfluenceError, human_bytes, near_path
from influence_cli.estimate import estimate
from influence_cli.fill import fill_blocks, training_batches
from influence_cli.fingerprint import compare, fingerprint
from influence_cli.layers import evaluate, flatten
from influence_cli.probe import check_finite, checkpoint_warnings, probe
from influence_cli.store import READ, SKIPPED, Store, block_sums
from influence_cli.store_file import Layout, check_space, create
from influence_cli.task import Task
from influence_cli.terminal import Terminal, duration

# Directions left out of an explicit basis carry less than this share of the summed self-influence.
DROPPED_SHARE = 1e-7


@dataclass(frozen=True)
class Prepared:
    """A complete store and what is needed to use it.

    Attributes:
        task: one checkpoint and its data.
        choice: the curvature in use.
        path: the store.
        spectrum: Λ [k] float64, or None for raw gradients.
        basis: P [p, k] on the task's device, or None for raw gradients.
        smallest: min Λ of the whole curvature, not of the kept part; 0 for raw gradients.
        trace: ΣΛ of the whole curvature; 0 for raw gradients.
        gradient_norm: ‖∇R + l2·θ̂‖ over the tracked parameters: 0 at a minimum.
        typical_norm: root mean square of ‖gᵢ‖, to compare it with.
        seconds: what this call spent on curvature and gradients.
    """

    task: Task
    choice: Choice
    path: Path
    spectrum: Tensor | None
    basis: Tensor | None
    smallest: float
    trace: float
    gradient_norm: float
    typical_norm: float
    seconds: float

    def coordinates(self, gradients: Tensor) -> Tensor:
        """Project gradients [b, p] on the basis: c = Pᵀg, [b, k]; raw gradients stay as they are."""
        return gradients if self.basis is None else gradients @ self.basis


def prepare_all(config: Config, tasks: Sequence[Task], terminal: Terminal, **how: bool) -> list[Prepared]:
    """Give the complete store of every checkpoint; ``how`` goes to ``prepare``."""
    return [prepare(config, number, task, terminal, **how) for number, task in enumerate(tasks)]


def store_path(config: Config, number: int) -> Path:
    """Name the store of a checkpoint: the configured one, or with the number of several before the suffix."""
    path = near_path(config.gradients.store)
    if len(config.model.checkpoint) == 1:
        return path
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def decide(config: Config, task: Task, terminal: Terminal) -> tuple[Choice, Batch]:
    """Probe the task and choose the curvature; what is chosen or left out is named on stderr."""
    where = config.where("gradients", "layers")
    network, batch = probe(task, config.gradients.layers, where)
    choice = choose_curvature(
        config.curvature.method,
        config.curvature.matrix,
        network,
        batch.inputs,
        config.where("curvature", "method"),
    )
    if choice.note:
        terminal.say(choice.note)
    elif network.left_out:
        shown = ", ".join(network.left_out[:6]) + (", …" if len(network.left_out) > 6 else "")
        terminal.say(f"parameters left out ({len(network.left_out)}): {shown}")
    if not network.vectorised:
        terminal.say(
            f"example gradients one by one (slower): torch.func cannot go through the model: {network.obstacle}"
        )
    return choice, batch


def row_bytes(config: Config, task: Task, choice: Choice) -> int:
    """Bound the store's size from above, before the basis is known: all p coordinates, and the basis."""
    size = choice.network.size
    layout = Layout(len(task.train), size, len(task.classes), config.gradients.block, config.gradients.store_dtype)
    return layout.bytes() + (4 * size * size if choice.has_basis else 0)


def prepare(
    config: Config,
    number: int,
    task: Task,
    terminal: Terminal,
    *,
    overwrite: bool = False,
    skip_unreadable: bool = False,
    fsck: bool = False,
    repair: bool = False,
) -> Prepared:
    """Give a complete store for one checkpoint: reuse, resume or make it.

    Args:
        config: the run's config.
        number: which of its checkpoints.
        task: that checkpoint and its data.
        terminal: progress and warnings.
        overwrite: replace a store that is there.
        skip_unreadable: go on without examples that cannot be read, and list them.
        fsck: verify every checksum and read every example again, to compare it with what the store was made of.
        repair: compute damaged (and, with ``fsck``, changed) blocks again.

    Raises:
        InfluenceError: the store belongs to something else, is too large for budget or disk, is damaged, an example
            cannot be read or has no finite loss.
    """
    started = time.perf_counter()
    path = store_path(config, number)
    choice, batch = decide(config, task, terminal)
    wanted = fingerprint(task, choice, config.gradients.store_dtype)
    if overwrite or not path.exists():
        _make(config, task, choice, batch, path, wanted, terminal, skip_unreadable)
    with Store.open(path) as store:
        compare(store.fingerprint, wanted, str(path))
        done = np.flatnonzero(store.done())
        missing = np.flatnonzero(~store.done())
        bad = store.damaged(done if fsck or repair else done[:1])
        sound = np.setdiff1d(done, bad)
        if len(sound):
            check_code(task, choice, store, int(sound[0]))
    if fsck:
        bad = np.union1d(bad, changed_blocks(task, path, terminal))
    if len(bad) and not repair:
        raise InfluenceError(
            f"{path}: {len(bad)} damaged blocks: {', '.join(map(str, bad[:8]))}",
            f"influence gradients {'--fsck ' if fsck else ''}--repair computes them again",
        )
    if len(bad):
        terminal.say(f"computing {len(bad)} damaged blocks of {path} again: {', '.join(map(str, bad[:8]))}")
        with Store.open(path, write=True) as store:
            store.clear(bad)
            store.write_labels(task.train.labels[task.train.indices], task.train.indices)
    todo = np.union1d(missing, bad)
    if len(todo):
        fill_blocks(task, choice, path, todo, terminal, skip_unreadable)
    prepared = _prepared(task, choice, path, time.perf_counter() - started)
    _remark(prepared, terminal)
    return prepared


def _make(
    config: Config,
    task: Task,
    choice: Choice,
    batch: Batch,
    path: Path,
    wanted: dict[str, str],
    terminal: Terminal,
    skip: bool,
) -> None:
    """Announce, compute the basis where the curvature has one, and lay the file out."""
    size = choice.network.size
    bound = row_bytes(config, task, choice)
    budget = config.gradients.budget
    plain = Layout(len(task.train), size, len(task.classes), config.gradients.block, config.gradients.store_dtype)
    # A coordinate takes a column of all rows, and one of the basis.
    per_column = plain.padded * np.dtype(plain.dtype).itemsize + 4 * size
    room = budget - Layout(len(task.train), 0, len(task.classes), config.gradients.block).bytes()
    if not choice.has_basis and plain.bytes() > budget:
        raise InfluenceError(
            f"{config.where('gradients', 'budget')}: the gradients of {len(task.train):,} examples × {size:,} "
            f"parameters take {human_bytes(plain.bytes())}, gradients.budget is {human_bytes(budget)}",
            "track fewer layers (gradients.layers), use store_dtype: float16, or raise the budget",
        )
    if choice.has_basis and room < per_column:
        raise InfluenceError(
            f"{config.where('gradients', 'budget')}: gradients.budget is {human_bytes(budget)}; a store of "
            f"{len(task.train):,} examples takes at least {human_bytes(budget - room + per_column)}",
            "raise the budget",
        )
    check_space(path, min(bound, budget))
    plan = estimate(task, choice, batch)
    terminal.say(
        f"making {path}: {len(task.train):,} training examples, {size:,} parameters, at most "
        f"{human_bytes(min(bound, budget))}, about {duration(plan.seconds)}"
    )
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, object] = {"parameters": size, "method": choice.method}
    k = size
    if choice.has_basis:
        basis, spectrum = _compute_basis(task, choice, terminal, skip)
        k = min(_enough(spectrum, max(task.l2, 0.0)), room // per_column)
        arrays = {"spectrum": spectrum[:k].cpu().numpy(), "basis": basis[:, :k].float().cpu().numpy()}
        facts |= {"smallest": float(spectrum[-1]), "trace": float(spectrum.sum()), "largest": float(spectrum[0])}
    layout = Layout(len(task.train), k, len(task.classes), config.gradients.block, config.gradients.store_dtype)
    create(
        path,
        layout,
        fingerprint=wanted,
        facts=facts,
        labels=task.train.labels[task.train.indices],
        indices=task.train.indices,
        arrays=arrays,
    )
    terminal.detail(f"{path}: {human_bytes(path.stat().st_size)} reserved, {k:,} numbers a row")


def _compute_basis(task: Task, choice: Choice, terminal: Terminal, skip: bool) -> tuple[Tensor, Tensor]:
    what = f"{'GGN' if choice.matrix == 'ggn' else 'Hessian'} {choice.network.size:,} × {choice.network.size:,}"
    with terminal.progress(len(task.train), what) as advance:
        matrix = curvature_matrix(choice.network, training_batches(task, skip), choice.matrix, choice.output, advance)
    if not bool(matrix.isfinite().all()):
        _refuse_not_finite(task, choice, skip)
        raise InfluenceError("the curvature has entries that are not finite", "look for examples with extreme outputs")
    with terminal.status(f"eigenvectors of the {what} matrix"):
        return eigenbasis(matrix)


def _refuse_not_finite(task: Task, choice: Choice, skip: bool) -> None:
    """Name the first training example whose loss is not finite, once a curvature has shown that there is one."""
    for batch in training_batches(task, skip):
        check_finite(task.train, batch, evaluate(choice.network, batch.inputs, batch.targets)[0])


def _enough(spectrum: Tensor, shift: float) -> int:
    """Count the directions worth keeping: the rest, by Λ/(Λ + shift), is below a share of the effective dimension.

    Along a direction of GGN eigenvalue 0 no training gradient of a cross-entropy has a component: nothing is lost.
    A negative eigenvalue is always kept: a pole must stay visible.
    """
    if float(spectrum[-1]) < -1e-6 * float(spectrum[0].abs()):
        return len(spectrum)
    positive = spectrum.clamp_min(0)
    floor = max(shift, 1e-9 * float(spectrum[0].clamp_min(0)), 1e-300)
    parts = positive / (positive + floor)
    total = float(parts.sum())
    tail = parts.flip(0).cumsum(0).flip(0)
    return max(1, int((tail > DROPPED_SHARE * total).sum()))


def _prepared(task: Task, choice: Choice, path: Path, seconds: float) -> Prepared:
    with Store.open(path) as store:
        spectrum, basis, facts, summary = store.array("spectrum"), store.array("basis"), store.facts, store.summary()
    if summary is None:
        summary = _summarise(path)
    projection = None if basis is None else torch.from_numpy(basis).to(task.device)
    mean = torch.from_numpy(summary[:-1]).to(task.device, torch.float32)
    slope = mean if projection is None else projection @ mean
    slope = slope + task.l2 * flatten([parameter.detach() for parameter in choice.network.parameters().values()])
    return Prepared(
        task=task,
        choice=choice,
        path=path,
        spectrum=None if spectrum is None else torch.from_numpy(spectrum),
        basis=projection,
        smallest=float(facts.get("smallest", 0.0)),
        trace=float(facts.get("trace", 0.0)),
        gradient_norm=float(slope.norm()),
        typical_norm=float(np.sqrt(summary[-1])),
        seconds=seconds,
    )


def _summarise(path: Path) -> np.ndarray:
    """Sum a complete store up in one verified scan, as filling it in one go does on the way.

    Returns:
        float64 [k + 1]: the mean coordinates, then the mean of ‖c‖².
    """
    with Store.open(path, write=True) as store:
        total, size = np.zeros(store.layout.k + 1), store.layout.block
        for _, rows in store.scan():
            for start in range(0, len(rows), size):
                total += block_sums(rows[start : start + size])
        total /= max(1, store.readable())
        store.write_summary(total)
    return total


def _remark(prepared: Prepared, terminal: Terminal) -> None:
    """Say what the complete store shows: skipped examples, accuracy near chance."""
    task = prepared.task
    with Store.open(prepared.path) as store:
        state, outputs, labels = store.column("state"), store.column("outputs"), store.column("labels")
    skipped = int((state == SKIPPED).sum())
    if skipped:
        terminal.warn(
            f"{skipped} unreadable training example{'s are' if skipped > 1 else ' is'} left out of every ranking"
        )
    read = state == READ
    if not read.any():
        raise InfluenceError(f"{task.train.where}: no training example could be read")
    accuracy = float((outputs[read].argmax(1) == labels[read]).mean())
    for text in checkpoint_warnings(accuracy, len(task.classes), prepared.gradient_norm, prepared.typical_norm):
        terminal.warn(text)
