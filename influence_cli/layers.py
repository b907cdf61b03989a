"""Example gradients of the tracked parameters, for any torch model.

``torch.func`` computes a batch of them at once (vmap of grad); where vmap cannot go (``.item()``, control flow on
data, recurrent layers) a loop of autograd does: slower, never wrong. Which of the two is decided once, by
``make_network``, on real examples, where both must agree.

A vector over the tracked parameters is their values flattened and joined in the order of ``Network.names``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.task import Loss, logits_of

# Example gradients that exist at one time: 2²⁷ numbers, 512 MB in float32.
GRADIENT_NUMBERS = 2**27


@dataclass(frozen=True)
class Network:
    """A model, its loss, and which of its parameters count.

    Attributes:
        model: in eval mode.
        loss: (outputs, targets) to losses [b].
        names: tracked parameters, in the model's order.
        left_out: the other parameters.
        size: p, numbers in the tracked parameters.
        vectorised: whether vmap can go through the model; False means a loop of autograd.
        obstacle: why it cannot, where it cannot.
    """

    model: nn.Module
    loss: Loss
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    size: int
    vectorised: bool = True
    obstacle: str = ""

    def parameters(self) -> dict[str, Tensor]:
        """Give the tracked parameters by name."""
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self.names}

    def device(self) -> torch.device:
        """Name the device that the model is on."""
        return next(self.model.parameters()).device


def track(model: nn.Module, loss: Loss, patterns: Sequence[str], where: str) -> Network:
    """Choose the parameters whose gradients count.

    Args:
        model: the model; parameters with ``requires_grad`` off were not trained and are left out.
        loss: its loss.
        patterns: globs on module names; a pattern takes the modules that match and everything below them.
        where: the config's line, for errors.

    Raises:
        InfluenceError: a pattern that matches no module, or nothing left to track.
    """
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name in modules if fnmatch.fnmatchcase(name, pattern)}
        if pattern == "*":
            hits.add("")
        if not hits:
            owners = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
            raise InfluenceError(f"{where}: no layer matches {pattern!r}", did_you_mean(pattern, owners))
        chosen |= hits
    names, left_out, size = [], [], 0
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        ancestors = {owner, ""} | {owner[:i] for i, letter in enumerate(owner) if letter == "."}
        if parameter.requires_grad and parameter.is_floating_point() and chosen & ancestors and _reached(chosen, owner):
            names.append(name)
            size += parameter.numel()
        else:
            left_out.append(name)
    if not names:
        raise InfluenceError(
            f"{where}: the layers {', '.join(map(repr, patterns))} hold no trained parameter",
            "all of them have requires_grad off, or the layers have no parameters; choose others",
        )
    return Network(model, loss, tuple(names), tuple(left_out), size)


def _reached(chosen: set[str], owner: str) -> bool:
    """Say whether a module, or one above it, was chosen; the root counts only where it was chosen itself."""
    if "" in chosen:
        return True
    parts = owner.split(".")
    return any(".".join(parts[: depth + 1]) in chosen for depth in range(len(parts)))


def restrict(network: Network, names: Sequence[str]) -> Network:
    """Track fewer parameters: those of ``names`` only."""
    own = network.parameters()
    kept = tuple(name for name in network.names if name in set(names))
    dropped = tuple(name for name in network.names if name not in set(names))
    size = sum(own[name].numel() for name in kept)
    return replace(network, names=kept, left_out=network.left_out + dropped, size=size)


def make_network(network: Network, inputs: Tensor, targets: Tensor) -> Network:
    """Decide, on a few real examples, whether vmap can go through the model; where it can, both ways must agree.

    Args:
        network: from ``track``.
        inputs: [b, …], two or more examples.
        targets: [b].

    Returns:
        The network, with ``vectorised`` and ``obstacle`` set.
    """
    inputs, targets = inputs[:2], targets[:2]
    looped = replace(network, vectorised=False)
    try:
        fast = example_gradients(replace(network, vectorised=True), inputs, targets)[0]
    except InfluenceError:
        raise
    except Exception as error:
        return replace(looped, obstacle=" ".join(str(error).split())[:160] or type(error).__name__)
    slow = example_gradients(looped, inputs, targets)[0]
    if float((fast - slow).norm()) > 1e-3 * float(slow.norm()) + 1e-8:
        return replace(looped, obstacle="its gradients under vmap differ from autograd's")
    return replace(network, vectorised=True)


def micro_batch(network: Network, block: int, columns: int = 1) -> int:
    """Bound the examples computed at one time, by the model's size alone, so that the same block gives the same bytes.

    Args:
        network: the model.
        block: rows in a block.
        columns: gradients an example (1, or C for a Jacobian).
    """
    return max(1, min(block, GRADIENT_NUMBERS // (network.size * columns)))


def example_gradients(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gᵢ = ∇_θ L(zᵢ, θ̂) of each example.

    Args:
        network: the model.
        inputs: [b, …], on any device.
        targets: int64 [b].

    Returns:
        Gradients [b, p], losses [b], outputs [b, C], on the model's device, detached.
    """
    inputs, targets = inputs.to(network.device()), targets.to(network.device())
    if not network.vectorised:
        return _looped_gradients(network, inputs, targets)
    single, parameters = _single_loss(network)
    with differentiable_attention():
        batched = vmap(grad(single, has_aux=True), in_dims=(None, 0, 0), randomness="error")
        grads, (losses, outputs) = batched(parameters, inputs, targets)
    return _join(network, grads, len(inputs)), losses.detach(), outputs.detach()


