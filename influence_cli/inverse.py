"""s_test = (H + (l2 + λ)I)⁻¹ ∇L(z_test), by whichever method was chosen: a division in a basis, or a solver."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from influence_cli.curvature.damping import Damping, check_poles, choose_damping
from influence_cli.curvature.fisher import Moment, stored_moment
from influence_cli.curvature.operator import (
    Examples,
    batch_product,
    hold,
    largest_batch_eigenvalue,
    mean_product,
)
from influence_cli.data import readable_batches
from influence_cli.precompute import Prepared
from influence_cli.scores import effective_dimension, preconditioned, require_finite
from influence_cli.solvers import SolveInfo, conjugate_gradients, lanczos, lissa
from influence_cli.spectrum import Spectrum
from influence_cli.store import READ, Store
from influence_cli.terminal import Terminal, duration

CG_TOLERANCE = 1e-5
LISSA_TOLERANCE = 1e-3
LISSA_BATCH = 256
# Below this share of the effective dimension what was left out may matter: half of it, by the datamodeling score.
ENOUGH = 0.5
# An exact basis has no such tail: what is missing there is missing.
NEARLY_ALL = 0.99
# A solver that may take longer, in seconds, is warned of before it starts.
LONG = 300.0


@dataclass
class Inverse:
    """The inverse curvature of one checkpoint.

    Attributes:
        apply: coordinates of gradients [m, k] to those of s_test [m, k].
        own: coordinates of gradients [b, k] to gᵢᵀ(H + (l2 + λ)I)⁻¹gᵢ [b]; None where that takes a solve an example.
        shift: l2 + λ, of all coordinates or of each [k]; 0 for ``identity``.
        damping: λ and its reason; None for ``identity``.
        groups: what each λ belongs to: layers, or one empty name.
        effective_dimension: d_eff of the kept spectrum; None without one.
        kept: share of ΣΛ/(Λ + shift) that the store keeps, from above; 1 without a basis.
        solves: what a solver did, a call each.
        at: the same inverse at another λ, from what is known already; it raises at a pole. None where another λ takes
            a solve.
    """

    apply: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor] | None
    shift: float | Tensor
    damping: Damping | None
    groups: tuple[str, ...] = ("",)
    effective_dimension: float | None = None
    kept: float = 1.0
    solves: list[SolveInfo] = field(default_factory=list)
    at: Callable[[Damping], Inverse] | None = None


def make_inverse(prepared: Prepared, given: float | str, terminal: Terminal) -> Inverse:
    """Choose λ by the one rule, print it in absolute units, and give the inverse.

    Args:
        prepared: a complete store.
        given: ``curvature.damping``: ``auto`` or λ.
        terminal: where λ, residuals and warnings go.

    Raises:
        InfluenceError: Λⱼ + l2 + λ ≤ 0 somewhere, or a solver that cannot go on.
    """
    choice = prepared.choice
    if choice.method == "identity":
        if given != "auto":
            terminal.warn("curvature identity has no damping: the score is gᵗg/n, without a unit; λ is not used")
        return Inverse(lambda coordinates: coordinates, lambda rows: rows.square().sum(dim=1), 0.0, None)
    if prepared.spectrum is not None:
        return _spectral(prepared, prepared.spectrum, given, terminal)
    if choice.method == "fisher":
        return _stored_fisher(prepared, given, terminal)
    return _iterative(prepared, given, terminal)


def _convex(prepared: Prepared) -> bool:
    return prepared.choice.output is not None and prepared.task.convex_loss


def _spectral(prepared: Prepared, spectrum: Spectrum, given: float | str, terminal: Terminal) -> Inverse:
    l2 = prepared.task.l2
    damping = choose_damping(
        given,
        convex=_convex(prepared),
        l2=l2,
        matrix=prepared.choice.matrix,
        smallest=spectrum.smallest,
        means=[group.mean for group in spectrum.groups],
        largest=float(spectrum.values.max()),
    )
    inverse = _divided(spectrum, damping, l2)
    _announce(damping, l2, terminal)
    _, whole = spectrum.dimension(damping, l2)
    kept, size = inverse.kept, prepared.choice.network.size
    terminal.say(
        f"effective dimension {whole:,.1f}; {len(spectrum.values):,} of {size:,} coordinates kept ({kept:.2%} of it)"
    )
    if kept < (ENOUGH if prepared.choice.is_layered else NEARLY_ALL):
        terminal.warn(
            f"the store keeps {kept:.1%} of the effective dimension: influence is restricted to the span of the kept "
            "coordinates; raise gradients.budget or the damping, or use --on-the-fly, which keeps all"
        )
    return inverse


def _divided(spectrum: Spectrum, damping: Damping, l2: float) -> Inverse:
    """Divide by Λ + l2 + λ, coordinate by coordinate."""
    shift = spectrum.shift(damping, l2)
    # Rounding leaves the GGN's zero eigenvalues a hair on either side; only a real shift makes them invertible.
    check_poles(min(spectrum.smallest, float(spectrum.values.min())), shift.numpy())
    d_eff, whole = spectrum.dimension(damping, l2)
    values, names = spectrum.values, tuple(group.name for group in spectrum.groups)

    def apply(coordinates: Tensor) -> Tensor:
        return preconditioned(coordinates, values.to(coordinates.device), shift.to(coordinates.device))

    return Inverse(
        apply,
        lambda c: (apply(c) * c).sum(dim=1),
        shift,
        damping,
        names,
        d_eff,
        min(1.0, d_eff / whole) if whole > 0 else 1.0,
        at=lambda other: _divided(spectrum, other, l2),
    )


def _stored_fisher(prepared: Prepared, given: float | str, terminal: Terminal) -> Inverse:
    """Make the inverse of the second moment of the stored gradients, from one scan."""
    network, task = prepared.choice.network, prepared.task
    with terminal.progress(len(task.train), "second moment of the stored gradients") as advance:
        found = stored_moment(prepared.path, advance, where="curvature fisher")
    damping = choose_damping(
        given,
        convex=_convex(prepared),
        l2=task.l2,
        matrix="empirical",
        smallest=0.0,
        means=[found.trace / network.size],
        largest=float(found.values[0]),
    )
    inverse = _of_moment(found, damping, task.l2)
    _announce(damping, task.l2, terminal)
    terminal.say(f"effective dimension {inverse.effective_dimension:,.1f} of at most {len(found.values):,}")
    return inverse


def _of_moment(found: Moment, damping: Damping, l2: float) -> Inverse:
    """Divide along the eigenvectors of the stored gradients' second moment."""
    shift = l2 + damping.values[0]
    check_poles(0.0, shift)
    vectors, inverse = found.vectors, 1 / (found.values + shift)

    def apply(rows: Tensor) -> Tensor:
        # Stored gradients have no component outside the span of the eigenvectors: nothing is left out.
        p, scale = vectors.to(rows), inverse.to(rows)
        return ((rows @ p) * scale) @ p.T

    def own(rows: Tensor) -> Tensor:
        return (rows @ vectors.to(rows)).square() @ inverse.to(rows)

    return Inverse(
        apply,
        own,
        shift,
        damping,
        effective_dimension=effective_dimension(found.values, shift),
        at=lambda other: _of_moment(found, other, l2),
    )


