"""Example gradients of the tracked parameters, for any torch model.

The layer pass covers linear layers, convolutions, norms and embeddings. Parameters that it does not cover (attention
projections, position embeddings, custom parameters) use ``torch.func`` (vmap of grad). Models that vmap does not
support (``.item()``, control flow on data, recurrent layers) use a loop of autograd: slower, never wrong.
``make_network`` decides once, on real examples and random slopes, where each way must agree with autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from influence_cli.errors import InfluenceError, few
from influence_cli.model.network import (
    Layer,
    Network,
    differentiable_attention,
    evaluate,
    loss_slopes,
    recurrent_backward,
)
from influence_cli.model.outputs import logits_of, output_curvature
from influence_cli.passes.contractions import flat_gradient
from influence_cli.passes.layers import Call, Tape, candidates, forward, terms

# Relative to the norm of a parameter's gradient, and to the whole gradient's, below which only rounding is left.
AGREES, ROUNDING = 1e-3, 1e-6


def make_network(network: Network, inputs: Tensor) -> Network:
    """Decide, on a few real examples, how each tracked parameter's example gradients are computed.

    Args:
        network: from ``track``.
        inputs: [b, …], two or more examples.

    Returns:
        The network, with ``layers``, ``rest``, ``vectorised``, ``obstacle`` and ``unused`` set.

    Raises:
        InfluenceError: no output depends on any tracked parameter.
    """
    inputs = inputs[:2].to(network.device())
    plain = replace(network, layers=(), rest=network.names, vectorised=False, obstacle="", unused=())
    with torch.no_grad():
        outputs = logits_of(network.model(inputs))
    # Random slopes: the loss's own slopes may be zero for a fitted example.
    slopes = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    truth, reached = _truth(plain, inputs, slopes)
    if not reached:
        _refuse_unreached(network, inputs)
    layers = [layer for layer in candidates(plain) if reached.intersection(layer.names)]
    covered = _covered(plain, inputs, slopes, truth, layers)
    done = {name for layer in covered for name in layer.names}
    unused = tuple(name for name in network.names if name not in reached)
    rest = tuple(name for name in network.names if name not in done and name in reached)
    made = replace(plain, layers=tuple(covered), rest=rest, unused=unused, vectorised=True)
    if not rest:
        return made
    slow = replace(made, vectorised=False)
    try:
        fast = _vectorised_products(made, inputs, slopes)
    except InfluenceError:
        raise
    except Exception as error:
        return replace(slow, obstacle=" ".join(str(error).split())[:160] or type(error).__name__)
    wanted = torch.cat([truth[:, network.slots[name]] for name in rest], dim=1)
    if float((fast - wanted).norm()) > AGREES * float(wanted.norm()) + ROUNDING * float(truth.norm()) + 1e-12:
        return replace(slow, obstacle="its gradients under vmap differ from autograd's")
    return made


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
    outputs = tape.outputs.detach().to(_dtype(tape.outputs))
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
    rows = torch.zeros(len(slopes), network.size, dtype=_dtype(like), device=like.device)
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
        return _vectorised_products(network, inputs, slopes)
    return _looped_products(network, inputs, slopes)


def _vectorised_products(network: Network, inputs: Tensor, slopes: Tensor) -> Tensor:
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
    sizes = [parameter.numel() for parameter in wanted]
    rows = torch.empty(len(inputs), sum(sizes), dtype=_dtype(wanted[0]), device=wanted[0].device)
    with torch.enable_grad(), recurrent_backward(network.model):
        for row, x, u in zip(rows, inputs, slopes, strict=True):
            outputs = logits_of(network.model(x[None]))
            grads = torch.autograd.grad(outputs, wanted, u[None], materialize_grads=True, allow_unused=True)
            for place, part in zip(row.split(sizes), grads, strict=True):
                place.copy_((part.to_dense() if part.is_sparse else part).reshape(-1))
    return rows


def _truth(network: Network, inputs: Tensor, slopes: Tensor) -> tuple[Tensor, set[str]]:
    """Compute Jᵢᵀuᵢ [b, p] by autograd, and name the tracked parameters that the outputs depend on.

    All examples share one forward, the batch of the layer pass. In another batch, rounding may put a ReLU unit on the
    other side of its kink, and every gradient below it would differ without being wrong.
    """
    rows = torch.zeros(len(slopes), network.size, dtype=_dtype(slopes), device=slopes.device)
    reached: set[str] = set()
    wanted = list(network.parameters().values())
    with torch.enable_grad(), recurrent_backward(network.model):
        outputs = logits_of(network.model(inputs))
        for row, output, slope in zip(rows, outputs if outputs.requires_grad else (), slopes, strict=False):
            grads = torch.autograd.grad(output, wanted, slope, retain_graph=True, allow_unused=True)
            for name, part in zip(network.names, grads, strict=True):
                if part is not None:
                    row[network.slots[name]] = (part.to_dense() if part.is_sparse else part).reshape(-1)
                    reached.add(name)
    return rows, reached


def _refuse_unreached(network: Network, inputs: Tensor) -> None:
    """Refuse a model that gives its outputs no gradient: every influence would be zero."""
    with torch.enable_grad(), recurrent_backward(network.model):
        outputs = logits_of(network.model(inputs))
    if outputs.requires_grad:
        raise InfluenceError(
            f"no output of the model depends on the tracked parameters: {few(network.names)}",
            "track other layers (gradients.layers)",
        )
    mode = "torch.inference_mode" if outputs.is_inference() else "torch.no_grad, or detaches its outputs"
    raise InfluenceError(
        "the model's outputs have no gradient, so no influence can be computed",
        f"its forward runs under {mode}: leave that to the code that calls the model",
    )


def _covered(network: Network, inputs: Tensor, slopes: Tensor, truth: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Keep the layers whose contracted gradients agree with autograd's.

    Where a module's own input and output do not, the functions inside it that take the weight may; and a parameter
    that is in no layer may be a term.
    """
    kept = _agreeing(network, inputs, slopes, truth, _called_plainly(network, inputs, layers))
    done = {name for layer in kept for name in layer.names}
    inside = [replace(layer, inside=True) for layer in layers if not done.issuperset(layer.names)]
    kept += _agreeing(network, inputs, slopes, truth, inside)
    done = {name for layer in kept for name in layer.names}
    left = [name for name in network.names if name not in done and bool(truth[:, network.slots[name]].any())]
    return kept + _agreeing(network, inputs, slopes, truth, terms(network, left))


