"""Products of example gradients with vectors, and their norms, straight from the layer pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_cli.model.network import Network, loss_slopes
from influence_cli.passes.contractions import example_squares, flat_gradient, inner
from influence_cli.passes.gradients import rest_products
from influence_cli.passes.layers import Call, forward


def layer_number(network: Network, name: str) -> int:
    """Find a layer by its module's name."""
    return next(number for number, layer in enumerate(network.layers) if layer.name == name)


def loose_gradients(
    network: Network,
    calls: Sequence[Sequence[Call]],
    inputs: Tensor,
    slopes: Tensor,
    wanted: Sequence[tuple[str, ...]],
) -> dict[tuple[str, ...], Tensor]:
    """Give the example gradients, joined for each wanted tuple of parameters.

    They are those of norms, embeddings, terms and the rest; of a matrix layer too, where an older store kept it so.
    """
    grads: dict[str, Tensor] = {}
    asked = {name for names in wanted for name in names}
    for number, layer in enumerate(network.layers):
        if asked.intersection(layer.names):
            layer_calls = calls[number] if number < len(calls) else ()
            for name in layer.names:
                grads[name] = torch.zeros(len(slopes), network.model.get_parameter(name).numel(), device=slopes.device)
            if layer_calls:
                flat_gradient(network, layer, layer_calls, grads)
    if asked.intersection(network.rest):
        products, start = rest_products(network, inputs, slopes), 0
        for name in network.rest:
            width = network.model.get_parameter(name).numel()
            grads[name] = products[:, start : start + width]
            start += width
    return {names: torch.cat([grads[name] for name in names], dim=1) for names in wanted}


def products(network: Network, vectors: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply example gradients with vectors, gᵢᵀv: no gradient is stored, and most layers form none.

    Args:
        network: the model.
        vectors: V [m, p].
        inputs: [b, …].
        targets: [b].

    Returns:
        [b, m], losses [b], outputs [b, C].
    """
    tape = forward(network, inputs)
    losses, slopes = loss_slopes(network, tape.outputs, targets.to(network.device()))
    calls = tape.backward(slopes)
    total = torch.zeros(len(slopes), len(vectors), dtype=vectors.dtype, device=vectors.device)
    for layer, layer_calls in zip(network.layers, calls, strict=False):
        if layer_calls and layer.is_matrix:
            total += inner(network, layer, layer_calls, layer_matrices(network, layer.name, vectors))
    loose = tuple(name for name in network.names if name in _loose_names(network))
    if loose:
        grads = loose_gradients(network, calls, inputs, slopes, [loose])[loose]
        total += grads @ torch.cat([vectors[:, network.slots[name]] for name in loose], dim=1).T
    return total, losses, tape.outputs.detach()


def squared_norms(network: Network, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ‖gᵢ‖² over all tracked parameters, layer by layer.

    Returns:
        [b], losses [b], outputs [b, C].
    """
    tape = forward(network, inputs)
    losses, slopes = loss_slopes(network, tape.outputs, targets.to(network.device()))
    calls = tape.backward(slopes)
    wide = torch.float64 if slopes.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(slopes), dtype=wide, device=slopes.device)
    for layer, layer_calls in zip(network.layers, calls, strict=False):
        if layer_calls and layer.is_matrix:
            total += example_squares(network, layer, layer_calls)
    loose = tuple(name for name in network.names if name in _loose_names(network))
    if loose:
        total += loose_gradients(network, calls, inputs, slopes, [loose])[loose].square().sum(dim=1)
    return total, losses, tape.outputs.detach()


def layer_matrices(network: Network, name: str, vectors: Tensor) -> Tensor:
    """Cut a matrix layer's part out of vectors [m, p]: [m, g, O, K']."""
    layer = network.layers[layer_number(network, name)]
    shape = (len(vectors), layer.groups, layer.outputs)
    parts = []
    if layer.weight:
        parts.append(vectors[:, network.slots[layer.weight]].reshape(*shape, layer.inputs))
    if layer.bias:
        parts.append(vectors[:, network.slots[layer.bias]].reshape(*shape, 1))
    return torch.cat(parts, dim=3)


def _loose_names(network: Network) -> set[str]:
    matrix = {name for layer in network.layers if layer.is_matrix for name in layer.names}
    return set(network.names) - matrix - set(network.unused)
