"""`influence mislabels`: which labels are probably wrong, by a signal of suspicion.

Signals, higher is more suspicious for all of them:

- ``combined`` (the default), ``readout``, ``neighbours``, ``logistic``: −log p of the label by opinions that have not
  seen it (evidence/gather.py)
- ``pred-probs``: likewise by probabilities from elsewhere, such as k-fold training
- ``readout:NAME``, ``neighbours:NAME``, ``probabilities:NAME``: likewise by the features of another network
- ``trajectory``: the margin of the logits of the probabilities averaged over the checkpoints of one run
- ``loss`` (the model's), ``margin`` (probability of the largest other class minus that of the label)
- ``self-influence``, ``gradient-norm``, ``tracin``, ``test-influence``: influence/self_influence.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from influence_cli.data.split import Split, rows_of
from influence_cli.errors import InfluenceError
from influence_cli.evidence.features import Features, signals_of
from influence_cli.evidence.gather import Evidence, gather_evidence
from influence_cli.evidence.guessing import beats_guessing, largest_share
from influence_cli.evidence.opinions import FEWEST
from influence_cli.evidence.plan import announce, make_plan
from influence_cli.evidence.readout import row_parts
from influence_cli.influence.ensemble import make_inverses, times_of
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.inverse import all_closed
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.self_influence import gradient_norms, harm_to_tests, self_influences
from influence_cli.metrics import percentile_rank
from influence_cli.mislabels.data_issues import DataIssues, find_data_issues
from influence_cli.mislabels.noise import Noise, calibrated, count_wrong, noise_of
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal, or_silent

PROBABILITY_SIGNALS = ("combined", "readout", "neighbours", "logistic", "pred-probs")
GRADIENTS = ("self-influence", "gradient-norm", "tracin", "test-influence")
SIGNALS = (*PROBABILITY_SIGNALS, "loss", "margin", "trajectory", *GRADIENTS)


@dataclass(frozen=True)
class Mislabels:
    """Suspicion of every example that could be read, most suspicious first.

    Attributes:
        order: int64 [n], rows of ``facts`` from most to least suspicious.
        score: float64 [n] in [0, 1], by row of ``facts``; NaN, and last in the order, where a label is not judged.
        facts: indices, labels, the model's probabilities and losses.
        signals: each signal's values [n], higher is more suspicious; NaN where a label is not judged.
        log_probabilities: by source, log-probabilities [n, C] that have not seen the label.
        suggested: int64 [n], the class of largest probability by the signal or by ``combined``, by the model for its
            own signals; −1 where a label is not judged.
        confidence: [n], the probability of that class.
        evidence: opinions, neighbours, the diagnosis.
        noise: how many labels are wrong; None without evidence.
        doubt: why that is not estimated though there is evidence; empty where it is.
        issues: duplicates, outliers, confused classes.
        scores: what is known of the run where stores were used; None without any, or where they failed.
    """

    order: np.ndarray
    score: np.ndarray
    facts: TrainingFacts
    signals: dict[str, np.ndarray]
    log_probabilities: dict[str, np.ndarray]
    suggested: np.ndarray
    confidence: np.ndarray
    evidence: Evidence
    noise: Noise | None
    doubt: str
    issues: DataIssues
    scores: ScoreRecord | None

    @property
    def flagged(self) -> np.ndarray:
        """Give the rows above the default cut: the first ones, as many as the estimated number of wrong labels."""
        return self.order[: self.noise.count] if self.noise else self.order[:0]


def is_opinion(signal: str) -> bool:
    """Say whether a signal is a probability of every class that has not seen the label."""
    return signal in PROBABILITY_SIGNALS or ":" in signal


def wanted_signals(
    signal: str,
    *,
    every: bool,
    on: str,
    checkpoints: int,
    tests: bool,
    solves: bool,
    probabilities: bool,
    features: Sequence[Features] = (),
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
        features: of other networks.

    Raises:
        InfluenceError: the signal is unknown or not available here.
    """
    known = (*SIGNALS, *(name for each in features for name in signals_of(each)))
    if signal not in known:
        raise InfluenceError(
            f"--signal {signal}: there is no such signal",
            f"known: {', '.join(known)}" + ("" if features else "; others, such as readout:NAME, need --features"),
        )
    why = {
        "pred-probs": (not probabilities, "it needs --pred-probs FILE"),
        "tracin": (checkpoints < 2, "it needs several checkpoints; with one it equals gradient-norm"),
        "trajectory": (checkpoints < 2, "it needs several checkpoints of one run; with one it equals margin"),
        "test-influence": (
            on == "test" or not tests,
            "it scores training examples and needs a test set with labels in the config",
        ),
        "self-influence": (solves, "it would need one solve per example; use -s curvature.method=auto"),
    }
    missing = {name: reason for name, (cannot, reason) in why.items() if cannot}
    if signal in missing:
        raise InfluenceError(f"--signal {signal}: {missing[signal]}", f"known: {', '.join(known)}")
    return tuple(name for name in known if name not in missing) if every else (signal,)