def _agreeing(network: Network, inputs: Tensor, slopes: Tensor, truth: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Try layers, and keep those whose contracted gradients agree with autograd's."""
    if not layers:
        return []
    trial = replace(network, layers=tuple(layers), rest=())
    try:
        calls = forward(trial, inputs).backward(slopes)
    except Exception as error:
        # An overwritten input: only autograd knows its old value. Nor does every model run while functions are watched.
        if isinstance(error, RuntimeError) or layers[0].inside:
            return []
        raise
    kept = []
    for layer, layer_calls in zip(layers, calls, strict=False):
        if not layer_calls:
            continue
        # A term is recognised by its use alone; nothing but its gradient shows that this is its only use.
        rounding = ROUNDING if layer.kind != "term" else 0.01 * ROUNDING
        floor = rounding * float(truth.norm()) + 1e-12
        rows = {name: torch.zeros_like(truth[:, network.slots[name]]) for name in layer.names}
        try:
            flat_gradient(trial, layer, layer_calls, rows)
        except Exception:  # a subclass with other shapes
            continue
        if all(_agree(products, truth[:, network.slots[name]], floor) for name, products in rows.items()):
            kept.append(layer)
    return kept


def _agree(products: Tensor, truth: Tensor, floor: float) -> bool:
    return float((products - truth).norm()) <= AGREES * float(truth.norm()) + floor


def _called_plainly(network: Network, inputs: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Drop modules that are never called, or not with one tensor whose rows are the examples or parts of them."""
    plain: dict[str, bool] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            fits = fits and args[0].ndim > 1 and len(args[0]) == len(output) and len(output) % len(inputs) == 0
            plain[name] = plain.get(name, True) and fits

        return hook

    try:
        for layer in layers:
            module = network.model.get_submodule(layer.name)
            handles.append(module.register_forward_hook(watch(layer.name), with_kwargs=True))
        with torch.no_grad():
            network.model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers if plain.get(layer.name, False)]


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
