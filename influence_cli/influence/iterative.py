"""s_test by a solver: λ from what the curvature's mean and ends are, a preconditioner, limits, a report of each solve.

`cg` has two ways. Three products with the exact GGN of a sample of images, preconditioned by EK-FAC, are its default:
they hold what predicts retraining, and more products do not predict it better (bench/results/cg.md). With a tolerance
or a limit, and where EK-FAC is not to be had (layer_curvature.py says why), it solves until the residual is small.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from influence_cli.curvature.damping import Damping
from influence_cli.curvature.operator import (
    Examples,
    batch_product,
    fits_kept,
    hold,
    kept_mean_product,
    largest_batch_eigenvalue,
    mean_product,
)
from influence_cli.curvature.preconditioner import (
    block_preconditioner,
    heaviest_rows,
    row_preconditioner,
    scaled_row_preconditioner,
)
from influence_cli.data.batches import readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.influence.layer_curvature import sampled, why_no_layers
from influence_cli.influence.system_shift import SystemShift, choose_shift
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal, duration
from influence_cli.solvers.cg import Product, SolveInfo, check_limits, conjugate_gradients, few_products
from influence_cli.solvers.lissa import MARGIN, Series, lissa
from influence_cli.solvers.nystrom import nystrom
from influence_cli.store.store import READ, Store

BATCH = 256
# Defaults: the relative residual, and products of a block (cg, nystrom) or steps (a series).
TOLERANCES = {"cg": 1e-5, "nystrom": 1e-5, "lissa": 1e-3, "neumann": 1e-3}
ITERATIONS = {"cg": 1_000, "nystrom": 1_000, "lissa": 40_000, "neumann": 10_000}
# Products of `cg` without a tolerance or a limit.
PRODUCTS = 3
# Examples of a product that is timed.
TIMED = 32
# A solver that may take longer than this, in seconds, gives a warning before it starts.
LONG = 300.0


@dataclass(frozen=True)
class Limits:
    """When a solver stops; None for the method's own number.

    Attributes:
        tolerance: of the relative residual, in (0, 1).
        max_iterations: at least 1.
        strict: stopping before the tolerance is an error, not a warning.
    """

    tolerance: float | None = None
    max_iterations: int | None = None
    strict: bool = False


@dataclass(frozen=True)
class Iterative:
    """An inverse by a solver.

    Attributes:
        apply: gradients [m, p] to s_test [m, p].
        shift: l2 + λ, of all parameters or of each, float64 [p].
        damping: λ and its reason.
        groups: what each λ belongs to: layers, or one empty name.
        smallest: min Λ of a Hessian, an estimate from inside its spectrum; None where it was not measured.
        solves: what the solver did, one entry per call.
    """

    apply: Product
    shift: float | Tensor
    damping: Damping
    groups: tuple[str, ...] = ("",)
    smallest: float | None = None
    solves: list[SolveInfo] = field(default_factory=list)


@dataclass(frozen=True)
class _System:
    """A = H + shift·I on the training examples in memory, and how to solve with it."""

    prepared: Prepared
    examples: Examples
    shift: float | Tensor
    floor: float
    product: Product
    precondition: Product | None
    scale: float
    tolerance: float
    max_iterations: int

    @property
    def method(self) -> str:
        return self.prepared.choice.method

    @property
    def is_series(self) -> bool:
        return self.method in ("lissa", "neumann")

    def batch_product(self) -> Product:
        choice = self.prepared.choice
        return batch_product(choice.network, self.examples, choice.matrix, self.shift, self.prepared.task.seed)


def make_iterative(
    prepared: Prepared, given: float | str, *, convex: bool, limits: Limits, terminal: Terminal
) -> Iterative:
    """Measure what λ needs, choose it, and make the inverse.

    The ends of a Hessian's spectrum are always measured: a solver may not notice a negative eigenvalue that λ
    does not outweigh.

    Args:
        prepared: a store of raw gradients, or none on the fly.
        given: ``curvature.damping``: ``auto``, ``training`` or λ.
        convex: whether the objective is convex in the tracked parameters.
        limits: when to stop.
        terminal: λ, residuals and warnings.

    Raises:
        InfluenceError: H + (l2 + λ)I is singular or indefinite, as far as that is visible here; limits that cannot
            solve anything.
    """
    method = prepared.choice.method
    tolerance = TOLERANCES[method] if limits.tolerance is None else limits.tolerance
    most = ITERATIONS[method] if limits.max_iterations is None else limits.max_iterations
    check_limits(tolerance, most)
    why = why_no_layers(prepared, convex=convex)
    if method == "cg" and limits.tolerance is None and limits.max_iterations is None:
        if not why:
            return _three_products(prepared, given, terminal)
        terminal.detail(f"cg solves to a residual of {tolerance:.0e}: {why}")
    examples = _training_examples(prepared)
    shift = choose_shift(prepared, examples, given, convex=convex, layered=not why, terminal=terminal)
    return _solver(prepared, examples, shift, replace(limits, tolerance=tolerance, max_iterations=most), terminal)


def _three_products(prepared: Prepared, given: float | str, terminal: Terminal) -> Iterative:
    """Make the default of `cg`: a few products with the GGN of a sample, from 0, preconditioned by EK-FAC."""
    examples = _training_examples(prepared, sample=True)
    shift = choose_shift(prepared, examples, given, convex=False, layered=True, terminal=terminal)
    product, kept = _ggn_product(prepared, examples, shift.total, terminal)
    precondition = _block_preconditioner(prepared, shift)
    iterative = Iterative(lambda vectors: vectors, shift.total, shift.damping, shift.groups)

    def apply(vectors: Tensor) -> Tensor:
        if not kept:
            _forecast_rebuilt(prepared, examples, vectors, terminal)
        with terminal.progress(PRODUCTS, "products with the curvature") as advance:
            solution, info = few_products(
                product, vectors, PRODUCTS, precondition=precondition, on_iteration=lambda *_: advance(1)
            )
        info = replace(info, preconditioner="ekfac", damping=shift.damping.value, examples=len(examples))
        iterative.solves.append(info)
        terminal.say(
            f"cg: {info.iterations} products with the GGN of {len(examples):,} training examples, relative residual "
            f"{info.residual:.2g}, preconditioner ekfac"
        )
        return solution

    return replace(iterative, apply=apply)


def _ggn_product(
    prepared: Prepared, examples: Examples, shift: float | Tensor, terminal: Terminal
) -> tuple[Product, bool]:
    """Multiply with the GGN; its Jacobian is kept where it fits the memory, and rebuilt in every product elsewhere.

    Returns:
        The product, and whether the Jacobian is kept.
    """
    network = prepared.choice.network
    like = next(network.model.parameters()).detach()
    moved = shift if isinstance(shift, float) else shift.to(like)
    if not fits_kept(network, examples):
        return mean_product(network, examples, "ggn", moved), False
    with terminal.progress(len(examples) // distributed.size(), "the Jacobian of the outputs") as advance:
        return kept_mean_product(network, examples, moved, like.dtype, advance), True


def _block_preconditioner(prepared: Prepared, shift: SystemShift) -> Product:
    """Invert EK-FAC at the system's own λ; an l2 that differs inside a layer counts with its mean there."""
    network, l2 = prepared.choice.network, prepared.task.objective.over(prepared.choice.network)
    shifts = []
    for block, value in zip(shift.blocks, shift.damping.values, strict=True):
        own = (
            l2 if isinstance(l2, float) else float(torch.cat([l2[network.slots[name]] for name in block.names]).mean())
        )
        shifts.append(own + value)
    return block_preconditioner(network, shift.blocks, shifts)


