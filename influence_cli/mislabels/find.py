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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from influence_cli.data.split import Split, rows_of
from influence_cli.errors import InfluenceError
from influence_cli.evidence.gather import Evidence, gather_evidence
from influence_cli.evidence.mapped import is_on_disk, on_disk, scratch_folder
from influence_cli.evidence.opinions import FEWEST
from influence_cli.evidence.plan import announce, make_plan
from influence_cli.influence.ensemble import make_inverses, times_of
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.inverse import all_closed
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.self_influence import gradient_norms, harm_to_tests, self_influences
from influence_cli.metrics import percentile_rank
from influence_cli.mislabels.data_issues import DataIssues, find_data_issues
from influence_cli.mislabels.estimate import estimate, ways_of
from influence_cli.mislabels.noise import Noise
from influence_cli.mislabels.sample import Sample, Sampled
from influence_cli.mislabels.signals import COMBINED, GRADIENTS, SignalChoice, is_opinion
from influence_cli.mislabels.suspicion import signals_without_gradients, suggestions, with_probabilities
from influence_cli.mislabels.teaching import Taught, learn, taught_split
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal, or_silent


@dataclass(frozen=True)
class Mislabels:
    """Suspicion of every example that could be read, most suspicious first.

    Attributes:
        order: int64 [m], rows of ``facts`` from most to least suspicious, without those that are decided.
        score: float64 [n] in [0, 1], by row of ``facts``; NaN, and last in the order, where a label is not judged,
            and for one that is decided.
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
        ways: how many labels of the list are wrong, by each way to estimate it without decisions; empty without noise.
        taught: what a person has decided; None where nothing was given.
        sample: images drawn at random; None without.
        sampled: how many labels are wrong by the decisions on them; None without.
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
    ways: dict[str, int] = field(default_factory=dict)
    taught: Taught | None = None
    sample: Sample | None = None
    sampled: Sampled | None = None

    @property
    def count(self) -> int | None:
        """Give how many labels of the list are probably wrong: by the sample, or else by the model; None if unknown."""
        if self.sampled is not None:
            return self.sampled.left
        if self.noise is None:
            return None
        return next(iter(self.ways.values()), self.noise.count)

    @property
    def flagged(self) -> np.ndarray:
        """Give the rows above the default cut: the first ones, as many as the estimated number of wrong labels."""
        return self.order[: self.count or 0]


def find_mislabels(
    tasks: Sequence[Task],
    stores: Sequence[Prepared] = (),
    *,
    on: str = "train",
    choice: SignalChoice = COMBINED,
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
    before, split = split, split if choice.taught is None else taught_split(split, choice.taught)
    logistic = "logistic" in choice.wanted
    obstacle, folder = _announced(tasks, split, scratch_folder(store), terminal, logistic=logistic)
    with on_disk(folder):
        return _ranked(
            tasks,
            stores,
            (before, split),
            choice,
            terminal,
            obstacle=obstacle,
            skip_unreadable=skip_unreadable,
            strict=strict,
        )


def _ranked(
    tasks: Sequence[Task],
    stores: Sequence[Prepared],
    splits: tuple[Split, Split],
    choice: SignalChoice,
    terminal: Terminal,
    *,
    obstacle: InfluenceError | None,
    skip_unreadable: bool,
    strict: bool,
) -> Mislabels:
    """Rank the labels of a split, whose labels are as given and as decided."""
    before, split = splits
    signal, wanted, taught = choice.rank_by, choice.wanted, choice.taught
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
        trajectory="trajectory" in wanted,
    )
    gradients = partial(_gradient_signals, stores, before, wanted, terminal, skip=skip_unreadable, strict=strict)
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
    log_probabilities = with_probabilities(evidence.log_probabilities, choice.probabilities, facts.indices)
    signals = signals_without_gradients(log_probabilities, facts, evidence.trajectory)
    scores: ScoreRecord | None = None
    try:
        of_gradients, scores = gradients()
        signals |= _of_read(of_gradients, before, facts)
    except InfluenceError as error:
        if set(wanted) & set(GRADIENTS):
            raise
        terminal.warn(f"no self_influence: {error.message}")
    distributed.dissolve()
    if signal not in signals:
        raise InfluenceError(f"--signal {signal}: not available here", f"available: {', '.join(signals)}")
    leading = signal if signal in log_probabilities else next(iter(log_probabilities), None)
    source = None if leading is None or signal in ("loss", "margin", "trajectory") else log_probabilities[leading]
    of_run = evidence.trajectory if signal == "trajectory" else None
    suggested, confidence, chance = suggestions(source, facts.probabilities if of_run is None else of_run, facts.labels)
    noise, doubt = (None, "") if leading is None else estimate(leading, log_probabilities[leading], evidence)
    order = np.lexsort((facts.indices, -signals[signal]))
    score = 1.0 - chance if signal == "loss" or is_opinion(signal) else percentile_rank(signals[signal])
    ways = partial(ways_of, leading, log_probabilities, evidence, noise)
    if taught is not None and leading is not None:
        order, score, noise = _relearnt(log_probabilities[leading], facts.indices, suggested, noise, taught)
    issues = find_data_issues(
        facts.labels,
        evidence.hashes,
        evidence.nearest,
        evidence.similarity,
        evidence.distance,
        noise.joint if noise else None,
    )
    return Mislabels(
        order,
        score,
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
        ways(order),
        taught,
    )


def _relearnt(
    log_probabilities: np.ndarray, indices: np.ndarray, suggested: np.ndarray, noise: Noise | None, taught: Taught
) -> tuple[np.ndarray, np.ndarray, Noise | None]:
    """Order the rows that are not decided by what was found of the others; the score is the probability of wrong."""
    lesson = learn(log_probabilities, indices, suggested, None if noise is None else noise.wrong, taught)
    noise = noise and replace(noise, wrong=np.nan_to_num(lesson.wrong))
    return lesson.order, lesson.wrong, noise


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
