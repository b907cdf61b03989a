"""Retrain an output layer under a convex loss exactly: Newton steps in float64, with the layers before it fixed.

The objective without example i is (1/n) Σ_{j≠i} ℓ(W aⱼ + fⱼ, yⱼ) + l2/2 ‖W‖² with the same n. Steps with the Hessian
at the minimum of all examples serve every left-out example and group at once (one factor, a few steps, because the
change is of the order of a leverage). If they do not converge, such as for a loss with a sharp bend or without a large
group, each gets its own Newton steps with a line search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from influence_cli.data.batches import Batch
from influence_cli.errors import InfluenceError
from influence_cli.model.heads import PaddedLoss
from influence_cli.model.network import Network, layer_inputs, reads_one_logit
from influence_cli.model.outputs import Loss, output_curvature, two_classes

# A gradient norm counts as zero at this share of what leaving an example out adds, or of a single gradient if smaller.
ACCURACY, ROUNDING = 1e-7, 1e-14
# Problems solved at once, steps of each kind, numbers in a piece of outputs.
TOGETHER, SHARED_STEPS, OWN_STEPS, PIECE = 50, 20, 100, 2**22


@dataclass(frozen=True)
class Outputs:
    """Examples as the tracked parameters see them: outputs = a Wᵀ + f.

    Attributes:
        a: float64 [n, d], the layer's inputs, with a column of ones for a tracked bias.
        fixed: f, float64 [n, C], the part of the outputs that no tracked parameter changes.
        targets: int64 [n].
        one_logit: whether these outputs are the single logit f of outputs (0, f).
    """

    a: Tensor
    fixed: Tensor
    targets: Tensor
    one_logit: bool = False

    def logits(self, w: Tensor) -> Tensor:
        """Give the logits of all classes under weights W [C, d]: [n, C], or [n, 2] for a single logit."""
        outputs = self.a @ w.T + self.fixed
        return two_classes(outputs) if self.one_logit else outputs


@dataclass(frozen=True)
class Problem:
    """(1/n) Σ ℓ + l2/2 ‖W‖² over an output layer.

    Attributes:
        examples: the training examples.
        loss: (outputs [b, C], targets [b]) to losses [b], of float64.
        l2: λ₂ of all weights, or of each, float64 [C, d].
    """

    examples: Outputs
    loss: Loss
    l2: float | Tensor

    @property
    def n(self) -> int:
        """Count the examples."""
        return len(self.examples.targets)


def make_problem(network: Network, layer: nn.Linear, batches: Iterable[Batch], l2: float | Tensor) -> Problem:
    """Run the training examples up to the output layer; l2 is one number, or one per tracked parameter [p]."""
    examples = outputs_of(network, layer, batches)
    loss = _in_float64(network.loss, examples.targets.device)
    if isinstance(l2, Tensor):
        parts = [l2[network.slots[name]].view(layer.out_features, -1) for name in _in_order(network)]
        l2 = torch.cat(parts, dim=1).to(examples.a)
    return Problem(examples, PaddedLoss(loss) if examples.one_logit else loss, l2)


def _in_float64(loss: Loss, device: torch.device) -> Loss:
    """Give a loss whose own numbers, such as class weights, are in float64; the loss itself stays as it is."""
    if not isinstance(loss, nn.Module):
        return loss
    state = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
    state = {name: value.to(device).double() if value.is_floating_point() else value for name, value in state.items()}
    return lambda outputs, targets: functional_call(loss, state, (outputs, targets))


def outputs_of(network: Network, layer: nn.Linear, batches: Iterable[Batch]) -> Outputs:
    """Run examples up to the output layer."""
    # MPS has no float64.
    device = torch.device("cpu") if network.device().type == "mps" else network.device()
    weight, bias = _tracked(network)
    inputs, fixed, targets, one_logit = [], [], [], False
    for batch in batches:
        a, outputs = layer_inputs(network, layer, batch.inputs)
        a, one_logit = a.to(device).double(), reads_one_logit(layer, outputs)
        x = a[:, : layer.in_features]
        rest = x.new_zeros(len(x), layer.out_features)
        if not weight:
            rest += x @ layer.weight.detach().to(device).double().T
        if not bias and layer.bias is not None:
            rest += layer.bias.detach().to(device).double()
        inputs.append(a if weight and bias else x if weight else a[:, layer.in_features :])
        fixed.append(rest)
        targets.append(batch.targets.to(device))
    return Outputs(torch.cat(inputs), torch.cat(fixed), torch.cat(targets), one_logit)


def start_of(network: Network, layer: nn.Linear, like: Tensor) -> Tensor:
    """Give the tracked parameters of the output layer as W [C, d], in float64."""
    weight, bias = _tracked(network)
    parts = [layer.weight] if weight else []
    parts += [layer.bias[:, None]] if bias else []
    return torch.cat([part.detach().to(like) for part in parts], dim=1)


def _in_order(network: Network) -> list[str]:
    """Give the tracked names as W has them: the weight, then the bias."""
    return sorted(network.names, key=lambda name: name.rpartition(".")[2] == "bias")


def _tracked(network: Network) -> tuple[bool, bool]:
    names = {name.rpartition(".")[2] for name in network.names}
    return "weight" in names, "bias" in names


def minimise(problem: Problem, start: Tensor) -> tuple[Tensor, float, float]:
    """Find the minimum with all examples.

    Args:
        problem: the objective.
        start: W [C, d].

    Returns:
        W [C, d], and the gradient norm at the start and there.

    Raises:
        InfluenceError: no minimum was reached.
    """
    before = float(gradients_at(problem, start[None])[0].norm())
    w = _newton(problem, start, None, ROUNDING * typical_gradient(problem, start))
    return w, before, float(gradients_at(problem, w[None])[0].norm())


def without_each(problem: Problem, w: Tensor, rows: Tensor, advance: Callable[[int], None] = lambda _: None) -> Tensor:
    """Retrain without each of some examples.

    Args:
        problem: the objective.
        w: its minimum W [C, d].
        rows: int64 [k].
        advance: called with the number of newly finished ones.

    Returns:
        [k, C, d].

    Raises:
        InfluenceError: no minimum was reached without one of them.
    """
    factor, minima = factor_of(problem, w), []
    for part in torch.split(rows, TOGETHER):
        ws, norms, wanted = _shared_steps(problem, w, factor, [row[None] for row in part])
        for j in torch.nonzero(norms > wanted).flatten().tolist():
            ws[j] = _newton(problem, ws[j], int(part[j]), float(wanted[j]))
        minima.append(ws)
        advance(len(part))
    return torch.cat(minima)


def without_groups(
    problem: Problem,
    w: Tensor,
    groups: Sequence[Tensor],
    names: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Retrain without each of some groups of examples.

    Args:
        problem: the objective.
        w: its minimum W [C, d].
        groups: int64 rows of each group.
        names: of the groups, for messages.
        advance: called with the number of newly finished ones.

    Returns:
        [groups, C, d].

    Raises:
        InfluenceError: no minimum was reached without one of them.
    """
    factor, minima = factor_of(problem, w), []
    for start in range(0, len(groups), TOGETHER):
        part = groups[start : start + TOGETHER]
        ws, norms, wanted = _shared_steps(problem, w, factor, part)
        for j, rows in enumerate(part):
            if bool(norms[j] > wanted[j]):
                rest = _without(problem, rows)
                try:
                    ws[j] = _newton(rest, ws[j], None, float(wanted[j]) * problem.n / rest.n)
                except InfluenceError as error:
                    raise InfluenceError(
                        f"without the group {names[start + j]}: {error.message}", error.hint
                    ) from error
            advance(1)
        minima.append(ws)
    return torch.cat(minima)


