"""s_test = (H + (l2 + λ)I)⁻¹ ∇L(z_test), by the chosen method: a division in a basis, or a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeGuard

from torch import Tensor

from influence_cli.curvature.damping import Damping, check_poles, choose_damping
from influence_cli.curvature.fisher import Moment, stored_moment
from influence_cli.curvature.spectrum import Spectrum, effective_dimension
from influence_cli.influence.iterative import Iterative, Limits, make_iterative
from influence_cli.influence.scores import preconditioned
from influence_cli.influence.system_shift import announce
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal
from influence_cli.solvers.cg import SolveInfo

# Below this share of the effective dimension (half, by the datamodeling score), what was left out may matter.
ENOUGH = 0.5
# An exact basis has no such unimportant tail, so nearly all of it must be kept.
NEARLY_ALL = 0.99


@dataclass(frozen=True)
class Summary:
    """What the run file says about an inverse, in addition to λ.

    Attributes:
        groups: what each λ belongs to: layers, or one empty name.
        effective_dimension: d_eff of the kept spectrum; None without one.
        kept: share of ΣΛ/(Λ + shift) that the store keeps, from above; 1 without a basis.
        smallest: min Λ of a Hessian that a solver works with, an estimate; None elsewhere.
        solves: what a solver did, one entry per call.
    """

    groups: tuple[str, ...] = ("",)
    effective_dimension: float | None = None
    kept: float = 1.0
    smallest: float | None = None
    solves: Sequence[SolveInfo] = ()


class Inverse(Protocol):
    """The part of a checkpoint's inverse curvature that every method has."""

    @property
    def shift(self) -> float | Tensor:
        """Give l2 + λ, of all coordinates or of each [k]; 0 for ``identity``."""

    @property
    def damping(self) -> Damping | None:
        """Give λ and its reason; None if there is no λ."""

    @property
    def summary(self) -> Summary:
        """Give what the run file says about it."""

    def apply(self, rows: Tensor) -> Tensor:
        """Turn coordinates of gradients [m, k] into those of s_test [m, k]."""


@dataclass(frozen=True)
class Identity:
    """No curvature: s_test is the gradient itself.

    Attributes:
        weight: of the checkpoint in the mean of its run, as given by ``tracin``.
    """

    weight: float = 1.0

    @property
    def shift(self) -> float:
        """Give 0: nothing is added to a curvature."""
        return 0.0

    @property
    def damping(self) -> None:
        """Give None: there is no λ."""

    @property
    def summary(self) -> Summary:
        """Give what the run file says about it: nothing is left out."""
        return Summary()

    def apply(self, rows: Tensor) -> Tensor:
        """Turn gradients [m, p] into s_test [m, p]: weight · g."""
        return self.weight * rows

    def self_influence(self, rows: Tensor) -> Tensor:
        """Compute the quadratic form gᵢᵀ s_i = weight · ‖gᵢ‖² [b] of gradients [b, p]."""
        return self.weight * rows.square().sum(dim=1)

    def whiten(self, rows: Tensor) -> Tensor:
        """Give gradients [b, p], whose inner products are s_testᵀgᵢ except for the weight, which changes no order.

        So the index of a store stays the same at other weights.
        """
        return rows


@dataclass(frozen=True)
class Spectral:
    """A division by Λ + l2 + λ, coordinate by coordinate, in a basis of eigenvectors.

    Attributes:
        spectrum: Λ of the coordinates.
        damping: λ and its reason.
        l2: λ₂.

    Raises:
        InfluenceError: Λⱼ + l2 + λ ≤ 0 somewhere.
    """

    spectrum: Spectrum
    damping: Damping
    l2: float

    def __post_init__(self) -> None:
        # Rounding leaves zero eigenvalues of the GGN slightly above or below zero; only a real shift inverts them.
        check_poles(min(self.spectrum.smallest, float(self.spectrum.values.min())), self.shift.numpy())

    @cached_property
    def shift(self) -> Tensor:
        """Give l2 + λ of each coordinate: float64 [k]."""
        return self.spectrum.shift(self.damping, self.l2)

    @property
    def effective_dimension(self) -> float:
        """Give ΣΛ/(Λ + l2 + λ) of the kept coordinates."""
        return self.spectrum.dimension(self.damping, self.l2)[0]

    @property
    def summary(self) -> Summary:
        """Give what the run file says about it."""
        kept, whole = self.spectrum.dimension(self.damping, self.l2)
        names = tuple(group.name for group in self.spectrum.groups)
        return Summary(names, kept, min(1.0, kept / whole) if whole > 0 else 1.0)

    def apply(self, rows: Tensor) -> Tensor:
        """Turn coordinates of gradients [m, k] into those of s_test [m, k]."""
        return preconditioned(rows, self.spectrum.values.to(rows.device), self.shift.to(rows.device))

    def self_influence(self, rows: Tensor) -> Tensor:
        """Compute the quadratic form gᵢᵀ(H + (l2 + λ)I)⁻¹gᵢ [b] of coordinates [b, k]."""
        return (self.apply(rows) * rows).sum(dim=1)

    def whiten(self, rows: Tensor) -> Tensor:
        """Multiply coordinates [b, k] by (H + (l2 + λ)I)^(−1/2): inner products of these are s_testᵀgᵢ."""
        return rows * (self.spectrum.values + self.shift).rsqrt().to(rows)

    def at(self, damping: Damping) -> Spectral:
        """Give the same at another λ; it raises at a pole."""
        return replace(self, damping=damping)


