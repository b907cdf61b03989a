"""EK-FAC: a Kronecker-factored eigenbasis per layer with corrected eigenvalues (George et al. 2018); also K-FAC.

1. Covariances A = E Σ_τ a_τa_τᵀ of a layer's inputs, G = E Σ_τ δ_τδ_τᵀ of its output gradients, labels drawn from the
   model (Martens & Grosse 2015; for convolutions Grosse & Martens 2016). They only choose a basis, so a sample of the
   examples is enough, smaller where an example has many positions: ``sample_sizes``.
2. Their eigenvectors Q_A, Q_G, in float64.
3. Λ = E (Q_Gᵀ G_i Q_A)², the exact diagonal of the Fisher in the basis Q_A ⊗ Q_G over all examples (K-FAC: λ_A λ_Gᵀ,
   from covariances over all of them).

Norms and loose parameters have their exact Fisher block up to 4,096 parameters, and its diagonal beyond that. Use it
for any network too large for `explicit`. Each stage can be interrupted: `Progress` holds everything known so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature import kronecker_plan
from influence_cli.curvature.blocks import Block
from influence_cli.curvature.fisher_draws import EXACT, draws, part_seed
from influence_cli.curvature.kronecker_plan import KroneckerPlan, make_plan
from influence_cli.curvature.progress import Progress
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, owner_of
from influence_cli.passes.contractions import covariances, gradient_squares, rotated, sketched, turned_sides
from influence_cli.passes.gradient_products import loose_gradients
from influence_cli.passes.layers import Call, forward
from influence_cli.runtime import distributed, exchange
from influence_cli.solvers.eigen import eigenpairs

# Prefixes of the names of sums over examples: covariances, sketches, loose parameters, Λ, its trace.
SUMS = ("a", "d", "m", "v", "s")
# What each stage sums, positions (t) besides; what the decomposition of a layer gives.
OF_STAGE = {"covariances": ("a", "d", "m", "t"), "eigenvalues": ("m", "v", "s")}
DECOMPOSED = ("la", "ld", "qa", "qd")

STAGES = ("covariances", "eigenvectors", "eigenvalues", "done")

Batches = Callable[[str, int], Iterable[Batch]]
Report = Callable[[str, int], None]


@dataclass(frozen=True)
class Thinning:
    """Which examples the covariances of a layer use.

    Attributes:
        every: by a layer's number, 3 if it takes every third example of ``order`` only; 1 where it is left out.
        order: int64, rising positions in the data set of the examples of the covariances; None: counted per batch.
    """

    every: Mapping[int, int] = field(default_factory=dict)
    order: np.ndarray | None = None

    def slice_of(self, number: int, batch: Batch) -> slice:
        """Give the rows of a batch that a layer takes."""
        before = 0 if self.order is None else int(np.searchsorted(self.order, batch.indices[0]))
        step = self.every.get(number, 1)
        return slice(-before % step, None, step)


@dataclass(frozen=True)
class Watch:
    """What is told of a fit while it goes on.

    Attributes:
        save: called after every batch and layer; it decides when to write.
        report: called with (stage, finished examples or layers).
    """

    save: Callable[[Progress], None] = lambda _: None
    report: Report = lambda _stage, _count: None


def fit(
    network: Network,
    batches: Batches,
    *,
    how: str,
    seed: int,
    corrected: bool = True,
    thinning: Thinning = Thinning(),
    progress: Progress | None = None,
    watch: Watch = Watch(),
) -> list[Block]:
    """Fit the factors of every layer.

    Each process of a job takes a part of the batches, and of the layers to decompose; sums are
    added and eigenvectors exchanged at the end of a stage.

    Args:
        network: the model, its layers decided.
        batches: gives this process's batches of a stage from a number on; the same ones at every call.
        how: which draws (``fisher_slopes``).
        seed: of the draws.
        corrected: Λ from the data (EK-FAC); otherwise the products of the factors' eigenvalues (K-FAC).
        thinning: which examples the covariances of each layer use; all of them by default.
        progress: where an earlier call stopped.
        watch: what is told while it goes on.

    Returns:
        One block per layer, then the loose ones, on the CPU.

    Raises:
        FloatingPointError: after the last batch an output or a sum was NaN or infinite.
    """
    progress = progress or Progress(STAGES[0], arrays={"seed": torch.tensor(seed)})
    plan = make_plan(network)
    if progress.stage == "covariances":
        for batch in batches("covariances", progress.done):
            if len(batch):
                _add_covariances(network, plan, batch, progress, how, seed, thinning, loose=not corrected)
            _finished(progress, batch, watch)
        _add_up(progress)
        progress.advance("eigenvectors")
    if progress.stage == "eigenvectors":
        for position, number in enumerate(_layers_here(network, plan)):
            if position >= progress.done:
                _decompose_layer(network, number, progress)
                progress.done = position + 1
                watch.save(progress)
            watch.report("eigenvectors", 1)
        _hand_round(plan, progress)
        progress.advance("eigenvalues" if corrected else "done")
    if progress.stage == "eigenvalues":
        for batch in batches("eigenvalues", progress.done):
            if len(batch):
                _add_eigenvalues(network, plan, batch, progress, how, seed)
            _finished(progress, batch, watch)
        _add_up(progress)
        progress.advance("done")
    return _blocks(network, plan, progress, corrected=corrected)


def _add_up(progress: Progress) -> None:
    """Add up what the processes of a job have summed in a stage, and count its examples."""
    exchange.sum_tensors(progress.arrays, lambda name: name.partition(".")[0] in OF_STAGE[progress.stage])
    counts = sum(distributed.gathered(progress.examples))
    progress.arrays[f"{progress.stage}.n"] = torch.tensor(counts)


def _layers_here(network: Network, plan: KroneckerPlan) -> list[int]:
    """Choose the layers that this process decomposes: widest first, each to the process with the least work."""
    cost = {number: network.layers[number].width ** 3 + network.layers[number].outputs ** 3 for number in plan.layers}
    loads, owner = [0] * distributed.size(), dict[int, int]()
    for number in sorted(plan.layers, key=lambda number: -cost[number]):
        owner[number] = loads.index(min(loads))
        loads[owner[number]] += cost[number]
    return [number for number in plan.layers if owner[number] == distributed.rank()]


def _hand_round(plan: KroneckerPlan, progress: Progress) -> None:
    """Give every process the eigenvectors of all layers."""
    if distributed.size() == 1:
        return
    made = {name: progress.arrays.pop(name) for name in list(progress.arrays) if name.partition(".")[0] in DECOMPOSED}
    exchange.hand_round(made)
    for number in plan.layers:
        for side in ("a", "d"):
            progress.arrays.pop(f"{side}.{number}", None)
    progress.arrays |= made


def catch_up(progress: Progress) -> None:
    """Move a process that is one stage behind the others to the start of their stage.

    A kill can come when only some processes have saved the end of a stage; the sums and eigenvectors exchanged
    there are the same in all of them.
    """
    stages = distributed.gathered(progress.stage)
    furthest = max(stages, key=STAGES.index)
    if len(set(stages)) == 1:
        return
    leader = stages.index(furthest)
    theirs = dict[str, Tensor]()
    if distributed.rank() == leader:
        local = OF_STAGE.get(furthest, DECOMPOSED)
        theirs = {name: value for name, value in progress.arrays.items() if name.partition(".")[0] not in local}
    exchange.hand_round(theirs)
    if progress.stage != furthest:
        progress.arrays.clear()
        progress.arrays.update(theirs)
        progress.advance(furthest)


def _finished(progress: Progress, batch: Batch, watch: Watch) -> None:
    _refuse_not_finite(progress)
    progress.done += 1
    progress.examples += len(batch)
    progress.arrays[f"{progress.stage}.n"] = torch.tensor(progress.examples)
    watch.report(progress.stage, len(batch))
    watch.save(progress)


def _refuse_not_finite(progress: Progress) -> None:
    """Check that sums are finite; of a square only its diagonal, which bounds all entries of a covariance."""
    sums = []
    for name, values in progress.arrays.items():
        if name.partition(".")[0] in SUMS:
            square = values.ndim > 1 and values.shape[-1] == values.shape[-2] and name[0] in "adm"
            sums.append((values.diagonal(dim1=-2, dim2=-1) if square else values).sum())
    if sums and not bool(torch.stack(sums).isfinite().all()):
        raise FloatingPointError(progress.stage)


def _passes(network: Network, batch: Batch, how: str, seed: int) -> Iterator[tuple[int, list[list[Call]], Tensor]]:
    """Yield (draw, the calls of each layer, slopes) for every draw of a batch; the same ones in every stage."""
    tape = forward(network, batch.inputs)
    if not bool(tape.outputs.isfinite().all()):
        raise FloatingPointError("outputs")
    for draw, slopes in enumerate(draws(network, tape.outputs, batch.targets, how, seed, batch.indices)):
        yield draw, tape.backward(slopes, again=how == EXACT), slopes


def _add_covariances(
    network: Network,
    plan: KroneckerPlan,
    batch: Batch,
    progress: Progress,
    how: str,
    seed: int,
    thinning: Thinning,
    *,
    loose: bool = False,
) -> None:
    for draw, calls, slopes in _passes(network, batch, how, seed):
        for number in plan.layers:
            layer_calls = _thinned(calls[number] if number < len(calls) else [], thinning.slice_of(number, batch))
            if not layer_calls or not len(layer_calls[0].a):
                continue
            layer = network.layers[number]
            into, out, positions = covariances(network, layer, layer_calls, kronecker_plan.WIDEST)
            for side, square, width in (("a", into, layer.width), ("d", out, layer.outputs)):
                if side == "a" and draw:
                    continue  # the inputs are the same for every draw
                if square is None:
                    square = sketched(network, layer, layer_calls, side, _sketch(width, seed, number))
                progress.add(f"{side}.{number}", square)
            progress.add(f"t.{number}", torch.tensor(float(positions)))
        if loose:
            _add_loose(network, plan, batch, calls, slopes, progress)


def _thinned(calls: Sequence[Call], kept: slice) -> list[Call]:
    """Keep each so-many-th example, so that a data set ordered by class is covered."""
    return [replace(call, a=call.a[kept], delta=None if call.delta is None else call.delta[kept]) for call in calls]


def _add_loose(
    network: Network, plan: KroneckerPlan, batch: Batch, calls: list[list[Call]], slopes: Tensor, progress: Progress
) -> None:
    if not plan.loose:
        return
    loose = loose_gradients(network, calls, batch.inputs, slopes, plan.loose)
    for position, names in enumerate(plan.loose):
        grads = loose[names]
        exact = grads.shape[1] <= kronecker_plan.EXACT_BLOCK
        progress.add(f"m.{position}", grads.T @ grads if exact else grads.square().sum(dim=0))


def _sketch(width: int, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(part_seed(seed, number))
    return torch.randn(width, kronecker_plan.TOP + kronecker_plan.OVERSAMPLED, generator=generator)


def _decompose_layer(network: Network, number: int, progress: Progress) -> None:
    """Replace a layer's covariances by their eigenvectors."""
    layer = network.layers[number]
    for side, width in (("a", layer.width), ("d", layer.outputs)):
        matrix = progress.arrays.pop(f"{side}.{number}", None)
        if matrix is None:  # the layer never ran: all directions are equal
            matrix = torch.zeros(layer.groups, width, min(width, kronecker_plan.WIDEST), dtype=torch.float64)
        if width > kronecker_plan.WIDEST:
            values, vectors = nystrom(matrix[0].cpu(), _sketch(width, progress_seed(progress), number).double())
            values, vectors = values[None], vectors[None]
        else:
            values, vectors = eigenpairs(matrix)
        progress.arrays[f"l{side}.{number}"] = values.clamp_min(0)
        # Same memory layout as when read from a file: other strides round differently in a matrix product.
        progress.arrays[f"q{side}.{number}"] = vectors.float().contiguous()