def _without(problem: Problem, rows: Tensor) -> Problem:
    """Restrict the objective to the other examples: over their number, l2·n/(their number) keeps its minimum."""
    examples = problem.examples
    kept = torch.ones(problem.n, dtype=torch.bool, device=examples.targets.device)
    kept[rows] = False
    rest = Outputs(examples.a[kept], examples.fixed[kept], examples.targets[kept], examples.one_logit)
    return Problem(rest, problem.loss, problem.l2 * problem.n / len(rest.targets))


def _shared_steps(
    problem: Problem, w: Tensor, factor: Tensor, groups: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Take steps with the Hessian at the minimum of all examples, while they halve the gradient.

    Args:
        problem: the objective.
        w: its minimum.
        factor: of its Hessian.
        groups: int64 rows that each problem leaves out.

    Returns:
        The weights [k, C, d], their gradient norms [k], and which of these are small enough [k].
    """
    owners = torch.cat([torch.full_like(rows, j) for j, rows in enumerate(groups)])
    without = (torch.cat(list(groups)), owners)
    ws = w.expand(len(groups), *w.shape).clone()
    slopes = gradients_at(problem, ws, without)
    norms = slopes.flatten(1).norm(dim=1)
    wanted = (ACCURACY * norms).clamp_min(ROUNDING * typical_gradient(problem, w))
    going = norms > wanted
    for _ in range(SHARED_STEPS):
        if not bool(going.any()):
            break
        tried = ws - going[:, None, None] * solve(factor, slopes)
        slopes = gradients_at(problem, tried, without)
        fresh = slopes.flatten(1).norm(dim=1)
        falls = fresh < 0.5 * norms
        ws = torch.where((going & falls)[:, None, None], tried, ws)
        norms = torch.where(going & falls, fresh, norms)
        going &= falls & (norms > wanted)
    return ws, norms, wanted


def losses_under(problem: Problem, ws: Tensor, tests: Outputs) -> Tensor:
    """Compute the loss of test examples under several weights [k, C, d]: float64 [k, m]."""
    outputs = torch.einsum("md,kcd->kmc", tests.a, ws) + tests.fixed
    with torch.no_grad():
        losses = problem.loss(outputs.flatten(0, 1), tests.targets.repeat(len(ws)))
    return losses.view(len(ws), -1)


def _newton(problem: Problem, w: Tensor, row: int | None, wanted: float) -> Tensor:
    """Take Newton steps with a line search until the gradient norm is at most ``wanted``, or rounding stops it."""
    without = None if row is None else (torch.tensor([row], device=w.device), torch.tensor([0], device=w.device))
    slope = gradients_at(problem, w[None], without)[0]
    value, norm = value_at(problem, w, row), float(slope.norm())
    for _ in range(OWN_STEPS):
        if norm <= wanted:
            return w
        direction = solve(factor_of(problem, w), slope[None])[0]
        tried, now = line_search(problem, w, slope, direction, value, row)
        slope = gradients_at(problem, tried[None], without)[0]
        # Near the minimum the value no longer shows progress, but the gradient does; if neither falls, it is rounding.
        if not (now < value or float(slope.norm()) < norm):
            break
        w, value, norm = tried, now, float(slope.norm())
    if norm > 1e-9 * typical_gradient(problem, w):
        raise InfluenceError(
            f"Newton steps did not reach a minimum{'' if row is None else f' without training row {row}'}: the "
            f"gradient norm stays at {norm:.3g}",
            "with l2 = 0, or a loss without curvature, there may be none: name a training function (training:)",
        )
    return w


def line_search(
    problem: Problem, w: Tensor, slope: Tensor, direction: Tensor, value: float, row: int | None = None
) -> tuple[Tensor, float]:
    """Halve a step against a direction until the objective falls as its slope promises (Armijo).

    Args:
        problem: the objective.
        w: W [C, d].
        slope: its gradient there.
        direction: of the step, to be subtracted.
        value: the objective at w.
        row: an example to leave out.

    Returns:
        The weights after the step, and the objective there.
    """
    gain, size, tried, now = float((slope * direction).sum()), 1.0, w, value
    while size > 1e-6:
        tried = w - size * direction
        now = value_at(problem, tried, row)
        if now <= value - 1e-4 * size * gain + 1e-15 * abs(value):
            break
        size /= 2
    return tried, now


def _pieces(problem: Problem, count: int, classes: int) -> Iterable[slice]:
    step = max(1, PIECE // (count * classes))
    return (slice(start, min(start + step, problem.n)) for start in range(0, problem.n, step))


def gradients_at(problem: Problem, ws: Tensor, without: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Give the gradients [k, C, d] at weights [k, C, d]; ``without``: rows, and the problem that leaves each out."""
    count, classes, _ = ws.shape
    total, examples = torch.zeros_like(ws), problem.examples
    flat = ws.reshape(count * classes, -1)
    for place in _pieces(problem, count, classes):
        a, targets = examples.a[place], examples.targets[place]
        outputs = (a @ flat.T).view(len(a), count, classes) + examples.fixed[place, None]
        slopes = _slopes(problem.loss, outputs.flatten(0, 1), targets.repeat_interleave(count)).view_as(outputs)
        if without is not None:
            rows, owners = without
            here = (rows >= place.start) & (rows < place.stop)
            slopes[rows[here] - place.start, owners[here]] = 0
        total += (slopes.flatten(1).T @ a).view_as(ws)
    return total / problem.n + problem.l2 * ws


def _slopes(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(loss(outputs, targets).sum(), outputs)
    return slopes.detach()


def value_at(problem: Problem, w: Tensor, row: int | None) -> float:
    examples = problem.examples
    with torch.no_grad():
        losses = problem.loss(examples.a @ w.T + examples.fixed, examples.targets)
        if row is not None:
            losses[row] = 0
        return float(losses.sum() / problem.n + (problem.l2 * w.square()).sum() / 2)


def typical_gradient(problem: Problem, w: Tensor) -> float:
    """Give the root mean square of ‖gᵢ‖: the scale for calling a gradient norm small."""
    examples, total = problem.examples, 0.0
    for place in _pieces(problem, 1, w.shape[0]):
        a = examples.a[place]
        slopes = _slopes(problem.loss, a @ w.T + examples.fixed[place], examples.targets[place])
        total += float((slopes.square().sum(dim=1) * a.square().sum(dim=1)).sum())
    return math.sqrt(total / problem.n) + float((problem.l2 * w).norm())


def factor_of(problem: Problem, w: Tensor) -> Tensor:
    """Give the Cholesky factor of (1/n) Σ Sᵢ ⊗ aᵢaᵢᵀ + l2 I: [C d, C d]."""
    classes, width = w.shape
    hessian = w.new_zeros(classes, width, classes, width)
    examples = problem.examples
    for place in _pieces(problem, width, 1):
        outputs = examples.a[place] @ w.T + examples.fixed[place]
        curvature = output_curvature(problem.loss, outputs, examples.targets[place])
        sizes = curvature.abs().amax(dim=(1, 2))
        # With a hinge most examples have no curvature.
        bent = sizes > 1e-12 * sizes.max()
        a, curvature = examples.a[place][bent], curvature[bent]
        for c in range(classes):
            for e in range(c + 1):
                hessian[c, :, e] += (a * curvature[:, c, e, None]).T @ a
    for c in range(classes):
        for e in range(c):
            hessian[e, :, c] = hessian[c, :, e].T
    flat = hessian.view(classes * width, classes * width) / problem.n
    flat.diagonal().add_(problem.l2.reshape(-1) if isinstance(problem.l2, Tensor) else problem.l2)
    ridge = 0.0
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(flat)
        if not int(failed):
            return factor
        # Directions without curvature from any example: their slope is zero, and the ridge limits the step.
        ridge = max(10 * ridge, 1e-12 * float(flat.diagonal().mean()), 1e-300)
        flat.diagonal().add_(ridge)


def solve(factor: Tensor, slopes: Tensor) -> Tensor:
    """Multiply slopes [k, C, d] by the inverse of the Hessian whose factor this is."""
    solved: Tensor = torch.cholesky_solve(slopes.flatten(1).T, factor)
    return solved.T.reshape(slopes.shape)
