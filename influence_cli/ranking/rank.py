"""`influence rank`: how much would the loss of each test example rise if a training example were removed?

Test examples are processed in groups and training examples are streamed, so memory is bounded by the group and not by
all pairs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import read_batches, refuse_unreadable
from influence_cli.data.split import Split, row_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.ensemble import make_inverses, solved_vectors, source_parts, test_stores
from influence_cli.influence.example_facts import TestFacts, TrainingFacts, add_up, explained
from influence_cli.influence.inverse import Inverse
from influence_cli.influence.measure import LOSS, measured_by
from influence_cli.influence.normalise import NONE, Norms, test_norms
from influence_cli.influence.replayed import replayed_groups, replayed_mean, replayed_tests
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.scores import Running, Strongest, influence, merged, relative, removal, require_finite
from influence_cli.influence.streams import averaged, of_all, training_products
from influence_cli.influence.test_gradients import gradient_groups, group_size, test_gradients
from influence_cli.influence.test_selection import Selected, at_position, refuse_without_label
from influence_cli.metrics import pearson
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import distributed, exchange
from influence_cli.runtime.terminal import Terminal, or_silent

# Test examples whose correlation with plain gradient similarity is measured.
COMPARED = 8


class Sink(Protocol):
    """Takes all of influence[t, i] as it is computed."""

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Take the next test examples (None for an aggregate)."""

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take their influence [m, b] on a range of training examples."""


@dataclass(frozen=True)
class RankedGroup:
    """The training examples of strongest effect on some test examples.

    Attributes:
        tests: the test examples (for an aggregate: all that it averages).
        strongest: one per test example; a single one for an aggregate.
    """

    tests: list[TestFacts]
    strongest: list[Strongest]


@dataclass(frozen=True)
class RankedTests:
    """The influence of one training example on all test examples.

    Attributes:
        tests: the test examples.
        influence: [m], of the training example on each.
        scores: what is known of the run (λ, effective dimension, residuals).
    """

    tests: list[TestFacts]
    influence: np.ndarray
    scores: ScoreRecord


@dataclass(frozen=True)
class RankOptions:
    """How a pass over the training examples goes, and by what they are ranked.

    Attributes:
        skip_unreadable: continue without unreadable examples.
        sinks: take every number as well.
        strict: a solver that does not converge is an error.
        normalise: rank by influence (``none``), or by a score of influence/normalise.py; sinks take influence.
        measure: influence on what: the ``loss`` of a test example, or its ``margin`` with the sign changed.
    """

    skip_unreadable: bool = False
    sinks: Sequence[Sink] = ()
    strict: bool = False
    normalise: str = NONE
    measure: str = LOSS


@dataclass(frozen=True)
class _Pass:
    """One pass over the training examples, for one group of test examples.

    Attributes:
        facts: of the training examples; filled in if nothing of them is known yet.
        count: training examples per effect, or None for all of them.
        plain: test examples for which plain gradient similarity rides along.
        takes: whether the numbers for sinks are held until those of other processes have arrived.
        options: of the ranking.
    """

    facts: TrainingFacts
    count: int | None
    plain: int
    takes: bool
    options: RankOptions


def rank_training(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    *,
    facts: TrainingFacts,
    count: int | None = 10,
    target: str = "label",
    aggregate: bool = False,
    terminal: Terminal | None = None,
    options: RankOptions = RankOptions(),
) -> Generator[RankedGroup, None, ScoreRecord]:
    """Rank the training examples by their influence on the selected test examples.

    Args:
        stores: what was prepared for each checkpoint; scores are averaged over them.
        selected: which test examples.
        facts: of the training examples (``training_facts``); filled in on the fly.
        count: training examples per effect, or None for all of them.
        target: whose loss is explained: ``label``, ``predicted``, or a class name.
        aggregate: explain the mean loss of all selected examples.
        terminal: progress, λ, residuals, warnings.
        options: how the pass goes, what else takes the numbers, and by what score is ranked.

    Yields:
        Groups of test examples, in order; one group for an aggregate.

    Returns:
        At the end, what is known of the run (λ, effective dimension, residuals, correlation with ``identity``).
    """
    terminal = or_silent(terminal)
    if stores[0].effects is not None:
        return (yield from _rank_replayed(stores, selected, facts, count, target, terminal, options, mean=aggregate))
    inverses = make_inverses(stores, terminal, strict=options.strict)
    asked = [measured_by(prepared, options.measure) for prepared in test_stores(stores, inverses)]
    # The numbers for sinks from other processes are held until all of them have arrived.
    takes = distributed.size() > 1 and any(distributed.gathered(bool(options.sinks)))
    size = group_size([*stores, *asked], None if count is None or takes else 2 * count)
    if stores[0].on_the_fly and not aggregate and len(selected) > size:
        passes = -(-len(selected) // size)
        terminal.say(f"on the fly in {passes} groups of {size:,} test examples: one pass over the data per group")
    correlation: float | None = None
    for tests, gradients, of in gradient_groups(
        asked, selected, size, target, aggregate=aggregate, terminal=terminal, skip=options.skip_unreadable
    ):
        compare = correlation is None and inverses[0].damping is not None
        plain = min(COMPARED, len(gradients[0])) if compare else 0
        group_pass = _Pass(facts, count, plain, takes=takes, options=options)
        strongest, measured = _strongest(stores, inverses, gradients, of, terminal, group_pass)
        correlation = measured if correlation is None else correlation
        yield RankedGroup(tests, strongest)
    return describe_run(stores, inverses, correlation, terminal)


def _rank_replayed(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    facts: TrainingFacts,
    count: int | None,
    target: str,
    terminal: Terminal,
    options: RankOptions,
    *,
    mean: bool,
) -> Generator[RankedGroup, None, ScoreRecord]:
    """Rank by a run that is replayed: it gives influence on all training examples at once."""
    task, effects = stores[0].task, measured_by(stores[0], options.measure).effects
    if effects is None:
        raise ValueError("no run to replay")
    skip = options.skip_unreadable
    groups: Iterable[tuple[list[TestFacts], np.ndarray]]
    if mean:
        averaged_tests, row = replayed_mean(task, effects, selected, target, terminal, skip=skip)
        groups = [(averaged_tests, row[None])]
    else:
        groups = replayed_groups(task, effects, selected, target, terminal, skip=skip)
    for group, values in groups:
        running = Running(len(values), count)
        running.add(np.arange(len(facts.indices)), values)
        for sink in options.sinks:
            sink.begin([None] if mean else group)
            sink.add(slice(0, values.shape[1]), values)
        yield RankedGroup(group, running.results())
    return describe_run(stores, make_inverses(stores, terminal), None, terminal)


def rank_into_sinks(groups: Generator[RankedGroup, None, ScoreRecord]) -> tuple[list[TestFacts], ScoreRecord]:
    """Run a ranking of ``rank_training`` to its end, for what its sinks take.

    Returns:
        All test examples, and what is known of the run.
    """
    tests: list[TestFacts] = []
    while True:
        try:
            tests += next(groups).tests
        except StopIteration as end:
            scores: ScoreRecord = end.value
            return tests, scores


def rank_tests(
    stores: Sequence[Prepared],
    index: int,
    *,
    target: str = "label",
    terminal: Terminal | None = None,
    skip_unreadable: bool = False,
    strict: bool = False,
) -> RankedTests:
    """Answer the reverse question: which test examples does training example ``index`` help and hurt?

    H is symmetric, so influence[t, i] = (1/n) g_tᵀ (H + (l2 + λ)I)⁻¹ gᵢ needs one inverse, that of gᵢ. A run under
    SOURCE is followed from each test example, as in ``rank_training``.
    """
    terminal = or_silent(terminal)
    split = stores[0].task.train
    check_train(split, index)
    if (effects := stores[0].effects) is not None:
        row = int(np.searchsorted(split.indices, index))
        all_tests, result = replayed_tests(stores[0].task, effects, row, target, terminal, skip=skip_unreadable)
        return RankedTests(all_tests, result, describe_run(stores, make_inverses(stores, terminal), None, terminal))
    inverses = make_inverses(stores, terminal, strict=strict)
    batch = next(read_batches(split, np.array([index]), 1))
    refuse_unreadable(batch)
    asked = test_stores(stores, inverses)
    vectors = [prepared.coordinates(batch.inputs, batch.targets)[0] for prepared in stores]
    is_path = bool(source_parts(inverses))
    if not is_path:
        vectors = solved_vectors(inverses, vectors)
    tests: list[TestFacts] = []
    values: list[np.ndarray] = []
    test = stores[0].task.test_split()
    everything = [at_position(test, int(i)) for i in test.indices]
    refuse_without_label(everything[:1], test, target)
    size = group_size([*stores, *asked], 1)
    for start in range(0, len(everything), size):
        group, gradients = test_gradients(
            asked, everything[start : start + size], target, terminal, skip=skip_unreadable
        )
        if is_path and group:
            gradients = solved_vectors(inverses, gradients)
        columns = [
            influence(s, gradient, prepared.task.n)[0]
            for prepared, s, gradient in zip(stores, vectors, gradients, strict=True)
        ]
        tests += group
        values.append((sum(columns[1:], columns[0]) / len(stores)).cpu().numpy())
    record = describe_run(stores, inverses, None, terminal)
    result = np.concatenate(values)
    require_finite(result, "influence", lambda row: f"{split.title(index)} on {tests[row].title()}")
    return RankedTests(tests, result, record)


def check_train(split: Split, index: int) -> None:
    """Refuse a training example that is not in use.

    Raises:
        InfluenceError: there is none at this position, or it is excluded.
    """
    if row_of(split.indices, index) is None:
        raise InfluenceError(
            f"--train {index}: there is no such training example in use",
            f"valid indices are 0 to {len(split.source) - 1}",
        )


def _strongest(
    stores: Sequence[Prepared],
    inverses: Sequence[Inverse],
    gradients: Sequence[Tensor],
    tests: Sequence[TestFacts | None],
    terminal: Terminal,
    group_pass: _Pass,
) -> tuple[list[Strongest], float | None]:
    """Let all training examples stream by once, from every checkpoint, and keep the strongest effects.

    Plain gradient similarity rides along in the same product for the first ``plain`` test examples. The second result
    is their mean correlation with it: NaN where they have none, None where ``plain`` is 0.
    """
    facts, count, plain, takes = group_pass.facts, group_pass.count, group_pass.plain, group_pass.takes
    skip, sinks = group_pass.options.skip_unreadable, group_pass.options.sinks
    normalise = group_pass.options.normalise
    m, n = len(gradients[0]), len(facts.indices)
    first = facts if not facts.read.any() else None
    running, similar = Running(m, count), np.zeros((2, plain, n if plain else 0), dtype=np.float32)
    solved, share = solved_vectors(inverses, gradients), len(explained(stores))
    # With several checkpoints, the mean influence is divided by the mean norm, so the signs stay those of influence.
    sizes = test_norms(normalise, inverses, gradients)
    against = None if sizes is None else sizes.double().numpy()
    for sink in sinks:
        sink.begin(tests)
    with ExitStack() as stack:
        streams = []
        lefts = [removal(s, prepared.task.n) for prepared, s in zip(stores, solved, strict=True)]
        if plain:
            lefts = [torch.cat([left, coordinates[:plain]]) for left, coordinates in zip(lefts, gradients, strict=True)]
        for prepared, inverse, left in zip(stores, inverses, lefts, strict=True):
            norms = None if normalise == NONE else Norms(normalise, inverse)
            streams.append(
                training_products(prepared, left, first, share, terminal, skip=skip, stack=stack, norms=norms)
            )
        held: list[tuple[slice, np.ndarray]] = []
        for where, values in averaged(streams):
            scores, others = values[:m], values[m : m + plain]
            if not stores[0].on_the_fly:  # on the fly each batch is checked, and NaN marks what was skipped
                require_finite(scores, "influence", partial(_pair, stores[0].task.train, tests, where))
                scores = np.where(facts.read[where], scores, np.nan)
            ranked = None if normalise == NONE else relative(scores, values[-1], against, stores[0].task.n)
            running.add(np.arange(where.start, where.stop), scores, ranked)
            if plain:
                similar[0, :, where], similar[1, :, where] = scores[:plain], others
            if takes:
                held.append((where, scores))
            for sink in [] if takes else sinks:
                sink.add(where, scores)
    if distributed.size() > 1:
        exchange.sum_array(similar)
        if first is not None:
            add_up(first)
        for where, scores in of_all(iter(held)):
            for sink in sinks:
                sink.add(where, scores)
    correlation = None
    if plain:
        read = facts.read
        correlations = [pearson(a, b) for a, b in zip(similar[0][:, read], similar[1][:, read], strict=True)]
        correlations = [value for value in correlations if np.isfinite(value)]  # a single training example has none
        correlation = float(np.mean(correlations)) if correlations else nan
    if distributed.size() == 1:
        return running.results(), correlation
    return merged(distributed.gathered(running.results()), count), correlation


def _pair(split: Split, tests: Sequence[TestFacts | None], where: slice, test: int, row: int) -> str:
    """Name a training and a test example in a message."""
    explained = tests[test]
    on = "the mean of the test examples" if explained is None else explained.title()
    return f"{split.title(int(split.indices[where.start + row]))} on {on}"
