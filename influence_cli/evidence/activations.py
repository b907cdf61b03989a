"""Activations of every layer, pooled to a bounded size: how a network represents each example.

They are the inputs of all linear layers and convolutions (the images are the input of the first one) and the outputs.
This takes one forward pass and no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.data.batches import Batch
from influence_cli.errors import InfluenceError
from influence_cli.evidence import mapped
from influence_cli.model.outputs import logits_of
from influence_cli.passes.layers import CONVOLUTIONS
from influence_cli.runtime import distributed, exchange

# Most numbers per layer after pooling; for the last layer's input (the penultimate activations); for all together.
LAYER, PENULTIMATE, ALL = 256, 1_024, 2_048
OUTPUTS = "outputs"


@dataclass(frozen=True)
class Activations:
    """What the layers of a network read on some examples.

    Attributes:
        features: float32 [n, d], all layers side by side, on the CPU; float16 where it is in a file.
        layers: columns by the name of the module that reads them, in the order of the pass; the last is ``outputs``,
            and the only one where the model has no layer whose input can be read.
        indices: int64 [n], positions in the data set.
        targets: int64 [n], labels as given.
        hashes: uint64 [n], xxh3 of the model's input.
    """

    features: Tensor
    layers: dict[str, slice]
    indices: np.ndarray
    targets: np.ndarray
    hashes: np.ndarray

    @property
    def hidden(self) -> Tensor:
        """Give all layers but the outputs, which repeat a memorised label [n, d − C]."""
        return self.features[:, : self.layers[OUTPUTS].start]

    @property
    def outputs(self) -> Tensor:
        """Give the model's outputs [n, C]."""
        return self.features[:, self.layers[OUTPUTS]]


def activations(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    on_examples: Callable[[int], None] = lambda _: None,
    most: int = ALL,
    title: Callable[[int], str] = "example {}".format,
    count: int = 0,
) -> Activations:
    """Run a model forward over some examples and keep what its layers read.

    Args:
        model: in evaluation mode.
        batches: the examples.
        device: the model's.
        on_examples: called with the number of finished examples.
        most: numbers per example, in addition to its outputs.
        title: names the example of a position in a message.
        count: examples to make room for; with more of them it grows.

    Raises:
        InfluenceError: an output or an activation that is not finite, no example.
    """
    indices, targets, hashes = [], [], []
    bounds: dict[str, int] = {}
    layers: dict[str, slice] = {}
    features, done = torch.empty(0, 0), 0
    for batch in batches:
        read, outputs = _run(model, batch.inputs.to(device))
        _refuse_not_finite(outputs, batch, title)
        if not layers:
            bounds = _bounds(model, {name: read[name][:1] for name in _distinct(read)}, most)
        parts = {name: pooled(model.get_submodule(name), read[name], bound) for name, bound in bounds.items()}
        for part in parts.values():
            _refuse_not_finite(part, batch, title)
        parts[OUTPUTS] = outputs
        if not layers:
            ends = np.cumsum([part.shape[1] for part in parts.values()]).tolist()
            layers = {
                name: slice(end - part.shape[1], end) for (name, part), end in zip(parts.items(), ends, strict=True)
            }
        features = _with_room(features, done, len(outputs), count, layers[OUTPUTS].stop)
        for name, part in parts.items():
            whole = part.float().cpu()
            features[done : done + len(whole), layers[name]] = (
                whole if features.dtype == torch.float32 else whole.clamp_(-mapped.LARGEST, mapped.LARGEST)
            )
        done += len(outputs)
        mapped.release()
        indices.append(batch.indices)
        targets.append(batch.labels.numpy())
        inputs = batch.inputs.numpy()
        hashes.append(np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(one).data) for one in inputs], np.uint64))
        on_examples(len(batch))
    if not layers:
        raise InfluenceError("no example's activations could be read")
    every = np.concatenate(hashes)
    return Activations(features[:done], layers, np.concatenate(indices), np.concatenate(targets), every)