def _iterative(prepared: Prepared, given: float | str, terminal: Terminal) -> Inverse:
    task, choice = prepared.task, prepared.choice
    network, matrix = choice.network, choice.matrix
    indices = task.train.indices
    if not prepared.on_the_fly:
        with Store.open(prepared.path) as store:
            indices = indices[store.column("state") == READ]
    batches = readable_batches(task.train, indices, LISSA_BATCH, skip=prepared.on_the_fly)
    examples = hold(batches, task.device, LISSA_BATCH)
    like = next(network.model.parameters()).detach()
    smallest = mean = largest = 0.0
    if given == "auto" and not (_convex(prepared) and task.l2 > 0):
        with terminal.status("measuring the spectrum's ends (Lanczos)"):
            smallest, mean, largest = lanczos(
                mean_product(network, examples, matrix, 0.0), network.size, like=like, seed=task.seed
            )
    damping = choose_damping(
        given, convex=_convex(prepared), l2=task.l2, matrix=matrix, smallest=smallest, means=[mean], largest=largest
    )
    shift = task.l2 + damping.values[0]
    if matrix == "ggn":
        check_poles(0.0, shift)
    _announce(damping, task.l2, terminal)
    inverse = Inverse(lambda vectors: vectors, None, shift, damping)
    with terminal.status("measuring the largest eigenvalue (power iteration)"):
        scale = 1.2 * (largest_batch_eigenvalue(network, examples, matrix, task.seed) + shift)

    def apply(vectors: Tensor) -> Tensor:
        _forecast(prepared, examples, vectors, shift, scale, terminal)
        solution, info = _solve(prepared, examples, vectors, shift, scale, terminal)
        require_finite(solution, f"the solution by {info.method}")
        inverse.solves.append(info)
        text = f"{info.method}: {info.iterations:,} iterations, relative residual {info.residual:.1e}"
        if info.scale is not None:
            text += f", scale {info.scale:.3g}"
        terminal.say(text)
        if not info.converged:
            terminal.warn(
                f"{info.method} did not converge: relative residual {info.residual:.1e}, wanted {info.tolerance:.0e}; "
                "use a larger curvature.damping, or curvature.method: explicit on fewer layers"
            )
        return solution

    inverse.apply = apply
    return inverse


