"""`influence mislabels`: which labels are probably wrong, by a signal of suspicion.

Signals: ``self-influence`` (the rise of its own loss if an example were removed), ``loss`` (the model's), ``margin``
(probability of the given label less the largest other one, falling). Higher is more suspicious for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influence_cli.config import Config
from influence_cli.data import readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.facts import TrainingFacts, empty_facts, mean_outputs
from influence_cli.fill import workers
from influence_cli.inverse import Inverse
from influence_cli.metrics import auroc, average_precision, percentile_rank, share_found
from influence_cli.precompute import Prepared
from influence_cli.probe import check_finite
from influence_cli.rank import describe_run, make_inverses, training_facts
from influence_cli.scores import removal, require_finite
from influence_cli.store import Store
from influence_cli.streams import Piece, averaged, direct_self_influence
from influence_cli.terminal import Terminal

SIGNALS = ("self-influence", "loss", "margin")
CHECKED = (0.01, 0.05, 0.10, 0.20, 0.30)


@dataclass(frozen=True)
class Mislabels:
    """Suspicion of every example, most suspicious first.

    Attributes:
        order: int64 [n], rows of ``facts`` from most to least suspicious.
        score: float64 [n] in [0, 1], by row of ``facts``.
        facts: indices, labels, probabilities and losses.
        self_influence: float64 [n], or None where it was not computed.
        signals: each signal's values [n], higher is more suspicious.
    """

    order: np.ndarray
    score: np.ndarray
    facts: TrainingFacts
    self_influence: np.ndarray | None
    signals: dict[str, np.ndarray]

    @property
    def suggested(self) -> np.ndarray:
        """Give the suggested label of each example: the model's class."""
        return self.facts.predicted


@dataclass(frozen=True)
class Quality:
    """How well a signal finds the wrong labels.

    Attributes:
        signal: its name, or ``random``.
        average_precision: AP.
        auroc: area under the ROC curve.
        found: share of the wrong labels found at each share of ``CHECKED``.
    """

    signal: str
    average_precision: float
    auroc: float
    found: tuple[float, ...]


def find_mislabels(
    stores: Sequence[Prepared],
    *,
    config: Config,
    on: str = "train",
    signal: str = "self-influence",
    terminal: Terminal,
    skip_unreadable: bool = False,
    run: dict[str, Any] | None = None,
) -> Mislabels:
    """Rank training (or test) examples by how suspicious their label is.

    Args:
        stores: a prepared store a checkpoint; signals are averaged over them.
        config: for ``curvature.damping``.
        on: ``train`` or ``test``; for a test example self-influence is what it would be as a training example.
        signal: one of ``SIGNALS``.
        terminal: progress, λ, warnings.
        skip_unreadable: go on without test examples that cannot be read.
        run: takes the facts of the run.

    Raises:
        InfluenceError: the signal is unknown, or self-influence under a method that solves example by example.
    """
    run = {} if run is None else run
    check_method(stores[0].choice.method, signal)
    inverses = None if stores[0].choice.solves else make_inverses(stores, config, terminal)
    if on == "train":
        facts, own = _training_pass(stores, inverses, terminal, skip_unreadable)
    else:
        facts, own = _test_pass(stores, inverses, terminal, skip_unreadable)
    given = facts.probabilities[np.arange(len(facts.labels)), facts.labels]
    others = facts.probabilities.copy()
    others[np.arange(len(facts.labels)), facts.labels] = -1
    signals = {"loss": facts.losses.astype(np.float64), "margin": (others.max(axis=1) - given).astype(np.float64)}
    if own is not None:
        signals["self-influence"] = own
    values = signals[signal]
    rows = np.flatnonzero(facts.read)
    score = np.zeros(len(values))
    score[rows] = 1.0 - given[rows] if signal == "loss" else percentile_rank(values[rows])
    order = rows[np.lexsort((facts.indices[rows], -values[rows]))]
    if inverses:
        describe_run(stores, inverses, run, terminal)
    return Mislabels(order, score, facts, own, signals)


def check_method(method: str, signal: str) -> None:
    """Refuse a signal that the curvature cannot give, before anything is computed."""
    if signal not in SIGNALS:
        raise InfluenceError(f"--signal {signal}: there is no such signal", f"known: {', '.join(SIGNALS)}")
    if signal == "self-influence" and method in ("cg", "lissa"):
        raise InfluenceError(
            f"mislabels under curvature {method} would need a solve an example",
            "use explicit: -s curvature.method=explicit (or --signal loss)",
        )


