"""Signals of suspicion that take gradients: from the stores, or by a pass over the data.

``self-influence`` is the estimated rise of its own loss if an example were removed; ``test-influence`` the mean
estimated fall of the test losses if it were (harmful on average: the negative mean influence); ``gradient-norm`` is
‖gᵢ‖ and ``tracin`` ‖gᵢ‖² averaged over the checkpoints of a run (TracInCP with equal steps, Pruthi et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from influence_cli.coordinates import squared_norms
from influence_cli.data import Split, readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.facts import TrainingFacts, empty_facts
from influence_cli.fill import workers
from influence_cli.inverse import Inverse
from influence_cli.precompute import Prepared
from influence_cli.probe import check_finite
from influence_cli.scores import removal, require_finite
from influence_cli.selection import Selected
from influence_cli.store import READ, Store
from influence_cli.streams import Piece, averaged, direct_products, direct_self_influence, stored_products
from influence_cli.terminal import Terminal
from influence_cli.testset import test_gradients


def self_influences(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], split: Split, terminal: Terminal, skip: bool
) -> np.ndarray:
    """Compute self_influence of every example of a split, float64 [n]; NaN where one could not be read.

    Of a test example it is what it would be as a training example: nothing of the test set is stored.
    """
    if split.name != "train":
        own = _streamed_self_influences(stores, inverses, split, terminal, skip)
    else:
        share = len(stores)
        noted = _facts(stores[0])
        streams = [
            direct_self_influence(prepared, inverse, noted, share, terminal, skip)
            if prepared.on_the_fly
            else _stored_self_influence(prepared, inverse, terminal)
            for prepared, inverse in zip(stores, inverses, strict=True)
        ]
        own = _gathered(stores, streams)
    require_finite(own[~np.isnan(own)], "self-influence")
    return own


def harm_to_tests(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], terminal: Terminal, skip: bool
) -> np.ndarray:
    """Compute −mean influence on the test set of every training example, float64 [n]: above zero it is harmful."""
    test = stores[0].task.test_split()
    chosen = [Selected(int(index), None, int(test.labels[index])) for index in test.indices]
    size = max(1, min(256, min(prepared.batch for prepared in stores)))
    sums: list[torch.Tensor] = []
    count = 0
    for start in range(0, len(chosen), size * 8):
        tests, gradients = test_gradients(stores, chosen[start : start + size * 8], "label", terminal, skip)
        parts = [own.sum(dim=0, keepdim=True) for own in gradients]
        sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
        count += len(tests)
    noted = _facts(stores[0])
    with ExitStack() as stack:
        streams = []
        for prepared, inverse, total in zip(stores, inverses, sums, strict=True):
            left = removal(inverse.apply(total / count), prepared.task.n)
            if prepared.on_the_fly:
                streams.append(direct_products(prepared, left, noted, len(stores), terminal, skip))
            else:
                advance = stack.enter_context(
                    terminal.progress(len(prepared.task.train), f"scanning {prepared.path.name}")
                )
                streams.append(stored_products(prepared, left, advance))
        influence = _gathered(stores, streams)
    require_finite(influence[~np.isnan(influence)], "influence")
    return -influence


def gradient_norms(stores: Sequence[Prepared], split: Split, terminal: Terminal, skip: bool) -> list[np.ndarray]:
    """Compute ‖gᵢ‖ under every checkpoint over all tracked parameters, float64 [n] each; NaN where not read."""
    norms = [np.full(len(split), np.nan) for _ in stores]
    for prepared, own in zip(stores, norms, strict=True):
        network = prepared.choice.network
        with terminal.progress(len(split), f"gradient norms of the {split.name} examples") as advance:
            batches = readable_batches(
                split, split.indices, prepared.batch, workers(prepared.task), skip=skip, tell=terminal.warn
            )
            for batch in batches:
                squares, losses, _ = squared_norms(network, batch.inputs, batch.targets)
                check_finite(split, batch, losses, squares[:, None])
                at = np.searchsorted(split.indices, batch.indices)
                own[at] = squares.double().sqrt().cpu().numpy()
                advance(len(batch))
    return norms


def _facts(prepared: Prepared) -> TrainingFacts:
    split = prepared.task.train
    return empty_facts(prepared.task, split.indices, split.labels[split.indices])


def _gathered(stores: Sequence[Prepared], streams: Sequence[Iterator[Piece]]) -> np.ndarray:
    """Average streams of one row of scores; NaN where an example was not read when a store was made."""
    own = np.full(len(stores[0].task.train), np.nan)
    for where, values in averaged(streams):
        own[where] = values[0]
    for prepared in stores:
        if not prepared.on_the_fly:
            with Store.open(prepared.path) as store:
                own[store.column("state") != READ] = np.nan
    return own


def _stored_self_influence(prepared: Prepared, inverse: Inverse, terminal: Terminal) -> Iterator[Piece]:
    solve, device = inverse.own, prepared.task.device
    if solve is None:
        raise ValueError("self-influence would take a solve an example")

    def work(where: slice, block: np.ndarray) -> Piece:
        return where, removal(solve(torch.from_numpy(block).to(device)), prepared.task.n)[None].cpu().numpy()

    with (
        terminal.progress(len(prepared.task.train), f"scanning {prepared.path.name}") as advance,
        Store.open(prepared.path) as store,
    ):
        cpu = device.type == "cpu"
        for piece in store.map(work) if cpu else (work(where, block) for where, block in store.scan()):
            yield piece
            advance(piece[0].stop - piece[0].start)


def _streamed_self_influences(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], split: Split, terminal: Terminal, skip: bool
) -> np.ndarray:
    task = stores[0].task
    own = np.full(len(split), np.nan)
    size = min(256, min(prepared.batch for prepared in stores))
    with terminal.progress(len(split), f"gradients of the {split.name} examples") as advance:
        for batch in readable_batches(split, split.indices, size, workers(task), skip=skip, tell=terminal.warn):
            at = np.searchsorted(split.indices, batch.indices)
            own[at] = 0
            for prepared, inverse in zip(stores, inverses, strict=True):
                rows, losses, _ = prepared.coordinates(batch.inputs, batch.targets)
                check_finite(split, batch, losses, rows)
                if inverse.own is None:
                    raise InfluenceError("self-influence would take a solve an example")
                own[at] += removal(inverse.own(rows), prepared.task.n).cpu().numpy() / len(stores)
            advance(len(batch))
    return own
