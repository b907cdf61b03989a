"""From groups of copies to a page: across splits, with different labels, with the same label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from influence_cli.errors import counted
from influence_cli.inspection.duplicates import Copies, Duplicates
from influence_cli.model.task import Task
from influence_cli.pages.parts import config_text, example_thumbnail, path_fact, sentence
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section
from influence_cli.results.duplicate_rows import kind_of
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session

# Groups of one kind on a page, and images of one group.
GROUPS, IMAGES = 60, 12
HEADINGS = {
    "across splits": "Across splits: test images that are training images as well",
    "different labels": "Different labels on copies of one image",
    "same label": "Copies with the same label",
}


def duplicates_page(session: Session, tasks: Sequence[Task], result: Duplicates) -> Page:
    """Lay out the groups of copies by kind, with what the leak is worth."""
    kinds = {kind: [group for group in result.groups if kind_of(group) == kind] for kind in HEADINGS}
    sections = duplicate_sections(result, tasks[0].classes, GROUPS)
    notes = tuple(
        f"{HEADINGS[kind]}: {len(groups) - GROUPS:,} more groups are not shown; influence duplicates --all lists them."
        for kind, groups in kinds.items()
        if len(groups) > GROUPS
    )
    return Page(
        title="influence duplicates",
        sentence=sentence(session, tasks, []),
        meaning=(
            "Images of one group have the same pixels (exact), or are one picture after a crop, a flip, another light "
            "or compression. similarity is the correlation of their whitened pixels, 1 for the same ones.",
            "out: a training image that the exclusion file leaves out. Of a group in the training set one image stays. "
            "Of a group with test images no training image stays, and the test set is not touched.",
            *([leak] if (leak := leak_text(result)) else []),
        ),
        classes=PageTable(
            "Groups by kind",
            ("kind", "groups", "exact", "training images", "test images"),
            tuple(_count(kind, groups) for kind, groups in kinds.items()),
        ),
        sections=sections,
        histogram=None,
        charts=(),
        tables=(),
        notes=notes,
        command=command_line(),
        config=config_text(session),
    )


def duplicate_sections(result: Duplicates, classes: Sequence[str], most: int) -> tuple[Section, ...]:
    """Give a section per kind of groups, of at most so many groups each."""
    sections = []
    for kind, heading in HEADINGS.items():
        rows = [
            _row(result, group, classes, number)
            for number, group in enumerate(result.groups, start=1)
            if kind_of(group) == kind
        ]
        if rows:
            sections.append(Section(heading, None, tuple(rows[:most])))
    return tuple(sections)


def leak_text(result: Duplicates) -> str:
    """Say what the leaked test images are worth; empty if there are none with a label."""
    leak = result.leak
    if leak is None or not len(leak.indices):
        return ""
    whole, without, on_them = leak.accuracies
    are = "is" if len(leak.indices) == 1 else "are"
    text = f"{counted(len(leak.indices), 'labelled test image')} {are} in the training set as well: test accuracy "
    if not leak.others[0]:
        return text + f"{whole:.2%}, all of it on such images."
    return text + f"{whole:.2%} with them, {without:.2%} without them ({on_them:.2%} on them)."


def _count(kind: str, groups: Sequence[Copies]) -> tuple[str, ...]:
    return (
        kind,
        f"{len(groups):,}",
        f"{sum(group.is_exact for group in groups):,}",
        f"{sum(int(group.inside(0).sum()) for group in groups):,}",
        f"{sum(int(group.inside(1).sum()) for group in groups):,}",
    )


def _row(result: Duplicates, group: Copies, classes: Sequence[str], number: int) -> CardRow:
    cards = []
    for at, place in list(enumerate(group.places))[:IMAGES]:
        split, label = result.splits[place.split], int(group.labels[at])
        name = classes[label] if label >= 0 else "unknown"
        cards.append(
            Card(
                image=example_thumbnail(split, place.index),
                alt=f"{split.title(place.index)}, labelled {name}",
                title=name,
                facts=(
                    ("set", split.name),
                    ("similarity", "exact" if group.exact[at] else f"{group.similarity[at]:.3f}"),
                    *(() if group.kept[at] else (("out", "yes"),)),
                    ("index", str(place.index)),
                    *path_fact(split, place.index),
                ),
                tone="plain" if group.kept[at] else "suspect",
                group=name,
            )
        )
    more = len(group.places) - len(cards)
    size = f"{counted(len(group.places), 'image')}, {'exact' if group.is_exact else 'near'} copies"
    return CardRow(f"Group {number}", size + (f", {more:,} not shown" if more else ""), tuple(cards))