def jacobians(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Jacobian of the outputs and the loss's curvature in the outputs, of each example.

    Returns:
        J = ∂f/∂θ [b, C, p], S = ∇²_f ℓ(f, y) [b, C, C], losses [b].
    """
    inputs, targets = inputs.to(network.device()), targets.to(network.device())
    losses, outputs = evaluate(network, inputs, targets)
    curvature = output_curvature(network.loss, outputs, targets)
    if not network.vectorised:
        return _looped_jacobians(network, inputs), curvature, losses
    parameters, fixed = _parts(network)

    def outputs_of(tracked: dict[str, Tensor], x: Tensor) -> Tensor:
        return logits_of(functional_call(network.model, {**tracked, **fixed}, (x[None],)))[0]

    with differentiable_attention():
        blocks = vmap(jacrev(outputs_of), in_dims=(None, 0), randomness="error")(parameters, inputs)
    flat = [blocks[name].reshape(len(inputs), outputs.shape[1], -1) for name in network.names]
    return torch.cat(flat, dim=2).detach(), curvature, losses


def evaluate(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model forward only.

    Returns:
        Losses [b], outputs [b, C].
    """
    with torch.no_grad():
        outputs = logits_of(network.model(inputs.to(network.device())))
        return network.loss(outputs, targets.to(network.device())), outputs


def output_curvature(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute S = ∇²_f ℓ(f, y), the Hessian of each example's loss in its outputs: [b, C, C], symmetric.

    For softmax cross-entropy this is diag(π) − π πᵀ with the model's probabilities π.
    """
    outputs = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        total = loss(outputs, targets).sum()
        (slope,) = torch.autograd.grad(total, outputs, create_graph=True)
        if not slope.requires_grad:  # linear in the outputs: no curvature
            return outputs.new_zeros(*outputs.shape, outputs.shape[1]).detach()
        rows = [
            torch.autograd.grad(slope[:, c].sum(), outputs, retain_graph=True, materialize_grads=True)[0]
            for c in range(outputs.shape[1])
        ]
    return torch.stack(rows, dim=1).detach()


def output_layer(network: Network, inputs: Tensor) -> nn.Linear | None:
    """Find the Linear layer whose output is the model's output, where it holds all tracked parameters.

    In its parameters the outputs are linear: the Hessian equals the GGN, and a convex loss stays convex.
    """
    owners = {name.rpartition(".")[0] for name in network.names}
    if len(owners) != 1:
        return None
    layer = network.model.get_submodule(owners.pop())
    shared = {id(p) for m in network.model.modules() if m is not layer for p in m.parameters(recurse=False)}
    if type(layer) is not nn.Linear or any(id(p) in shared for p in layer.parameters()):
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            outputs = logits_of(network.model(inputs.to(network.device())))
    finally:
        handle.remove()
    same = len(seen) == 1 and seen[0].shape == outputs.shape and torch.equal(seen[0], outputs)
    return layer if same else None


def layer_inputs(network: Network, layer: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Capture a layer's input on the way.

    Returns:
        The layer's input a [b, d], with a column of ones where it has a bias; the model's outputs [b, C].
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, received, _output: seen.append(received[0]))
    try:
        with torch.no_grad():
            outputs = logits_of(network.model(inputs.to(network.device())))
    finally:
        handle.remove()
    a = seen[0]
    if layer.bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    return a, outputs


def layers_in_order(network: Network, inputs: Tensor) -> list[tuple[str, tuple[str, ...]]]:
    """List the modules that hold tracked parameters in the order in which the model runs them.

    Returns:
        (module name, its own tracked parameters), first to last; modules that never run come first.
    """
    own: dict[str, list[str]] = {}
    for name in network.names:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    order: list[str] = []
    handles = [
        network.model.get_submodule(owner).register_forward_hook(
            lambda _module, _inputs, _output, owner=owner: order.append(owner)
        )
        for owner in own
    ]
    try:
        with torch.no_grad():
            network.model(inputs.to(network.device()))
    finally:
        for handle in handles:
            handle.remove()
    last_run = {owner: position for position, owner in enumerate(order)}
    return [(owner, tuple(own[owner])) for owner in sorted(own, key=lambda owner: last_run.get(owner, -1))]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors, one a tracked parameter, to one vector [p]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(network: Network, vector: Tensor) -> list[Tensor]:
    """Cut a vector [p] into the shapes of the tracked parameters."""
    own = list(network.parameters().values())
    parts = vector.split([parameter.numel() for parameter in own])
    return [part.view_as(parameter) for part, parameter in zip(parts, own, strict=True)]


def _parts(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tracked = {name: parameter.detach() for name, parameter in network.parameters().items()}
    fixed = {name: p.detach() for name, p in network.model.named_parameters() if name not in tracked}
    return tracked, {**fixed, **dict(network.model.named_buffers())}


def _single_loss(network: Network) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    parameters, fixed = _parts(network)

    def single(tracked: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs = logits_of(functional_call(network.model, {**tracked, **fixed}, (x[None],)))
        loss = network.loss(outputs, y[None])[0]
        return loss, (loss, outputs[0])

    return single, parameters


def _join(network: Network, grads: dict[str, Tensor], rows: int) -> Tensor:
    return torch.cat([grads[name].reshape(rows, -1) for name in network.names], dim=1).detach()


def _looped_gradients(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wanted = list(network.parameters().values())
    rows, losses, outputs = [], [], []
    with torch.enable_grad(), recurrent_backward():
        for x, y in zip(inputs, targets, strict=True):
            output = logits_of(network.model(x[None]))
            loss = network.loss(output, y[None])[0]
            grads = torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)
            rows.append(flatten(grads))
            losses.append(loss.detach())
            outputs.append(output[0].detach())
    return torch.stack(rows), torch.stack(losses), torch.stack(outputs)


def _looped_jacobians(network: Network, inputs: Tensor) -> Tensor:
    wanted = list(network.parameters().values())
    blocks = []
    with torch.enable_grad(), recurrent_backward():
        for x in inputs:
            output = logits_of(network.model(x[None]))[0]
            rows = [
                torch.autograd.grad(value, wanted, retain_graph=True, materialize_grads=True, allow_unused=True)
                for value in output
            ]
            blocks.append(torch.stack([flatten(row) for row in rows]))
    return torch.stack(blocks)


def recurrent_backward() -> Any:
    """Let recurrent layers in eval mode have a backward: cuDNN's have none."""
    return torch.backends.cudnn.flags(enabled=False) if torch.cuda.is_available() else nullcontext()


def differentiable_attention() -> Any:
    """Use the attention that torch.func and a second derivative can go through; the fused ones lack the rules."""
    return sdpa_kernel(SDPBackend.MATH)
