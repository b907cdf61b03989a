"""EK-FAC for a solver, from the examples that it holds: each layer's mean eigenvalue for λ, and a preconditioner.

The trace of EK-FAC is that of the exact GGN up to the drawn labels, so the means cost nothing beside the fit, which is
two passes over at most ``SAMPLE`` images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from influence_cli.curvature.blocks import Block
from influence_cli.curvature.choice import AUTO_PARAMETERS
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.kronecker_plan import factor_bytes
from influence_cli.curvature.operator import Examples
from influence_cli.data.batches import Batch
from influence_cli.errors import human_bytes
from influence_cli.precompute.fit import choose_draws
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal

# Training images of the GGN, of EK-FAC and so of λ: a random sample (bench/results/cg.md).
SAMPLE = 2_048


def why_no_layers(prepared: Prepared, *, convex: bool) -> str:
    """Say why EK-FAC is not to be had beside a solver, in one line; empty where it is."""
    choice, task = prepared.choice, prepared.task
    network = choice.network
    need, free = factor_bytes(network), distributed.smallest(available_bytes(task.device))
    reasons = (
        (choice.matrix == "hessian", "EK-FAC approximates the GGN, not the Hessian"),
        (convex, "the objective is convex, so a whole solve is exact"),
        (network.size <= AUTO_PARAMETERS, f"up to {AUTO_PARAMETERS:,} parameters a whole solve is explicit's answer"),
        (not (task.convex_loss and task.curved_loss), "the loss has no positive curvature in the outputs"),
        (not any(layer.is_matrix for layer in network.layers), "no tracked layer is linear or convolutional"),
        (need > free, f"EK-FAC's factors need {human_bytes(need)} of memory, and {human_bytes(free)} is free"),
    )
    return next((text for holds, text in reasons if holds), "")


def sampled(indices: np.ndarray, seed: int) -> np.ndarray:
    """Draw at most ``SAMPLE`` of some positions, rising."""
    if len(indices) <= SAMPLE:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, SAMPLE, replace=False))


def fit_layers(prepared: Prepared, examples: Examples, terminal: Terminal) -> list[Block]:
    """Fit EK-FAC on the examples, at most ``SAMPLE`` of them; the processes of a job take turns.

    Args:
        prepared: a store, or none on the fly.
        examples: those that the solver holds.
        terminal: progress, and a warning where the labels are not drawn.
    """
    task, network = prepared.task, prepared.choice.network
    chosen = sampled(np.arange(len(examples)), task.seed)
    starts = range(0, len(chosen), examples.batch)[distributed.rank() :: distributed.size()]

    def batches(_stage: str, done: int) -> Iterator[Batch]:
        for start in starts[done:]:
            part = chosen[start : start + examples.batch]
            at = torch.from_numpy(part).to(examples.targets.device)
            yield Batch(examples.inputs[at], examples.targets[at], part)

    with terminal.status(f"EK-FAC on {len(chosen):,} training examples"):
        return fit(network, batches, how=choose_draws(task, prepared.choice, terminal), seed=task.seed)
