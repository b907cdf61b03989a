"""A model and its tracked parameters: which ones count, in what order, and the model's outputs for a batch.

A vector over the tracked parameters is their values flattened and joined in the order of ``Network.names``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.model.outputs import Loss, logits_of, two_classes


@dataclass(frozen=True)
class Layer:
    """A module whose example gradients are contractions of its input a and its output gradient δ.

    Attributes:
        name: of the module.
        kind: ``linear``, ``conv``, ``norm``, ``embedding``, or ``term``: one parameter that is added or multiplied.
        weight: the name of its tracked weight; empty if it is not tracked.
        bias: likewise.
        groups: g, for a grouped convolution; otherwise 1.
        outputs: O, rows of the weight matrix of a group.
        inputs: K, its columns, without the bias: input channels of a group × kernel size.
        inside: a and δ are those of the function that takes the weight (passes/uses.py), not those of the module.
        rows: how many rows an example has in it, over all calls of a forward pass, as the probe saw it; 0 if unknown.
    """

    name: str
    kind: str
    weight: str
    bias: str
    groups: int
    outputs: int
    inputs: int
    inside: bool = False
    rows: int = 0

    @property
    def width(self) -> int:
        """Count the columns of the gradient's matrix: those of the weight, and one for the bias."""
        return (self.inputs if self.weight else 0) + bool(self.bias)

    @property
    def names(self) -> tuple[str, ...]:
        """Name the tracked parameters."""
        return tuple(name for name in (self.weight, self.bias) if name)

    @property
    def is_matrix(self) -> bool:
        """Say whether the gradient is a matrix Σ_τ δ_τ a_τᵀ, as of linear layers and convolutions."""
        return self.kind in ("linear", "conv")


