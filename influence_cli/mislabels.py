"""`influence mislabels`: which labels are probably wrong, by a signal of suspicion.

Signals: ``self-influence`` (the rise of its own loss if an example were removed), ``loss`` (the model's), ``margin``
(probability of the given label less the largest other one, falling). Higher is more suspicious for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influence_cli.config import Config
from influence_cli.data import readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.fill import workers
from influence_cli.inverse import Inverse
from influence_cli.layers import example_gradients, micro_batch
from influence_cli.metrics import auroc, average_precision, percentile_rank, share_found
from influence_cli.precompute import Prepared
from influence_cli.probe import check_finite
from influence_cli.rank import TrainingFacts, describe_run, make_inverses, mean_outputs, training_facts
from influence_cli.scores import require_finite, self_influence
from influence_cli.store import Store
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
    inverses = make_inverses(stores, config, terminal) if stores[0].choice.method not in ("cg", "lissa") else None
    if on == "train":
        if inverses is None:  # no scan of the rows, which would find damage
            _refuse_damage(stores)
        facts = training_facts(stores)
        own = _stored_self_influence(stores, inverses, terminal) if inverses else None
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


def _stored_self_influence(stores: Sequence[Prepared], inverses: Sequence[Inverse], terminal: Terminal) -> np.ndarray:
    total = np.zeros(len(stores[0].task.train))
    for prepared, inverse in zip(stores, inverses, strict=True):
        task = prepared.task
        with (
            terminal.progress(len(total), f"scanning {prepared.path.name}") as advance,
            Store.open(prepared.path) as store,
        ):
            for where, block in store.scan():
                rows = torch.from_numpy(block).to(task.device)
                total[where] += self_influence(rows, _on(prepared, rows), inverse.shift, task.n).cpu().numpy()
                advance(len(block))
    require_finite(total, "self-influence")
    return np.asarray(total / len(stores))


def _refuse_damage(stores: Sequence[Prepared]) -> None:
    for prepared in stores:
        with Store.open(prepared.path) as store:
            for _ in store.scan():
                pass  # a scan verifies every checksum


def _on(prepared: Prepared, like: torch.Tensor) -> torch.Tensor | None:
    return None if prepared.spectrum is None else prepared.spectrum.to(like.device)


def _test_pass(
    stores: Sequence[Prepared], inverses: Sequence[Inverse] | None, terminal: Terminal, skip: bool
) -> tuple[TrainingFacts, np.ndarray | None]:
    """Stream the test set: nothing of it is stored."""
    task = stores[0].task
    split = task.test_split()
    losses = np.zeros(len(split), dtype=np.float32)
    probabilities = np.zeros((len(split), len(task.classes)), dtype=np.float32)
    own = np.zeros(len(split))
    read = np.zeros(len(split), dtype=bool)
    size = min(micro_batch(prepared.choice.network, 256) for prepared in stores)
    with terminal.progress(len(split), "test gradients") as advance:
        for batch in readable_batches(split, split.indices, size, workers(task), skip=skip, tell=terminal.warn):
            at = np.searchsorted(split.indices, batch.indices)
            mean_losses, soft = mean_outputs(stores, batch)
            check_finite(split, batch, mean_losses)
            losses[at], probabilities[at], read[at] = mean_losses.numpy(), soft.numpy(), True
            for prepared, inverse in zip(stores, inverses or [], strict=False):
                rows = prepared.coordinates(example_gradients(prepared.choice.network, batch.inputs, batch.targets)[0])
                values = self_influence(rows, _on(prepared, rows), inverse.shift, prepared.task.n)
                own[at] += values.cpu().numpy() / len(stores)
            advance(len(batch))
    require_finite(own, "self-influence")
    facts = TrainingFacts(split.indices, split.labels[split.indices], probabilities, losses, read)
    return facts, own if inverses else None
