"""Tensors that the processes of a job sum, exchange or gather; a single process gets its own tensors back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from influence_cli.runtime import distributed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Most bytes of a message: rows that lie in a file are then not in memory all at once.
SENT = 2**26


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place: each gets the same bytes."""
    if distributed.size() > 1:
        import torch.distributed as channel

        # Neither backend knows other devices.
        there = tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()
        there = there.contiguous()
        with distributed.listening():
            channel.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)
    return tensor


def sum_array(values: np.ndarray) -> np.ndarray:
    """Sum an array over the processes, in place."""
    if distributed.size() > 1:
        import torch

        sum_tensor(torch.from_numpy(values))
    return values


def sum_tensors(tensors: dict[str, Tensor], chosen: Callable[[str], bool]) -> None:
    """Sum tensors by name over the processes, in place; a tensor that a process lacks counts as zero."""
    if distributed.size() == 1:
        return
    import torch

    described = {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in tensors.items() if chosen(name)}
    known: dict[str, Any] = {}
    for others in distributed.gathered(described):
        known |= others
    for name in sorted(known):
        shape, dtype, kind = known[name]
        if name not in tensors:
            there = torch.device(kind, distributed.local_device(torch.cuda.device_count())) if kind == "cuda" else kind
            tensors[name] = torch.zeros(shape, dtype=dtype, device=there)
        tensors[name] = sum_tensor(tensors[name].contiguous())


def hand_round(tensors: dict[str, Tensor]) -> None:
    """Give every process the tensors that one of them has; a name belongs to one process."""
    if distributed.size() == 1:
        return
    import torch
    import torch.distributed as channel

    owners = distributed.gathered({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    for owner, names in enumerate(owners):
        for name in sorted(names):
            shape, dtype = names[name]
            # Through the CPU: they are small relative to the work, and end up there anyway.
            there = tensors[name].cpu().contiguous() if owner == distributed.rank() else torch.empty(shape, dtype=dtype)
            with distributed.listening():
                channel.broadcast(there, src=owner)
            if owner != distributed.rank():
                tensors[name] = there


def rows_to_first(
    rows: Tensor | None, make: Callable[..., Tensor] | None = None, after: Callable[[], None] = lambda: None
) -> Tensor | None:
    """Give the first process the rows of all, joined in order; None in the others.

    Args:
        rows: [b, d] on the CPU, of one width and type in all processes; None where there are none.
        make: makes the array of all rows by (rows, width, dtype); ``torch.empty`` by default.
        after: called after each message of at most ``SENT`` bytes.
    """
    if distributed.size() == 1:
        return rows
    import torch
    import torch.distributed as channel

    described = distributed.gathered(None if rows is None else (len(rows), rows.shape[1], rows.dtype))
    known = [one for one in described if one is not None]
    if not known:
        return None
    counts, (_, width, dtype) = [one[0] if one else 0 for one in described], known[0]
    step = max(1, SENT // max(1, width * dtype.itemsize))
    if not distributed.is_first():
        with distributed.listening():
            for part in [] if rows is None else [rows[at : at + step] for at in range(0, len(rows), step)]:
                channel.send(part.contiguous(), 0)
                after()
        return None
    whole = make(sum(counts), width, dtype) if make else torch.empty(sum(counts), width, dtype=dtype)
    start = 0
    for source, count in enumerate(counts):
        place = whole[start : start + count]
        start += count
        for at in range(0, count, step):
            if source == 0 and rows is not None:
                place[at : at + step] = rows[at : at + step]
            else:
                with distributed.listening():
                    channel.recv(place[at : at + step], source)
            after()
    return whole


def rows_to_all(rows: Tensor) -> Tensor:
    """Give every process the rows of all, joined in order.

    Args:
        rows: [b, d] on the CPU, of one width and type in all processes; b may be 0.
    """
    if distributed.size() == 1:
        return rows
    import torch
    import torch.distributed as channel

    counts = distributed.gathered(len(rows))
    whole, start = torch.empty(sum(counts), rows.shape[1], dtype=rows.dtype), 0
    for owner, count in enumerate(counts):
        place = whole[start : start + count]
        start += count
        if owner == distributed.rank():
            place.copy_(rows)
        if count:
            with distributed.listening():
                channel.broadcast(place, src=owner)
    return whole
