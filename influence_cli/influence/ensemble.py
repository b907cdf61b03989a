"""Several checkpoints: independent models, or checkpoints of one run that each represent a part of its training.

``mean``    independent models: influence is averaged (``model.ensemble``, the default).
``tracin``  one run, no curvature (TracInCP: Pruthi et al., NeurIPS 2020, "Estimating training data influence by tracing
            gradient descent", section 3.2). A step of SGD at weights w on a batch of B draws example i with probability
            B/n and then moves along −(η/B) gᵢ(w), which to first order lowers the loss of t by (η/B) g_t(w)ᵀgᵢ(w): in
            expectation (η/n) g_tᵀgᵢ per step. Without i these steps are missing; with K_c steps at rate η_c for which
            checkpoint c stands,

                influence[t, i] = (1/n) Σ_c η_c K_c g_t(w_c)ᵀ gᵢ(w_c)

            in the loss's unit. Without ``steps``, K_c = 1 and the score has no unit.
``source``  one run, each part with its curvature (SOURCE: Bae et al., NeurIPS 2024, "Training data attribution via
            approximate unrolling"). Training is cut into segments; in segment ℓ curvature H_ℓ, gradients and rate count
            as constant. A step without i leaves out −(η/n) gᵢ, and each later step multiplies what that has changed by
            I − ηH (H with l2); summed over a segment's K steps, and passed through the segments after it,

                influence[t, i] = (1/n) Σ_ℓ vᵀ (Π_{ℓ' > ℓ} exp(−η_ℓ' K_ℓ' H_ℓ')) r_ℓ,   v = ∇L(z_t) at the end,
                r_ℓ = (I − exp(−η_ℓ K_ℓ H_ℓ)) H_ℓ⁻¹ gᵢ

            As K grows, a single segment is ordinary influence with λ = 0; without curvature it is TracIn with v for
            g_t(w_c). No λ is needed: (1 − e^(−ηKσ))/σ is at most ηK.

What is approximate here beyond the paper: a store has the basis and spectrum of its own checkpoint, so that r_ℓ is the
mean over a segment's checkpoints of theirs (in the paper that of their mean curvature and gradient), and a segment's
exp is the product of its checkpoints', each over its own steps: the same where their curvatures commute, and where each
checkpoint is a segment of its own (``segments`` left out). A kept part of a basis restricts gᵢ to its span; v passes
through whole, what is outside the span by the curvature l2. Under momentum β the rate to give is η/(1 − β). For Adam
and other per-parameter rates both are only an analogy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.coordinates import Blocks, Joint, parameter_vectors, vector_coordinates
from influence_cli.curvature.spectrum import relaxation
from influence_cli.errors import InfluenceError, counted
from influence_cli.influence.inverse import (
    ClosedForm,
    Division,
    Inverse,
    Summary,
    Unrolled,
    make_closed_form,
    make_division,
    make_identity,
    make_inverse,
    warn_of_span,
)
from influence_cli.influence.iterative import Limits
from influence_cli.model.network import Network
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal, or_silent


@dataclass(frozen=True)
class SourcePart:
    """SOURCE's counterpart of the inverse curvature, for one checkpoint and the part of a run that it represents.

    Attributes:
        network: the model, for the layout of its parameters.
        basis: of the checkpoint's coordinates.
        segment: number of the segment that the checkpoint is in.
        factors: (1 − e^(−ηKσ))/σ over the whole segment, of each coordinate [k], times its weight in the mean.
        decay: e^(−ηKΛ) − 1 of each coordinate [k].
        time: η·K of the checkpoint's own part.
        shift: l2; there is no λ.
        summary: what the run file says about it.
    """

    network: Network
    basis: Joint | Blocks
    segment: int
    factors: Tensor
    decay: Tensor
    time: float
    shift: float
    summary: Summary

    @property
    def damping(self) -> None:
        """Give None: there is no λ."""

    def apply(self, rows: Tensor) -> Tensor:
        """Multiply coordinates [m, k] at the end of the segment by the share of each that training follows."""
        return rows * self.factors

    def project(self, vectors: Tensor) -> Tensor:
        """Project vectors over the parameters [m, p] on the checkpoint's coordinates [m, k]."""
        return vector_coordinates(self.network, self.basis, vectors)

    def carry(self, vectors: Tensor) -> Tensor:
        """Carry vectors over the parameters [m, p] at the end of its part of the run to those at its beginning."""
        # exp(−ηK(PΛPᵀ + l2·I)) = e^(−ηK·l2) (I + P(e^(−ηKΛ) − 1)Pᵀ)
        kept = parameter_vectors(self.network, self.basis, self.project(vectors) * self.decay)
        return float(np.exp(-self.time * self.shift)) * (vectors + kept)