@dataclass(frozen=True)
class Network:
    """A model, its loss, and which of its parameters count.

    Attributes:
        model: in eval mode.
        loss: (outputs, targets) to losses [b].
        names: tracked parameters, in the model's order.
        left_out: the other parameters.
        size: p, numbers in the tracked parameters.
        layers: modules that the layer pass covers.
        rest: tracked parameters that it does not, through torch.func or a loop of autograd.
        vectorised: whether vmap can go through the model for the rest; False means a loop of autograd.
        obstacle: why vmap cannot, if so.
        unused: tracked parameters that no output depends on.
        precision: ``float32``, ``tf32`` or ``bf16`` for the layer pass.
    """

    model: nn.Module
    loss: Loss
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    size: int
    layers: tuple[Layer, ...] = ()
    rest: tuple[str, ...] = ()
    vectorised: bool = True
    obstacle: str = ""
    unused: tuple[str, ...] = ()
    precision: str = "float32"

    def parameters(self) -> dict[str, Tensor]:
        """Give the tracked parameters by name."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.names}

    def device(self) -> torch.device:
        """Name the device that the model is on."""
        return next(self.model.parameters()).device

    @cached_property
    def slots(self) -> dict[str, slice]:
        """Give each tracked parameter's place in a flat vector."""
        places, start = {}, 0
        for name, parameter in self.parameters().items():
            places[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return places


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
        if parameter.requires_grad and parameter.is_floating_point() and _reached(chosen, owner_of(name)):
            names.append(name)
            size += parameter.numel()
        else:
            left_out.append(name)
    if not names:
        raise InfluenceError(
            f"{where}: the layers {', '.join(map(repr, patterns))} hold no trained parameter",
            "their parameters have requires_grad off, or they have none; choose other layers",
        )
    return Network(model, loss, tuple(names), tuple(left_out), size, rest=tuple(names))


def owner_of(name: str) -> str:
    """Name the module that holds a parameter."""
    return name.rpartition(".")[0]


def _reached(chosen: set[str], owner: str) -> bool:
    """Say whether a module, or one above it, was chosen; the root counts only if it was chosen itself."""
    if "" in chosen:
        return True
    parts = owner.split(".")
    return any(".".join(parts[: depth + 1]) in chosen for depth in range(len(parts)))


def restrict(network: Network, names: Sequence[str]) -> Network:
    """Track fewer parameters: those of ``names`` only."""
    parameters, wanted = network.parameters(), set(names)
    kept = tuple(name for name in network.names if name in wanted)
    dropped = tuple(name for name in network.names if name not in wanted)
    layers = []
    for layer in network.layers:
        weight, bias = (name if name in wanted else "" for name in (layer.weight, layer.bias))
        if weight or bias:
            layers.append(replace(layer, weight=weight, bias=bias))
    return replace(
        network,
        names=kept,
        left_out=network.left_out + dropped,
        size=sum(parameters[name].numel() for name in kept),
        layers=tuple(layers),
        rest=tuple(name for name in network.rest if name in wanted),
        unused=tuple(name for name in network.unused if name in wanted),
    )


def evaluate(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model forward only.

    Returns:
        Losses [b], outputs [b, C].
    """
    with torch.no_grad():
        outputs = logits_of(network.model(inputs.to(network.device())))
        return network.loss(outputs, targets.to(network.device())), outputs


def loss_slopes(network: Network, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the loss with respect to the outputs.

    Returns:
        Losses [b] and ∂ℓ/∂f [b, C], detached, in float32 or wider.
    """
    outputs = outputs.detach()
    outputs = (outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs).requires_grad_()
    with torch.enable_grad():
        losses = network.loss(outputs, targets)
        (slopes,) = torch.autograd.grad(losses.sum(), outputs, materialize_grads=True, allow_unused=True)
    return losses.detach(), slopes.detach()


def output_layer(network: Network, inputs: Tensor) -> nn.Linear | None:
    """Find the Linear layer whose output f is the model's output, or (0, f), if it holds all tracked parameters.

    The outputs are linear in its parameters, so the Hessian equals the GGN and a convex loss stays convex.
    """
    owners = {owner_of(name) for name in network.names}
    if len(owners) != 1:
        return None
    layer = network.model.get_submodule(owners.pop())
    shared = {id(p) for m in network.model.modules() if m is not layer for p in m.parameters(recurse=False)}
    if type(layer) is not nn.Linear or any(id(p) in shared for p in layer.parameters()):
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output), prepend=True)
    try:
        with torch.no_grad():
            outputs = logits_of(network.model(inputs.to(network.device())))
    finally:
        handle.remove()
    if len(seen) != 1:
        return None
    made = two_classes(seen[0]) if reads_one_logit(layer, outputs) and seen[0].ndim == 2 else seen[0]
    return layer if made.shape == outputs.shape and torch.equal(made, outputs) else None


def reads_one_logit(layer: nn.Linear, outputs: Tensor) -> bool:
    """Say whether outputs [b, 2] are (0, f) of an output layer's single logit f, rather than its outputs."""
    return layer.out_features == 1 and outputs.shape[1] == 2


def layer_inputs(network: Network, layer: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Capture a layer's input during a forward pass.

    Returns:
        The layer's input a [b, d], with a column of ones if it has a bias; the model's outputs [b, C].
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


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors, one per tracked parameter, to one vector [p]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(network: Network, vector: Tensor) -> list[Tensor]:
    """Cut a vector [p] into the shapes of the tracked parameters."""
    parameters = list(network.parameters().values())
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


@contextmanager
def frozen(model: nn.Module, but: Collection[str] = ()) -> Iterator[None]:
    """Switch off the gradients of all parameters but a few, and restore them afterwards."""
    wanted = [p for name, p in model.named_parameters() if p.requires_grad and name not in but]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)  # noqa: FBT003  torch and its stubs name it differently
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)  # noqa: FBT003  torch and its stubs name it differently


@contextmanager
def recurrent_backward(model: nn.Module) -> Iterator[None]:
    """Make backward work for recurrent layers in eval mode: cuDNN's forward has none.

    The forward pass must run inside. Other models keep cuDNN, because their convolutions are slow without it.
    """
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    # Not cudnn.flags(), which allows TF32 while it is active.
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def differentiable_attention() -> Any:
    """Use the attention that supports torch.func and second derivatives; the fused ones do not."""
    return sdpa_kernel(SDPBackend.MATH)
