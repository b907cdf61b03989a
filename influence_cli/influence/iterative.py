"""s_test by a solver: λ from the ends of the spectrum, a preconditioner, limits, and a report of each solve."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from torch import Tensor

from influence_cli.curvature.damping import Damping, check_poles, choose_damping
from influence_cli.curvature.operator import Examples, batch_product, hold, largest_batch_eigenvalue, mean_product
from influence_cli.curvature.preconditioner import heaviest_rows, row_preconditioner
from influence_cli.data.batches import readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.model.objective import Objective
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal, duration
from influence_cli.solvers.cg import Product, SolveInfo, check_limits, conjugate_gradients
from influence_cli.solvers.lanczos import lanczos
from influence_cli.solvers.lissa import MARGIN, Series, lissa
from influence_cli.solvers.nystrom import nystrom
from influence_cli.store.store import READ, Store

BATCH = 256
# Defaults: the relative residual, and products of a block (cg, nystrom) or steps (a series).
TOLERANCES = {"cg": 1e-5, "nystrom": 1e-5, "lissa": 1e-3, "neumann": 1e-3}
ITERATIONS = {"cg": 1_000, "nystrom": 1_000, "lissa": 40_000, "neumann": 10_000}
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
        shift: l2 + λ; the mean where l2 differs between parameters.
        damping: λ and its reason.
        smallest: min Λ of a Hessian, an estimate from inside its spectrum; None where it was not measured.
        solves: what the solver did, one entry per call.
    """

    apply: Product
    shift: float
    damping: Damping
    smallest: float | None
    solves: list[SolveInfo] = field(default_factory=list)


@dataclass(frozen=True)
class _System:
    """A = H + shift·I on the training examples in memory, and how to solve with it."""

    prepared: Prepared
    examples: Examples
    shift: float | Tensor
    floor: float
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

    def product(self) -> Product:
        choice = self.prepared.choice
        return mean_product(choice.network, self.examples, choice.matrix, self.shift)

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
        given: ``curvature.damping``: ``auto`` or λ.
        convex: whether the objective is convex in the tracked parameters.
        limits: when to stop.
        terminal: λ, residuals and warnings.

    Raises:
        InfluenceError: H + (l2 + λ)I is singular or indefinite, as far as that is visible here; limits that cannot
            solve anything.
    """
    task, choice = prepared.task, prepared.choice
    network, matrix, method = choice.network, choice.matrix, choice.method
    tolerance = TOLERANCES[method] if limits.tolerance is None else limits.tolerance
    most = ITERATIONS[method] if limits.max_iterations is None else limits.max_iterations
    check_limits(tolerance, most)
    examples = _training_examples(prepared)
    like = next(network.model.parameters()).detach()
    indefinite = matrix == "hessian" and not convex
    smallest = mean = largest = 0.0
    l2 = task.objective.over(network)
    # λ = 0 is right if l2 determines what the data do not: all of it, or all that a gradient can have.
    least = l2 if isinstance(l2, float) else float(l2.max() if convex and task.curved_loss else l2.min())
    if indefinite or (given == "auto" and not (convex and least > 0)):
        with terminal.status("measuring the spectrum's ends (Lanczos)"):
            smallest, mean, largest = lanczos(
                mean_product(network, examples, matrix, 0.0), network.size, like=like, seed=task.seed
            )
    if indefinite:
        terminal.say(f"the Hessian's smallest eigenvalue is about {smallest:.3g}, its largest {largest:.3g}")
    damping = choose_damping(
        given,
        convex=convex,
        l2=least,
        matrix=matrix,
        smallest=smallest,
        means=[mean],
        largest=largest,
        layered=False,
    )
    shift = l2 + damping.values[0] if isinstance(l2, float) else (l2 + damping.values[0]).to(like)
    check_poles(smallest if indefinite else 0.0, least + damping.values[0])
    announce(damping, task.objective, terminal)
    floor = shift if isinstance(shift, float) else float(shift.mean())
    precondition = None
    if choice.is_preconditioned and floor > 0:
        with terminal.status("computing the preconditioner"):
            precondition = row_preconditioner(heaviest_rows(network, examples), floor)
    with terminal.status("measuring the largest eigenvalue (power iteration)"):
        scale = MARGIN * largest_batch_eigenvalue(
            network, examples, matrix, shift, task.seed, precondition if method == "neumann" else None
        )
    system = _System(prepared, examples, shift, floor, precondition, scale, tolerance, most)
    iterative = Iterative(lambda vectors: vectors, floor, damping, smallest if indefinite else None)

    def apply(vectors: Tensor) -> Tensor:
        _forecast(system, vectors, terminal)
        solution, info = _solve(system, vectors, terminal)
        info = replace(info, damping=damping.values[0])
        iterative.solves.append(info)
        _report(info, most, strict=limits.strict, terminal=terminal)
        return solution

    return replace(iterative, apply=apply)


def announce(damping: Damping, objective: Objective, terminal: Terminal) -> None:
    """Print λ in absolute units and its reason."""
    terminal.say(f"damping λ = {damping.text()} ({damping.reason}); l2 = {objective.text()}")
    if damping.advice:
        terminal.warn(damping.advice)


def expected_products(method: str, scale: float, shift: float, tolerance: float) -> int:
    """Bound the products that a solver needs without a preconditioner, by the slowest possible direction.

    Conjugate gradients: ½ √(σ/(l2 + λ)) ln(2/ε); the Neumann series of LiSSA: σ/(l2 + λ) ln(1/ε).
    """
    condition = max(1.0, scale / shift) if shift > 0 else math.inf
    if method in ("cg", "nystrom"):
        return round(min(1e9, 0.5 * math.sqrt(condition) * math.log(2 / tolerance))) + 1
    return round(min(1e9, condition * math.log(1 / tolerance))) + 1


def _training_examples(prepared: Prepared) -> Examples:
    task, indices = prepared.task, prepared.task.train.indices
    if not prepared.on_the_fly:
        with Store.open(prepared.path) as store:
            indices = indices[store.column("state") == READ]
    return hold(readable_batches(task.train, indices, BATCH, skip=prepared.on_the_fly), task.device, BATCH)


def _solve(system: _System, vectors: Tensor, terminal: Terminal) -> tuple[Tensor, SolveInfo]:
    product, method, done = system.product(), system.method, 0
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
    started = time.perf_counter()
    float(product(vectors)[0, 0])
    spent = time.perf_counter() - started
    count = system.max_iterations
    if method != "neumann":
        count = min(count, expected_products(method, system.scale, system.floor, system.tolerance))
    seconds = count * spent * (1.0 if system.is_series else len(examples) / examples.batch)
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


def _report(info: SolveInfo, most: int, *, strict: bool, terminal: Terminal) -> None:
    """Report what a solve took; without convergence it is a warning, or an error with ``strict``."""
    text = (
        f"{info.method}: {info.iterations:,} iterations, relative residual {info.residual:.1e}, λ = {info.damping:.6g}"
    )
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