def _solver(
    prepared: Prepared, examples: Examples, shift: SystemShift, limits: Limits, terminal: Terminal
) -> Iterative:
    """Make the inverse that solves until the residual is small."""
    task, choice = prepared.task, prepared.choice
    network, matrix, method = choice.network, choice.matrix, choice.method
    like = next(network.model.parameters()).detach()
    moved = shift.total if isinstance(shift.total, float) else shift.total.to(like)
    precondition = None
    if choice.is_preconditioned and shift.mean > 0:
        with terminal.status("computing the preconditioner"):
            rows = heaviest_rows(network, examples)
            # A direction without l2 and λ may exist where l2 differs: then the mean stands for all.
            if isinstance(moved, Tensor) and float(moved.min()) > 0:
                precondition = scaled_row_preconditioner(rows, moved)
            else:
                precondition = row_preconditioner(rows, shift.mean)
    with terminal.status("measuring the largest eigenvalue (power iteration)"):
        scale = MARGIN * largest_batch_eigenvalue(
            network, examples, matrix, moved, task.seed, precondition if method in ("cg", "neumann") else None
        )
    if method in ("cg", "nystrom") and matrix == "ggn":
        product, _ = _ggn_product(prepared, examples, shift.total, terminal)
    else:
        product = mean_product(network, examples, matrix, moved)
    # The preconditioned matrix has no eigenvalue below about 1.
    floor = shift.mean if precondition is None else 1.0
    tolerance, most = limits.tolerance or TOLERANCES[method], limits.max_iterations or ITERATIONS[method]
    system = _System(prepared, examples, moved, floor, product, precondition, scale, tolerance, most)
    iterative = Iterative(lambda vectors: vectors, shift.total, shift.damping, shift.groups, shift.smallest)

    def apply(vectors: Tensor) -> Tensor:
        _forecast(system, vectors, terminal)
        solution, info = _solve(system, vectors, terminal)
        info = replace(info, damping=shift.damping.value, examples=len(examples))
        iterative.solves.append(info)
        _report(info, shift.damping, most, strict=limits.strict, terminal=terminal)
        return solution

    return replace(iterative, apply=apply)


