"""`influence perturb`: how much would the loss of a test example rise if pixels of a training image changed?

Koh & Liang (ICML 2017, section 2.2): if a training input x becomes x + δ, the training objective gains
(1/n)(L(x + δ) − L(x)). To first order in 1/n the loss of a test example rises by influence(x) − influence(x + δ)
(``replaced``: x is removed and x + δ is added), and to first order in δ as well by slope · δ with

    slope = −(1/n) ∇ₓ(s_testᵀ ∇_θL(x)),

which is 1/n times their I_pert,loss. The derivative with respect to x is a second one: autograd of autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.coordinates import parameter_vectors
from influence_cli.data.batches import Batch
from influence_cli.data.split import rows_of
from influence_cli.errors import InfluenceError, describe
from influence_cli.influence.ensemble import make_inverses, solved_vectors, test_stores
from influence_cli.influence.example_facts import TestFacts
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.scores import perturbation, removal, require_finite
from influence_cli.influence.test_gradients import group_size, test_gradients
from influence_cli.influence.test_selection import Selected
from influence_cli.model.network import Network, differentiable_attention, recurrent_backward, unflatten
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import only_task
from influence_cli.passes.gradient_products import products
from influence_cli.perturb.change import Perturbed
from influence_cli.perturb.inputs import read_training_image
from influence_cli.perturb.replayed import replayed_changes
from influence_cli.precompute.prepared import Prepared
from influence_cli.retrain.newton import Outputs, Problem, factor_of, losses_under, outputs_of
from influence_cli.retrain.newton_update import follow
from influence_cli.retrain.output_layer import NewtonRecord, explained_outputs, is_convex, to_minimum
from influence_cli.retrain.training import check_whole
from influence_cli.runtime.terminal import Terminal, or_silent

BATCH = 256


@dataclass(frozen=True)
class Perturbation:
    """What a change of one training image does to the test examples, and what is known of the run.

    Attributes:
        effects: one per test example, in order.
        scores: of the run that gave the estimates.
        newton: of the minimum that the training started from; None where nothing was trained.
    """

    effects: list[Perturbed]
    scores: ScoreRecord
    newton: NewtonRecord | None


def input_slopes(network: Network, vector: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Compute ∇ₓ(vᵀ∇_θL(x)) of each example: [b, …] in the shape of the inputs, no sign and no 1/n applied.

    Args:
        network: the model; v is over its tracked parameters.
        vector: v [p].
        inputs: x [b, …], floats.
        targets: int64 [b].

    Raises:
        InfluenceError: the model's gradient has no derivative of its own.
    """
    device = network.device()
    x = inputs.to(device).detach().clone().requires_grad_()
    parameters = list(network.parameters().values())
    with torch.enable_grad(), recurrent_backward(network.model), differentiable_attention():
        try:
            # A copy, because a model may change its input in place, which a leaf forbids.
            losses = network.loss(logits_of(network.model(x.clone())), targets.to(device))
            slopes = torch.autograd.grad(
                losses.sum(), parameters, create_graph=True, materialize_grads=True, allow_unused=True
            )
            product = torch.stack([(v * g).sum() for v, g in zip(unflatten(network, vector), slopes, strict=True)])
            _refuse_once(product.grad_fn)
            (of_inputs,) = torch.autograd.grad(product.sum(), x, materialize_grads=True, allow_unused=True)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InfluenceError(
                f"the model's gradient has no derivative with respect to its input: {describe(error)}",
                "perturb differentiates twice; a layer with a custom backward pass may allow only one",
            ) from error
    return of_inputs.detach()


def _refuse_once(end: Any) -> None:
    """Refuse a graph with a function that is only once differentiable: its node is a dead end that autograd ignores."""
    seen, left = {end}, [end]
    while left:
        node = left.pop()
        if type(node).__name__ == "Error":
            raise RuntimeError("a function is marked @once_differentiable")
        for other, _ in node.next_functions if node is not None else ():
            if other is not None and other not in seen:
                seen.add(other)
                left.append(other)


def perturb_image(
    stores: Sequence[Prepared],
    index: int,
    selected: Sequence[Selected],
    *,
    change: Callable[[Tensor], Tensor] | None = None,
    target: str = "label",
    retrain: bool = False,
    terminal: Terminal | None = None,
    strict: bool = False,
) -> Perturbation:
    """Estimate what changes of a training image do to the loss of test examples.

    Args:
        stores: what was prepared for each checkpoint; rows are not needed; estimates are averaged.
        index: position of the training image.
        selected: which test examples.
        change: from the slope [C, H, W] to a δ of its shape; None for the slope alone.
        target: whose loss is explained, as for ``rank_training``.
        retrain: retrain an output layer with x + δ, or take the run that is replayed again with it, for the actual
            rise.
        terminal: progress, λ, residuals, warnings.
        strict: a solver that does not converge is an error.

    Raises:
        InfluenceError: the image is not in use, the model is not differentiable with respect to its input, or
            ``retrain`` without an output layer under a convex loss.
    """
    terminal = or_silent(terminal)
    task = stores[0].task
    batch = read_training_image(task, index)
    if (run := stores[0].effects) is not None:
        changes = replayed_changes(task, run, batch, selected, change, target, terminal, retrain=retrain)
        return _perturbation(
            changes, describe_run(stores, make_inverses(stores, terminal), None, terminal), None, terminal
        )
    again = _Again(stores, batch, terminal) if retrain else None
    inverses = make_inverses(stores, terminal, strict=strict)
    effects: list[Perturbed] = []
    asked = test_stores(stores, inverses)
    size = group_size([*stores, *asked], 1)
    for start in range(0, len(selected), size):
        group = selected[start : start + size]
        tests, rows = test_gradients(asked, group, target, terminal, skip=False)
        vectors = [
            parameter_vectors(prepared.choice.network, prepared.basis, s)
            for prepared, s in zip(stores, solved_vectors(inverses, rows), strict=True)
        ]
        held = again.held_out(group, tests) if again is not None else None
        for number, test in enumerate(tests):
            one = _estimate(stores, [vector[number : number + 1] for vector in vectors], batch, test, change)
            if again is not None and held is not None and one.delta is not None:
                one = replace(one, actual=again.actual(one.delta, number, held))
            effects.append(one)
    record = describe_run(stores, inverses, None, terminal)
    return _perturbation(effects, record, None if again is None else again.newton, terminal)


