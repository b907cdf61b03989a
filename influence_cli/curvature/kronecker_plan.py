"""Which Kronecker factors of each layer fit into memory and store, and how many examples fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from influence_cli.model.network import Network, owner_of
from influence_cli.passes.contractions import positions
from influence_cli.passes.layers import Call

# A factor wider than this keeps only its top eigenvectors, from a sketch.
WIDEST, TOP, OVERSAMPLED = 8_192, 1_024, 128
# Norms and loose parameters up to here have an exact block.
EXACT_BLOCK = 4_096

# Fewest examples whose covariances choose the basis.
SAMPLED_AT_LEAST = 2_048


@dataclass(frozen=True)
class KroneckerPlan:
    """What is fitted: Kronecker layers, and the parameters that are not in one.

    Attributes:
        layers: numbers in ``Network.layers``.
        loose: parameters by module, in the model's order.
    """

    layers: tuple[int, ...]
    loose: tuple[tuple[str, ...], ...]


def make_plan(network: Network) -> KroneckerPlan:
    """Divide the tracked parameters into blocks."""
    layers = tuple(number for number, layer in enumerate(network.layers) if layer.is_matrix)
    matrix = {name for number in layers for name in network.layers[number].names} | set(network.unused)
    loose: dict[str, list[str]] = {}
    for name in network.names:
        if name not in matrix:
            loose.setdefault(owner_of(name), []).append(name)
    return KroneckerPlan(layers, tuple(map(tuple, loose.values())))


def factor_bytes(network: Network) -> int:
    """Estimate the memory of the largest stage: covariances in float64, eigenvectors, Λ."""
    plan, total = make_plan(network), 0
    for number in plan.layers:
        layer = network.layers[number]
        for width in (layer.width, layer.outputs):
            total += layer.groups * 12 * width * (width if width <= WIDEST else TOP + OVERSAMPLED)
        total += 8 * layer.groups * layer.outputs * layer.width
    for names in plan.loose:
        size = sum(network.model.get_parameter(name).numel() for name in names)
        total += 12 * size * size if size <= EXACT_BLOCK else 8 * size
    return total


def sample_sizes(network: Network, calls: Sequence[Sequence[Call]], n: int) -> dict[int, int]:
    """Count the examples whose covariances a layer takes: some thousands, or eight times its width in positions.

    Args:
        network: the model.
        calls: the layers' calls in a pass over any examples.
        n: training examples.

    Returns:
        A count for the number of each matrix layer.
    """
    wanted = {}
    for number, layer in enumerate(network.layers):
        if layer.is_matrix:
            layer_calls = calls[number] if number < len(calls) else []
            tokens = max(1, positions(layer, layer_calls))
            width = min(max(layer.width, layer.outputs), WIDEST)
            wanted[number] = min(n, max(SAMPLED_AT_LEAST, -(-8 * width // tokens)))
    return wanted


def stored_bytes(network: Network) -> int:
    """Count the bytes of the factors in a store: eigenvectors and Λ, float32."""
    plan, total = make_plan(network), 0
    for number in plan.layers:
        layer = network.layers[number]
        out, into = (TOP if width > WIDEST else width for width in (layer.outputs, layer.width))
        total += 4 * layer.groups * (layer.outputs * out + layer.width * into + out * into)
    for names in plan.loose:
        size = sum(network.model.get_parameter(name).numel() for name in names)
        total += 4 * size * (size + 1) if size <= EXACT_BLOCK else 4 * size
    return total
