"""Coordinates of example gradients in a basis, c = Pᵀg, straight from the layer pass.

None        raw gradients: the parameters themselves
Joint       one basis over all tracked parameters, P [p, k]
Blocks      a basis a layer (blocks.py), of which some coordinates are kept
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from influence_cli.blocks import Kept
from influence_cli.contractions import example_squares, flat_gradient, inner, rotated, turned_sides
from influence_cli.gradients import example_gradients, rest_products
from influence_cli.layers import Call, forward
from influence_cli.model.network import Network, loss_slopes


@dataclass(frozen=True)
class Joint:
    """One basis over all tracked parameters.

    Attributes:
        vectors: P [p, k], orthonormal columns.
    """

    vectors: Tensor

    @property
    def width(self) -> int:
        """Count the coordinates."""
        return self.vectors.shape[1]


@dataclass(frozen=True)
class Blocks:
    """A basis a layer.

    Attributes:
        kept: the used coordinates of each block, in order.
    """

    kept: tuple[Kept, ...]

    @property
    def width(self) -> int:
        """Count the coordinates."""
        return sum(map(len, self.kept))


Basis = Joint | Blocks | None


def coordinates(network: Network, basis: Basis, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute c = Pᵀgᵢ of each example.

    Args:
        network: the model.
        basis: P, or None for the gradients themselves.
        inputs: [b, …], on any device.
        targets: int64 [b].

    Returns:
        Coordinates [b, k], losses [b], outputs [b, C], on the model's device, detached.
    """
    if not isinstance(basis, Blocks):
        grads, losses, outputs = example_gradients(network, inputs, targets)
        return (grads if basis is None else grads @ basis.vectors), losses, outputs
    tape = forward(network, inputs)
    losses, slopes = loss_slopes(network, tape.outputs, targets.to(network.device()))
    outputs = tape.outputs.detach()
    return block_coordinates(network, basis, tape.backward(slopes), inputs, slopes), losses, outputs


def block_coordinates(
    network: Network, basis: Blocks, calls: Sequence[Sequence[Call]], inputs: Tensor, slopes: Tensor
) -> Tensor:
    """Turn what a layer pass gave into the kept coordinates: [b, k]."""
    out = torch.empty(len(slopes), basis.width, dtype=torch.float32, device=network.device())
    loose = loose_gradients(network, calls, inputs, slopes, [kept.block.names for kept in basis.kept])
    start = 0
    for kept in basis.kept:
        place = out[:, start : start + len(kept)]
        start += len(kept)
        if kept.block.kind == "kronecker":
            _kronecker(network, kept, calls, place)
            continue
        grads = loose[kept.block.names]
        if kept.block.vectors is not None:
            place.copy_(grads @ kept.block.vectors)
        else:
            place.copy_(grads if kept.flat is None else grads[:, kept.flat])
    return out


def _kronecker(network: Network, kept: Kept, calls: Sequence[Sequence[Call]], out: Tensor) -> None:
    if not len(kept):
        return
    number = layer_number(network, kept.block.name)
    own = calls[number] if number < len(calls) else []
    if not own:
        out.zero_()
        return
    q_out, q_in = kept.block.sides()
    layer = network.layers[number]
    pair = turned_sides(network, layer, own, q_out, q_in)
    if pair is not None and kept.flat is not None:
        _outer_products(*pair, kept.flat, out)
        return
    start = 0
    for part in rotated(network, layer, own, q_out, q_in):
        flat = part.flatten(1)
        out[start : start + len(part)] = flat if kept.flat is None else flat.gather(1, kept.flat.expand(len(flat), -1))
        start += len(part)


