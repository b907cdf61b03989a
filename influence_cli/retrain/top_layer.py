"""A frozen body and a trained top layer: with them retraining is exact, and an attack is practical.

The top layer is the linear layer that gives the model's output; here it is at the minimum of the objective, found by
Newton steps in float64 (retrain/newton.py). Of its gradient g = r ãᵀ (r = ∂ℓ/∂f, ã the layer's input and a 1 for
the bias) the derivative with respect to the pixels is v · ∂a/∂x with v = ∂(rᵀ S ã)/∂a for s_test as S [C, d]: a closed
form, and one backward pass through the body.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.curvature.choice import MAX_PARAMETERS
from influence_cli.data.batches import Batch, readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network, frozen, output_layer, recurrent_backward, restrict, track
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task
from influence_cli.retrain.newton import Outputs, Problem, factor_of, make_problem, minimise, outputs_of, start_of
from influence_cli.retrain.training import check_whole
from influence_cli.runtime.terminal import Terminal, or_silent

BATCH = 256


@dataclass(frozen=True)
class TopLayer:
    """A top layer at its minimum, with its view of the training and test examples.

    Attributes:
        task: model and data.
        network: the model, tracking only this layer.
        layer: the layer.
        problem: its objective over the training examples.
        w: its minimum W [C, d], float64.
        inverse: of the Hessian there [C d, C d].
        tests: the test examples in use; their targets are the labels.
        test_indices: int64 [m], their positions.
    """

    task: Task
    network: Network
    layer: nn.Linear
    problem: Problem
    w: Tensor
    inverse: Tensor
    tests: Outputs
    test_indices: np.ndarray

    @property
    def width(self) -> int:
        """Count the layer's inputs."""
        return self.layer.in_features

    def s_test(self, slopes: Tensor) -> Tensor:
        """Multiply slopes [k, C, d] by the inverse of the Hessian at the minimum."""
        return (slopes.flatten(1) @ self.inverse).view_as(slopes)

    def outputs(self, w: Tensor) -> Tensor:
        """Give the logits [m, C] of all test examples under weights W [C, d], or [m, 2] of a single logit."""
        return self.tests.logits(w)


def top_layer(task: Task, terminal: Terminal | None = None) -> TopLayer:
    """Find the top layer, run all examples up to it once, and train it to its minimum.

    Raises:
        InfluenceError: no linear layer gives the output, it was not trained, is too large or its loss is not convex
            and smooth, or not all training examples are listed.
    """
    terminal = or_silent(terminal)
    check_whole(task)
    if not (task.convex_loss and task.smooth_loss):
        raise InfluenceError(
            f"the attack trains the top layer to its minimum: {task.loss_name} is not known to be convex and smooth",
            "it works under cross_entropy and smooth_hinge",
        )
    test = task.labelled_tests()
    first = next(readable_batches(task.train, task.train.indices[:1], 1, skip=False))
    network, layer = _find(task, first.inputs)
    with terminal.progress(len(task.train) + len(test), "features below the top layer") as advance:

        def told(batches: Iterable[Batch]) -> Iterable[Batch]:
            for batch in batches:
                yield batch
                advance(len(batch))

        train = readable_batches(task.train, task.train.indices, BATCH, skip=False)
        problem = make_problem(network, layer, told(train), task.objective.over(network))
        tests = outputs_of(network, layer, told(readable_batches(test, test.indices, BATCH, skip=False)))
    with terminal.status("training the top layer to its minimum (Newton)"):
        start = start_of(network, layer, problem.examples.a)
        w, before, after = minimise(problem, start)
        inverse = torch.cholesky_inverse(factor_of(problem, w))
    terminal.say(
        f"top layer: gradient norm {before:.1e} at the checkpoint, {after:.1e} after Newton steps in float64; the "
        "layers below it stay unchanged"
    )
    top = TopLayer(task, network, layer, problem, w, inverse, tests, test.indices)
    moved = int((top.outputs(start).argmax(dim=1) != top.outputs(w).argmax(dim=1)).sum())
    if moved:
        terminal.say(f"at its minimum {moved:,} of {len(test):,} test predictions differ from those of the checkpoint")
    return top


