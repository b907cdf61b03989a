"""What can be verified without retraining: is s_test solved, is the checkpoint a minimum, what does the store keep?

The residual of s_test is ‖(H + (l2 + λ)I) s − v‖ / ‖v‖ with H itself as products over the training data, not its
approximation: the Hessian or the Gauss–Newton matrix, over all tracked parameters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.coordinates import Blocks, Joint, parameter_vectors
from influence_cli.data.batches import readable_batches
from influence_cli.influence.inverse import Division, Identity, Solver, Spectral, make_inverse
from influence_cli.influence.iterative import LONG
from influence_cli.influence.scores import preconditioned
from influence_cli.influence.test_gradients import test_gradients
from influence_cli.influence.test_selection import Selected
from influence_cli.model.task import measure_loading
from influence_cli.passes.curvature_products import curvature_product
from influence_cli.precompute.check import measure
from influence_cli.precompute.prepare import stored_basis
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal, or_silent

# Test examples that are checked: each costs a product with the curvature.
AT_MOST = 8
# Training examples per product: its two backward passes need more memory than the layer pass.
BATCH = 256
# Relative residuals up to which s_test counts as solved, and as nearly solved.
SOLVED, NEARLY = 1e-3, 0.1
# ‖∇R + l2·θ‖ relative to a single gradient, up to which the checkpoint is a minimum, and near one.
MINIMUM, NEAR = 1e-3, 0.1
# Of ‖∇L‖², what is outside the kept coordinates only by rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Checked:
    """One line of the self-check.

    Attributes:
        item: what was measured.
        value: a number, or None if there is none.
        unit: of the number.
        meaning: what it implies, in words.
    """

    item: str
    value: float | None
    unit: str
    meaning: str


def check_estimates(
    stores: Sequence[Prepared], selected: Sequence[Selected], *, terminal: Terminal | None = None
) -> list[Checked]:
    """Measure what influence relies on, without retraining.

    Args:
        stores: what was prepared for each checkpoint.
        selected: test examples; the first 8 are checked.
        terminal: progress, λ.

    Returns:
        Lines in reading order, for one checkpoint after another.
    """
    terminal = or_silent(terminal)
    if len(selected) > AT_MOST:
        terminal.say(f"checking the first {AT_MOST} of {len(selected):,} test examples")
    checks: list[Checked] = []
    for number, prepared in enumerate(stores):
        if len(stores) > 1:
            checks.append(
                Checked("checkpoint", number, prepared.task.checkpoint.name, "the rows below are about this one")
            )
        checks += _minimum(prepared, terminal)
        inverse = make_inverse(prepared, prepared.settings.damping, terminal)
        if isinstance(inverse, Identity):
            text = "gradient similarity solves nothing: no residual, no energy; its size has no unit"
            checks.append(Checked("residual of s_test", None, "", text))
            continue
        _, (rows,) = test_gradients([prepared], selected[:AT_MOST], "label", terminal, skip=False)
        checks.append(_residual(prepared, inverse, selected[:AT_MOST], rows, terminal))
        checks.append(_energy(prepared, inverse, selected[:AT_MOST], rows, terminal))
    return checks


def _minimum(prepared: Prepared, terminal: Terminal) -> list[Checked]:
    task = prepared.task
    seen = measure(task, task.train, prepared.choice.network, terminal, full=True, skip=True, gradients=True)
    share = seen.gradient_norm / seen.typical_norm if seen.typical_norm > 0 else 0.0
    if share <= MINIMUM:
        text = "a minimum: leaving an example out is a small step from here"
    elif share <= NEAR:
        text = "near a minimum; retraining also takes the remaining steps, which influence does not count"
    else:
        text = "not a minimum: influence describes one step, retraining goes further; trust --lds, not --loo"
    return [
        Checked("gradient norm at the checkpoint", seen.gradient_norm, "‖∇R + l2·θ‖", text),
        Checked(
            "relative to one example's gradient norm",
            share,
            f"of {seen.typical_norm:.3g}",
            f"0 at a minimum, up to {NEAR:g} near one",
        ),
    ]


def _residual(
    prepared: Prepared, inverse: Division | Solver, selected: Sequence[Selected], rows: Tensor, terminal: Terminal
) -> Checked:
    """Multiply s_test by the curvature itself, over as much of the data as five minutes allow."""
    network, task, choice = prepared.choice.network, prepared.task, prepared.choice
    plain = replace(prepared, basis=None, spectrum=None)
    _, (v,) = test_gradients([plain], selected, "label", terminal, skip=False)
    s = parameter_vectors(network, prepared.basis, inverse.apply(rows))
    matrix = "hessian" if choice.matrix == "hessian" else "ggn"
    total, count, started = torch.zeros(s.shape, dtype=torch.float64), 0, 0.0
    generator = np.random.default_rng(task.seed)
    order = generator.permutation(task.train.indices)
    with terminal.progress(len(order), "products with the curvature") as advance:
        measure_loading(task, terminal)
        for batch in readable_batches(task.train, order, min(prepared.batch, BATCH), task.loading, skip=True):
            total += curvature_product(network, batch.inputs, batch.targets, s, matrix).cpu().double()
            # The first batch also warms up.
            started, count = started or time.perf_counter(), count + len(batch)
            advance(len(batch))
            if time.perf_counter() - started > LONG:
                break
    s, v = s.cpu().double(), v.cpu().double()
    left = total / count + _shift(prepared, inverse) * s - v
    value = float((left.norm(dim=1) / v.norm(dim=1).clamp_min(1e-300)).max())
    name = "the Hessian" if matrix == "hessian" else "the Gauss–Newton matrix"
    if value <= SOLVED:
        text = f"solved: s_test is (H + λI)⁻¹∇L with {name} of the data"
    elif value <= NEARLY:
        text = f"nearly solved with {name}; the largest influences hold, their last digits do not"
    elif choice.is_layered:
        text = f"{choice.method} is rough here (0 is exact, above 1 its errors exceed λ); check it with verify --lds"
    elif isinstance(prepared.basis, Joint) and prepared.width < network.size:
        text = "the kept coordinates do not span the gradient: influence is restricted to them; see the share below"
    else:
        text = "not solved: use a larger curvature.damping, or curvature.method: explicit on fewer layers"
    unit = f"of ‖∇L‖, over {count:,} of {len(order):,} examples; the largest of {len(v)}"
    return Checked("residual of s_test", value, unit, text)


def _shift(prepared: Prepared, inverse: Division | Solver) -> Tensor:
    """Give l2 + λ per parameter: float64 [p], or [1] if it is one number."""
    network, damping = prepared.choice.network, inverse.damping
    if isinstance(inverse, Solver):
        return torch.as_tensor(inverse.shift, dtype=torch.float64).reshape(-1)
    l2 = prepared.task.objective.over(network)
    if not isinstance(prepared.basis, Blocks):
        return torch.as_tensor(l2, dtype=torch.float64).reshape(-1) + damping.values[0]
    shift = torch.zeros(network.size, dtype=torch.float64) + l2
    for kept, value in zip(prepared.basis.kept, damping.values, strict=True):
        for name in kept.block.names:
            shift[network.slots[name]] += value
    return shift


def _energy(
    prepared: Prepared, inverse: Division | Solver, selected: Sequence[Selected], rows: Tensor, terminal: Terminal
) -> Checked:
    """Compare vᵀ(H + λI)⁻¹v over the kept coordinates with the same over all of them."""
    item, network = "energy of the score kept", prepared.choice.network
    if prepared.on_the_fly or not isinstance(inverse, Spectral) or prepared.width == network.size:
        return Checked(item, 1.0, "of ∇Lᵀ(H + λI)⁻¹∇L", "all of it: no coordinate is left out")
    kept = (inverse.apply(rows) * rows).double().sum(dim=1).cpu()
    if prepared.choice.is_layered:
        basis, spectrum = stored_basis(prepared.path, prepared.choice, prepared.task, whole=True)
        whole = replace(prepared, basis=basis, spectrum=spectrum)
        _, (every,) = test_gradients([whole], selected, "label", terminal, skip=False)
        if spectrum is None:
            raise ValueError("a basis per layer has a spectrum")
        shift = spectrum.shift(inverse.damping, prepared.l2)
        solved = preconditioned(every.double(), spectrum.values.to(every.device), shift.to(every.device))
        share, bound = float((kept / (solved * every).sum(dim=1).cpu().clamp_min(1e-300)).mean()), ""
    else:
        plain = replace(prepared, basis=None, spectrum=None)
        _, (v,) = test_gradients([plain], selected, "label", terminal, skip=False)
        whole_square = v.double().square().sum(dim=1)
        outside = (whole_square - rows.double().square().sum(dim=1)).cpu()
        outside = outside.where(outside > ROUNDING * whole_square.cpu(), 0.0)
        # Directions outside have at most the smallest kept curvature, and at least λ.
        least = max(float(inverse.shift.min()), 1e-300)
        share, bound = float((kept / (kept + outside / least).clamp_min(1e-300)).mean()), ", at least"
    share = min(1.0, share)
    if share > 0.9:
        text = "the store keeps nearly all of it"
    elif share > 0.5:
        text = "the store keeps most of it; --on-the-fly or a larger gradients.budget keeps more"
    else:
        text = "influence is restricted to a part: use --on-the-fly or a larger gradients.budget, or a larger λ"
    return Checked(item, share, f"of ∇Lᵀ(H + λI)⁻¹∇L{bound}", text)
