"""The first screen of a ranking of many test examples: what hurts most of them, and which classes are confused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest

import numpy as np

from influence_cli.errors import counted
from influence_cli.influence.example_facts import TestFacts, TrainingFacts
from influence_cli.influence.test_selection import Selected
from influence_cli.pages.doubts import Doubts
from influence_cli.pages.parts import SHOWN, WRONG, example_thumbnail, path_fact, test_key
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankedGroup
from influence_cli.ranking.sinks import KeptInfluence, is_wanted
from influence_cli.report.html import Card, CardRow, PageTable, Section

# Test examples that are open on a page of many, training images on its first screen, and small pictures behind.
OPEN, MOST, REST = 10, 20, 200
# How many of the most harmful images of each test example count as those that hurt it.
WORST = 10
# Fewer test examples than these have no overview: each can be looked at.
MANY = 3


def spread_over_classes(selected: Sequence[Selected]) -> set[int | str] | None:
    """Choose the test examples that get a gallery: all of a few, otherwise ten spread over their labels.

    Args:
        selected: all test examples, in order.

    Returns:
        The keys of the chosen ones (`test_key`), the first one among them; None for all of them.
    """
    if len(selected) <= SHOWN:
        return None
    by_label: dict[int | None, list[Selected]] = {}
    for item in selected:
        by_label.setdefault(item.label, []).append(item)
    # One of each label, then a second one of each, and so on.
    turns = chain.from_iterable(zip_longest(*by_label.values()))
    keys = dict.fromkeys(test_key(item.index, item.file) for item in turns if item is not None)
    return set(list(keys)[:OPEN])


class Collected:
    """Takes the groups of a ranking as they come: counts over all of them, and holds those that the page shows.

    Attributes:
        everyone: all test examples.
        shown: those with a gallery (for an aggregate all of the first group).
        group: the lists of these: one per test example, a single one for an aggregate.
        held: all influence on these.
        hurts: int64 [n], of how many test examples each training example is among the `WORST` most harmful.
    """

    def __init__(self, tests: int, training: int, wanted: set[int | str] | None = None) -> None:
        """Begin a page.

        Args:
            tests: how many galleries at most.
            training: training examples, n.
            wanted: of `spread_over_classes`.
        """
        self.everyone: list[TestFacts] = []
        self.group = RankedGroup([], [])
        self.held = KeptInfluence(tests, training, wanted)
        self.hurts = np.zeros(training, dtype=np.int64)
        self._tests, self._wanted = tests, wanted

    def take(self, group: RankedGroup) -> None:
        """Take the next group of `rank_training`."""
        self.everyone += group.tests
        for strongest in group.strongest:
            self.hurts[strongest.harmful[:WORST]] += 1
        if len(group.strongest) != len(group.tests):  # a mean
            self.group = group
            return
        for test, strongest in zip(group.tests, group.strongest, strict=True):
            if len(self.group.tests) < self._tests and is_wanted(test, self._wanted):
                self.group.tests.append(test)
                self.group.strongest.append(strongest)


def errors(tests: Sequence[TestFacts]) -> list[TestFacts]:
    """Give the test examples that the model misclassifies."""
    return [test for test in tests if test.label is not None and test.predicted != test.label]


def confusions(tests: Sequence[TestFacts], classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """Count (label, class that it was taken for) over the errors, the most frequent first."""
    pairs = Counter((test.label, test.predicted) for test in errors(tests) if test.label is not None)
    return [(classes[label], classes[predicted], count) for (label, predicted), count in pairs.most_common()]


def overview_section(prepared: Prepared, facts: TrainingFacts, collected: Collected, doubts: Doubts) -> Section:
    """Show the training images that hurt the most test examples, above the classes that are confused."""
    what, many = named(collected.everyone), len(collected.everyone)
    pairs = confusions(collected.everyone, prepared.task.classes)
    table = PageTable(
        "Classes confused",
        ("label", "taken for", "errors"),
        tuple((label, predicted, f"{count:,}") for label, predicted, count in pairs),
    )
    return Section(
        f"Training images that hurt the most {what}",
        None,
        (
            CardRow(
                "",
                f"each is among the {WORST} most harmful of so many of the {many:,} {what}",
                tuple(_hurting(prepared, facts, int(row), collected, doubts) for row in most_hurting(collected)),
            ),
        ),
        table=table if pairs else None,
    )


def most_hurting(collected: Collected) -> np.ndarray:
    """Find the rows of the training examples that hurt the most test examples, ties in their order."""
    order = np.argsort(-collected.hurts, kind="stable")[:MOST]
    return np.asarray(order[collected.hurts[order] > 0])


def named(tests: Sequence[TestFacts]) -> str:
    """Call test examples errors where all of them are."""
    return "errors" if len(errors(tests)) == len(tests) else "test images"


def _hurting(prepared: Prepared, facts: TrainingFacts, row: int, collected: Collected, doubts: Doubts) -> Card:
    split, classes, index = prepared.task.train, prepared.task.classes, int(facts.indices[row])
    label = classes[int(facts.labels[row])]
    return Card(
        image=example_thumbnail(split, index),
        alt=f"training example {index}, labelled {label}",
        title=label,
        facts=(
            ("hurts", counted(int(collected.hurts[row]), named(collected.everyone).removesuffix("s"))),
            ("predicted", classes[int(facts.predicted[row])]),
            ("index", str(index)),
            *path_fact(split, index),
        ),
        tone="harmful",
        group=label,
        mark=WRONG if doubts.wrong[row] else "",
    )


def rest_section(prepared: Prepared, collected: Collected) -> Section | None:
    """Show the test examples without a gallery as small pictures, folded; None if there are none."""
    shown = {test_key(test.index, test.path) for test in collected.group.tests}
    rest = [test for test in collected.everyone if test_key(test.index, test.path) not in shown]
    if not rest:
        return None
    cards = tuple(_small(prepared, test) for test in rest[:REST] if test.index is not None)
    return Section(
        f"The other {named(collected.everyone)}",
        None,
        (CardRow("", "influence rank INDEX explains one", cards),),
        folded=True,
    )


def _small(prepared: Prepared, test: TestFacts) -> Card:
    split, classes, index = prepared.task.test or prepared.task.train, prepared.task.classes, test.index or 0
    label = "unknown" if test.label is None else classes[test.label]
    wrong = test.label is not None and test.predicted != test.label
    return Card(
        image=example_thumbnail(split, index),
        alt=f"test example {index}, labelled {label}, predicted {classes[test.predicted]}",
        title=label,
        facts=(
            ("taken for" if wrong else "predicted", classes[test.predicted]),
            ("loss", f"{test.loss:.3g}"),
            ("index", str(index)),
            *path_fact(split, index),
        ),
        tone="plain",
        group=label,
    )
