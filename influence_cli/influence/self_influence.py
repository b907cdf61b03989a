"""Signals of suspicion that need gradients: from the stores, or by a pass over the data.

``self-influence`` is the estimated rise of its own loss if an example were removed; ``test-influence`` the mean
estimated fall of the test losses if it were (harmful on average: the negative mean influence); ``gradient-norm`` is
‖gᵢ‖ and ``tracin`` ‖gᵢ‖² averaged over the checkpoints of a run (TracInCP, Pruthi et al. 2020), by the rates and steps
of the config, otherwise with equal weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from influence_cli.data.batches import readable_batches
from influence_cli.data.split import Split, rows_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.ensemble import solved_vectors, test_stores
from influence_cli.influence.example_facts import TrainingFacts, empty_facts, explained
from influence_cli.influence.inverse import ClosedForm, Inverse
from influence_cli.influence.replayed import replayed_mean
from influence_cli.influence.scores import removal, require_finite
from influence_cli.influence.streams import (
    Piece,
    averaged,
    direct_self_influence,
    of_all,
    stored_self_influence,
    training_products,
)
from influence_cli.influence.test_gradients import mean_gradients
from influence_cli.influence.test_selection import Selected
from influence_cli.model.sample_weights import own_rise
from influence_cli.model.task import measure_loading
from influence_cli.passes.finite import check_finite, check_gradients
from influence_cli.passes.gradient_products import squared_norms
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.store import READ, Store


def self_influences(
    stores: Sequence[Prepared], inverses: Sequence[ClosedForm], split: Split, terminal: Terminal, *, skip: bool
) -> np.ndarray:
    """Compute self_influence of every example of a split, float64 [n]; NaN where one could not be read.

    For a test example it is what it would be as a training example: nothing of the test set is stored.
    """
    if split.name != "train":
        influences = _streamed_self_influences(stores, inverses, split, terminal, skip=skip)
    else:
        noted = empty_facts(stores[0].task)
        streams = [
            direct_self_influence(prepared, inverse, noted, len(stores), terminal, skip=skip)
            if prepared.on_the_fly
            else stored_self_influence(prepared, inverse, terminal)
            for prepared, inverse in zip(stores, inverses, strict=True)
        ]
        influences = _gathered(stores, streams)
    _require_finite(influences, "self-influence", split)
    return influences


def harm_to_tests(
    stores: Sequence[Prepared],
    inverses: Sequence[Inverse],
    terminal: Terminal,
    *,
    skip: bool,
    facts: TrainingFacts | None = None,
) -> np.ndarray:
    """Compute −mean influence on the test set of every training example, float64 [n]: above zero it is harmful.

    ``facts`` are filled in on the way if nothing is stored.
    """
    test = stores[0].task.labelled_tests()
    chosen = [Selected(int(index), None, int(test.labels[index])) for index in test.indices]
    if (effects := stores[0].effects) is not None:
        influence = replayed_mean(stores[0].task, effects, chosen, "label", terminal, skip=skip)[1]
    else:
        influence = _mean_influence(stores, inverses, chosen, terminal, skip=skip, facts=facts)
    _require_finite(influence, "mean influence on the test examples", stores[0].task.train)
    return -influence


def _mean_influence(
    stores: Sequence[Prepared],
    inverses: Sequence[Inverse],
    chosen: Sequence[Selected],
    terminal: Terminal,
    *,
    skip: bool,
    facts: TrainingFacts | None,
) -> np.ndarray:
    """Compute the influence of every training example on the mean loss of the chosen tests by gradients: [n]."""
    size = 8 * min(256, min(prepared.batch for prepared in stores))
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    seen, means = mean_gradients(test_stores(stores, inverses), groups, "label", terminal, skip=skip)
    if not seen:
        raise InfluenceError("no test example could be read", "use another --signal")
    with ExitStack() as stack:
        share = len(explained(stores))
        streams = [
            training_products(prepared, removal(s, prepared.task.n), facts, share, terminal, skip=skip, stack=stack)
            for prepared, s in zip(stores, solved_vectors(inverses, means), strict=True)
        ]
        return _gathered(stores, streams)


def _require_finite(values: np.ndarray, what: str, split: Split) -> None:
    """Refuse a score that is not finite; NaN marks an example that was not read."""
    read = np.flatnonzero(~np.isnan(values))
    require_finite(values[read], what, lambda row: split.title(int(split.indices[read[row]])))


def gradient_norms(stores: Sequence[Prepared], split: Split, terminal: Terminal, *, skip: bool) -> list[np.ndarray]:
    """Compute ‖gᵢ‖ under every checkpoint over all tracked parameters, float64 [n] each; NaN where not read."""
    indices, norms = split.indices[distributed.share(len(split))], []
    for prepared in stores:
        network, share_norms = prepared.choice.network, np.full(len(indices), np.nan)
        with terminal.progress(len(indices), f"gradient norms of the {split.name} examples") as advance:
            measure_loading(prepared.task, terminal)
            batches = readable_batches(
                split, indices, prepared.batch, prepared.task.loading, skip=skip, tell=terminal.warn
            )
            for batch in batches:
                squares, losses, _ = squared_norms(network, batch.inputs, batch.labels)
                check_finite(split, batch, losses, squares[:, None])
                at = rows_of(indices, batch.indices)
                share_norms[at] = squares.double().sqrt().cpu().numpy()
                advance(len(batch))
        norms.append(np.concatenate(distributed.gathered(share_norms)))
    return norms


def _gathered(stores: Sequence[Prepared], streams: Sequence[Iterator[Piece]]) -> np.ndarray:
    """Average streams of one row of scores; NaN where an example was not read when a store was made."""
    scores = np.full(len(stores[0].task.train), np.nan)
    for where, values in of_all(averaged(streams)):
        scores[where] = values[0]
    for prepared in stores:
        if not prepared.on_the_fly:
            with Store.open(prepared.path) as store:
                scores[store.column("state") != READ] = np.nan
    return scores


def _streamed_self_influences(
    stores: Sequence[Prepared], inverses: Sequence[ClosedForm], split: Split, terminal: Terminal, *, skip: bool
) -> np.ndarray:
    task = stores[0].task
    indices = split.indices[distributed.share(len(split))]
    influences = np.full(len(indices), np.nan)
    size = min(256, min(prepared.batch for prepared in stores))
    with terminal.progress(len(indices), f"gradients of the {split.name} examples") as advance:
        measure_loading(task, terminal)
        for batch in readable_batches(split, indices, size, task.loading, skip=skip, tell=terminal.warn):
            at = rows_of(indices, batch.indices)
            influences[at] = 0
            for prepared, inverse in zip(stores, inverses, strict=True):
                rows, losses, _ = prepared.coordinates(batch.inputs, batch.targets)
                check_gradients(split, batch, losses, rows)
                values = own_rise(inverse.self_influence(rows), split, rows_of(split.indices, batch.indices))
                influences[at] += removal(values, prepared.task.n).cpu().numpy() / len(stores)
            advance(len(batch))
    return np.concatenate(distributed.gathered(influences))
