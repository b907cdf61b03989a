"""Example gradients of the tracked parameters, for any torch model.

The layer pass covers linear layers, convolutions, norms and embeddings. Parameters that it does not cover (attention
projections, position embeddings, custom parameters) use ``torch.func`` (vmap of grad). Models that vmap does not
support (``.item()``, control flow on data, recurrent layers) use a loop of autograd: slower, never wrong.
passes/coverage.py decides once, on real examples and random slopes, where each way must agree with autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from influence_cli.model.network import (
    Network,
    differentiable_attention,
    evaluate,
    loss_slopes,
    recurrent_backward,
)
from influence_cli.model.outputs import logits_of, output_curvature
from influence_cli.passes.contractions import flat_gradient
from influence_cli.passes.layers import Call, Tape, forward, refuse_used


def example_gradients(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gᵢ = ∇_θ L(zᵢ, θ̂) of each example.

    Args:
        network: the model.
        inputs: [b, …], on any device.
        targets: int64 [b].

    Returns:
        Gradients [b, p], losses [b], outputs [b, C], on the model's device, detached.
    """
    tape = forward(network, inputs)
    losses, slopes = loss_slopes(network, tape.outputs, targets.to(network.device()))
    return example_products(network, inputs, slopes, tape), losses, tape.outputs.detach()


def summed_gradient(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Σᵢ gᵢ [p] of a batch by one plain backward pass, with the losses [b] and outputs [b, C]."""
    wanted = list(network.parameters().values())
    with torch.enable_grad(), recurrent_backward(network.model):
        outputs = logits_of(network.model(inputs.to(network.device())))
        losses = network.loss(outputs, targets.to(network.device()))
        grads = torch.autograd.grad(losses.sum(), wanted, materialize_grads=True, allow_unused=True)
    return torch.cat([part.reshape(-1) for part in grads]), losses.detach(), outputs.detach()


def jacobians(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Jacobian of the outputs and the loss's curvature in the outputs, of each example.

    Returns:
        J = ∂f/∂θ [b, C, p], S = ∇²_f ℓ(f, y) [b, C, C], losses [b].
    """
    tape = forward(network, inputs)
    outputs = tape.outputs.detach().to(wide_dtype(tape.outputs))
    targets = targets.to(network.device())
    classes = outputs.shape[1]
    unit = torch.eye(classes, dtype=outputs.dtype, device=outputs.device)
    rows = [
        example_products(network, inputs, unit[c].expand_as(outputs), tape, again=c + 1 < classes)
        for c in range(classes)
    ]
    losses, _ = evaluate(network, inputs, targets)
    return torch.stack(rows, dim=1), output_curvature(network.loss, outputs, targets), losses


def example_products(
    network: Network, inputs: Tensor, slopes: Tensor, tape: Tape | None = None, *, again: bool = False
) -> Tensor:
    """Compute Jᵢᵀuᵢ of each example, Jᵢ = ∂f(xᵢ)/∂θ.

    Args:
        network: the model.
        inputs: [b, …].
        slopes: u [b, C].
        tape: the forward pass, if it has been run already.
        again: keep its graph for another call.

    Returns:
        [b, p].
    """
    if network.rest == network.names:
        return rest_products(network, inputs, slopes)
    calls = (tape or forward(network, inputs)).backward(slopes, again=again) if network.layers else []
    like = next(network.model.parameters())
    rows = torch.zeros(len(slopes), network.size, dtype=wide_dtype(like), device=like.device)
    add_products(network, calls, rows)
    if network.rest:
        products = rest_products(network, inputs, slopes)
        start = 0
        for name in network.rest:
            place = network.slots[name]
            width = place.stop - place.start
            rows[:, place] = products[:, start : start + width]
            start += width
    return rows


def add_products(network: Network, calls: Sequence[Sequence[Call]], rows: Tensor) -> None:
    """Add what the layer pass gives to rows [b, p] that hold zeros."""
    for layer, layer_calls in zip(network.layers, calls, strict=False):
        if layer_calls:
            flat_gradient(network, layer, layer_calls, {name: rows[:, network.slots[name]] for name in layer.names})


def rest_products(network: Network, inputs: Tensor, slopes: Tensor) -> Tensor:
    """Compute Jᵢᵀuᵢ over the parameters that the layer pass does not cover: [b, numbers in ``rest``], joined."""
    inputs = inputs.to(network.device())
    if network.vectorised:
        return vectorised_products(network, inputs, slopes)
    return _looped_products(network, inputs, slopes)


def vectorised_products(network: Network, inputs: Tensor, slopes: Tensor) -> Tensor:
    """Compute Jᵢᵀuᵢ over the rest by torch.func: [b, numbers in ``rest``]."""
    wanted = set(network.rest)
    rest = {name: p.detach() for name, p in network.model.named_parameters() if name in wanted}
    fixed = {name: p.detach() for name, p in network.model.named_parameters() if name not in wanted}
    fixed |= dict(network.model.named_buffers())

    def pulled(tracked: dict[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        outputs = logits_of(functional_call(network.model, {**tracked, **fixed}, (x[None],)))
        return (outputs[0] * u).sum()

    with differentiable_attention(), warnings.catch_warnings():
        # vmap runs operators without a rule example by example: slower, but correct.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads = vmap(grad(pulled), in_dims=(None, 0, 0), randomness="error")(rest, inputs, slopes)
    return torch.cat([grads[name].reshape(len(inputs), -1) for name in network.rest], dim=1).detach()


def _looped_products(network: Network, inputs: Tensor, slopes: Tensor) -> Tensor:
    wanted = [network.model.get_parameter(name) for name in network.rest]
    unused = {name: network.model.get_parameter(name) for name in network.unused}
    sizes = [parameter.numel() for parameter in wanted]
    rows = torch.empty(len(inputs), sum(sizes), dtype=wide_dtype(wanted[0]), device=wanted[0].device)
    with torch.enable_grad(), recurrent_backward(network.model):
        for row, x, u in zip(rows, inputs, slopes, strict=True):
            outputs = logits_of(network.model(x[None]))
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                outputs, [*wanted, *unused.values()], u[None], allow_unused=True
            )
            refuse_used(unused, grads[len(wanted) :])
            for place, part in zip(row.split(sizes), grads, strict=False):
                if part is None:
                    place.zero_()
                else:
                    place.copy_((part.to_dense() if part.is_sparse else part).reshape(-1))
    return rows


def wide_dtype(like: Tensor) -> torch.dtype:
    """Give the type in which gradients are kept: float32 for the half ones."""
    return torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
