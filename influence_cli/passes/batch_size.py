"""How many examples go through a layer pass at once, given the free memory."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_cli.model.network import Network
from influence_cli.passes.layers import forward
from influence_cli.runtime.memory import available_bytes

# Share of the free memory for one batch; the rest is for contractions, data and other processes.
SHARE = 0.4


def example_bytes(network: Network, inputs: Tensor) -> int:
    """Measure what one example holds in a forward and backward: saved tensors, layer inputs, output gradients.

    Args:
        network: the model, its layers decided.
        inputs: [b, …], a few examples.
    """
    model_storages = {p.untyped_storage().data_ptr() for p in network.model.parameters()}
    model_storages |= {b.untyped_storage().data_ptr() for b in network.model.buffers()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tape = forward(network, inputs)
    for call in tape.calls:
        note(call.a)
    # Backward frees what forward saved as it goes, and slopes may reuse the same memory.
    held = sum(seen.values())
    seen.clear()
    for layer_calls in tape.backward(torch.ones_like(tape.outputs)):
        for call in layer_calls:
            if call.delta is not None:
                note(call.delta)
    return max(1, (held + sum(seen.values()) + inputs.numel() * inputs.element_size()) // max(1, len(inputs)))


def plan_batch(network: Network, inputs: Tensor, width: int, block: int) -> int:
    """Choose how many examples go through the layer pass at once: a whole block, or a power of two below it.

    Args:
        network: the model, its layers decided.
        inputs: a few examples, for the measurement.
        width: numbers per output row; p for raw gradients.
        block: rows of a block.
    """
    rest = sum(network.model.get_parameter(name).numel() for name in network.rest)
    # vmap keeps its own activations in addition to the gradients of the rest.
    each = example_bytes(network, inputs) * (3 if network.rest else 1) + 4 * (3 * width + 3 * rest)
    batch = max(1, int(SHARE * available_bytes(network.device())) // each)
    return min(block, 1 << (batch.bit_length() - 1))


# Example gradients that exist at once: 2²⁷ numbers, 512 MB in float32.
GRADIENT_NUMBERS = 2**27


def micro_batch(network: Network, block: int, columns: int = 1) -> int:
    """Bound the examples computed at once, by the model's size only, so that the same block gives the same bytes.

    Args:
        network: the model.
        block: rows in a block.
        columns: gradients per example (1, or C for a Jacobian).
    """
    return max(1, min(block, GRADIENT_NUMBERS // (network.size * columns)))