def expected_products(method: str, scale: float, shift: float, tolerance: float) -> int:
    """Bound the products that a solver needs without a preconditioner, by the slowest possible direction.

    Conjugate gradients: ½ √(σ/(l2 + λ)) ln(2/ε); the Neumann series of LiSSA: σ/(l2 + λ) ln(1/ε).
    """
    condition = max(1.0, scale / shift) if shift > 0 else math.inf
    if method in ("cg", "nystrom"):
        return round(min(1e9, 0.5 * math.sqrt(condition) * math.log(2 / tolerance))) + 1
    return round(min(1e9, condition * math.log(1 / tolerance))) + 1


def _training_examples(prepared: Prepared, *, sample: bool = False) -> Examples:
    task, indices = prepared.task, prepared.task.train.indices
    if not prepared.on_the_fly:
        with Store.open(prepared.path) as store:
            indices = indices[store.column("state") == READ]
    indices = sampled(indices, task.seed) if sample else indices
    return hold(readable_batches(task.train, indices, BATCH, skip=prepared.on_the_fly), task.device, BATCH)


def _solve(system: _System, vectors: Tensor, terminal: Terminal) -> tuple[Tensor, SolveInfo]:
    product, method, done = system.product, system.method, 0
    stop = {"tolerance": system.tolerance, "max_iterations": system.max_iterations}
    names = {"cg": "conjugate gradients", "nystrom": "Nyström", "lissa": "LiSSA", "neumann": "Neumann iteration"}
    with terminal.progress(system.max_iterations, names[method]) as advance:

        def tell(count: int, _residual: float) -> None:
            nonlocal done
            advance(count - done)
            done = count

        if method == "nystrom":
            return nystrom(product, vectors, seed=system.prepared.task.seed, on_iteration=tell, **stop)  # type: ignore[arg-type]
        named = "ggn-rows" if system.precondition is not None else ""
        if method == "cg":
            solved = conjugate_gradients(
                product,
                vectors,
                precondition=system.precondition,
                on_iteration=tell,
                **stop,  # type: ignore[arg-type]
            )
        else:
            solved = lissa(
                system.batch_product(),
                product,
                vectors,
                precondition=system.precondition,
                series=Series(system.scale),
                on_round=tell,
                **stop,  # type: ignore[arg-type]
            )
    return solved[0], replace(solved[1], method=method, preconditioner=named)


