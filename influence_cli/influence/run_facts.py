"""Facts about a run of scores as a whole: stores, damping, residuals, share kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from influence_cli.influence.inverse import Inverse
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal


def describe_run(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], run: dict[str, Any], terminal: Terminal
) -> None:
    """Gather the facts of the run, and warn if curvature has no effect."""
    run["stores"] = [
        {
            "store": None if prepared.on_the_fly else str(prepared.path),
            "checkpoint": str(prepared.task.checkpoint),
            "method": prepared.choice.method,
            "matrix": prepared.choice.matrix,
            "precision": prepared.choice.network.precision,
            "parameters": prepared.choice.network.size,
            "parameters_left_out": len(prepared.choice.network.left_out),
            "coordinates": prepared.width,
            "l2": prepared.task.l2,
            "n": prepared.task.n,
            "damping": _damping(inverse),
            "damping_reason": inverse.damping.reason if inverse.damping else None,
            "effective_dimension": inverse.effective_dimension,
            "kept_share": inverse.kept,
            "gradient_norm": prepared.gradient_norm,
            "smallest_eigenvalue": inverse.smallest,
            "solves": [vars(info) for info in inverse.solves],
        }
        for prepared, inverse in zip(stores, inverses, strict=True)
    ]
    correlation = run.get("identity_correlation")
    if correlation is not None and np.isfinite(correlation):
        terminal.detail(f"correlation with plain gradient similarity: {correlation:.3f}")
        if correlation > 0.98:
            terminal.warn(
                f"the curvature has almost no effect here (correlation {correlation:.3f} with identity): "
                "λ is large relative to the spectrum; use a smaller curvature.damping"
            )
    elif correlation is not None:
        run["identity_correlation"] = None


def _damping(inverse: Inverse) -> float | dict[str, float] | None:
    """Give λ in absolute units: a number, or one per layer."""
    if inverse.damping is None or inverse.damping.value is not None:
        return inverse.damping.value if inverse.damping else None
    return dict(zip(inverse.groups, inverse.damping.values, strict=True))
