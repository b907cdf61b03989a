"""A block-diagonal curvature: one basis and spectrum per layer, and which of its coordinates are kept.

    Kronecker   Q_G ⊗ Q_A of a linear layer or a convolution, Λ [g, O, K']
    Dense       eigenvectors of the exact block of a norm's or loose parameters
    Diagonal    the parameters themselves, if such a block would be too wide

The coordinates of a network are those of its blocks, one block after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """The curvature of one layer.

    Attributes:
        name: of the module.
        kind: ``kronecker``, ``dense`` or ``diagonal``.
        names: its parameters; for a Kronecker block the weight, then the bias.
        values: Λ, float32: [g, r, s], [r] or [q].
        q_out: Q_G [g, O, r] of a Kronecker block.
        q_in: Q_A [g, K', s] of a Kronecker block.
        vectors: P [q, r] of a dense block.
        size: numbers in its parameters; larger than Λ if eigenvectors were left out.
        trace: ΣΛ over the whole block, including what was left out.
    """

    name: str
    kind: str
    names: tuple[str, ...]
    values: Tensor
    q_out: Tensor | None
    q_in: Tensor | None
    vectors: Tensor | None
    size: int
    trace: float

    @property
    def count(self) -> int:
        """Count the coordinates."""
        return self.values.numel()

    @property
    def mean(self) -> float:
        """Give the mean eigenvalue over all of the block's parameters."""
        return self.trace / max(1, self.size)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Give Q_G and Q_A of a Kronecker block."""
        if self.q_out is None or self.q_in is None:
            raise ValueError(f"{self.name} is not a Kronecker block")
        return self.q_out, self.q_in


@dataclass(frozen=True)
class Kept:
    """The coordinates of one block that are used.

    Attributes:
        block: with its basis cut down to the columns that are used.
        flat: int64, positions of the coordinates in the cut-down [g, r, s] (or [r]); None for all, in order.
        values: Λ of them, float32 [k].
        whole: positions of the coordinates among all of the block's, int64 [k].
    """

    block: Block
    flat: Tensor | None
    values: Tensor
    whole: np.ndarray

    def __len__(self) -> int:
        """Count them."""
        return len(self.whole)


def keep(blocks: Sequence[Block], chosen: np.ndarray | None, device: torch.device) -> list[Kept]:
    """Cut the blocks down to the chosen coordinates.

    Args:
        blocks: all of them.
        chosen: int64 [k], rising positions in the joined spectrum; None for all.
        device: where the bases go.
    """
    kept, start = [], 0
    for block in blocks:
        stop = start + block.count
        if chosen is None:
            inside = np.arange(block.count, dtype=np.int64)
        else:
            inside = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, stop)] - start
        start = stop
        kept.append(_cut(block, inside, device))
    return kept


def _cut(block: Block, inside: np.ndarray, device: torch.device) -> Kept:
    flat = torch.from_numpy(inside)
    values = block.values.reshape(-1)[flat].to(device)
    whole = len(inside) == block.count
    if block.kind == "diagonal":
        return Kept(_moved(block, device), None if whole else flat.to(device), values, inside)
    if block.kind == "dense":
        vectors = block.vectors if whole or block.vectors is None else block.vectors[:, flat]
        return Kept(_moved(block, device, vectors=vectors), None, values, inside)
    q_out, q_in = block.sides()
    if whole:
        return Kept(_moved(block, device), None, values, inside)
    group, row, column = np.unravel_index(inside, tuple(block.values.shape))
    rows, row = np.unique(row, return_inverse=True)
    columns, column = np.unique(column, return_inverse=True)
    place = torch.from_numpy((group * len(rows) + row) * len(columns) + column).to(device)
    cut = _moved(block, device, q_out=q_out[:, :, rows], q_in=q_in[:, :, columns])
    return Kept(cut, place, values, inside)


def _moved(
    block: Block,
    device: torch.device,
    *,
    q_out: Tensor | None = None,
    q_in: Tensor | None = None,
    vectors: Tensor | None = None,
) -> Block:
    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous().to(device)

    return Block(
        block.name,
        block.kind,
        block.names,
        block.values,
        there(block.q_out if q_out is None else q_out),
        there(block.q_in if q_in is None else q_in),
        there(block.vectors if vectors is None else vectors),
        block.size,
        block.trace,
    )


def joined(blocks: Sequence[Block]) -> Tensor:
    """Join the spectra of all blocks: Λ, float32 [count]."""
    return torch.cat([block.values.reshape(-1).cpu() for block in blocks])


def groups(blocks: Sequence[Block]) -> np.ndarray:
    """Give the block of each coordinate: int32 [count]."""
    return np.repeat(np.arange(len(blocks), dtype=np.int32), [block.count for block in blocks])


def largest(blocks: Sequence[Block], count: int) -> np.ndarray:
    """Choose the coordinates to keep: at least one per block, then those of largest Λ / (mean eigenvalue of the block).

    λ is a multiple of that mean, so these coordinates make up the effective dimension ΣΛ/(Λ + λ).

    Args:
        blocks: all of them.
        count: how many, at least one per block.

    Returns:
        int64 [count], rising positions in the joined spectrum; ties go to the earlier position.
    """
    weight = torch.cat([block.values.reshape(-1).cpu().double() / max(block.mean, 1e-300) for block in blocks]).numpy()
    owners = groups(blocks)
    if count >= len(weight):
        return np.arange(len(weight), dtype=np.int64)
    starts = np.cumsum([0] + [block.count for block in blocks[:-1]])
    firsts = np.array([start + int(block.values.argmax()) for start, block in zip(starts, blocks, strict=True)])
    boosted = weight.copy()
    boosted[firsts] = np.inf
    cut = np.partition(boosted, len(boosted) - count)[len(boosted) - count]
    above = np.flatnonzero(boosted > cut)
    level = np.flatnonzero(boosted == cut)[: count - len(above)]
    chosen = np.sort(np.concatenate([above, level]))
    if len(np.unique(owners[chosen])) < len(blocks):
        raise ValueError("fewer coordinates than blocks")
    return chosen


def to_arrays(blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """Give the arrays that a store keeps: ``factor.0003.q_out`` and the like."""
    arrays: dict[str, np.ndarray] = {}
    for number, block in enumerate(blocks):
        for part in ("values", "q_out", "q_in", "vectors"):
            tensor = getattr(block, part)
            if tensor is not None:
                arrays[f"factor.{number:04d}.{part}"] = tensor.cpu().numpy()
    return arrays


def describe(blocks: Sequence[Block]) -> list[dict[str, object]]:
    """Give the facts that are not arrays, JSON-able."""
    return [{"name": b.name, "kind": b.kind, "names": list(b.names), "size": b.size, "trace": b.trace} for b in blocks]


def from_arrays(described: Sequence[dict[str, object]], array: Callable[[str], np.ndarray | None]) -> list[Block]:
    """Read blocks back; ``array`` gives an array by name, or None."""

    def tensor(number: int, part: str) -> Tensor | None:
        values = array(f"factor.{number:04d}.{part}")
        return None if values is None else torch.from_numpy(values)

    blocks = []
    for number, description in enumerate(described):
        values = tensor(number, "values")
        if values is None:
            raise ValueError(f"factor {number} has no spectrum")
        blocks.append(
            Block(
                str(description["name"]),
                str(description["kind"]),
                tuple(description["names"]),  # type: ignore[arg-type]
                values,
                tensor(number, "q_out"),
                tensor(number, "q_in"),
                tensor(number, "vectors"),
                int(description["size"]),  # type: ignore[call-overload]
                float(description["trace"]),  # type: ignore[arg-type]
            )
        )
    return blocks