def _with_room(features: Tensor, done: int, more: int, count: int, width: int) -> Tensor:
    """Give an array that has rows for more examples, with the ones that are done."""
    if done + more <= len(features):
        return features
    wider = mapped.large(max(count, 2 * len(features), done + more), width, mapped.narrow())
    for rows in mapped.row_parts(done, width):
        wider[rows] = features[rows]
    return wider


def with_all(here: Activations | None) -> tuple[Activations, Activations]:
    """Let the processes of a job know of all examples; a process alone has them.

    Args:
        here: of this process's part of the examples; None if it has none.

    Returns:
        The activations of this process's part; and those of all examples, in order: indices, targets and hashes in
        every process, outputs alone, and in the first one alone (in the others they are of no example).

    Raises:
        InfluenceError: there is no example.
    """
    if distributed.size() == 1 and here is not None:
        return here, here
    rest = None if here is None else (here.layers, here.indices, here.targets, here.hashes)
    parts = [part for part in distributed.gathered(rest) if part is not None]
    if not parts:
        raise InfluenceError("no example's activations could be read")
    layers = parts[0][0]
    indices, targets, hashes = (np.concatenate([part[at] for part in parts]) for at in (1, 2, 3))
    if here is None:
        none = mapped.large(0, layers[OUTPUTS].stop, mapped.narrow())
        here = Activations(none, layers, indices[:0], targets[:0], hashes[:0])
    outputs = exchange.rows_to_first(here.outputs, mapped.large, mapped.release)
    alone = {OUTPUTS: slice(0, here.outputs.shape[1])}
    return here, Activations(here.outputs[:0] if outputs is None else outputs, alone, indices, targets, hashes)


def pooled(module: nn.Module, x: Tensor, most: int) -> Tensor:
    """Average activations over neighbours until an example has at most ``most`` numbers: [b, w].

    Positions of a convolution's input are pooled on the finest grid that fits, and tokens to their mean. What is still
    too wide is averaged over neighbouring channels (in a flattened map these are neighbouring pixels).
    """
    if isinstance(module, CONVOLUTIONS):
        channels, places = x.shape[1], x.ndim - 2
        side = max(1, int((most / channels) ** (1 / places) + 1e-9))
        sizes: Any = [min(side, size) for size in x.shape[2:]]
        pool: Any = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
        x = pool[places - 1](x, sizes)
    elif x.ndim > 2:
        x = x.flatten(1, -2).mean(dim=1)
    x = x.flatten(1)
    return functional.adaptive_avg_pool1d(x[:, None], most)[:, 0] if x.shape[1] > most else x


def _run(model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Give the input of every linear layer and convolution (of its last call), in the order of the pass."""
    read: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(_module: nn.Module, received: tuple[object, ...]) -> None:
            if (
                received
                and isinstance(received[0], Tensor)
                and received[0].ndim > 1
                and len(received[0]) == len(inputs)
            ):
                read[name] = received[0]

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        outputs = logits_of(model(inputs))
    return read, outputs


def _distinct(read: dict[str, Tensor]) -> list[str]:
    """Name the layers; a tensor that several of them read counts once."""
    names: dict[tuple[int, torch.Size], str] = {}
    for name, x in read.items():
        names.setdefault((x.data_ptr(), x.shape), name)
    return list(names.values())


def _bounds(model: nn.Module, one: dict[str, Tensor], most: int) -> dict[str, int]:
    """Halve the numbers per layer (the last layer keeps four times as many) until all together are at most ``most``."""
    bound = LAYER
    while True:
        bounds = dict.fromkeys(one, bound)
        if one:
            bounds[list(one)[-1]] = bound * PENULTIMATE // LAYER
        widths = [pooled(model.get_submodule(name), one[name], wide).shape[1] for name, wide in bounds.items()]
        if sum(widths) <= most or bound == 1:
            return bounds
        bound //= 2


def _refuse_not_finite(outputs: Tensor, batch: Batch, title: Callable[[int], str]) -> None:
    finite = outputs.isfinite().all(dim=1).cpu()
    if not bool(finite.all()):
        index = int(batch.indices[int(torch.nonzero(~finite)[0])])
        raise InfluenceError(
            f"the model's activations or outputs for {title(index)} are NaN or infinite",
            "check that image; list it under exclude to continue without it",
        )