def _solve(
    prepared: Prepared, examples: Examples, vectors: Tensor, shift: float, scale: float, terminal: Terminal
) -> tuple[Tensor, SolveInfo]:
    network, matrix = prepared.choice.network, prepared.choice.matrix
    product = mean_product(network, examples, matrix, shift)
    if prepared.choice.method == "cg":
        with terminal.progress(1000, "conjugate gradients") as advance:
            return conjugate_gradients(
                product, vectors, tolerance=CG_TOLERANCE, on_iteration=lambda _count, _residual: advance(1)
            )
    with terminal.progress(200, "LiSSA") as advance:
        return lissa(
            batch_product(network, examples, matrix, shift, prepared.task.seed),
            product,
            vectors,
            scale=scale,
            tolerance=LISSA_TOLERANCE,
            on_round=lambda _count, _residual: advance(1),
        )


def expected_products(method: str, scale: float, shift: float) -> int:
    """Bound the products that a solver needs, by the slowest direction that the spectrum can have.

    Conjugate gradients: ½ √(σ/(l2 + λ)) ln(2/ε); the Neumann series of LiSSA: σ/(l2 + λ) ln(1/ε).
    """
    condition = max(1.0, scale / shift) if shift > 0 else math.inf
    if method == "cg":
        return round(min(1e9, 0.5 * math.sqrt(condition) * math.log(2 / CG_TOLERANCE))) + 1
    return round(min(1e9, condition * math.log(1 / LISSA_TOLERANCE))) + 1


def _forecast(
    prepared: Prepared, examples: Examples, vectors: Tensor, shift: float, scale: float, terminal: Terminal
) -> None:
    """Say before a solver starts how long it can take, from one product with a mini-batch."""
    method, network, matrix = prepared.choice.method, prepared.choice.network, prepared.choice.matrix
    product = batch_product(network, examples, matrix, shift, prepared.task.seed)
    product(vectors[:1])  # the first call also warms up
    started = time.perf_counter()
    float(product(vectors)[0, 0])
    spent = time.perf_counter() - started
    count = expected_products(method, scale, shift)
    seconds = count * spent * (len(examples) / examples.batch if method == "cg" else 1.0)
    terminal.say(
        f"{method} for {len(vectors)} right sides: at most about {count:,} products with the curvature "
        f"({'of all examples' if method == 'cg' else 'of mini-batches'}), {duration(seconds)}"
    )
    if seconds > LONG:
        terminal.warn(
            f"{method} may take {duration(seconds)}: a larger curvature.damping needs fewer products, and "
            "curvature.method: explicit on the last layers (gradients.layers) needs none; Ctrl-C keeps the store"
        )


def _announce(damping: Damping, l2: float, terminal: Terminal) -> None:
    terminal.say(f"damping λ = {damping.text()} ({damping.reason}); l2 = {l2:g}")
    if damping.advice:
        terminal.warn(damping.advice)
