"""`influence mislabels`: which labels are probably wrong, by a signal of suspicion.

Signals, higher is more suspicious for all of them:

- ``combined`` (the default), ``readout``, ``neighbours``, ``logistic``: −log p of the label by opinions that have not
  seen it (mislabels/evidence.py)
- ``pred-probs``: likewise by probabilities from elsewhere, such as k-fold training
- ``loss`` (the model's), ``margin`` (probability of the largest other class minus that of the label)
- ``self-influence``, ``gradient-norm``, ``tracin``, ``test-influence``: influence/self_influence.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from influence_cli.data.split import Split, rows_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.ensemble import make_inverses, times_of
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.inverse import all_closed
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.self_influence import gradient_norms, harm_to_tests, self_influences
from influence_cli.metrics import percentile_rank
from influence_cli.mislabels.data_issues import DataIssues, find_data_issues
from influence_cli.mislabels.evidence import Evidence, gather_evidence
from influence_cli.mislabels.noise import Noise, estimate_noise
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal, or_silent

PROBABILITY_SIGNALS = ("combined", "readout", "neighbours", "logistic", "pred-probs")
GRADIENTS = ("self-influence", "gradient-norm", "tracin", "test-influence")
SIGNALS = (*PROBABILITY_SIGNALS, "loss", "margin", *GRADIENTS)


@dataclass(frozen=True)
class Mislabels:
    """Suspicion of every example that could be read, most suspicious first.

    Attributes:
        order: int64 [n], rows of ``facts`` from most to least suspicious.
        score: float64 [n] in [0, 1], by row of ``facts``.
        facts: indices, labels, the model's probabilities and losses.
        signals: each signal's values [n], higher is more suspicious.
        probabilities_by_source: probabilities [n, C] that have not seen the label.
        leading_probabilities: those that suggest a label, of the signal or of ``combined``; the model's for its own
            signals.
        evidence: opinions, neighbours, the diagnosis.
        noise: how many labels are wrong; None without evidence.
        issues: duplicates, outliers, confused classes.
        scores: what is known of the run where stores were used; None without any, or where they failed.
    """

    order: np.ndarray
    score: np.ndarray
    facts: TrainingFacts
    signals: dict[str, np.ndarray]
    probabilities_by_source: dict[str, np.ndarray]
    leading_probabilities: np.ndarray
    evidence: Evidence
    noise: Noise | None
    issues: DataIssues
    scores: ScoreRecord | None

    @cached_property
    def suggested(self) -> np.ndarray:
        """Give the suggested label of each example: the class of largest probability."""
        return np.asarray(self.leading_probabilities.argmax(axis=1))

    @property
    def flagged(self) -> np.ndarray:
        """Give the rows above the default cut: the first ones, as many as the estimated number of wrong labels."""
        return self.order[: self.noise.count] if self.noise else self.order[:0]


def wanted_signals(
    signal: str, *, every: bool, on: str, checkpoints: int, tests: bool, solves: bool, probabilities: bool
) -> tuple[str, ...]:
    """Choose the signals to compute: one, or all that are available here.

    Args:
        signal: the one to rank by.
        every: all of them.
        on: ``train`` or ``test``.
        checkpoints: how many.
        tests: whether there is a test set.
        solves: whether the curvature method needs one solve per example.
        probabilities: whether ``--pred-probs`` is given.

    Raises:
        InfluenceError: the signal is unknown or not available here.
    """
    if signal not in SIGNALS:
        raise InfluenceError(f"--signal {signal}: there is no such signal", f"known: {', '.join(SIGNALS)}")
    why = {
        "pred-probs": (not probabilities, "it needs --pred-probs FILE"),
        "tracin": (checkpoints < 2, "it needs several checkpoints; with one it equals gradient-norm"),
        "test-influence": (
            on == "test" or not tests,
            "it scores training examples and needs a test set with labels in the config",
        ),
        "self-influence": (solves, "it would need one solve per example; use -s curvature.method=auto"),
    }
    missing = {name: reason for name, (cannot, reason) in why.items() if cannot}
    if signal in missing:
        raise InfluenceError(f"--signal {signal}: {missing[signal]}", f"known: {', '.join(SIGNALS)}")
    return tuple(name for name in SIGNALS if name not in missing) if every else (signal,)


@dataclass(frozen=True)
class SignalChoice:
    """Which signals are computed, and which one decides the order.

    Attributes:
        rank_by: which of ``SIGNALS`` to rank by.
        wanted: signals to compute.
        probabilities: [examples of the data set, C] from elsewhere, for ``pred-probs``.
    """

    rank_by: str = "combined"
    wanted: Collection[str] = ("combined",)
    probabilities: np.ndarray | None = None


def find_mislabels(
    tasks: Sequence[Task],
    stores: Sequence[Prepared] = (),
    *,
    on: str = "train",
    choice: SignalChoice = SignalChoice(),
    terminal: Terminal | None = None,
    skip_unreadable: bool = False,
    strict: bool = False,
) -> Mislabels:
    """Rank training (or test) examples by how suspicious their label is.

    Args:
        tasks: one task per checkpoint; signals are averaged over them.
        stores: what was prepared for each checkpoint; without any there is no self-influence.
        on: ``train`` or ``test``; for a test example self-influence is what it would be as a training example.
        choice: which signals to compute, and which one to rank by.
        terminal: progress, the diagnosis, warnings.
        skip_unreadable: continue without unreadable examples.
        strict: a solver that does not converge is an error.

    Raises:
        InfluenceError: the signal is not available: no readout, or an example of a store that could not be read.
    """
    terminal = or_silent(terminal)
    signal, wanted, probabilities = choice.rank_by, choice.wanted, choice.probabilities
    split = tasks[0].train if on == "train" else tasks[0].labelled_tests()
    evidence = gather_evidence(tasks, split, terminal, skip=skip_unreadable, logistic="logistic" in wanted)
    gradients = partial(_gradient_signals, stores, split, wanted, terminal, skip=skip_unreadable, strict=strict)
    if evidence is None:  # all processes of a job but the first, which does the rest
        try:
            gradients()
        except InfluenceError:
            if set(wanted) & set(GRADIENTS):
                raise
        distributed.dissolve()
        raise ValueError("only the first process has evidence")
    if evidence.obstacle is not None:
        if signal in PROBABILITY_SIGNALS and signal != "pred-probs":
            raise evidence.obstacle
        terminal.warn(f"no readout: {evidence.obstacle.message}")
    facts = evidence.facts
    log_probabilities = dict(evidence.log_probabilities)
    if probabilities is not None:
        log_probabilities["pred-probs"] = np.log(np.maximum(probabilities[facts.indices], 1e-300))
    rows = np.arange(len(facts.labels))
    signals = {name: -values[rows, facts.labels].astype(np.float64) for name, values in log_probabilities.items()}
    signals["loss"] = facts.losses.astype(np.float64)
    signals["margin"] = _margin(facts)
    scores: ScoreRecord | None = None
    try:
        of_gradients, scores = gradients()
        signals |= _of_read(of_gradients, split, facts)
    except InfluenceError as error:
        if set(wanted) & set(GRADIENTS):
            raise
        terminal.warn(f"no self_influence: {error.message}")
    distributed.dissolve()
    if signal not in signals:
        raise InfluenceError(f"--signal {signal}: not available here", f"available: {', '.join(signals)}")
    probabilities_by_source = {name: np.exp(values) for name, values in log_probabilities.items()}
    leading = signal if signal in log_probabilities else next(iter(log_probabilities), None)
    leading_probabilities = (
        facts.probabilities if leading is None or signal in ("loss", "margin") else probabilities_by_source[leading]
    )
    noise = estimate_noise(log_probabilities[leading], facts.labels) if leading is not None else None
    issues = find_data_issues(
        facts.labels,
        evidence.hashes,
        evidence.nearest,
        evidence.similarity,
        evidence.distance,
        noise.joint if noise else None,
    )
    return Mislabels(
        np.lexsort((facts.indices, -signals[signal])),
        1.0 - leading_probabilities[rows, facts.labels]
        if signal in (*PROBABILITY_SIGNALS, "loss")
        else percentile_rank(signals[signal]),
        facts,
        signals,
        probabilities_by_source,
        leading_probabilities,
        evidence,
        noise,
        issues,
        scores,
    )


def _margin(facts: TrainingFacts) -> np.ndarray:
    rows = np.arange(len(facts.labels))
    others = facts.probabilities.copy()
    others[rows, facts.labels] = -1
    return np.asarray(others.max(axis=1) - facts.probabilities[rows, facts.labels], dtype=np.float64)


def _gradient_signals(
    stores: Sequence[Prepared],
    split: Split,
    wanted: Collection[str],
    terminal: Terminal,
    *,
    skip: bool,
    strict: bool,
) -> tuple[dict[str, np.ndarray], ScoreRecord | None]:
    """Compute the signals from the stores, [n] each: self-influence if there are stores, the others if wanted."""
    if not stores:
        return {}, None
    inverses = make_inverses(stores, terminal, strict=strict)
    signals: dict[str, np.ndarray] = {}
    if all_closed(inverses):
        signals["self-influence"] = self_influences(stores, inverses, split, terminal, skip=skip)
    if "test-influence" in wanted:
        signals["test-influence"] = harm_to_tests(stores, inverses, terminal, skip=skip)
    if {"gradient-norm", "tracin"} & set(wanted):
        norms = np.stack(gradient_norms(stores, split, terminal, skip=skip))
        signals["gradient-norm"] = norms.mean(axis=0)
        if "tracin" in wanted:
            weights = times_of(stores) if stores[0].settings.ensemble != "mean" else None
            signals["tracin"] = np.average(norms**2, axis=0, weights=weights)
    record = describe_run(stores, inverses, None, terminal)
    distributed.hear(terminal.warnings, terminal.warn)
    return signals, record


def _of_read(signals: dict[str, np.ndarray], split: Split, facts: TrainingFacts) -> dict[str, np.ndarray]:
    """Restrict signals to the examples that could be read."""
    at = rows_of(split.indices, facts.indices)
    for name, values in signals.items():
        lost = np.flatnonzero(np.isnan(values[at]))
        if len(lost):
            raise InfluenceError(
                f"{name}: {split.title(int(facts.indices[lost[0]]))} can be read now, but not when the store was made",
                "influence gradients --overwrite rebuilds the store",
            )
    return {name: values[at] for name, values in signals.items()}