@dataclass(frozen=True)
class StoredMoment:
    """A division along the eigenvectors of the stored gradients' second moment.

    Stored gradients have no component outside the span of the eigenvectors: nothing is left out.

    Attributes:
        moment: its eigenpairs.
        damping: λ and its reason.
        l2: λ₂.

    Raises:
        InfluenceError: l2 + λ is 0.
    """

    moment: Moment
    damping: Damping
    l2: float

    def __post_init__(self) -> None:
        check_poles(0.0, self.shift)

    @property
    def shift(self) -> float:
        """Give l2 + λ."""
        return self.l2 + self.damping.values[0]

    @property
    def effective_dimension(self) -> float:
        """Give ΣΛ/(Λ + l2 + λ)."""
        return effective_dimension(self.moment.values, self.shift)

    @property
    def summary(self) -> Summary:
        """Give what the run file says about it."""
        return Summary(effective_dimension=self.effective_dimension)

    def apply(self, rows: Tensor) -> Tensor:
        """Turn gradients [m, p] into s_test [m, p]."""
        vectors = self.moment.vectors.to(rows)
        return ((rows @ vectors) * self._inverse().to(rows)) @ vectors.T

    def self_influence(self, rows: Tensor) -> Tensor:
        """Compute the quadratic form gᵢᵀ(H + (l2 + λ)I)⁻¹gᵢ [b] of gradients [b, p]."""
        return (rows @ self.moment.vectors.to(rows)).square() @ self._inverse().to(rows)

    def whiten(self, rows: Tensor) -> Tensor:
        """Multiply gradients [b, p] by (H + (l2 + λ)I)^(−1/2): inner products of these are s_testᵀgᵢ."""
        # The symmetric root: another run may find the eigenvectors with other signs.
        vectors = self.moment.vectors.to(rows)
        return ((rows @ vectors) * self._inverse().sqrt().to(rows)) @ vectors.T

    def at(self, damping: Damping) -> StoredMoment:
        """Give the same at another λ; it raises at a pole."""
        return replace(self, damping=damping)

    def _inverse(self) -> Tensor:
        return 1 / (self.moment.values + self.shift)


@dataclass(frozen=True)
class Solver:
    """One solve per right-hand side: the self-influence of each example, and another λ, would need their own solves.

    Attributes:
        iterative: the solver, λ chosen.
    """

    iterative: Iterative

    @property
    def shift(self) -> float | Tensor:
        """Give l2 + λ, of all parameters or of each [p]."""
        return self.iterative.shift

    @property
    def damping(self) -> Damping:
        """Give λ and its reason."""
        return self.iterative.damping

    @property
    def summary(self) -> Summary:
        """Give what the run file says about it, with the solves so far."""
        iterative = self.iterative
        return Summary(iterative.groups, smallest=iterative.smallest, solves=iterative.solves)

    def apply(self, rows: Tensor) -> Tensor:
        """Turn gradients [m, p] into s_test [m, p]."""
        return self.iterative.apply(rows)


@dataclass(frozen=True)
class Unrolled:
    """No inverse curvature: a run that is replayed gives influence itself."""

    @property
    def shift(self) -> float:
        """Give 0: there is no curvature."""
        return 0.0

    @property
    def damping(self) -> None:
        """Give None: there is no λ."""

    @property
    def summary(self) -> Summary:
        """Give what the run file says about it: nothing is left out."""
        return Summary()

    def apply(self, rows: Tensor) -> Tensor:  # noqa: ARG002 (as of every Inverse)
        """Refuse: there is no inverse."""
        raise ValueError("a replayed run has no inverse curvature")


