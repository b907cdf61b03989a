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
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.config.schema import Config
from influence_cli.curvature.coordinates import Blocks, parameter_vectors, vector_coordinates
from influence_cli.curvature.spectrum import relaxation
from influence_cli.errors import InfluenceError, counted
from influence_cli.influence.inverse import Inverse, Passage, make_inverse, warn_of_span
from influence_cli.influence.iterative import Limits
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal


def weighted(inverses: Sequence[Inverse], times: Sequence[float]) -> list[Inverse]:
    """Weight the scores of each checkpoint, so that their mean is Σ_c (weight_c × score of c).

    Args:
        inverses: one per checkpoint.
        times: weights: η_c K_c.
    """
    return [_scaled(inverse, len(times) * time) for inverse, time in zip(inverses, times, strict=True)]


def _scaled(inverse: Inverse, scale: float) -> Inverse:
    own = inverse.own
    return replace(
        inverse,
        apply=lambda coordinates: scale * inverse.apply(coordinates),
        own=None if own is None else lambda rows: scale * own(rows),
    )


def segments_of(count: int, segments: int | None) -> list[int]:
    """Cut checkpoints into consecutive segments of equal size: the segment of each; None for one segment each."""
    parts = np.array_split(np.arange(count), min(segments or count, count))
    return [number for number, part in enumerate(parts) for _ in part]


def source_inverses(stores: Sequence[Prepared], config: Config, terminal: Terminal) -> list[Inverse]:
    """Make SOURCE's counterpart of the inverse curvature, for every checkpoint.

    Args:
        stores: what was prepared for each checkpoint, in order of training.
        config: for the rates, steps and segments of ``model``.
        terminal: shows what replaces λ.
    """
    times, count = config.model.times(), len(stores)
    owner = segments_of(count, config.model.segments)
    whole = [sum(time for time, own in zip(times, owner, strict=True) if own == segment) for segment in owner]
    terminal.say(
        f"SOURCE: {counted(count, 'checkpoint')} in {counted(max(owner) + 1, 'segment')}, η·steps "
        f"{', '.join(f'{whole[owner.index(segment)]:.3g}' for segment in sorted(set(owner)))}; λ is not used: an "
        "eigenvalue σ is weighted by (1 − exp(−η·steps·σ))/σ, at most η·steps"
    )
    if config.curvature.damping != "auto":
        terminal.warn("curvature.damping is not used: SOURCE has no λ")
    return [
        _source_inverse(prepared, segment, own, time, count / owner.count(segment), terminal)
        for prepared, segment, own, time in zip(stores, owner, times, whole, strict=True)
    ]


def _source_inverse(
    prepared: Prepared, segment: int, own: float, time: float, scale: float, terminal: Terminal
) -> Inverse:
    """Make it for one checkpoint: ``own`` is its η·K, ``time`` that of its whole segment."""
    spectrum, basis, network, l2 = prepared.spectrum, prepared.basis, prepared.choice.network, prepared.task.l2
    if spectrum is None or basis is None:
        raise ValueError("a curvature without a spectrum, which the config refuses")
    device = prepared.task.device
    counts = relaxation(spectrum.values + l2, time)
    decay = torch.expm1(-own * spectrum.values).float().to(device)
    d_eff, every = spectrum.decided(l2, time)
    kept = min(1.0, d_eff / every) if every > 0 else 1.0
    terminal.say(f"{prepared.task.checkpoint.name}: the store keeps {kept:.0%} of the signal.")
    terminal.detail(
        f"{prepared.task.checkpoint.name}: training determines {every:,.1f} directions; {len(counts):,} of "
        f"{network.size:,} coordinates kept ({kept:.2%} of that)"
    )
    warn_of_span(prepared, kept, "the directions that training determines", "raise gradients.budget", terminal)
    factors = (scale * counts).float().to(device)

    def project(vectors: Tensor) -> Tensor:
        return vector_coordinates(network, basis, vectors) if isinstance(basis, Blocks) else vectors @ basis.vectors

    def carry(vectors: Tensor) -> Tensor:
        # exp(−ηK(PΛPᵀ + l2·I)) = e^(−ηK·l2) (I + P(e^(−ηKΛ) − 1)Pᵀ)
        kept = parameter_vectors(network, prepared.basis, project(vectors) * decay)
        return float(np.exp(-own * l2)) * (vectors + kept)

    return Inverse(
        lambda coordinates: coordinates * factors,
        None,
        l2,
        None,
        tuple(group.name for group in spectrum.groups),
        d_eff,
        kept,
        passage=Passage(segment, project, carry),
    )