def qualities(result: Mislabels, wrong: np.ndarray) -> list[Quality]:
    """Score every signal by the truth, and random order beside them.

    Args:
        result: a ranking.
        wrong: bool by position in the data set: True where the label is wrong.
    """
    rows = result.order
    truth = wrong[result.facts.indices[rows]]
    if not truth.any() or truth.all():
        raise InfluenceError(
            f"--truth says that {int(truth.sum())} of {len(truth)} labels are wrong",
            "it needs both right and wrong ones",
        )
    table = [
        Quality(
            name,
            average_precision(values[rows], truth),
            auroc(values[rows], truth),
            tuple(share_found(values[rows], truth, CHECKED)),
        )
        for name, values in sorted(result.signals.items(), reverse=True)
    ]
    # In expectation over orders: AP is near the share of wrong labels, and x % checked finds x %.
    return [*table, Quality("random", float(truth.mean()), 0.5, CHECKED)]


def _training_pass(
    stores: Sequence[Prepared], inverses: Sequence[Inverse] | None, terminal: Terminal, skip: bool
) -> tuple[TrainingFacts, np.ndarray | None]:
    """Give facts and self-influence of the training examples, from the stores or on the fly."""
    facts = training_facts(stores)
    if inverses is None and not stores[0].on_the_fly:
        for prepared in stores:  # a scan verifies every checksum
            with Store.open(prepared.path) as store:
                for _ in store.scan():
                    pass
        return facts, None
    own = np.zeros(len(facts.indices))
    if inverses is None:
        _forward_pass(stores, facts, terminal, skip)
        return facts, None
    share = len(stores)
    streams = [
        direct_self_influence(prepared, inverse, facts, share, terminal, skip)
        if prepared.on_the_fly
        else _stored_self_influence(prepared, inverse, terminal)
        for prepared, inverse in zip(stores, inverses, strict=True)
    ]
    for where, values in averaged(streams):
        own[where] = values[0]
    own[~facts.read] = 0
    require_finite(own, "self-influence")
    return facts, own


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


def _forward_pass(stores: Sequence[Prepared], facts: TrainingFacts, terminal: Terminal, skip: bool) -> None:
    """Fill in losses and probabilities of a split that no other pass goes over."""
    split = stores[0].task.train
    with terminal.progress(len(split), "predicting the training set") as advance:
        for batch in readable_batches(
            split, split.indices, 256, workers(stores[0].task), skip=skip, tell=terminal.warn
        ):
            at = np.searchsorted(facts.indices, batch.indices)
            losses, soft = mean_outputs(stores, batch)
            check_finite(split, batch, losses)
            facts.losses[at], facts.probabilities[at], facts.read[at] = losses.numpy(), soft.numpy(), True
            advance(len(batch))


def _test_pass(
    stores: Sequence[Prepared], inverses: Sequence[Inverse] | None, terminal: Terminal, skip: bool
) -> tuple[TrainingFacts, np.ndarray | None]:
    """Stream the test set: nothing of it is stored."""
    task = stores[0].task
    split = task.test_split()
    facts = empty_facts(task, split.indices, split.labels[split.indices])
    own = np.zeros(len(split))
    size = min(256, min(prepared.batch for prepared in stores))
    with terminal.progress(len(split), "test gradients") as advance:
        for batch in readable_batches(split, split.indices, size, workers(task), skip=skip, tell=terminal.warn):
            at = np.searchsorted(split.indices, batch.indices)
            losses, soft = mean_outputs(stores, batch)
            check_finite(split, batch, losses)
            facts.losses[at], facts.probabilities[at], facts.read[at] = losses.numpy(), soft.numpy(), True
            for prepared, inverse in zip(stores, inverses or [], strict=False):
                rows = prepared.coordinates(batch.inputs, batch.targets)[0]
                if inverse.own is not None:
                    own[at] += removal(inverse.own(rows), prepared.task.n).cpu().numpy() / len(stores)
            advance(len(batch))
    require_finite(own, "self-influence")
    return facts, own if inverses else None