def _perturbation(
    effects: list[Perturbed], record: ScoreRecord, newton: NewtonRecord | None, terminal: Terminal
) -> Perturbation:
    """Warn of estimates that say little."""
    if any(_bends(one) for one in effects):
        terminal.warn(
            "estimated and replaced differ by more than half: the change is not small for this model, for example "
            "because it crosses kinks of ReLU or max pooling (a black background has many ties); trust replaced"
        )
    if effects and not any(one.slope.any() for one in effects):
        terminal.warn(
            "no pixel moves the loss: the derivative is 0 everywhere, for example because the model rounds its "
            "input or the training loss of this image is 0"
        )
    return Perturbation(effects, record, newton)


def _estimate(
    stores: Sequence[Prepared],
    vectors: Sequence[Tensor],
    batch: Batch,
    test: TestFacts,
    change: Callable[[Tensor], Tensor] | None,
) -> Perturbed:
    """Average slope and estimates over the checkpoints."""
    task = stores[0].task
    pairs = list(zip(stores, vectors, strict=True))
    slopes = [
        perturbation(
            input_slopes(prepared.choice.network, s[0], batch.inputs, batch.targets)[0].cpu().double(), prepared.task.n
        )
        for prepared, s in pairs
    ]
    slope = torch.stack(slopes).mean(dim=0)
    title = task.train.title(int(batch.indices[0]))
    require_finite(slope, "change", lambda *_: f"{title} on {test.title()}")

    def influence_of(inputs: Tensor) -> float:
        values = [
            removal(products(prepared.choice.network, s, inputs, batch.targets)[0][0, 0].double(), prepared.task.n)
            for prepared, s in pairs
        ]
        return float(torch.stack([value.cpu() for value in values]).mean())

    before = influence_of(batch.inputs)
    if change is None:
        return Perturbed(test, before, slope.numpy())
    delta = change(slope).cpu().double()
    moved = (batch.inputs[0].double() + delta).to(batch.inputs.dtype)[None]
    return Perturbed(
        test,
        before,
        slope.numpy(),
        delta.numpy(),
        float((slope * delta).sum()),
        before - influence_of(moved),
    )


def _bends(one: Perturbed) -> bool:
    """Say whether the linear estimate in δ is far from the nonlinear one."""
    if one.estimated is None or one.replaced is None:
        return False
    return abs(one.estimated - one.replaced) > 0.5 * max(abs(one.estimated), abs(one.replaced))


class _Again:
    """Trains an output layer to its minimum, and retrains it for every changed image, by Newton steps in float64."""

    def __init__(self, stores: Sequence[Prepared], batch: Batch, terminal: Terminal) -> None:
        only_task([prepared.task for prepared in stores], "--retrain retrains one checkpoint")
        prepared = stores[0]
        layer = prepared.choice.output
        check_whole(prepared.task)
        if layer is None or not is_convex(prepared):
            raise InfluenceError(
                "--retrain needs an output layer under a smooth convex loss: only that has a minimum to retrain to",
                "track the last layer alone (gradients.layers), or leave --retrain out",
            )
        self._prepared, self._layer, self._batch, self._terminal = prepared, layer, batch, terminal
        self._problem, self._w, self.newton = to_minimum(prepared, layer, terminal)
        self._inverse = torch.cholesky_inverse(factor_of(self._problem, self._w))
        # The last change and its weights: many test examples use the same change.
        self._done: tuple[np.ndarray, Tensor] | None = None
        self._row = int(rows_of(prepared.task.train.indices, batch.indices[:1])[0])

    def held_out(self, selected: Sequence[Selected], tests: Sequence[TestFacts]) -> Outputs:
        """Run test examples up to the output layer."""
        return explained_outputs(self._prepared, self._layer, selected, tests, self._terminal)

    def actual(self, delta: np.ndarray, number: int, held: Outputs) -> float:
        """Train with x + δ, and give the rise of the loss of one of the test examples."""
        if self._done is None or not np.array_equal(self._done[0], delta):
            inputs = (self._batch.inputs[0].double() + torch.from_numpy(delta)).to(self._batch.inputs.dtype)[None]
            network = self._prepared.choice.network
            changed = outputs_of(network, self._layer, [replace(self._batch, inputs=inputs)])
            problem = replaced_rows(self._problem, np.array([self._row]), changed.a, changed.fixed)
            self._done = (delta, follow(problem, self._w, self._inverse))
        losses = losses_under(self._problem, torch.stack([self._done[1], self._w]), held)[:, number]
        return float(losses[0] - losses[1])


def replaced_rows(problem: Problem, rows: np.ndarray, a: Tensor, fixed: Tensor) -> Problem:
    """Give the objective with other inputs of the output layer for some rows: a [k, d], f [k, C]."""
    examples, at = problem.examples, torch.from_numpy(rows).to(problem.examples.a.device)
    changed = replace(examples, a=examples.a.index_copy(0, at, a), fixed=examples.fixed.index_copy(0, at, fixed))
    return replace(problem, examples=changed)
