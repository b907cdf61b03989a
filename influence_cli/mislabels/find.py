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
from pathlib import Path

import numpy as np
import torch

from influence_cli.data.split import Split, rows_of
from influence_cli.errors import InfluenceError
from influence_cli.evidence.gather import Evidence, gather_evidence
from influence_cli.evidence.guessing import beats_guessing, largest_share
from influence_cli.evidence.mapped import chosen, is_on_disk, large, on_disk, picked, row_parts, scratch_folder
from influence_cli.evidence.mapped import likeliest as likeliest_of
from influence_cli.evidence.opinions import FEWEST
from influence_cli.evidence.plan import announce, make_plan
from influence_cli.influence.ensemble import make_inverses, times_of
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.inverse import all_closed
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.self_influence import gradient_norms, harm_to_tests, self_influences
from influence_cli.metrics import percentile_rank
from influence_cli.mislabels.data_issues import DataIssues, find_data_issues
from influence_cli.mislabels.noise import Noise, calibrated, confident_counts, noise_of
from influence_cli.mislabels.signals import GRADIENTS, SignalChoice, is_opinion
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal, or_silent


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


def find_mislabels(
    tasks: Sequence[Task],
    stores: Sequence[Prepared] = (),
    *,
    on: str = "train",
    choice: SignalChoice = SignalChoice(),
    terminal: Terminal | None = None,
    skip_unreadable: bool = False,
    strict: bool = False,
    store: Path | None = None,
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
        store: where the store lies or would lie; temporary files go beside it where memory is short.

    Raises:
        InfluenceError: the signal is not available: no readout, or an example of a store that could not be read.
    """
    terminal = or_silent(terminal)
    split = tasks[0].train if on == "train" else tasks[0].labelled_tests()
    logistic = "logistic" in choice.wanted
    obstacle, folder = _announced(tasks, split, scratch_folder(store), terminal, logistic=logistic)
    with on_disk(folder):
        return _found(
            tasks, stores, split, choice, terminal, obstacle=obstacle, skip_unreadable=skip_unreadable, strict=strict
        )


def _found(
    tasks: Sequence[Task],
    stores: Sequence[Prepared],
    split: Split,
    choice: SignalChoice,
    terminal: Terminal,
    *,
    obstacle: InfluenceError | None,
    skip_unreadable: bool,
    strict: bool,
) -> Mislabels:
    signal, wanted, probabilities = choice.rank_by, choice.wanted, choice.probabilities
    if obstacle is not None and is_opinion(signal) and signal != "pred-probs":
        raise obstacle
    logistic = "logistic" in wanted and not _refuse_logistic(signal, terminal)
    evidence = gather_evidence(
        tasks,
        split,
        terminal,
        skip=skip_unreadable,
        logistic=logistic,
        obstacle=obstacle,
        features=choice.features,
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
        log_probabilities["pred-probs"] = _logarithms(probabilities, facts.indices)
    signals = {name: -_at(values, facts.labels).astype(np.float64) for name, values in log_probabilities.items()}
    signals["loss"] = facts.losses.astype(np.float64)
    signals["margin"] = margin_of(facts.probabilities, facts.labels)
    if evidence.trajectory is not None:
        signals["trajectory"] = margin_of(evidence.trajectory, facts.labels, logarithms=True)
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


def _announced(
    tasks: Sequence[Task], split: Split, folder: Path, terminal: Terminal, *, logistic: bool
) -> tuple[InfluenceError | None, Path | None]:
    """Say what the readout takes; give the reason if there is too little for it, and where its large arrays go."""
    heard = [task for task in tasks if task.explained]
    counts = np.bincount(np.maximum(split.labels[split.indices], 0))
    rare = bool(((counts > 0) & (counts < FEWEST)).any())
    plan = make_plan(heard[0], split, len(heard), rare=rare) if distributed.is_first() else None
    return announce(plan, heard[0], split, folder, terminal, logistic=logistic)


def _refuse_logistic(signal: str, terminal: Terminal) -> bool:
    """Say whether memory is too short for the logistic readout, whose arrays cannot be made by parts.

    Raises:
        InfluenceError: it is the signal to rank by.
    """
    if not is_on_disk():
        return False
    why = "memory is too short for its arrays of examples and classes"
    if signal == "logistic":
        raise InfluenceError(f"--signal logistic: {why}", "use --signal readout")
    terminal.warn(f"no logistic readout: {why}")
    return True


def _logarithms(probabilities: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Give the logarithms of some rows [n, C]."""
    if not is_on_disk():
        return np.asarray(np.log(np.maximum(probabilities[indices], 1e-300)))
    logs = large(len(indices), probabilities.shape[1]).numpy()
    for rows in row_parts(*logs.shape):
        logs[rows] = np.log(np.maximum(probabilities[indices[rows]], 1e-300))
    return logs


def likeliest(probabilities: np.ndarray) -> np.ndarray:
    """Give the class of largest probability, or log-probability, int64 [n]; −1 for a row of NaN."""
    return likeliest_of(torch.from_numpy(probabilities)).numpy()


def _at(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give the (log-)probability of each row's label, [n]; of the last class for −1."""
    labels = np.where(labels < 0, probabilities.shape[1] - 1, labels)
    return picked(torch.from_numpy(probabilities), torch.from_numpy(labels)).numpy()


def _suggestions(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the likeliest class of each example, its (log-)probability and that of the given label, [n] each."""
    suggested = likeliest(probabilities)
    return suggested, _at(probabilities, suggested), _at(probabilities, labels)


def _estimate(source: str, log_probabilities: np.ndarray, evidence: Evidence) -> tuple[Noise | None, str]:
    """Estimate the label noise, or say why the evidence does not allow it.

    Evidence that is no better than guessing says nothing of the labels. Where it contradicts most of them, wrong labels
    and classes that it cannot tell apart look the same.
    """
    known = likeliest(log_probabilities) >= 0
    whole = bool(known.all())
    labels = evidence.facts.labels if whole else evidence.facts.labels[known]
    log_p = log_probabilities if whole else _some(log_probabilities, known)
    # The model, a part of ``combined``, has seen the labels.
    judge = evidence.judge if source == "combined" else source
    right = int((likeliest(evidence.log_probabilities.get(judge, log_probabilities))[known] == labels).sum())
    compared = f"accuracy {right / len(labels):.2%}, guessing {largest_share(labels):.2%}"
    if not beats_guessing(right, labels):
        what = "these probabilities are" if judge == "pred-probs" else f"the {judge} is"
        return None, f"{what} no better than guessing ({compared})"
    soft = calibrated(log_p, labels)
    count, confident = confident_counts(soft)
    if count > len(labels) / 2:
        return None, (
            f"the evidence contradicts {count / len(labels):.0%} of the labels, which says more of the evidence than "
            f"of the labels ({judge}: {compared})"
        )
    noise = noise_of(soft, count, confident)
    if not whole:
        wrong = np.zeros(len(known))
        wrong[known] = noise.wrong
        noise = replace(noise, wrong=wrong)
    return noise, ""


def _some(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return chosen(torch.from_numpy(values), torch.from_numpy(np.flatnonzero(mask))).numpy()


def margin_of(probabilities: np.ndarray, labels: np.ndarray, *, logarithms: bool = False) -> np.ndarray:
    """Give the probability, or its logarithm, of the largest other class minus that of the label, [n]."""
    margins = np.empty(len(labels))
    for part in row_parts(*probabilities.shape):
        others, some = probabilities[part].copy(), labels[part]
        if logarithms:
            others = np.log(np.maximum(others, 1e-30))
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