@dataclass(frozen=True)
class SignalChoice:
    """Which signals are computed, and which one decides the order.

    Attributes:
        rank_by: which of ``SIGNALS`` to rank by.
        wanted: signals to compute.
        probabilities: [examples of the data set, C] from elsewhere, for ``pred-probs``.
        features: of other networks, which take part in ``combined``.
    """

    rank_by: str = "combined"
    wanted: Collection[str] = ("combined",)
    probabilities: np.ndarray | None = None
    features: Sequence[Features] = ()


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
    obstacle = _shortage(tasks, split, terminal)
    if obstacle is not None and is_opinion(signal) and signal != "pred-probs":
        raise obstacle
    evidence = gather_evidence(
        tasks,
        split,
        terminal,
        skip=skip_unreadable,
        logistic="logistic" in wanted,
        obstacle=obstacle,
        features=choice.features,
        trajectory="trajectory" in wanted,
    )
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
        if is_opinion(signal) and signal != "pred-probs":
            raise evidence.obstacle
        terminal.warn(f"no readout: {evidence.obstacle.message}")
    facts = evidence.facts
    log_probabilities = dict(evidence.log_probabilities)
    if probabilities is not None:
        log_probabilities["pred-probs"] = np.log(np.maximum(probabilities[facts.indices], 1e-300))
    rows = np.arange(len(facts.labels))
    signals = {name: -values[rows, facts.labels].astype(np.float64) for name, values in log_probabilities.items()}
    signals |= _of_model(evidence)
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
    leading = signal if signal in log_probabilities else next(iter(log_probabilities), None)
    if leading is None or signal in ("loss", "margin", "trajectory"):
        soft = evidence.trajectory if signal == "trajectory" and evidence.trajectory is not None else None
        suggested, confidence, given = _suggestions(facts.probabilities if soft is None else soft, facts.labels)
    else:
        suggested, *logs = _suggestions(log_probabilities[leading], facts.labels)
        confidence, given = map(np.exp, logs)
    noise, doubt = (None, "") if leading is None else _estimate(leading, log_probabilities[leading], evidence)
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
        1.0 - given if signal == "loss" or is_opinion(signal) else percentile_rank(signals[signal]),
        facts,
        signals,
        log_probabilities,
        suggested,
        confidence,
        evidence,
        noise,
        doubt,
        issues,
        scores,
    )


def _shortage(tasks: Sequence[Task], split: Split, terminal: Terminal) -> InfluenceError | None:
    """Say what the readout takes; give the reason if there is too little memory for it."""
    heard = [task for task in tasks if task.explained]
    counts = np.bincount(np.maximum(split.labels[split.indices], 0))
    rare = bool(((counts > 0) & (counts < FEWEST)).any())
    plan = make_plan(heard[0], split, len(heard), rare=rare) if distributed.is_first() else None
    return announce(plan, heard[0], split, terminal)


def likeliest(probabilities: np.ndarray) -> np.ndarray:
    """Give the class of largest probability, or log-probability, int64 [n]; −1 for a row of NaN."""
    return np.where(np.isnan(probabilities[:, 0]), -1, probabilities.argmax(axis=1))


def _suggestions(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the likeliest class of each example, its (log-)probability and that of the given label, [n] each."""
    rows, suggested = np.arange(len(labels)), likeliest(probabilities)
    return suggested, probabilities[rows, suggested], probabilities[rows, labels]


def _estimate(source: str, log_probabilities: np.ndarray, evidence: Evidence) -> tuple[Noise | None, str]:
    """Estimate the label noise, or say why the evidence does not allow it.

    Evidence that is no better than guessing says nothing of the labels. Where it contradicts most of them, wrong labels
    and classes that it cannot tell apart look the same.
    """
    known = ~np.isnan(log_probabilities[:, 0])
    whole = bool(known.all())
    labels = evidence.facts.labels if whole else evidence.facts.labels[known]
    log_p = log_probabilities if whole else log_probabilities[known]
    # The model, a part of ``combined``, has seen the labels.
    judge = evidence.judge if source == "combined" else source
    right = int((likeliest(evidence.log_probabilities.get(judge, log_probabilities))[known] == labels).sum())
    compared = f"accuracy {right / len(labels):.2%}, guessing {largest_share(labels):.2%}"
    if not beats_guessing(right, labels):
        what = "these probabilities are" if judge == "pred-probs" else f"the {judge} is"
        return None, f"{what} no better than guessing ({compared})"
    soft = calibrated(log_p, labels)
    count = count_wrong(soft, labels)
    if count > len(labels) / 2:
        return None, (
            f"the evidence contradicts {count / len(labels):.0%} of the labels, which says more of the evidence than "
            f"of the labels ({judge}: {compared})"
        )
    noise = noise_of(soft, labels, count)
    if not whole:
        wrong = np.zeros(len(known))
        wrong[known] = noise.wrong
        noise = replace(noise, wrong=wrong)
    return noise, ""


def _of_model(evidence: Evidence) -> dict[str, np.ndarray]:
    """Give the signals of the model's own outputs, [n] each."""
    facts = evidence.facts
    signals = {"loss": facts.losses.astype(np.float64), "margin": margin_of(facts.probabilities, facts.labels)}
    if evidence.trajectory is not None:
        signals["trajectory"] = margin_of(np.log(np.maximum(evidence.trajectory, 1e-30)), facts.labels)
    return signals


def margin_of(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give the (log-)probability of the largest other class minus that of the label, [n]."""
    margins = np.empty(len(labels))
    for part in row_parts(*probabilities.shape):
        others, some = probabilities[part].copy(), labels[part]
        rows = np.arange(len(some))
        given = others[rows, some]
        others[rows, some] = -np.inf
        margins[part] = others.max(axis=1) - given
    return margins


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