def _outer_products(left: Tensor, right: Tensor, flat: Tensor, out: Tensor) -> None:
    """Write chosen entries of the outer products of [b, g, r] and [b, g, s] to [b, k], row by row, within the cache.

    Args:
        left: Q_Gᵀδ.
        right: Q_Aᵀa.
        flat: int64 [k], rising positions in [g, r, s].
        out: takes them.
    """
    rows, width = left.flatten(1), right.shape[2]
    ends = torch.searchsorted(flat, width * torch.arange(rows.shape[1] + 1, device=flat.device)).tolist()
    for row, (start, stop) in enumerate(pairwise(ends)):
        if start < stop:
            columns = flat[start:stop] - width * row
            # gather, not indexing: six times as fast along rows.
            entries = right[:, row // left.shape[2]].gather(1, columns.expand(len(right), -1))
            torch.mul(rows[:, row : row + 1], entries, out=out[:, start:stop])


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
    """Give the example gradients of norms, embeddings and the rest, joined for each wanted tuple of parameters."""
    found: dict[str, Tensor] = {}
    for layer, own in zip(network.layers, calls, strict=False):
        if not layer.is_matrix:
            for name in layer.names:
                found[name] = torch.zeros(len(slopes), network.model.get_parameter(name).numel(), device=slopes.device)
            if own:
                flat_gradient(network, layer, own, found)
    if network.rest:
        products, start = rest_products(network, inputs, slopes), 0
        for name in network.rest:
            width = network.model.get_parameter(name).numel()
            found[name] = products[:, start : start + width]
            start += width
    return {names: torch.cat([found[name] for name in names], dim=1) for names in wanted if names[0] in found}


def full_vectors(network: Network, basis: Blocks, values: Tensor) -> Tensor:
    """Turn coordinates [m, k] back into vectors over the parameters, P c: [m, p]."""
    out = torch.zeros(len(values), network.size, dtype=values.dtype, device=values.device)
    start = 0
    for kept in basis.kept:
        part, block = values[:, start : start + len(kept)], kept.block
        start += len(kept)
        if block.kind == "kronecker":
            q_out, q_in = block.sides()
            table = part.new_zeros(len(part), q_out.shape[0] * q_out.shape[2] * q_in.shape[2])
            if kept.flat is None:
                table = part
            else:
                table[:, kept.flat] = part
            table = table.view(len(part), q_out.shape[0], q_out.shape[2], q_in.shape[2])
            _place(network, block.name, q_out @ table @ q_in.transpose(1, 2), out)
            continue
        if block.vectors is not None:
            flat = part @ block.vectors.T
        elif kept.flat is None:
            flat = part
        else:
            flat = part.new_zeros(len(part), block.size)
            flat[:, kept.flat] = part
        at = 0
        for name in block.names:
            slot = network.slots[name]
            out[:, slot] = flat[:, at : at + slot.stop - slot.start]
            at += slot.stop - slot.start
    return out


def vector_coordinates(network: Network, basis: Blocks, vectors: Tensor) -> Tensor:
    """Project vectors over the parameters on the kept coordinates, Pᵀv: [m, p] to [m, k]."""
    parts = []
    for kept in basis.kept:
        block = kept.block
        if block.kind == "kronecker":
            q_out, q_in = block.sides()
            turned = q_out.transpose(1, 2) @ layer_matrices(network, block.name, vectors) @ q_in
            flat = turned.flatten(1)
        else:
            flat = torch.cat([vectors[:, network.slots[name]] for name in block.names], dim=1)
            flat = flat if block.vectors is None else flat @ block.vectors
        parts.append(flat if kept.flat is None else flat[:, kept.flat])
    return torch.cat(parts, dim=1)


def _place(network: Network, name: str, matrices: Tensor, out: Tensor) -> None:
    """Put matrices [m, g, O, K'] where a layer's weight and bias lie in flat vectors."""
    layer = network.layers[layer_number(network, name)]
    if layer.weight:
        out[:, network.slots[layer.weight]] = matrices[..., : layer.inputs].flatten(1)
    if layer.bias:
        out[:, network.slots[layer.bias]] = matrices[..., -1].flatten(1)


def products(network: Network, vectors: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply example gradients with vectors, gᵢᵀv, no gradient being stored and for most layers none formed.

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
    for layer, own in zip(network.layers, calls, strict=False):
        if own and layer.is_matrix:
            total += inner(network, layer, own, layer_matrices(network, layer.name, vectors))
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
    for layer, own in zip(network.layers, calls, strict=False):
        if own and layer.is_matrix:
            total += example_squares(network, layer, own)
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


def weighted_squares(
    network: Network, basis: Blocks, weights: Sequence[Tensor], inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Σⱼ wⱼ c_ij² over the coordinates of whole blocks, layer by layer.

    Args:
        network: the model.
        basis: with every coordinate kept.
        weights: w of each block, in the shape of its Λ.
        inputs: [b, …].
        targets: [b].

    Returns:
        [b] float64, losses [b], outputs [b, C].
    """
    tape = forward(network, inputs)
    losses, slopes = loss_slopes(network, tape.outputs, targets.to(network.device()))
    calls = tape.backward(slopes)
    loose = loose_gradients(network, calls, inputs, slopes, [kept.block.names for kept in basis.kept])
    total = torch.zeros(len(slopes), dtype=torch.float64, device=slopes.device)
    for kept, weight in zip(basis.kept, weights, strict=True):
        block = kept.block
        if block.kind == "kronecker":
            number = layer_number(network, block.name)
            own = calls[number] if number < len(calls) else []
            if own:
                total += _kronecker_squares(network, number, own, block.sides(), weight)
            continue
        grads = loose[block.names]
        turned = grads if block.vectors is None else grads @ block.vectors
        total += turned.square() @ weight
    return total, losses, tape.outputs.detach()


def _kronecker_squares(
    network: Network, number: int, calls: Sequence[Call], basis: tuple[Tensor, Tensor], weight: Tensor
) -> Tensor:
    layer = network.layers[number]
    pair = turned_sides(network, layer, calls, *basis)
    if pair is not None:
        left, right = (side.square() for side in pair)
        return torch.einsum("bgr,grs,bgs->b", left, weight, right).double()
    parts = [part.square().flatten(1) @ weight.flatten() for part in rotated(network, layer, calls, *basis)]
    return torch.cat(parts).double()