# Methods that give the inverse at another λ, and those that give the self-influence of each example, without a solve.
Division = Spectral | StoredMoment
ClosedForm = Identity | Division


def all_closed(inverses: Sequence[Inverse]) -> TypeGuard[Sequence[ClosedForm]]:
    """Say whether all of them give the self-influence of each example without a solve."""
    return all(isinstance(inverse, ClosedForm) for inverse in inverses)


def make_inverse(
    prepared: Prepared,
    given: float | str,
    terminal: Terminal,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> ClosedForm | Solver:
    """Choose λ by the one rule, print it in absolute units, and give the inverse.

    Args:
        prepared: a complete store.
        given: ``curvature.damping``: ``auto``, ``training`` or λ.
        terminal: where λ, residuals and warnings go.
        limits: when a solver stops.

    Raises:
        InfluenceError: Λⱼ + l2 + λ ≤ 0 somewhere, or a solver that cannot continue.
    """
    if not prepared.choice.solves:
        return make_closed_form(prepared, given, terminal)
    return Solver(make_iterative(prepared, given, convex=_convex(prepared), limits=limits, terminal=terminal))


def make_closed_form(prepared: Prepared, given: float | str, terminal: Terminal) -> ClosedForm:
    """Do what ``make_inverse`` does for a method that is no solver."""
    if prepared.choice.method == "identity":
        return make_identity(given, terminal)
    return make_division(prepared, given, terminal)


def make_identity(given: float | str, terminal: Terminal) -> Identity:
    """Give the inverse of no curvature, and say that a λ that was given is not used."""
    if given != "auto":
        terminal.warn("curvature identity does not use λ: the score is gᵗg/n, without a unit")
    return Identity()


def make_division(prepared: Prepared, given: float | str, terminal: Terminal) -> Division:
    """Do what ``make_inverse`` does for a method that divides: one with a basis, or ``fisher``."""
    if prepared.spectrum is not None:
        return _spectral(prepared, prepared.spectrum, given, terminal)
    return _stored_fisher(prepared, given, terminal)


def _convex(prepared: Prepared) -> bool:
    return prepared.choice.output is not None and prepared.task.convex_loss


def _spectral(prepared: Prepared, spectrum: Spectrum, given: float | str, terminal: Terminal) -> Spectral:
    l2 = prepared.l2
    damping = choose_damping(
        prepared.settings.given_damping(given, [group.name for group in spectrum.groups]),
        convex=_convex(prepared),
        # Where Λ contains l2, its smallest value takes the place of l2: above 0 no direction needs λ.
        l2=l2 or (max(0.0, spectrum.smallest) if prepared.choice.is_joint else 0.0),
        matrix=prepared.choice.matrix,
        smallest=spectrum.smallest,
        means=[group.mean for group in spectrum.groups],
        largest=float(spectrum.values.max()),
        layered=prepared.choice.is_layered,
    )
    inverse = Spectral(spectrum, damping, l2)
    announce(damping, prepared.task.objective, terminal)
    _, whole = spectrum.dimension(damping, l2)
    kept, size = inverse.summary.kept, prepared.choice.network.size
    terminal.say(f"The store keeps {kept:.0%} of the signal.")
    terminal.detail(
        f"effective dimension {whole:,.1f}; {len(spectrum.values):,} of {size:,} coordinates kept ({kept:.2%} of it)"
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


def _stored_fisher(prepared: Prepared, given: float | str, terminal: Terminal) -> StoredMoment:
    """Make the inverse of the second moment of the stored gradients, from one scan."""
    network, task = prepared.choice.network, prepared.task
    with terminal.progress(len(task.train), "second moment of the stored gradients") as advance:
        moment = stored_moment(prepared.path, advance, where="curvature fisher")
    damping = choose_damping(
        prepared.settings.given_damping(given, [""]),
        convex=_convex(prepared),
        l2=prepared.l2,
        matrix="empirical",
        smallest=0.0,
        means=[moment.trace / network.size],
        largest=float(moment.values[0]),
    )
    inverse = StoredMoment(moment, damping, prepared.l2)
    announce(damping, task.objective, terminal)
    terminal.detail(f"effective dimension {inverse.effective_dimension:,.1f} of at most {len(moment.values):,}")
    return inverse