def _find(task: Task, inputs: Tensor) -> tuple[Network, nn.Linear]:
    whole = track(task.model, task.loss, ["*"], "the model")
    for name, module in reversed(list(task.model.named_modules())):
        names = [f"{name}.{part}" if name else part for part in ("weight", "bias")]
        if type(module) is not nn.Linear or names[0] not in whole.names:
            continue
        network = restrict(whole, names)
        layer = output_layer(network, inputs)
        if layer is None:
            continue
        if network.size > MAX_PARAMETERS:
            raise InfluenceError(
                f"the top layer {name} has {network.size:,} parameters; Newton steps allow up to {MAX_PARAMETERS:,}",
                "use a model with fewer classes or a narrower last layer",
            )
        return network, layer
    raise InfluenceError(
        "the model's output is not that of a trained linear layer, which the attack retrains",
        "end the model in nn.Linear, with requires_grad on",
    )


def with_graph(top: TopLayer, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run inputs [b, …] up to the top layer, with the graph for a backward pass.

    Returns:
        The inputs as leaves, and the layer's input a [b, d], without a column for the bias.
    """
    seen: list[Tensor] = []
    hook = top.layer.register_forward_hook(lambda _module, received, _output: seen.append(received[0]))
    model = top.network.model
    x = inputs.to(top.network.device()).detach().clone().requires_grad_()
    try:
        with torch.enable_grad(), frozen(model), recurrent_backward(model):
            # A copy, because a model may change its input in place, which a leaf forbids.
            logits_of(model(x.clone()))
    finally:
        hook.remove()
    return x, seen[0]


def as_inputs(top: TopLayer, a: Tensor) -> Tensor:
    """Make rows of the objective, float64 with a 1 for a bias, of the layer's inputs a [b, d]."""
    rows = a.detach().to(top.w.device).double()
    if top.problem.examples.a.shape[1] > top.width:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows


def feature_slopes(problem: Problem, w: Tensor, s: Tensor, rows: Tensor, width: int) -> Tensor:
    """Compute v = ∂(rᵀ S ã)/∂a of training rows: how s_testᵀg moves with the top layer's input.

    Args:
        problem: the objective.
        w: W [C, d].
        s: s_test as S [C, d].
        rows: int64 [k].
        width: the layer's inputs, without a column for the bias.

    Returns:
        float64 [k, width]; no sign and no 1/n applied.
    """
    examples = problem.examples
    a = examples.a[rows].detach().requires_grad_()
    with torch.enable_grad():
        outputs = a @ w.T + examples.fixed[rows]
        losses = problem.loss(outputs, examples.targets[rows])
        (r,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True)
        (slopes,) = torch.autograd.grad((r * (a @ s.T)).sum(), a)
    return slopes[:, :width].detach()


def pixel_slopes(x: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """Pull v [b, d] at the top layer's input back to the pixels that `with_graph` ran: [b, …], on the CPU."""
    (slopes,) = torch.autograd.grad(a, x, v.to(a).view_as(a), materialize_grads=True, allow_unused=True)
    return slopes.detach().cpu()


def loss_slope(problem: Problem, w: Tensor, tests: Outputs, row: int) -> Tensor:
    """Compute ∇_W of the loss of one test example: [C, d]."""
    a = tests.a[row : row + 1]
    outputs = (a @ w.T + tests.fixed[row : row + 1]).detach().requires_grad_()
    with torch.enable_grad():
        (r,) = torch.autograd.grad(problem.loss(outputs, tests.targets[row : row + 1]).sum(), outputs)
    return r.T @ a


def changed(problem: Problem, rows: Tensor, a: Tensor) -> Problem:
    """Give the objective with other inputs a [k, d] of the top layer for some rows."""
    examples = problem.examples
    return replace(problem, examples=replace(examples, a=examples.a.index_copy(0, rows, a)))
