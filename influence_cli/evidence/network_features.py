"""Features from another network: its penultimate activations of every example, computed once and kept.

``STORE.NAME.train.npy`` beside the store holds a row per position of the data set, NaN where none was needed;
``.json`` beside it says what they are of, and which rows are there. Rows are on disk before they are said to be, so a
pass that was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from influence_cli.data.batches import Loading, readable_batches
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError
from influence_cli.evidence.activations import pooled
from influence_cli.evidence.features import Features, refuse_unusable
from influence_cli.model.data_fingerprint import files_hash
from influence_cli.model.other_network import Network
from influence_cli.passes.layers import CONVOLUTIONS
from influence_cli.runtime import disk, distributed, exchange, locks
from influence_cli.runtime.terminal import Terminal

# Numbers of an example: wider maps are averaged over neighbours.
WIDEST = 4_096
# Examples per batch, and on a CPU, whose caches hold the maps of a few images: EfficientNet-Lite0 at 160 pixels takes
# half the time with 8 as with 64. Examples between two notes of what is done.
BATCH, ON_CPU, NOTED = 64, 8, 512
# Images that recognise a data set which is not in files.
SAMPLED = 64
MEANING = {
    "network": "its factory, args or code",
    "weights": "its weights",
    "transform": "its transform",
    "files": "the images (a path, size or time of change)",
    "images": "the images",
    "count": "the number of images",
}


def network_features(
    network: Network, store: Path, device: torch.device, loading: Loading, terminal: Terminal, *, skip: bool
) -> Features | None:
    """Give the features of the examples in use, from the file that keeps them or by a pass over those that it lacks.

    The processes of a job share the pass; the first one has the features, None in the others.

    Args:
        network: loaded.
        store: of the run's gradients, beside which they are kept.
        device: for the pass.
        loading: who reads the examples.
        terminal: progress, and what was kept or taken.
        skip: continue without unreadable examples.

    Raises:
        InfluenceError: a network without one row per example, numbers that are not finite, a disk that is full.
    """
    split = network.split
    path = store.with_name(f"{store.stem}.{network.name}.{split.name}.npy")
    with locks.claim(path) if distributed.is_first() else nullcontext():
        kept = _open(path, network, terminal) if distributed.is_first() else None
        waiting = split.indices if kept is None else split.indices[~kept.done[split.indices]]
        todo = distributed.from_first(lambda: waiting)
        if len(todo):
            _fill(network, kept, path, todo, device, loading, terminal, skip=skip)
        if kept is None or not distributed.is_first():
            return None
        if kept.values is None:
            raise InfluenceError(f"{network.where}: no example could be read")
        terminal.say(
            f"features {network.name}: {len(split):,} images, {kept.values.shape[1]:,} numbers each, "
            + (f"computed, kept in {path.name}" if len(todo) else f"from {path.name}")
        )
    used = split if not skip else replace(split, indices=split.indices[kept.done[split.indices]])
    refuse_unusable(kept.values, used, f"{network.where}: features {network.name}")
    return Features(network.name, kept.values)


@dataclass
class _Kept:
    """The file of features: its rows [length, d], None before the first batch; which are there, what they are of."""

    values: np.ndarray | None
    done: np.ndarray
    identity: dict[str, str]


def _note_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _open(path: Path, network: Network, terminal: Terminal) -> _Kept:
    """Open what is kept, if it is of this network and these images; begin anew otherwise."""
    split = network.split
    identity = {**network.identity, **_images(split), "count": str(len(split.labels))}
    fresh = _Kept(None, np.zeros(len(split.labels), dtype=bool), identity)
    try:
        note = json.loads(_note_of(path).read_text())
        values = np.load(path, mmap_mode="r+", allow_pickle=False)
        done = np.unpackbits(np.frombuffer(bytes.fromhex(note["done"]), dtype=np.uint8))[: len(split.labels)]
        before = dict(note["identity"])
    except FileNotFoundError:
        return fresh
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        terminal.say(f"features {network.name}: {path.name} cannot be read; they are computed again")
        return fresh
    changed = [MEANING.get(key, key) for key, value in identity.items() if before.get(key) != value]
    if changed or values.ndim != 2 or len(values) != len(split.labels) or len(done) != len(values):
        what = "; ".join(changed) or "its shape"
        terminal.say(f"features {network.name}: what has changed since they were computed: {what}; computed again")
        return fresh
    return _Kept(values, done.astype(bool), identity)


def _images(split: Split) -> dict[str, str]:
    """Recognise the images, whatever their labels and whichever are excluded: by their files, or by a sample."""
    every = replace(split, indices=np.arange(len(split.labels)))
    for some in (every, split):  # an excluded file may be missing
        with suppress(InfluenceError):
            if (files := files_hash(some)) is not None:
                return {"files": files}
            break
    state = xxhash.xxh3_128()
    for index in np.unique(np.linspace(0, len(every) - 1, SAMPLED).astype(np.int64)).tolist():
        with suppress(InfluenceError):
            one = to_input(split, raw_item(split, index)[0], split.title(index))
            state.update(np.ascontiguousarray(one.numpy()).data)
    return {"images": state.hexdigest()}


def _fill(
    network: Network,
    kept: _Kept | None,
    path: Path,
    todo: np.ndarray,
    device: torch.device,
    loading: Loading,
    terminal: Terminal,
    *,
    skip: bool,
) -> None:
    """Run the network over the examples that are missing, and write their rows block by block."""
    network.model.to(device)
    step = NOTED * distributed.size()
    with terminal.progress(len(todo), f"features {network.name}") as advance:
        counted = distributed.counted(advance)
        for start in range(0, len(todo), step):
            block = todo[start : start + step]
            mine = block[distributed.share(len(block))]
            read, rows = _block(network, mine, device, loading, terminal, counted, skip=skip)
            at = np.concatenate(distributed.gathered(read))
            joined = exchange.rows_to_first(rows)
            if kept is not None and joined is not None:
                _write(kept, path, at, joined.numpy())
    network.model.cpu()


def _block(
    network: Network,
    indices: np.ndarray,
    device: torch.device,
    loading: Loading,
    terminal: Terminal,
    advance: Callable[[float], None],
    *,
    skip: bool,
) -> tuple[np.ndarray, Tensor | None]:
    read, rows = [np.empty(0, dtype=np.int64)], []
    tell = terminal.warn
    size = ON_CPU if device.type == "cpu" else BATCH
    for batch in readable_batches(network.split, indices, size, loading, skip=skip, tell=tell):
        rows.append(penultimate(network.model, batch.inputs.to(device), network.where).float().cpu())
        read.append(batch.indices)
        advance(len(batch))
    return np.concatenate(read), torch.cat(rows) if rows else None


def _write(kept: _Kept, path: Path, positions: np.ndarray, rows: np.ndarray) -> None:
    """Write rows, and only when the disk has them the note that says so."""
    try:
        if kept.values is None:
            disk.remove(_note_of(path))
            shape = (len(kept.done), rows.shape[1])
            with path.open("wb") as raw:  # a full disk is found here, not after an hour
                disk.reserve(raw, 128 + 4 * shape[0] * shape[1])
            kept.values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            kept.values[:] = np.nan
        kept.values[positions] = rows
        kept.values.flush()  # type: ignore[attr-defined]
        kept.done[positions] = True
        note = {"identity": kept.identity, "done": np.packbits(kept.done).tobytes().hex()}
        disk.write_whole(_note_of(path), json.dumps(note).encode())
    except OSError as error:
        raise InfluenceError(
            f"{path} cannot be written: {error.strerror or error}", "set gradients.store elsewhere"
        ) from error


def penultimate(model: nn.Module, inputs: Tensor, where: str) -> Tensor:
    """Give what a network knows of each input before its last layer: [b, d].

    If its output is that of a linear layer (or of a convolution), the input of this layer; otherwise the output itself,
    as that of a network without a classifier. Positions and tokens are averaged.

    Args:
        model: in eval mode.
        inputs: [b, …].
        where: start of the error.

    Raises:
        InfluenceError: it gives something else than numbers for each input.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watch(module: nn.Module, received: tuple[Any, ...], output: Any) -> None:
        if received and isinstance(received[0], Tensor) and isinstance(output, Tensor):
            calls[:] = [*calls[-1:], (module, received[0], output)]

    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                stack.callback(module.register_forward_hook(watch).remove)
        output = _tensor_in(model(inputs), where)
    if not output.ndim or len(output) != len(inputs):
        raise InfluenceError(
            f"{where}: the network gives {list(output.shape)} for {len(inputs)} images",
            "it has to give a row of numbers for each image",
        )
    head = calls[-1] if calls and calls[-1][2].data_ptr() == output.data_ptr() else None
    if head is not None and head[2].numel() == output.numel():
        output = head[1]
        channels_first = isinstance(head[0], CONVOLUTIONS)
    else:
        channels_first = output.ndim > 3
    if output.ndim > 2:
        output = output.flatten(2).mean(dim=2) if channels_first else output.flatten(1, -2).mean(dim=1)
    if output.ndim != 2 or output.shape[1] < 2:
        raise InfluenceError(
            f"{where}: the network gives {list(output.shape[1:])} numbers for an image, too few for features",
            "the factory has to return a network with its hidden layers",
        )
    return pooled(nn.Identity(), output, WIDEST)


def _tensor_in(returned: Any, where: str) -> Tensor:
    """Take the features out of what a network returns: a tensor, one of usual names, or the first of a tuple."""
    if isinstance(returned, Tensor):
        return returned
    for key in ("logits", "image_embeds", "pooler_output", "x_norm_clstoken", "last_hidden_state", "out"):
        value = returned.get(key) if isinstance(returned, dict) else getattr(returned, key, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(returned, tuple | list) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    raise InfluenceError(
        f"{where}: the network returns a {type(returned).__name__} without a tensor of features",
        "let the factory return a module that gives one tensor [batch, numbers]",
    )
