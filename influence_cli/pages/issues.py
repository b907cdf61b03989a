"""From issues to a page: the kinds with counts, the worst images of each, properties and slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from influence_cli.inspection.issues import KINDS, Issue, Issues
from influence_cli.model.task import Task
from influence_cli.pages.duplicates import duplicate_sections, leak_text
from influence_cli.pages.parts import config_text, example_thumbnail, path_fact, sentence
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section
from influence_cli.results.issue_rows import NEXT, counted_in
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session

# Images of a kind, groups of copies, and rows of a table on the page.
IMAGES, GROUPS, ROWS = 24, 8, 50
MEANING = {
    "mislabel": "the label is probably wrong, judged by evidence that has not seen it",
    "leak": "a test image that is in the training set as well",
    "duplicate": "a copy of an image of the same set",
    "off topic": "far from every class in the network's features",
    "broken": "cannot be read",
    "blank": "one colour",
    "dark": "hardly any light",
    "bright": "hardly anything but white",
    "blurred": "no sharp edge, unlike the others",
    "odd size": "much larger or smaller than the others",
    "odd shape": "much longer in one direction than the others",
    "odd mode": "grey among colours, or another mode of file",
    "shortcut": "a property of the files that tells the label",
    "weak slice": "images of a class that the model gets wrong more often",
}


def issues_page(session: Session, tasks: Sequence[Task], result: Issues) -> Page:
    """Lay out the kinds, the worst images of each, every property, and the slices."""
    classes = tasks[0].classes
    sections = [
        Section(
            f"{kind[0].upper()}{kind[1:]}: {MEANING[kind]}",
            None,
            (CardRow(f"{len(issues):,} in all", "the worst first", _cards(result, issues, classes)),),
        )
        for kind, issues in result.by_kind.items()
        if issues and issues[0].index is not None and kind not in ("leak", "duplicate")
    ]
    leak = leak_text(result.duplicates)
    return Page(
        title="influence issues",
        sentence=sentence(session, tasks, []),
        meaning=(
            "One line per kind. An image can be of several kinds. Thresholds are cautious: what is common in this data "
            "set is its style, and no issue.",
            *([leak] if leak else []),
        ),
        classes=PageTable(
            "Kinds of issues",
            ("kind", "train", "test", "what it is", "next"),
            tuple(
                (
                    kind,
                    *(
                        ("–" if (n := counted_in(result, kind, name)) is None else f"{n:,}")
                        for name in ("train", "test")
                    ),
                    MEANING[kind],
                    NEXT.get(kind, "") if result.by_kind.get(kind) else "",
                )
                for kind in KINDS
            ),
        ),
        sections=(*sections, *duplicate_sections(result.duplicates, classes, GROUPS)),
        histogram=None,
        charts=(),
        tables=(_properties(result, classes), _slices(result, classes)),
        notes=tuple(f"{kind} was not looked for: {why}" for kind, why in result.missing.items()),
        command=command_line(),
        config=config_text(session),
    )


def _cards(result: Issues, issues: Sequence[Issue], classes: Sequence[str]) -> tuple[Card, ...]:
    cards = []
    for issue in issues[:IMAGES]:
        split, index = result.splits[issue.split], int(issue.index or 0)
        label = int(split.labels[index])
        name = classes[label] if label >= 0 else "unknown"
        cards.append(
            Card(
                image=example_thumbnail(split, index),
                alt=f"{split.title(index)}, labelled {name}",
                title=name,
                facts=(
                    ("why", issue.reason),
                    ("set", issue.split),
                    ("index", str(index)),
                    *path_fact(split, index),
                ),
                tone="suspect",
                group=name,
            )
        )
    return tuple(cards)


def _properties(result: Issues, classes: Sequence[str]) -> PageTable:
    rows = tuple(
        (
            one.name,
            f"{one.accuracy:.1%}",
            f"{one.guessing:.1%}",
            ", ".join(f"{classes[label]} {one.recall[label]:.0%}" for label in one.classes),
            "yes" if one.is_one else "no",
        )
        for one in result.shortcuts[:ROWS]
    )
    return PageTable(
        "Labels by properties of the files",
        ("property", "right", "by guessing", "best classes", "shortcut"),
        rows,
        "right: labels told from this property alone, out of sample, every class counted alike. A property that tells "
        "much may be learnt in the place of what the images show.",
    )


def _slices(result: Issues, classes: Sequence[str]) -> PageTable:
    rows = tuple(
        (
            classes[one.label],
            one.text or "the whole class",
            f"{len(one.rows):,}",
            f"{one.accuracies[0]:.1%}",
            f"{one.accuracies[1]:.1%}",
            f"{one.chance:.2g}",
        )
        for one in result.slices[:ROWS]
    )
    return PageTable(
        f"Where the model is worst ({result.sliced} examples)",
        ("class", "images", "count", "right", "right of the rest", "by chance"),
        rows,
        "The rest: the other images of the class; of a whole class, the other classes. by chance: how often so many "
        "errors come by chance, corrected for the number of slices.",
    )