def segments_of(count: int, segments: int | None) -> list[int]:
    """Cut checkpoints into consecutive segments, as equal as possible: the segment of each; None for one each."""
    parts = np.array_split(np.arange(count), min(segments or count, count))
    return [number for number, part in enumerate(parts) for _ in part]


def source_inverses(stores: Sequence[Prepared], terminal: Terminal) -> list[SourcePart]:
    """Make SOURCE's counterpart of the inverse curvature, for every checkpoint.

    Args:
        stores: what was prepared for each checkpoint, in order of training.
        terminal: shows what replaces λ.
    """
    times, count = times_of(stores), len(stores)
    owner = segments_of(count, stores[0].settings.segments)
    whole = [sum(time for time, other in zip(times, owner, strict=True) if other == segment) for segment in owner]
    terminal.say(
        f"SOURCE: {counted(count, 'checkpoint')} in {counted(max(owner) + 1, 'segment')}, η·steps "
        f"{', '.join(f'{whole[owner.index(segment)]:.3g}' for segment in sorted(set(owner)))}; λ is not used: an "
        "eigenvalue σ is weighted by (1 − exp(−η·steps·σ))/σ, at most η·steps"
    )
    if stores[0].settings.damping != "auto":
        terminal.warn("curvature.damping is not used: SOURCE has no λ")
    return [
        _source_inverse(prepared, segment, checkpoint_time, time, count / owner.count(segment), terminal)
        for prepared, segment, checkpoint_time, time in zip(stores, owner, times, whole, strict=True)
    ]


def _source_inverse(
    prepared: Prepared, segment: int, checkpoint_time: float, time: float, scale: float, terminal: Terminal
) -> SourcePart:
    """Make it for one checkpoint: ``checkpoint_time`` is its η·K, ``time`` that of its whole segment."""
    spectrum, basis, network, l2 = prepared.spectrum, prepared.basis, prepared.choice.network, prepared.l2
    if spectrum is None or basis is None:
        raise ValueError("a curvature without a spectrum, which the config refuses")
    device = prepared.task.device
    counts = relaxation(spectrum.values + l2, time)
    decay = torch.expm1(-checkpoint_time * spectrum.values).float().to(device)
    d_eff, every = spectrum.decided(l2, time)
    kept = min(1.0, d_eff / every) if every > 0 else 1.0
    terminal.say(f"{prepared.task.checkpoint.name}: the store keeps {kept:.0%} of the signal.")
    terminal.detail(
        f"{prepared.task.checkpoint.name}: training determines {every:,.1f} directions; {len(counts):,} of "
        f"{network.size:,} coordinates kept ({kept:.2%} of that)"
    )
    warn_of_span(prepared, kept, "the directions that training determines", "raise gradients.budget", terminal)
    factors = (scale * counts).float().to(device)
    summary = Summary(tuple(group.name for group in spectrum.groups), d_eff, kept)
    return SourcePart(network, basis, segment, factors, decay, checkpoint_time, l2, summary)


def source_parts(inverses: Sequence[Inverse]) -> list[SourcePart]:
    """Give the checkpoints of a run under SOURCE: all of them take part, or none does."""
    return [inverse for inverse in inverses if isinstance(inverse, SourcePart)]