def progress_seed(progress: Progress) -> int:
    """Give the seed that the sketches were made with."""
    return int(progress.arrays.get("seed", torch.tensor(0)))


def nystrom(image: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate the top eigenpairs of a positive semi-definite A ≈ Y (ΩᵀY)⁺ Yᵀ, Y = AΩ (Tropp et al. 2017).

    Args:
        image: Y [w, s].
        sketch: Ω [w, s].

    Returns:
        At most TOP values, largest first, and orthonormal vectors, in columns.
    """
    core = sketch.T @ image
    weights, turn = torch.linalg.eigh((core + core.T) / 2)
    # Values below this are rounding of float32 sums, not curvature.
    used = weights > 1e-7 * float(weights[-1].clamp_min(1e-300))
    half = image @ (turn[:, used] / weights[used].sqrt())
    vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return singular.square()[: kronecker_plan.TOP], vectors[:, : kronecker_plan.TOP]


def _add_eigenvalues(
    network: Network, plan: KroneckerPlan, batch: Batch, progress: Progress, how: str, seed: int
) -> None:
    for _draw, calls, slopes in _passes(network, batch, how, seed):
        _add_loose(network, plan, batch, calls, slopes, progress)
        for number in plan.layers:
            layer_calls = calls[number] if number < len(calls) else []
            if not layer_calls:
                continue
            layer = network.layers[number]
            q_out, q_in = (progress.arrays[f"q{side}.{number}"].to(network.device()) for side in ("d", "a"))
            pair = turned_sides(network, layer, layer_calls, q_out, q_in)
            if pair is not None:
                left, right = (side.square().transpose(0, 1) for side in pair)
                progress.add(f"v.{number}", left.transpose(1, 2) @ right)
            else:
                for part in rotated(network, layer, layer_calls, q_out, q_in):
                    progress.add(f"v.{number}", part.square().sum(dim=0))
            if q_out.shape[2] < layer.outputs or q_in.shape[2] < layer.width:
                progress.add(f"s.{number}", gradient_squares(network, layer, layer_calls))


def _blocks(network: Network, plan: KroneckerPlan, progress: Progress, *, corrected: bool) -> list[Block]:
    """Gather the results as blocks."""
    arrays = progress.arrays
    n = max(1, int(arrays["eigenvalues.n" if corrected else "covariances.n"]))
    blocks = []
    for number in plan.layers:
        layer = network.layers[number]
        q_out, q_in = arrays[f"qd.{number}"].cpu(), arrays[f"qa.{number}"].cpu()
        shape = (layer.groups, q_out.shape[2], q_in.shape[2])
        if corrected:
            values = arrays.get(f"v.{number}", torch.zeros(shape, dtype=torch.float64)).cpu() / n
        else:
            # Homogeneous in space: positions share one G (Grosse & Martens 2016, section 3).
            positions = float(arrays.get(f"t.{number}", torch.tensor(float(n))))
            out, into = arrays[f"ld.{number}"].cpu() / max(1.0, positions), arrays[f"la.{number}"].cpu() / n
            values = out[:, :, None] * into[:, None, :]
        trace = float(arrays[f"s.{number}"]) / n if f"s.{number}" in arrays else float(values.sum())
        size = layer.groups * layer.outputs * layer.width
        blocks.append(Block(layer.name, "kronecker", layer.names, values.float(), q_out, q_in, None, size, trace))
    for position, names in enumerate(plan.loose):
        moment = arrays[f"m.{position}"].cpu() / n
        name = owner_of(names[0]) or names[0]
        if moment.ndim == 1:
            values, kind, vectors = moment, "diagonal", None
        else:
            pairs = eigenpairs(moment[None])
            values, vectors, kind = pairs[0][0].clamp_min(0), pairs[1][0].float(), "dense"
        blocks.append(Block(name, kind, names, values.float(), None, None, vectors, len(values), float(values.sum())))
    return blocks


def remainders(blocks: Sequence[Block]) -> list[str]:
    """Name the layers with only their top eigenvectors in the basis, and how much that leaves out."""
    texts = []
    for block in blocks:
        if block.kind == "kronecker" and block.count < block.size:
            share = float(block.values.double().sum()) / max(block.trace, 1e-300)
            texts.append(
                f"{block.name}: {block.size:,} parameters are too many for all eigenvectors; the top "
                f"{kronecker_plan.TOP:,} per factor hold {share:.1%} of its curvature; the rest is left out"
            )
    return texts
