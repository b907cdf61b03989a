"""What the run file says about labels and copies: evidence, noise, issues, decisions, leaks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvidenceRecord:
    """The evidence about the labels: numbers by name, and whether the model has memorised its labels."""

    summary: dict[str, float]
    memorised: bool


@dataclass(frozen=True)
class NamedExample:
    """An example by its position, file and label."""

    index: int
    path: str | None
    label: str


@dataclass(frozen=True)
class ConfusedClasses:
    """Two classes that are mixed up, and how many labels in each direction."""

    classes: tuple[str, str]
    counts: tuple[int, int]


@dataclass(frozen=True)
class DataIssuesRecord:
    """Data issues beyond single labels."""

    duplicates: tuple[tuple[NamedExample, NamedExample], ...]
    near_duplicates: tuple[tuple[NamedExample, NamedExample], ...]
    outliers: tuple[NamedExample, ...]
    confused: tuple[ConfusedClasses, ...]


@dataclass(frozen=True)
class ExpectedPrecision:
    """The expected share of wrong labels among the first examples."""

    first: int
    expected: float


@dataclass(frozen=True)
class WrongLabels:
    """How many examples have one label but really belong to another class."""

    label: str
    true: str
    count: int


@dataclass(frozen=True)
class NoiseRecord:
    """The estimate of the label noise; joint[a][b] is the share of examples labelled a that are really b, or None.

    ``count`` and ``rate`` are the cut of the list; the estimate is the range of ``ways``, each a count.
    """

    rate: float
    count: int
    expected_precision: tuple[ExpectedPrecision, ...]
    pairs: tuple[WrongLabels, ...]
    classes: tuple[str, ...]
    joint: list[list[float]] | None
    low: int
    high: int
    ways: dict[str, int]


@dataclass(frozen=True)
class DecisionCounts:
    """How many decisions there are of each kind."""

    keep: int
    relabel: int
    drop: int
    unsure: int


@dataclass(frozen=True)
class RelabelledPair:
    """How many examples got one label instead of another."""

    label: str
    new_label: str
    count: int


@dataclass(frozen=True)
class LeakRecord:
    """Labelled test images that are training images as well: test accuracy with them, without them, and on them."""

    test_examples: tuple[int, ...]
    accuracy: float
    accuracy_without: float
    accuracy_on_them: float


@dataclass(frozen=True)
class DuplicatesRecord:
    """Groups of copies: images compared per split, groups by kind, training images that can be left out, the leak."""

    compared: tuple[int, ...]
    groups: int
    across_splits: int
    different_labels: int
    same_label: int
    superfluous: int
    leak: LeakRecord | None


@dataclass(frozen=True)
class ReviewedRecord:
    """What a person decided: how many labels, how many of them were wrong, and what is expected of the next ones."""

    files: tuple[str, ...]
    reviewed: int
    wrong: int
    unsure: int
    next: int
    expected_wrong: float


@dataclass(frozen=True)
class WrongRecord:
    """How many of some labels are wrong by a sample, with the 95% interval; ``label`` is None for all of them."""

    label: str | None
    count: float
    low: float
    high: float
    of: int
    decided: int


@dataclass(frozen=True)
class SampledRecord:
    """What follows from the decisions on a sample: the number of wrong labels, of all and by class; what is found."""

    drawn: int
    all: WrongRecord
    by_class: tuple[WrongRecord, ...]
    found: int
    found_before: int
    left: int
