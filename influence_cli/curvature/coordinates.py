"""Coordinates of example gradients in a basis, c = Pᵀg, straight from the layer pass.

None        raw gradients: the parameters themselves
Joint       one basis over all tracked parameters, P [p, k]
Blocks      one basis per layer (curvature/blocks.py), with some of its coordinates kept
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from influence_cli.curvature.blocks import Block, Kept
from influence_cli.model.network import Network, loss_slopes
from influence_cli.passes.contractions import rotated, turned_sides
from influence_cli.passes.gradient_products import layer_matrices, layer_number, loose_gradients
from influence_cli.passes.gradients import example_gradients
from influence_cli.passes.layers import Call, forward


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
    """One basis per layer.

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
    """Rotate the result of a layer pass into the kept coordinates: [b, k]."""
    out = torch.empty(len(slopes), basis.width, dtype=torch.float32, device=network.device())
    loose = loose_gradients(network, calls, inputs, slopes, _loose(basis))
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


def _loose(basis: Blocks) -> list[tuple[str, ...]]:
    return [kept.block.names for kept in basis.kept if kept.block.kind != "kronecker"]


def _kronecker(network: Network, kept: Kept, calls: Sequence[Sequence[Call]], out: Tensor) -> None:
    if not len(kept):
        return
    number = layer_number(network, kept.block.name)
    layer_calls = calls[number] if number < len(calls) else []
    if not layer_calls:
        out.zero_()
        return
    q_out, q_in = kept.block.sides()
    layer = network.layers[number]
    pair = turned_sides(network, layer, layer_calls, q_out, q_in)
    if pair is not None and kept.flat is not None:
        _outer_products(*pair, kept.flat, out)
        return
    start = 0
    for part in rotated(network, layer, layer_calls, q_out, q_in):
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


def vector_coordinates(network: Network, basis: Basis, vectors: Tensor) -> Tensor:
    """Project vectors over the parameters on the kept coordinates, Pᵀv: [m, p] to [m, k]."""
    if not isinstance(basis, Blocks):
        return vectors if basis is None else vectors @ basis.vectors
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
    loose = loose_gradients(network, calls, inputs, slopes, _loose(basis))
    total = torch.zeros(len(slopes), dtype=torch.float64, device=slopes.device)
    for kept, weight in zip(basis.kept, weights, strict=True):
        block = kept.block
        if block.kind == "kronecker":
            number = layer_number(network, block.name)
            layer_calls = calls[number] if number < len(calls) else []
            if layer_calls:
                total += _kronecker_squares(network, number, layer_calls, block.sides(), weight)
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


def block_penalties(network: Network, blocks: Sequence[Block], l2: Tensor) -> Tensor:
    """Give the diagonal of Pᵀ diag(l2) P in a basis per layer: float64 [count], one number per coordinate.

    It is all of that matrix where l2 is the same for all parameters of a block. Elsewhere the rest is left out, as
    EK-FAC does with the curvature.

    Args:
        network: the model.
        blocks: all of them, with whole bases.
        l2: λ₂ of each parameter, float64 [p].
    """
    parts = []
    for block in blocks:
        if block.kind == "kronecker":
            q_out, q_in = (side.double().cpu().square() for side in block.sides())
            table = layer_matrices(network, block.name, l2[None])[0]
            parts.append((q_out.transpose(1, 2) @ table @ q_in).reshape(-1))
            continue
        own = torch.cat([l2[network.slots[name]] for name in block.names])
        parts.append(own if block.vectors is None else own @ block.vectors.double().cpu().square())
    return torch.cat(parts)


def mixed_layers(network: Network, l2: Tensor) -> list[str]:
    """Name the layers whose parameters share a block but not λ₂."""
    names = [[part for part in (layer.weight, layer.bias) if part] for layer in network.layers]
    return [
        layer.name or "the model"
        for layer, parts in zip(network.layers, names, strict=True)
        if len({float(l2[network.slots[name]][0]) for name in parts}) > 1
    ]


def parameter_vectors(network: Network, basis: Basis, left: Tensor) -> Tensor:
    """Turn vectors of coordinates [m, k] into vectors over the parameters [m, p]."""
    if isinstance(basis, Blocks):
        return full_vectors(network, basis, left)
    return left @ basis.vectors.T if isinstance(basis, Joint) else left
