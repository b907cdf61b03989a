"""What `influence mislabels` notes of decisions, and of what follows from them."""

from __future__ import annotations

from dataclasses import dataclass


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