def test_stores(stores: Sequence[Prepared], inverses: Sequence[Inverse]) -> list[Prepared]:
    """Give the checkpoints under which test gradients are needed: all, or for SOURCE the last, as raw gradients."""
    if inverses[-1].passage is None:
        return list(stores)
    return [replace(stores[-1], basis=None, spectrum=None)]


def solved_vectors(inverses: Sequence[Inverse], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Give, per checkpoint, the vectors [m, k] that the coordinates of its training gradients are multiplied with.

    The mean over the checkpoints of the products, divided by n, is influence.

    Args:
        inverses: one per checkpoint.
        gradients: of the test examples, one per checkpoint of ``test_stores``: coordinates [m, k], raw ones [m, p].
    """
    if inverses[-1].passage is None:
        return [inverse.apply(own) for inverse, own in zip(inverses, gradients, strict=True)]
    (vectors,) = gradients
    found: list[Tensor] = []
    at_end, segment = vectors, -1
    for inverse in reversed(inverses):
        passage = inverse.passage
        if passage is None:
            raise ValueError("all checkpoints of a run take part in SOURCE, or none")
        if passage.segment != segment:
            at_end, segment = vectors, passage.segment
        found.append(inverse.apply(passage.project(at_end)))
        vectors = passage.carry(vectors)
    return found[::-1]


def refuse_source(config: Config, option: str, why: str) -> None:
    """Refuse what needs an inverse curvature, before any work.

    Args:
        config: of the run.
        option: such as ``--damping-sweep``.
        why: what SOURCE does not have.

    Raises:
        InfluenceError: ``model.ensemble`` is ``source``.
    """
    if config.model.ensemble == "source":
        raise InfluenceError(f"{option}: {why} under model.ensemble source", "-s model.ensemble=mean")


def alone(config: Config) -> Config:
    """Give the config of a single checkpoint, without the others."""
    return config.model_copy(update={"model": config.model.model_copy(update={"ensemble": "mean"})})


def last_checkpoints(config: Config, count: int) -> Config:
    """Give the config of a run with only its last ``count`` checkpoints.

    The first of them represents all training before it: its η·steps is the sum of theirs.
    """
    times = config.model.times()
    first = len(times) - count
    model = config.model.model_copy(
        update={
            "checkpoint": config.model.checkpoint[first:],
            "learning_rates": (sum(times[: first + 1]), *times[first + 1 :]),
            "steps": (1.0,) if config.model.steps else (),
            "segments": None if config.model.segments is None else min(config.model.segments, count),
        }
    )
    return config.model_copy(update={"model": model})


def make_inverses(
    stores: Sequence[Prepared], config: Config, terminal: Terminal, strict: bool = False
) -> list[Inverse]:
    """Choose λ and make the inverse curvature of every checkpoint; with ``strict`` a solver must converge."""
    given, kind = config.curvature, config.model.ensemble
    if kind == "source":
        return source_inverses(stores, config, terminal)
    limits = Limits(given.tolerance, given.max_iterations, strict)
    inverses = [make_inverse(prepared, given.damping, terminal, limits) for prepared in stores]
    return weighted(inverses, config.model.times()) if kind == "tracin" else inverses
