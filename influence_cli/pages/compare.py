"""From two compared results to a page: a table, and the two lists side by side. report/html.py draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.errors import InfluenceError, near_path
from influence_cli.pages.distances import MEANING, distance_section, distance_table, drawn_note
from influence_cli.pages.parts import capitalised
from influence_cli.pictures import thumbnail
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section, Tone
from influence_cli.report.table import Row, Scalar
from influence_cli.results.compare import CHANGES, VALUES, Comparison, Pair, labels_changed, quality_change
from influence_cli.results.distances import Distances, Spread
from influence_cli.results.images import TEST, TRAINING, Item, Reader, image_reader
from influence_cli.results.reader import Result
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session

# Lists with images on one page, places per list that both have, and places in all lists together that only one has.
LISTS, PLACES, CHANGED = 20, 50, 500

Picture = Callable[[Row], str | None]


def compare_page(
    session: Session,
    results: tuple[Result, Result],
    comparisons: Sequence[Comparison],
    config: Path,
    distances: Distances | None = None,
) -> Page:
    """Lay out a comparison: what entered and left per class, then each list in its own column.

    Args:
        session: of the command.
        results: the two that were compared.
        comparisons: list by list.
        config: names the data set where the results name no files.
        distances: of `--distance`; drawn against influence above the lists of each test example.

    Raises:
        InfluenceError: a file that a result names is missing, or there is no image to show.
    """
    a, b = results
    item = TEST if any(comparison.train is not None for comparison in comparisons) else TRAINING
    shown = comparisons[:LISTS]
    # The page is there to show what changed, so changes are cut only where the page would become too large.
    changed = max(PLACES, CHANGED // max(len(shown), 1))
    lists = [_rows(comparison, changed) for comparison in shown]
    needed = [row for rows in lists for _, pairs in rows for _, row, _ in pairs]
    picture = _pictures(image_reader(results, needed, item, config, "--report"))
    sections = []
    scattered: dict[Scalar, tuple[Spread, Spread]] = {} if distances is None else dict(distances.spreads)
    if scattered:
        rows_of_tests = [pair[1].row for pair in scattered.values()]
        test_picture = _pictures(image_reader(results, rows_of_tests, TEST, config, "--report"))
    for comparison, rows in zip(shown, lists, strict=True):
        spreads = scattered.pop(comparison.key, None)
        if spreads is not None:
            sections.append(distance_section(results, spreads, test_picture))
        cards = (
            CardRow(
                heading, "", tuple(_card(pair, row, other, VALUES[a.kind], item, picture) for pair, row, other in pairs)
            )
            for heading, pairs in rows
        )
        sections.append(Section(_heading(comparison), None, tuple(cards), columns=True))
    notes = [] if distances is None else list(drawn_note(distances))
    if len(comparisons) > LISTS:
        notes.append(f"{len(comparisons) - LISTS:,} more lists are in the rows of the result, not on this page.")
    for limit, changes, what in ((PLACES, ("kept",), "were kept"), (changed, CHANGES[1:], "entered or left")):
        if any(comparison.count(change) > limit for comparison in shown for change in changes):
            notes.append(f"The page shows the first {limit:,} per list that {what}; the rows of the result have all.")
    if all(not comparison.count(change) for comparison in shown for change in CHANGES[1:]):
        notes.append("Nothing has changed: nothing entered and nothing left.")
    return Page(
        title="influence compare",
        sentence=f"Two results of influence {a.kind}: A is {a.path}, B is {b.path}; {session.seconds:.1f} s.",
        meaning=(
            "kept: among the first of both lists. entered: only among the first of B. left: only among the first of A.",
            "The rank correlation (Spearman) is over the values of all examples that both lists have; 1 is the same "
            "order.",
            *(MEANING if distances is not None else ()),
        ),
        classes=_class_table(comparisons, item),
        sections=tuple(sections),
        histogram=None,
        charts=(),
        tables=(_table(comparisons), *(() if distances is None else (distance_table(distances),))),
        notes=tuple(notes),
        command=command_line(),
        config="",
        answer=_answer(comparisons),
        lead=_lead(results, comparisons),
    )


def _answer(comparisons: Sequence[Comparison]) -> str:
    """Say how much of the lists is new."""
    first, many = comparisons[0], len(comparisons)
    gone, new = (sum(comparison.count(change) for comparison in comparisons) for change in ("left", "entered"))
    if first.effect is None:
        suspects = "the first suspect" if first.top == 1 else f"the first {first.top:,} suspects"
        return f"Of {suspects}, {gone:,} {'is' if gone == 1 else 'are'} no longer suspicious; {new:,} new"
    mean = sum(comparison.overlap for comparison in comparisons) / many
    where = "" if many == 1 else f" (mean of {many:,} lists)"
    return f"{mean:.0%} of the strongest images are the same in both results{where}"


def _lead(results: tuple[Result, Result], comparisons: Sequence[Comparison]) -> str:
    """Say whether it helped: on the test set, and how many labels were changed. What is not known is not said."""
    a, b = results
    first, change, said = comparisons[0], quality_change(a, b), []
    if first.effect is None:
        fixed = labels_changed(first)
        of = f"of the first {first.top:,} that B still lists"
        said.append(f"{fixed or 'None'} {of} {'have' if fixed != 1 else 'has'} another label now.")
    if change is not None:
        said.append(f"{capitalised(change)}.")
    elif a.kind == "rank":
        said.append(
            "With influence rank misclassified -o FILE before and after, accuracy and loss are compared as well."
        )
    return " ".join(said)


def _rows(comparison: Comparison, changed: int) -> list[tuple[str, list[tuple[Pair, Row, Row | None]]]]:
    """Give rows of A and B alternately, so that they stand side by side: what left and entered, then what was kept.

    Args:
        comparison: a comparison.
        changed: how many that left, and that entered, at most.

    Returns:
        A heading and the pairs per row, each with its row in its own list and in the other. Empty rows are left out.
    """

    def of(change: str, *, second: bool, most: int) -> list[tuple[Pair, Row, Row | None]]:
        places = [
            (pair, row, other)
            for pair in comparison.pairs
            if pair.change == change
            for row, other in [(pair.b, pair.a) if second else (pair.a, pair.b)]
            if row is not None
        ]
        return sorted(places, key=lambda place: int(place[1]["rank"] or 0))[:most]

    left, entered = of("left", second=False, most=changed), of("entered", second=True, most=changed)
    kept = [of("kept", second=second, most=PLACES) for second in (False, True)]
    kind = "suspicious" if comparison.effect is None else comparison.effect
    gone, new = f"No longer {kind} (left: only in A)", f"Newly {kind} (entered: only in B)"
    rows = [(gone, left), (new, entered)] if left or entered else []
    return [*rows, ("In both lists (kept): A", kept[0]), ("In both lists (kept): B", kept[1])] if kept[0] else rows


def _heading(comparison: Comparison) -> str:
    test = (
        comparison.test
        if comparison.test is not None
        else comparison.test_path and near_path(Path(comparison.test_path))
    )
    name = "" if test is None else f"Test example {test}: "
    if comparison.train is not None:
        name = f"Training example {comparison.train}: test examples to which it is "
    kind = f"most {comparison.effect}" if comparison.effect else "the most suspicious labels"
    return f"{name}{kind}, {comparison.overlap:.0%} in both"


def _card(pair: Pair, row: Row, other: Row | None, value: str, item: Item, picture: Picture) -> Card:
    """Show an example of one list, and its place in the other list."""
    label, path = _label(row, item), row.get(item.path)
    elsewhere = "not listed" if other is None else f"place {other['rank']}"
    if other is not None and other.get("effect") != row.get("effect"):
        elsewhere += f" of the {other.get('effect')} list"
    relabelled = other is not None and _label(other, item) != label
    tones: dict[str, Tone] = {"kept": "plain", "entered": "entered", "left": "left"}
    return Card(
        image=picture(row),
        alt=f"{item.word} {row.get(item.index)}, labelled {label}",
        title=f"{row['rank']}. {label}",
        facts=(
            (value, f"{row[value]:.4g}"),
            ("in the other list", elsewhere),
            *((("label there", _label(other, item)),) if other is not None and relabelled else ()),
            *((("predicted", str(row[item.predicted])),) if item.predicted and row.get(item.predicted) else ()),
            *(((item.index, str(row[item.index])),) if row.get(item.index) is not None else ()),
            *((("path", str(near_path(Path(str(path))))),) if path is not None else ()),
        ),
        tone=tones[pair.change],
        group=label,
    )


def _label(row: Row, item: Item) -> str:
    label = row.get(item.label)
    return "unknown" if label is None else str(label)


def _class_table(comparisons: Sequence[Comparison], item: Item) -> PageTable:
    """Count kept, entered and left per label, over all lists."""
    counts: dict[str, dict[str, int]] = {}
    for comparison in comparisons:
        for pair in comparison.pairs:
            count = counts.setdefault(_label(pair.row, item), dict.fromkeys(CHANGES, 0))
            count[pair.change] += 1
    # The labels with the most changes first.
    order = sorted(counts.items(), key=lambda item: (-item[1]["entered"] - item[1]["left"], item[0]))
    rows = tuple((label, *(f"{count[change]:,}" for change in CHANGES)) for label, count in order)
    return PageTable(
        "Changes by label", ("label", *CHANGES), rows, "label in B; label in A if B does not list the example"
    )


def _table(comparisons: Sequence[Comparison]) -> PageTable:
    rows = tuple(
        (
            "–" if comparison.test is None else str(comparison.test),
            (comparison.test_path and str(near_path(Path(comparison.test_path)))) or "–",
            comparison.effect or "–",
            f"{comparison.top:,}",
            f"{comparison.overlap:.0%}",
            *(f"{comparison.count(change):,}" for change in CHANGES[1:]),
            "–" if comparison.correlation is None else f"{comparison.correlation:.3f}",
            f"{comparison.common:,}",
        )
        for comparison in comparisons
    )
    columns = ("test", "file", "effect", "first", "in both", *CHANGES[1:], "rank correlation", "over")
    return PageTable("Changes by list", columns, rows)


def _pictures(read: Reader) -> Picture:
    """Make small pictures; None for what cannot be read or is not an image."""

    from influence_cli.data.images import as_picture

    def picture(row: Row) -> str | None:
        try:
            image = as_picture(read(row))
        except InfluenceError:
            return None  # the card stays without a picture
        return None if image is None else thumbnail(image)

    return picture
