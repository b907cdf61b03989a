"""How many labels are wrong, in words and tables: as a range without decisions, measured by decisions on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.errors import near_path
from influence_cli.mislabels.find import Mislabels
from influence_cli.report.html import PageTable
from influence_cli.results.label_records import ReviewedRecord, SampledRecord, WrongRecord

if TYPE_CHECKING:
    from influence_cli.mislabels.sample import WrongCount

# The next images of the list, of which it is said how many are wrong.
NEXT = 50


def reviewed_record(result: Mislabels, files: Sequence[Path]) -> ReviewedRecord | None:
    """Count what was decided, and what is expected of the next images; None where nothing was decided."""
    taught = result.taught
    if taught is None:
        return None
    first = result.score[result.order[:NEXT]]
    return ReviewedRecord(
        tuple(str(near_path(file)) for file in files),
        int((~np.isnan(taught.wrong)).sum()),
        int((taught.wrong == 1).sum()),
        int((taught.decided & np.isnan(taught.wrong)).sum()),
        int((~np.isnan(first)).sum()),
        float(np.nansum(first)),
    )


def sampled_record(result: Mislabels, classes: Sequence[str]) -> SampledRecord | None:
    """Give what follows from the decisions on a sample; None where there are none."""
    sampled = result.sampled
    if sampled is None:
        return None

    def noted(label: str | None, wrong: WrongCount) -> WrongRecord:
        return WrongRecord(label, wrong.count, wrong.low, wrong.high, wrong.of, wrong.decided)

    by_class = tuple(noted(classes[label], wrong) for label, wrong in sampled.by_class.items())
    return SampledRecord(sampled.drawn, noted(None, sampled.all), by_class, sampled.found, sampled.before, sampled.left)


def wrong_label_lines(result: Mislabels, reviewed: ReviewedRecord | None, sampled: SampledRecord | None) -> list[str]:
    """Say what was decided, and how many labels are wrong; nothing of what is not known."""
    lines = []
    if reviewed is not None:
        unsure = f", {reviewed.unsure:,} unsure" if reviewed.unsure else ""
        coming = f"; of the next {reviewed.next:,} about {reviewed.expected_wrong:,.0f} are" if reviewed.next else ""
        were = "was" if reviewed.wrong == 1 else "were"
        lines.append(f"{reviewed.reviewed:,} reviewed{unsure}, {reviewed.wrong:,} {were} wrong{coming}")
    if sampled is not None:
        lines += _sampled_lines(sampled)
    elif result.noise is not None and result.ways:
        lines.append(_range_line(result))
    return lines


def _sampled_lines(sampled: SampledRecord) -> list[str]:
    wrong = sampled.all
    drawn = f"{sampled.drawn:,} images drawn at random"
    if wrong.decided < sampled.drawn:
        drawn = (
            f"{wrong.decided:,} of {drawn}; the interval takes the {sampled.drawn - wrong.decided:,} that are not "
            "decided to be like those that are"
        )
    lines = [
        f"about {wrong.count:,.0f} of {wrong.of:,} labels are wrong ({wrong.count / wrong.of:.1%}; 95% interval "
        f"{wrong.low:,.0f} to {wrong.high:,.0f}), by {drawn}"
    ]
    before = f", after {sampled.found_before:,} before the sample was drawn" if sampled.found_before else ""
    return [*lines, f"{sampled.found:,} of them are found{before}; about {sampled.left:,} are left"]


def _range_line(result: Mislabels) -> str:
    low, high, n = min(result.ways.values()), max(result.ways.values()), len(result.order)
    rest = " that are not decided" if result.taught is not None else ""
    if not high:
        return f"almost none of the {n:,} labels{rest} is wrong by any estimate; the most suspicious come first"
    return (
        f"between {low:,} and {high:,} of {n:,} labels{rest} are wrong ({low / n:.1%} to {high / n:.1%}), by "
        f"{len(result.ways)} ways to estimate it; deciding a random sample measures it (--sample 100)"
    )


def class_table(sampled: SampledRecord | None) -> tuple[PageTable, ...]:
    """Show the number of wrong labels of the classes with enough decisions."""
    if sampled is None or not sampled.by_class:
        return ()
    rows = tuple(
        (str(each.label), f"{each.of:,}", str(each.decided), f"{each.count:.0f}", f"{each.low:.0f}", f"{each.high:.0f}")
        for each in sampled.by_class
    )
    return (
        PageTable(
            "Wrong labels by class",
            ("label", "examples", "decided", "wrong", "from", "to"),
            rows,
            "by the random sample, with 95% intervals; classes with enough decisions",
        ),
    )