def test_stores(stores: Sequence[Prepared], inverses: Sequence[Inverse]) -> list[Prepared]:
    """Give the checkpoints under which test gradients are needed: all, or for SOURCE the last, as raw gradients."""
    if not source_parts(inverses):
        return list(stores)
    return [replace(stores[-1], basis=None, spectrum=None)]


def solved_vectors(inverses: Sequence[Inverse], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Give, per checkpoint, the vectors [m, k] that the coordinates of its training gradients are multiplied with.

    The mean over the checkpoints of the products, divided by n, is influence.

    Args:
        inverses: one per checkpoint.
        gradients: of the test examples, one per checkpoint of ``test_stores``: coordinates [m, k], raw ones [m, p].
    """
    parts = source_parts(inverses)
    if not parts:
        return [inverse.apply(rows) for inverse, rows in zip(inverses, gradients, strict=True)]
    (vectors,) = gradients
    solved: list[Tensor] = []
    at_end, segment = vectors, -1
    for part in reversed(parts):
        if part.segment != segment:
            at_end, segment = vectors, part.segment
        solved.append(part.apply(part.project(at_end)))
        vectors = part.carry(vectors)
    return solved[::-1]


def refuse_source(ensemble: str, option: str, why: str) -> None:
    """Refuse what needs an inverse curvature, before any work.

    Args:
        ensemble: ``model.ensemble``.
        option: such as ``--damping-sweep``.
        why: what SOURCE does not have.

    Raises:
        InfluenceError: ``model.ensemble`` is ``source``.
    """
    if ensemble == "source":
        raise InfluenceError(f"{option}: {why} under model.ensemble source", "-s model.ensemble=mean")


def alone(prepared: Prepared) -> Prepared:
    """Give a checkpoint by itself, whatever it is a part of."""
    return replace(prepared, settings=replace(prepared.settings, ensemble="mean"))


def last_checkpoints(stores: Sequence[Prepared], count: int) -> list[Prepared]:
    """Give the last ``count`` checkpoints of a run, as if no other had been kept.

    The first of them represents all training before it: its η·steps is the sum of theirs.
    """
    first = len(stores) - count
    time = sum(times_of(stores)[: first + 1])
    return [replace(stores[first], settings=replace(stores[first].settings, time=time)), *stores[first + 1 :]]


def times_of(stores: Sequence[Prepared]) -> list[float]:
    """Give η · steps of each checkpoint: the training time that it stands for; without steps the η alone."""
    return [prepared.settings.time for prepared in stores]


def make_inverses(
    stores: Sequence[Prepared], terminal: Terminal | None = None, *, strict: bool = False
) -> list[Inverse]:
    """Choose λ and make the inverse curvature of every checkpoint; with ``strict`` a solver must converge."""
    terminal = or_silent(terminal)
    given = stores[0].settings
    if stores[0].effects is not None:
        return [Unrolled() for _ in stores]
    if given.ensemble == "source":
        return list(source_inverses(stores, terminal))
    if given.ensemble == "tracin":
        return list(make_closed_forms(stores, terminal))
    limits = Limits(given.tolerance, given.max_iterations, strict)
    return [make_inverse(prepared, given.damping, terminal, limits) for prepared in stores]


def make_closed_forms(stores: Sequence[Prepared], terminal: Terminal) -> list[ClosedForm]:
    """Do the same as ``make_inverses`` if no method is a solver and the run is not under SOURCE."""
    given = stores[0].settings
    if given.ensemble == "tracin":
        # Their mean is Σ_c η_c K_c × the score of c.
        return [replace(make_identity(given.damping, terminal), weight=len(stores) * time) for time in times_of(stores)]
    return [make_closed_form(prepared, given.damping, terminal) for prepared in stores]


def make_divisions(stores: Sequence[Prepared], terminal: Terminal) -> list[Division]:
    """Do the same as ``make_inverses`` if every method divides, so that λ can change."""
    return [make_division(prepared, stores[0].settings.damping, terminal) for prepared in stores]
