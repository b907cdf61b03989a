"""s_test = (H + (l2 + λ)I)⁻¹ ∇L(z_test), by whichever method was chosen: a division in a basis, or a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from influence_cli.curvature.damping import Damping, check_poles, choose_damping
from influence_cli.curvature.fisher import Moment, stored_moment
from influence_cli.curvature.spectrum import Spectrum, effective_dimension
from influence_cli.influence.iterative import Limits, announce, make_iterative
from influence_cli.influence.scores import preconditioned
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal
from influence_cli.solvers.cg import SolveInfo

# Below this share of the effective dimension (half, by the datamodeling score), what was left out may matter.
ENOUGH = 0.5
# An exact basis has no such unimportant tail, so nearly all of it must be kept.
NEARLY_ALL = 0.99


@dataclass(frozen=True)
class Passage:
    """How a change of the parameters passes through the part of a run that a checkpoint represents.

    influence/ensemble.py makes it.

    Attributes:
        segment: number of the segment that the checkpoint is in.
        project: vectors over the parameters [m, p] to the checkpoint's coordinates [m, k].
        carry: vectors over the parameters [m, p] at the end of that part to those at its beginning.
    """

    segment: int
    project: Callable[[Tensor], Tensor]
    carry: Callable[[Tensor], Tensor]


@dataclass
class Inverse:
    """The inverse curvature of one checkpoint.

    Attributes:
        apply: coordinates of gradients [m, k] to those of s_test [m, k].
        own: coordinates of gradients [b, k] to gᵢᵀ(H + (l2 + λ)I)⁻¹gᵢ [b]; None if that needs one solve per example.
        shift: l2 + λ, of all coordinates or of each [k]; 0 for ``identity``.
        damping: λ and its reason; None for ``identity``.
        groups: what each λ belongs to: layers, or one empty name.
        effective_dimension: d_eff of the kept spectrum; None without one.
        kept: share of ΣΛ/(Λ + shift) that the store keeps, from above; 1 without a basis.
        smallest: min Λ of a Hessian that a solver works with, an estimate; None elsewhere.
        solves: what a solver did, one entry per call.
        at: the same inverse at another λ, from what is known already; it raises at a pole. None if another λ needs
            a solve.
        passage: of a checkpoint of a run under SOURCE; None elsewhere.
        whiten: coordinates of gradients [b, k] to (H + (l2 + λ)I)^(−1/2) times them, of which inner products are
            s_testᵀgᵢ; None if that needs more than a division.
    """

    apply: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor] | None
    shift: float | Tensor
    damping: Damping | None
    groups: tuple[str, ...] = ("",)
    effective_dimension: float | None = None
    kept: float = 1.0
    smallest: float | None = None
    solves: list[SolveInfo] = field(default_factory=list)
    at: Callable[[Damping], Inverse] | None = None
    passage: Passage | None = None
    whiten: Callable[[Tensor], Tensor] | None = None


def make_inverse(
    prepared: Prepared,
    given: float | str,
    terminal: Terminal,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Inverse:
    """Choose λ by the one rule, print it in absolute units, and give the inverse.

    Args:
        prepared: a complete store.
        given: ``curvature.damping``: ``auto`` or λ.
        terminal: where λ, residuals and warnings go.
        limits: when a solver stops.

    Raises:
        InfluenceError: Λⱼ + l2 + λ ≤ 0 somewhere, or a solver that cannot continue.
    """
    choice = prepared.choice
    if choice.method == "identity":
        if given != "auto":
            terminal.warn("curvature identity does not use λ: the score is gᵗg/n, without a unit")
        return Inverse(lambda rows: rows, lambda rows: rows.square().sum(dim=1), 0.0, None, whiten=lambda rows: rows)
    if prepared.spectrum is not None:
        return _spectral(prepared, prepared.spectrum, given, terminal)
    if choice.method == "fisher":
        return _stored_fisher(prepared, given, terminal)
    found = make_iterative(prepared, given, convex=_convex(prepared), limits=limits, terminal=terminal)
    return Inverse(found.apply, None, found.shift, found.damping, smallest=found.smallest, solves=found.solves)


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
        layered=prepared.choice.is_layered,
    )
    inverse = _divided(spectrum, damping, l2)
    announce(damping, l2, terminal)
    _, whole = spectrum.dimension(damping, l2)
    kept, size = inverse.kept, prepared.choice.network.size
    terminal.say(f"The store keeps {kept:.0%} of the signal.")
    terminal.detail(
        f"effective dimension {whole:,.1f};  {len(spectrum.values):,} of {size:,} coordinates kept ({kept:.2%} of it)"
    )
    warn_of_span(prepared, kept, "the effective dimension", "raise gradients.budget or the damping", terminal)
    return inverse


def warn_of_span(prepared: Prepared, kept: float, of: str, remedy: str, terminal: Terminal) -> None:
    """Warn if a store keeps too little to represent the whole."""
    if kept < (ENOUGH if prepared.choice.is_layered else NEARLY_ALL):
        terminal.warn(
            f"the store keeps {kept:.1%} of {of}: influence is restricted to the span of the kept "
            f"coordinates; {remedy}, or use --on-the-fly, which keeps all"
        )


def _divided(spectrum: Spectrum, damping: Damping, l2: float) -> Inverse:
    """Divide by Λ + l2 + λ, coordinate by coordinate."""
    shift = spectrum.shift(damping, l2)
    # Rounding leaves the GGN's zero eigenvalues slightly above or below zero; only a real shift makes them invertible.
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
        whiten=lambda c: c * (values + shift).rsqrt().to(c),
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
    announce(damping, task.l2, terminal)
    terminal.detail(f"effective dimension {inverse.effective_dimension:,.1f} of at most  {len(found.values):,}")
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

    def whiten(rows: Tensor) -> Tensor:
        # The symmetric root: another run may find the eigenvectors with other signs.
        p, scale = vectors.to(rows), inverse.sqrt().to(rows)
        return ((rows @ p) * scale) @ p.T

    return Inverse(
        apply,
        own,
        shift,
        damping,
        effective_dimension=effective_dimension(found.values, shift),
        at=lambda other: _of_moment(found, other, l2),
        whiten=whiten,
    )
