"""`influence groups`: which group of training examples drives these errors?

The influence of a group is the sum over its members: to first order, how much the loss would rise if the whole group
were removed (Koh et al., NeurIPS 2019, "On the accuracy of influence functions for measuring group effects": the order
holds, the size is mostly too small for large groups). The influences of all pairs are streamed. Only the sums (one
number per test example and group) and the mean over the test examples (one per training example) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.data.label_files import class_number
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import TestFacts, TrainingFacts
from influence_cli.influence.run_facts import ScoreRecord
from influence_cli.influence.scores import harmful_part, most_harmful_first
from influence_cli.influence.test_selection import Selected
from influence_cli.metrics import bootstrap_means, least_by_chance
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.group_files import Grouping
from influence_cli.ranking.rank import RankOptions, rank_into_sinks, rank_training
from influence_cli.runtime.terminal import Terminal, or_silent

# Share of the bootstrap samples in which a group must come first, and be harmful, to be named without a doubt; and
# the share of random groupings in which the most harmful group may be as harmful.
CLEAR, BY_CHANCE = 0.95, 0.05
# Random groupings, and the most numbers permuted for all of them.
DEALS, DEALT = 1000, 10**8


@dataclass(frozen=True)
class GroupInfluence:
    """The influence of groups of training examples on test examples.

    Attributes:
        grouping: the groups.
        tests: the test examples.
        sums: float64 [m, G], the influence of each group on each test example.
        harmful: float64 [m, G], the part of it that comes from harmful members.
        mean: float64 [n], the influence of each training example on the mean loss of the test examples; NaN for
            unreadable ones.
        scores: what is known of the run (λ, effective dimension, residuals, correlation with ``identity``).
    """

    grouping: Grouping
    tests: list[TestFacts]
    sums: np.ndarray
    harmful: np.ndarray
    mean: np.ndarray
    scores: ScoreRecord

    @property
    def examples(self) -> np.ndarray:
        """Count the members of each group that could be read."""
        return np.bincount(self.grouping.members[np.isfinite(self.mean)], minlength=len(self.grouping.names))

    def total(self) -> GroupSums:
        """Give the groups' influence on the mean loss of all test examples."""
        members, count = self.grouping.members, len(self.grouping.names)
        harmful = np.bincount(members, harmful_part(self.mean), minlength=count)
        return GroupSums(self.sums.mean(axis=0), harmful, self.examples)

    def on(self, test: int) -> GroupSums:
        """Give the groups' influence on one of the test examples."""
        return GroupSums(self.sums[test], self.harmful[test], self.examples)

    def doubt(self, seed: int) -> Doubt:
        """Measure how clear it is which group is most harmful: by resampled test examples, and by random groups."""
        read = np.isfinite(self.mean)
        values, members = self.mean[read], self.grouping.members[read]
        # A random grouping of harmful values has harmful groups too, so a group must be more harmful than those.
        chance = least_by_chance(values, members, max(100, min(DEALS, DEALT // len(values))), seed)
        least = float(self.total().influence.min())
        by_chance = float((chance <= least).mean())
        if len(self.tests) == 1:
            return Doubt(None, None, by_chance)
        means = bootstrap_means(self.sums, seed=seed)
        first = np.bincount(means.argmin(axis=1), minlength=means.shape[1]) / len(means)
        return Doubt(first, (means < 0).mean(axis=0), by_chance)


@dataclass(frozen=True)
class Doubt:
    """How clear it is which group is most harmful.

    Attributes:
        first: [G], the share of resamples of the test examples in which each group is first; None for a single one.
        harmful: [G], the share in which it is harmful.
        by_chance: the share of random groupings, of the same sizes, whose most harmful group is at least as harmful.
    """

    first: np.ndarray | None
    harmful: np.ndarray | None
    by_chance: float


@dataclass(frozen=True)
class GroupSums:
    """The influence of each group on one loss.

    Attributes:
        influence: [G], sums over the members.
        harmful: [G], sums over the harmful members, ≤ 0.
        examples: [G], members.
    """

    influence: np.ndarray
    harmful: np.ndarray
    examples: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Order the groups, most harmful first."""
        return most_harmful_first(self.influence)

    @property
    def mean(self) -> np.ndarray:
        """Give the influence of a group per example."""
        return np.asarray(self.influence / np.maximum(self.examples, 1))

    @property
    def share(self) -> np.ndarray:
        """Give each group's share of all harmful influence: in [0, 1]; 0 if nothing is harmful."""
        whole = float(self.harmful.sum())
        return np.asarray(self.harmful / whole) if whole else np.zeros(len(self.harmful))


class GroupSink:
    """Takes all of influence[t, i] as it is computed, and sums it."""

    def __init__(self, grouping: Grouping) -> None:
        self._members = torch.from_numpy(grouping.members)
        self._count = len(grouping.names)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._total = np.zeros(len(grouping.members))

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Take the next test examples."""
        shape = (len(tests), self._count)
        self._parts.append((torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)))

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take their influence [m, b] on a range of training examples; NaN for unreadable ones."""
        members = self._members[where]
        self._total[where] += values.sum(axis=0, dtype=np.float64)
        known = np.nan_to_num(values)
        for sums, part in zip(self._parts[-1], (known, harmful_part(known)), strict=True):
            sums.index_add_(1, members, torch.from_numpy(part).double())

    def result(self, grouping: Grouping, tests: list[TestFacts], scores: ScoreRecord) -> GroupInfluence:
        """Give the sums over all that was taken."""
        sums, harmful = (torch.cat(parts).numpy() for parts in zip(*self._parts, strict=True))
        return GroupInfluence(grouping, tests, sums, harmful, self._total / len(tests), scores)


def group_influence(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    grouping: Grouping,
    *,
    facts: TrainingFacts,
    target: str = "label",
    terminal: Terminal | None = None,
    skip_unreadable: bool = False,
    strict: bool = False,
) -> GroupInfluence:
    """Sum the influence on the selected test examples by groups of training examples.

    Args:
        stores: what was prepared for each checkpoint; scores are averaged over them.
        selected: which test examples.
        grouping: which group each training example in use belongs to.
        facts: of the training examples (``training_facts``); filled in on the fly.
        target: whose loss is explained: ``label``, ``predicted``, or a class name.
        terminal: progress, λ, residuals, warnings.
        skip_unreadable: continue without unreadable examples.
        strict: a solver that does not converge is an error.
    """
    terminal = or_silent(terminal)
    sink = GroupSink(grouping)
    groups = rank_training(
        stores,
        selected,
        facts=facts,
        count=1,
        target=target,
        terminal=terminal,
        options=RankOptions(skip_unreadable=skip_unreadable, sinks=[sink], strict=strict),
    )
    return sink.result(grouping, *rank_into_sinks(groups))


def labelled(selected: Sequence[Selected], of: str | None, classes: Sequence[str]) -> list[Selected]:
    """Keep the test examples whose label is a class: ``misclassified`` and ``--of cat`` are the errors on cats.

    Raises:
        InfluenceError: there is no such class, or none of them has it.
    """
    if of is None:
        return list(selected)
    number = class_number(of, classes, "--of")
    kept = [item for item in selected if item.label == number]
    if not kept:
        raise InfluenceError(
            f"none of the {len(selected):,} selected test examples has the label {classes[number]}",
            "without TEST the misclassified ones are used; 0: selects all test examples",
        )
    return kept


def verdict(influence: GroupInfluence, doubt: Doubt, unit: str) -> str:
    """Say in one sentence what `verdict_parts` says in two parts."""
    return ": ".join(verdict_parts(influence, doubt, unit))


def verdict_parts(influence: GroupInfluence, doubt: Doubt, unit: str) -> tuple[str, str]:
    """Say which group drives the errors; then its share of the harm, and how clear that is.

    Args:
        influence: the sums.
        doubt: of `GroupInfluence.doubt`.
        unit: of influence, such as `` nats``; empty for none.
    """
    total, names, count = influence.total(), influence.grouping.names, len(influence.tests)
    worst, what = int(total.order[0]), "this test example" if count == 1 else f"these {count:,} test examples"
    if not total.influence[worst] < 0:
        most = int(np.argmax(total.share))
        largest = f"{total.share[most]:.0%} of all harmful influence comes from {names[most]}"
        return f"no group as a whole is harmful to {what}", f"each helps at least as much as it harms; {largest}"
    loss = "its loss" if count == 1 else "their mean loss"
    now, less = float(np.mean([test.loss for test in influence.tests])), -float(total.influence[worst])
    # A loss cannot fall below zero: removing so many examples is not a small step.
    beyond = f" (it is {now:.3g} now: trust the ranking, not the number)" if unit and less > now else ""
    numbers = (
        f"without its {total.examples[worst]:,} examples {loss} would be about {less:.3g}{unit} lower{beyond}; "
        f"they have {total.share[worst]:.0%} of all harmful influence"
    )
    reasons = _reasons(doubt, worst, names)
    if reasons:
        return f"{names[worst]} is the most harmful group to {what}", f"{numbers}; likely, not certain: {reasons}"
    if doubt.first is None:
        return f"{names[worst]} drives {what}", f"{numbers}; one test example says little about others"
    resamples = f"first in {doubt.first[worst]:.0%} of 1,000 resamples of the test examples"
    return f"{names[worst]} drives {what}", f"{numbers}; {resamples}"


def retrained(influence: GroupInfluence, actual: Mapping[int, np.ndarray]) -> str:
    """Say which group is most harmful by retraining, and whether the estimate agrees.

    Args:
        influence: the sums.
        actual: the rise of each test loss without a group, by group.
    """
    names, worst = influence.grouping.names, int(influence.total().order[0])
    mean = {group: float(changes.mean()) for group, changes in actual.items()}
    really = min(mean, key=lambda group: mean[group])
    if really == worst:
        return f"retraining agrees: without {names[worst]} the mean loss changes by {mean[worst]:+.3g}"
    rest = f", without {names[worst]} by {mean[worst]:+.3g}" if worst in mean else ""
    return (
        f"retraining disagrees: without {names[really]} the mean loss changes by {mean[really]:+.3g}{rest}; removing a "
        "large or unusual group is more than a first-order step: trust the column actual"
    )


def _reasons(doubt: Doubt, worst: int, names: Sequence[str]) -> str:
    """Say why it is not clear that a group drives the errors; empty if it is."""
    reasons = []
    if doubt.first is not None and doubt.first[worst] < CLEAR:
        others = np.where(np.arange(len(names)) == worst, -1, doubt.first)
        rival = int(others.argmax())
        reasons.append(
            f"first in {doubt.first[worst]:.0%} of 1,000 resamples of the test examples, "
            f"{names[rival]} in {doubt.first[rival]:.0%}"
        )
    if doubt.harmful is not None and doubt.harmful[worst] < CLEAR:
        reasons.append(f"harmful in {doubt.harmful[worst]:.0%} of the resamples")
    if doubt.by_chance > BY_CHANCE:
        reasons.append(f"the worst of random groups of these sizes is as harmful in {doubt.by_chance:.0%} of the draws")
    return "; ".join(reasons)
