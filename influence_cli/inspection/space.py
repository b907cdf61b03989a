"""Images as points: what the network's layers say of them, in components that count alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import readable_batches
from influence_cli.data.split import Split
from influence_cli.evidence.activations import ALL, Activations, activations
from influence_cli.model.task import Task, measure_loading
from influence_cli.passes.probe import look
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal

# Components of the space, examples per pass and per product, share of the free memory for the activations.
COMPONENTS, BATCH, CHUNK, FREE_SHARE = 64, 256, 8_192, 0.25


@dataclass(frozen=True)
class Points:
    """The examples of one split in the space.

    Attributes:
        features: float32 [n, d], d the same in every split, columns of about unit variance.
        indices: int64 [n], positions in the data set, rising; examples that cannot be read are not among them.
        predicted: int64 [n], the class that the model gives.
    """

    features: Tensor
    indices: np.ndarray
    predicted: np.ndarray


def image_space(task: Task, splits: Sequence[Split], terminal: Terminal, *, skip: bool) -> list[Points]:
    """Run the network over some splits once, and give their examples as points of one space.

    The points are the activations of all layers but the outputs, standardised and whitened in their leading principal
    components over all splits together. Features from elsewhere take this function's place: float32 [n, d] per split.

    Args:
        task: the checkpoint.
        splits: training and test examples.
        terminal: progress.
        skip: leave out unreadable examples; otherwise the first of them is an error.

    Returns:
        The points, in the order of ``splits``.

    Raises:
        InfluenceError: an example that cannot be read, outputs that are not finite.
    """
    look(task, terminal)
    total = sum(map(len, splits))
    most = min(ALL, max(1, int(FREE_SHARE * available_bytes(torch.device("cpu"))) // (4 * max(1, total))))
    parts: list[Activations] = []
    with terminal.progress(total, "activations of every layer") as advance:
        measure_loading(task, terminal)
        for split in splits:
            batches = readable_batches(split, split.indices, BATCH, task.loading, skip=skip)
            parts.append(activations(task.model, batches, task.device, advance, most, split.title))
    features = _whitened([part.hidden if part.hidden.shape[1] else part.outputs for part in parts])
    return [
        Points(points, part.indices, part.outputs.argmax(dim=1).numpy())
        for points, part in zip(features, parts, strict=True)
    ]


def _whitened(parts: Sequence[Tensor]) -> list[Tensor]:
    """Standardise columns over all parts, and turn them to leading components of unit variance."""
    count, width = sum(map(len, parts)), parts[0].shape[1]
    mean, square = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for part in parts:
        for chunk in torch.split(part, CHUNK):
            mean += chunk.double().sum(dim=0) / count
    for part in parts:
        for chunk in torch.split(part, CHUNK):
            square += (chunk.double() - mean).square().sum(dim=0) / count
    deviation = square.sqrt()
    varies = deviation > 1e-6 * deviation.max().clamp_min(1e-30)
    if not bool(varies.any()):  # a single image, or the same one many times
        return [part.new_zeros(len(part), 1) for part in parts]
    centre, spread = mean[varies].float(), deviation[varies].float()

    def standardised(chunk: Tensor) -> Tensor:
        return (chunk[:, varies] - centre) / spread

    moment = torch.zeros(int(varies.sum()), int(varies.sum()), dtype=torch.float64)
    for part in parts:
        for chunk in torch.split(part, CHUNK):
            x = standardised(chunk)
            moment += (x.T @ x).double() / count
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0)[:COMPONENTS], vectors.flip(1)[:, :COMPONENTS]
    used = values > 1e-9 * values[0]
    turn = (vectors[:, used] / values[used].sqrt()).float()
    return [torch.cat([standardised(chunk) @ turn for chunk in torch.split(part, CHUNK)]) for part in parts]
