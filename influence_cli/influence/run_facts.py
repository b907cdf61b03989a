"""Facts about a run of scores as a whole: stores, damping, residuals, share kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from influence_cli.influence.inverse import Inverse
from influence_cli.precompute.prepared import Prepared, RunSummary
from influence_cli.runtime.terminal import Terminal
from influence_cli.solvers.cg import SolveInfo


@dataclass(frozen=True)
class StoreRecord:
    """What is known of one checkpoint's store and its inverse curvature after a run.

    Attributes:
        store: its file, or None on the fly.
        checkpoint: the file of the weights.
        method: of the curvature.
        matrix: which curvature matrix.
        precision: of the passes through the network.
        parameters: how many are tracked.
        parameters_left_out: how many of the model's parameters have no curvature.
        coordinates: numbers that are kept of each gradient.
        l2: of the training objective, against the plain mean of the losses: a number, or one per parameter.
        n: training examples of that objective.
        damping: λ in absolute units: a number, or one per layer; None for ``identity``.
        damping_reason: why it is that λ.
        effective_dimension: d_eff of the kept spectrum; None without one.
        kept_share: share of ΣΛ/(Λ + shift) that the store keeps.
        gradient_norm: of the objective at the checkpoint.
        smallest_eigenvalue: an estimate, of a Hessian that a solver works with; None elsewhere.
        solves: what a solver did, one entry per call.
    """

    store: str | None
    checkpoint: str
    method: str
    matrix: str
    precision: str
    parameters: int
    parameters_left_out: int
    coordinates: int
    l2: float | dict[str, float]
    n: int
    damping: float | dict[str, float] | None
    damping_reason: str | None
    effective_dimension: float | None
    kept_share: float
    gradient_norm: float | None
    smallest_eigenvalue: float | None
    solves: tuple[SolveInfo, ...]


@dataclass(frozen=True)
class ScoreRecord:
    """What is known of a run of scores as a whole.

    Attributes:
        stores: one per checkpoint.
        identity_correlation: the correlation of influence with plain gradient similarity; NaN where the scores have
            none, None where it was not measured.
        run: of a training run that was replayed; None for others.
    """

    stores: tuple[StoreRecord, ...]
    identity_correlation: float | None = None
    run: RunSummary | None = None


def describe_run(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], correlation: float | None, terminal: Terminal
) -> ScoreRecord:
    """Gather what belongs to the run, and say where curvature plays no part.

    Args:
        stores: what was prepared for each checkpoint.
        inverses: of every checkpoint, after all solves.
        correlation: of influence with plain gradient similarity, where it was measured.
        terminal: takes the correlation, and a warning where it is high.
    """
    records = tuple(
        StoreRecord(
            store=None if prepared.on_the_fly else str(prepared.path),
            checkpoint=str(prepared.task.checkpoint),
            method=prepared.choice.method,
            matrix=prepared.choice.matrix,
            precision=prepared.choice.network.precision,
            parameters=prepared.choice.network.size,
            parameters_left_out=len(prepared.choice.network.left_out),
            coordinates=prepared.width,
            l2=_l2(prepared),
            n=prepared.task.n,
            damping=_damping(inverse),
            damping_reason=inverse.damping.reason if inverse.damping else None,
            effective_dimension=inverse.summary.effective_dimension,
            kept_share=inverse.summary.kept,
            gradient_norm=prepared.gradient_norm,
            smallest_eigenvalue=inverse.summary.smallest,
            solves=tuple(inverse.summary.solves),
        )
        for prepared, inverse in zip(stores, inverses, strict=True)
    )
    if correlation is not None and isfinite(correlation):
        terminal.detail(f"correlation with plain gradient similarity: {correlation:.3f}")
        if correlation > 0.98:
            terminal.warn(
                f"the curvature has almost no effect here (correlation {correlation:.3f} with identity): "
                "λ is large relative to the spectrum; use a smaller curvature.damping"
            )
    effects = stores[0].effects
    return ScoreRecord(records, correlation, None if effects is None else effects.summary)


def _l2(prepared: Prepared) -> float | dict[str, float]:
    """Give λ₂: a number, or one per parameter."""
    objective, network = prepared.task.objective, prepared.choice.network
    l2 = objective.over(network)
    return l2 if isinstance(l2, float) else {name: objective.l2_of(name) for name in network.names}


def _damping(inverse: Inverse) -> float | dict[str, float] | None:
    """Give λ in absolute units: a number, or one per layer."""
    if inverse.damping is None or inverse.damping.value is not None:
        return inverse.damping.value if inverse.damping else None
    return dict(zip(inverse.summary.groups, inverse.damping.values, strict=True))