def _forecast(system: _System, vectors: Tensor, terminal: Terminal) -> None:
    """Say how long a solver can take before it starts, from one product with a mini-batch."""
    method, examples, product = system.method, system.examples, system.batch_product()
    product(vectors[:1])  # the first call also warms up
    spent = _seconds(product, vectors)
    # A preconditioner costs once per product, of all examples or of a mini-batch.
    beside = 0.0 if system.precondition is None else _seconds(system.precondition, vectors)
    count = system.max_iterations
    if method != "neumann":
        count = min(count, expected_products(method, system.scale, system.floor, system.tolerance))
    seconds = count * (spent * (1.0 if system.is_series else len(examples) / examples.batch) + beside)
    terminal.say(
        f"{method} for {len(vectors)} right-hand sides: at most about {count:,} products with the curvature "
        f"({'of mini-batches' if system.is_series else 'of all examples'}), {duration(seconds)}"
    )
    if seconds > LONG:
        terminal.warn(
            f"{method} may take {duration(seconds)}: a larger curvature.damping or curvature.tolerance needs fewer "
            "products, and curvature.method: explicit on the last layers (gradients.layers) needs none; Ctrl-C keeps "
            "the store"
        )


def _seconds(work: Product, vectors: Tensor) -> float:
    started = time.perf_counter()
    float(work(vectors)[0, 0])
    return time.perf_counter() - started


def _forecast_rebuilt(prepared: Prepared, examples: Examples, vectors: Tensor, terminal: Terminal) -> None:
    """Say how long three products take whose Jacobian is rebuilt, from one with some examples."""
    few = Examples(examples.inputs[:TIMED], examples.targets[:TIMED], TIMED)
    network = prepared.choice.network
    product = mean_product(network, few, "ggn", 0.0)
    product(vectors[:1])  # the first call also warms up
    seconds = PRODUCTS * _seconds(product, vectors) * len(examples) / len(few)
    terminal.say(
        f"cg for {len(vectors)} right-hand sides: {PRODUCTS} products, {duration(seconds)}; the Jacobian of "
        f"{len(examples):,} examples does not fit into the memory"
    )
    if seconds > LONG:
        terminal.warn(
            f"cg may take {duration(seconds)}: curvature.method: ekfac needs no products, and fewer layers "
            "(gradients.layers) need less memory; Ctrl-C keeps the store"
        )


def _report(info: SolveInfo, damping: Damping, most: int, *, strict: bool, terminal: Terminal) -> None:
    """Report what a solve took; without convergence it is a warning, or an error with ``strict``."""
    text = f"{info.method}: {info.iterations:,} iterations, relative residual {info.residual:.1e}, λ = {damping.text()}"
    if info.preconditioner:
        text += f", preconditioner {info.preconditioner}"
    if info.scale is not None:
        text += f", scale {info.scale:.3g}"
    terminal.say(text)
    if info.converged:
        return
    problem = f"{info.method} did not converge: relative residual {info.residual:.1e}, target {info.tolerance:.0e}"
    stopped = info.iterations >= most
    remedy = (
        f"raise curvature.max_iterations ({most:,}), use a larger curvature.damping"
        if stopped
        else "rounding allows no better: use a larger curvature.damping or curvature.tolerance"
    ) + ", or curvature.method: explicit on fewer layers"
    if strict:
        raise InfluenceError(f"{problem} (--strict)", remedy)
    terminal.warn(f"{problem}; {remedy}")
