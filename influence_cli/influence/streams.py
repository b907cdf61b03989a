"""Scores of all training examples as a stream: from the rows of a store, or on the fly from a layer pass.

Each stream yields a range of rows and their scores, in order, and never holds more than one piece. The processes of a
job each stream a part of the rows; ``of_all`` gives all rows to each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.coordinates import Blocks, coordinates, parameter_vectors, weighted_squares
from influence_cli.data.batches import Batch, readable_batches
from influence_cli.data.split import rows_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TrainingFacts, empty_facts
from influence_cli.influence.inverse import ClosedForm, Spectral
from influence_cli.influence.normalise import Norms
from influence_cli.influence.scores import removal
from influence_cli.model.sample_weights import own_rise, plain_losses
from influence_cli.model.task import Task, measure_loading
from influence_cli.passes.finite import check_finite
from influence_cli.passes.gradient_products import products
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Advance, Terminal
from influence_cli.store.store import Store

Piece = tuple[slice, np.ndarray]


def training_products(
    prepared: Prepared,
    left: Tensor,
    facts: TrainingFacts | None,
    share: int,
    terminal: Terminal,
    *,
    skip: bool,
    stack: ExitStack,
    norms: Norms | None = None,
) -> Iterator[Piece]:
    """Multiply vectors of coordinates [m, k] with all training gradients, from the store or on the fly: pieces [m, b].

    In a job with several processes: with the gradients of this process's part of the training examples.

    Args:
        prepared: of one checkpoint.
        left: [m, k].
        facts: filled in on the fly; None where they are known.
        share: number of checkpoints that are explained.
        terminal: progress, skipped examples.
        skip: continue without unreadable examples.
        stack: keeps the progress bar of a scan visible until it is closed.
        norms: of the training gradients: the last row of a piece [m + 1, b].
    """
    task = prepared.task
    if prepared.on_the_fly:
        return direct_products(prepared, left, facts or empty_facts(task), share, terminal, skip=skip, norms=norms)
    here = distributed.share(len(task.train))
    advance = stack.enter_context(terminal.progress(here.stop - here.start, f"scanning {prepared.path.name}"))
    return stored_products(prepared, left, advance, norms)


def stored_products(prepared: Prepared, left: Tensor, advance: Advance, norms: Norms | None = None) -> Iterator[Piece]:
    """Multiply vectors of coordinates [m, k] with all rows of a store: pieces [m, b], the checksums verified.

    With ``norms`` their norms [b] are the last row of each piece.
    """

    def work(where: slice, block: np.ndarray) -> Piece:
        rows = torch.from_numpy(block).to(left.device)
        values = left @ rows.T
        if norms is not None:
            values = torch.cat([values, norms.of_rows(rows)[None]])
        return where, values.cpu().numpy()

    return stored_pieces(prepared, work, advance)


def stored_self_influence(prepared: Prepared, inverse: ClosedForm, terminal: Terminal) -> Iterator[Piece]:
    """Compute the self-influence of all training examples from the rows of a store: pieces [1, b]."""
    task = prepared.task

    def work(where: slice, block: np.ndarray) -> Piece:
        rows = torch.from_numpy(block).to(task.device)
        values = own_rise(inverse.self_influence(rows), task.train, where)
        return where, removal(values, task.n)[None].cpu().numpy()

    here = distributed.share(len(task.train))
    with terminal.progress(here.stop - here.start, f"scanning {prepared.path.name}") as advance:
        yield from stored_pieces(prepared, work, advance)


def stored_pieces(prepared: Prepared, work: Callable[[slice, np.ndarray], Piece], advance: Advance) -> Iterator[Piece]:
    """Work on every block of a store (in a job: on this process's part), on the CPU in threads, in order."""
    with Store.open(prepared.path) as store:
        blocks = range(store.layout.blocks)[distributed.share(store.layout.blocks)]
        if prepared.task.device.type == "cpu":
            pieces = store.map(work, blocks=blocks)
        else:
            pieces = (work(where, block) for where, block in store.scan(blocks))
        for piece in pieces:
            yield piece
            advance(piece[0].stop - piece[0].start)


def direct_products(
    prepared: Prepared,
    left: Tensor,
    facts: TrainingFacts,
    share: int,
    terminal: Terminal,
    *,
    skip: bool,
    norms: Norms | None = None,
) -> Iterator[Piece]:
    """Multiply vectors of coordinates [m, k] with all training gradients, directly from a and δ: nothing is stored.

    Args:
        prepared: with every coordinate of its basis.
        left: [m, k].
        facts: filled in on the way; losses and probabilities are divided by ``share``.
        share: number of checkpoints that are explained.
        terminal: progress, skipped examples.
        skip: continue without unreadable examples.
        norms: of the training gradients, by a second layer pass: the last row of a piece.
    """
    network, task = prepared.choice.network, prepared.task
    size = None if norms is None else direct_norms(prepared, norms)
    vectors, rows = parameter_vectors(network, prepared.basis, left), _Rows(distributed.share(len(task.train)))
    with terminal.progress(rows.count, "training gradients on the fly") as advance:
        for batch in _batches(prepared, terminal, skip=skip):
            values, losses, outputs = products(network, vectors, batch.inputs, batch.targets)
            if size is not None:
                values = torch.cat([values, size(batch).to(values)[:, None]], dim=1)
            check_finite(task.train, batch, losses, values)
            losses = plain_losses(network.loss, outputs, batch.targets, losses)
            at = _note(task, facts, batch.indices, losses, outputs, share)
            yield from rows.pieces(at, values.T.cpu().numpy())
            advance(len(batch))
    yield from rows.rest(len(left) + (norms is not None))


def direct_self_influence(
    prepared: Prepared, inverse: ClosedForm, facts: TrainingFacts, share: int, terminal: Terminal, *, skip: bool
) -> Iterator[Piece]:
    """Compute the self-influence of all training examples from a layer pass: pieces [1, b]."""
    task, values_of = prepared.task, _self_influence_pass(prepared, inverse)
    places = _Rows(distributed.share(len(task.train)))
    with terminal.progress(places.count, "self-influence on the fly") as advance:
        for batch in _batches(prepared, terminal, skip=skip):
            values, losses, outputs = values_of(batch)
            check_finite(task.train, batch, losses, values[:, None])
            losses = plain_losses(task.loss, outputs, batch.targets, losses)
            at = _note(task, facts, batch.indices, losses, outputs, share)
            values = own_rise(values, task.train, at)
            yield from places.pieces(at, removal(values, task.n)[None].cpu().numpy())
            advance(len(batch))
    yield from places.rest(1)


def _self_influence_pass(prepared: Prepared, inverse: ClosedForm) -> Callable[[Batch], tuple[Tensor, Tensor, Tensor]]:
    """Make the function from a batch to the quadratic forms gᵢᵀ(H + (l2 + λ)I)⁻¹gᵢ [b], losses [b] and outputs."""
    network, basis = prepared.choice.network, prepared.basis
    if isinstance(basis, Blocks) and isinstance(inverse, Spectral):
        weights = _block_weights(prepared, basis, inverse)
        return lambda batch: weighted_squares(network, basis, weights, batch.inputs, batch.targets)

    def by_rows(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        rows, losses, outputs = coordinates(network, basis, batch.inputs, batch.targets)
        return inverse.self_influence(rows), losses, outputs

    return by_rows


def direct_norms(prepared: Prepared, norms: Norms) -> Callable[[Batch], Tensor]:
    """Make the function from a batch to the norms [b] of its gradients."""
    network, basis, inverse = prepared.choice.network, prepared.basis, norms.inverse
    if isinstance(basis, Blocks) and isinstance(inverse, Spectral):
        weights = norms.weights(_block_weights(prepared, basis, inverse))
        return lambda batch: weighted_squares(network, basis, weights, batch.inputs, batch.targets)[0].sqrt()
    return lambda batch: norms.of_rows(coordinates(network, basis, batch.inputs, batch.targets)[0])


def _block_weights(prepared: Prepared, basis: Blocks, inverse: Spectral) -> list[Tensor]:
    """Cut 1/(Λ + l2 + λ) into the shapes of the blocks' spectra."""
    weights = (1 / (inverse.spectrum.values + inverse.shift)).float().to(prepared.task.device)
    parts = weights.split([len(kept) for kept in basis.kept])
    return [part.view(kept.block.values.shape) for part, kept in zip(parts, basis.kept, strict=True)]


def _batches(prepared: Prepared, terminal: Terminal, *, skip: bool) -> Iterator[Batch]:
    split = prepared.task.train
    indices = split.indices[distributed.share(len(split))]
    measure_loading(prepared.task, terminal)
    return readable_batches(split, indices, prepared.batch, prepared.task.loading, skip=skip, tell=terminal.warn)


def _note(
    task: Task, facts: TrainingFacts, indices: np.ndarray, losses: Tensor, outputs: Tensor, share: int
) -> np.ndarray:
    at = rows_of(facts.indices, indices)
    if task.explained:
        facts.losses[at] += losses.float().cpu().numpy() / share
        facts.probabilities[at] += outputs.float().softmax(dim=1).cpu().numpy() / share
    facts.read[at] = True
    return at


class _Rows:
    """Yields scores as ranges without gaps: NaN where an example was skipped."""

    def __init__(self, rows: slice) -> None:
        self._stop, self._next = rows.stop, rows.start
        self.count = rows.stop - rows.start

    def pieces(self, at: np.ndarray, values: np.ndarray) -> Iterator[Piece]:
        """Place values [m, b] of the rows ``at``, rising."""
        if len(at):
            stop = int(at[-1]) + 1
            whole = np.full((len(values), stop - self._next), np.nan, dtype=values.dtype)
            whole[:, at - self._next] = values
            yield slice(self._next, stop), whole
            self._next = stop

    def rest(self, tests: int) -> Iterator[Piece]:
        """Yield what was skipped at the end."""
        if self._next < self._stop:
            left = self._stop - self._next
            yield slice(self._next, self._stop), np.full((tests, left), np.nan, dtype=np.float32)


def of_all(stream: Iterator[Piece]) -> Iterator[Piece]:
    """Give every process of a job the pieces of all of them, in order of the rows."""
    if distributed.size() == 1:
        yield from stream
        return
    for pieces in distributed.gathered(list(stream)):
        yield from pieces


def averaged(streams: Sequence[Iterator[Piece]]) -> Iterator[Piece]:
    """Average streams over the same rows whose pieces may be cut differently."""
    if len(streams) == 1:
        yield from streams[0]
        return
    first = [next(stream, None) for stream in streams]
    held: list[Piece] = [piece for piece in first if piece is not None]
    if len(held) < len(streams):  # a process without rows
        return
    if len({where.start for where, _ in held}) > 1:
        raise InfluenceError(
            "the stores of the checkpoints have different block sizes, so their blocks do not line up",
            "build them with the same gradients.block (influence gradients --overwrite), or run one process",
        )
    while True:
        start, stop = held[0][0].start, min(where.stop for where, _ in held)
        total = np.stack([values[:, : stop - start] for _, values in held]).mean(axis=0, dtype=np.float64)
        yield slice(start, stop), total.astype(held[0][1].dtype)
        rest: list[Piece] = []
        for (where, values), stream in zip(held, streams, strict=True):
            if where.stop > stop:
                rest.append((slice(stop, where.stop), values[:, stop - start :]))
                continue
            following = next(stream, None)
            if following is None:
                return
            rest.append(following)
        held = rest
