"""From two compared results to a page: a table, and the two lists side by side. Drawing it is report/html.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.compare import CHANGES, VALUES, Comparison, Pair
from influence_cli.errors import InfluenceError, near_path
from influence_cli.report.html import Card, Page, Section, Table, Tone, thumbnail
from influence_cli.report.html import Row as CardRow
from influence_cli.report.table import Row
from influence_cli.report_pages import command_line
from influence_cli.result_files import Result

if TYPE_CHECKING:
    from influence_cli.commands.session import Session
    from influence_cli.config import DataConfig
    from influence_cli.data import Split

# Lists with images on one page, places of each that both have, and places in all lists together that only one has.
LISTS, PLACES, CHANGED = 20, 50, 500

Picture = Callable[[Row], str | None]


@dataclass(frozen=True)
class _Item:
    """Which columns describe what is listed: training examples, or the test examples of `rank --train`."""

    word: str
    index: str
    path: str
    label: str
    predicted: str | None


_TRAINING = _Item("example", "index", "path", "label", None)
_TEST = _Item("test example", "test", "test_path", "test_label", "test_predicted")


def compare_page(
    session: Session, results: tuple[Result, Result], comparisons: Sequence[Comparison], config: Path
) -> Page:
    """Lay out a comparison: what entered and left by class, then either list in a column of its own.

    Args:
        session: of the command.
        results: the two that were compared.
        comparisons: list by list.
        config: names the data set where the results name no files.

    Raises:
        InfluenceError: a file that a result names is not there, or there is no image to be had.
    """
    a, b = results
    item = _TEST if any(found.train is not None for found in comparisons) else _TRAINING
    shown = comparisons[:LISTS]
    # What has changed is what the page is for, so it is cut only where the page would grow too large for a browser.
    changed = max(PLACES, CHANGED // max(len(shown), 1))
    lists = [_rows(found, changed) for found in shown]
    picture = _pictures(results, [row for rows in lists for _, pairs in rows for _, row, _ in pairs], item, config)
    sections = []
    for found, rows in zip(shown, lists, strict=True):
        cards = (
            CardRow(
                heading, "", tuple(_card(pair, row, other, VALUES[a.kind], item, picture) for pair, row, other in own)
            )
            for heading, own in rows
        )
        sections.append(Section(_heading(found), None, tuple(cards), columns=True))
    notes = []
    if len(comparisons) > LISTS:
        notes.append(f"{len(comparisons) - LISTS:,} further lists are in the rows, not on this page.")
    for limit, changes, what in ((PLACES, ("kept",), "were kept"), (changed, CHANGES[1:], "entered or left")):
        if any(found.count(change) > limit for found in shown for change in changes):
            notes.append(f"Of each list the first {limit:,} that {what} are shown; the rows of the result have all.")
    if all(not found.count(change) for found in shown for change in CHANGES[1:]):
        notes.append("Nothing entered and nothing left.")
    return Page(
        title="influence compare",
        sentence=f"Two results of influence {a.kind}: A is {a.path}, B is {b.path}; {session.seconds:.1f} s.",
        meaning=(
            "Kept: among the first of both lists. Entered: only among the first of B. Left: only among the first of A.",
            "The rank correlation (Spearman) is of the values of all that both lists have; 1 is the same order.",
        ),
        classes=_class_table(comparisons, item),
        sections=tuple(sections),
        histogram=None,
        charts=(),
        tables=(_table(comparisons),),
        notes=tuple(notes),
        command=command_line(),
        config="",
    )


def _rows(found: Comparison, changed: int) -> list[tuple[str, list[tuple[Pair, Row, Row | None]]]]:
    """Give rows of A and B in turn, so that they stand side by side: what left and entered, then what was kept.

    Args:
        found: a comparison.
        changed: how many that left, and that entered, at most.

    Returns:
        A heading and the pairs of each row, with the row of its own list and of the other; two empty ones are left out.
    """

    def of(change: str, second: bool, most: int) -> list[tuple[Pair, Row, Row | None]]:
        own = [
            (pair, row, other)
            for pair in found.pairs
            if pair.change == change
            for row, other in [(pair.b, pair.a) if second else (pair.a, pair.b)]
            if row is not None
        ]
        return sorted(own, key=lambda place: int(place[1]["rank"] or 0))[:most]

    left, entered = of("left", False, changed), of("entered", True, changed)
    kept = [of("kept", second, PLACES) for second in (False, True)]
    rows = [("Left: only in A", left), ("Entered: only in B", entered)] if left or entered else []
    return [*rows, ("Kept: in A", kept[0]), ("Kept: in B", kept[1])] if kept[0] else rows


def _heading(found: Comparison) -> str:
    test = found.test if found.test is not None else found.test_path and near_path(Path(found.test_path))
    name = "" if test is None else f"Test example {test}: "
    if found.train is not None:
        name = f"Training example {found.train}: test examples for which it is "
    return (
        f"{name}{f'most {found.effect}' if found.effect else 'the most suspicious labels'}, {found.overlap:.0%} in both"
    )


def _card(pair: Pair, row: Row, other: Row | None, value: str, item: _Item, picture: Picture) -> Card:
    """Show a place of one list, and where the same stands in the other."""
    label, path = _label(row, item), row.get(item.path)
    elsewhere = "not listed" if other is None else f"place {other['rank']}"
    if other is not None and other.get("effect") != row.get("effect"):
        elsewhere += f" of the {other.get('effect')}"
    relabelled = other is not None and _label(other, item) != label
    tones: dict[str, Tone] = {"kept": "plain", "entered": "entered", "left": "left"}
    return Card(
        image=picture(row),
        alt=f"{item.word} {row.get(item.index)}, labelled {label}",
        title=f"{row['rank']}. {label}",
        facts=(
            (value, f"{row[value]:.4g}"),
            ("in the other", elsewhere),
            *((("its label there", _label(other, item)),) if other is not None and relabelled else ()),
            *((("predicted", str(row[item.predicted])),) if item.predicted and row.get(item.predicted) else ()),
            *(((item.index, str(row[item.index])),) if row.get(item.index) is not None else ()),
            *((("path", str(near_path(Path(str(path))))),) if path is not None else ()),
        ),
        tone=tones[pair.change],
        group=label,
    )


def _label(row: Row, item: _Item) -> str:
    label = row.get(item.label)
    return "unknown" if label is None else str(label)


def _class_table(comparisons: Sequence[Comparison], item: _Item) -> Table:
    """Count kept, entered and left by label, in all lists."""
    counts: dict[str, dict[str, int]] = {}
    for found in comparisons:
        for pair in found.pairs:
            own = counts.setdefault(_label(pair.row, item), dict.fromkeys(CHANGES, 0))
            own[pair.change] += 1
    rows = tuple((label, *(f"{own[change]:,}" for change in CHANGES)) for label, own in sorted(counts.items()))
    return Table("Changes by label", ("label", *CHANGES), rows, "the label in B, in A where B does not list it")


def _table(comparisons: Sequence[Comparison]) -> Table:
    rows = tuple(
        (
            "–" if found.test is None else str(found.test),
            (found.test_path and str(near_path(Path(found.test_path)))) or "–",
            found.effect or "–",
            f"{found.top:,}",
            f"{found.overlap:.0%}",
            *(f"{found.count(change):,}" for change in CHANGES[1:]),
            "–" if found.correlation is None else f"{found.correlation:.3f}",
            f"{found.common:,}",
        )
        for found in comparisons
    )
    columns = ("test", "file", "effect", "first", "in both", *CHANGES[1:], "rank correlation", "of")
    return Table("List by list", columns, rows)


def _pictures(results: tuple[Result, Result], shown: Sequence[Row], item: _Item, config: Path) -> Picture:
    """Choose where images come from: the files that the results name, or the config's data set by position."""
    if all(row.get(item.path) is not None for result in results for row in result.rows):
        places = {id(row): at for row, at in _placed(results)}
        for row in shown:
            if not Path(str(row[item.path])).is_file():
                raise InfluenceError(
                    f"{places[id(row)]}: there is no image {row[item.path]} any more",
                    "run from where the images were, or leave out --report",
                )
        return lambda row: _of_file(Path(str(row[item.path])))
    from influence_cli.config import load_config
    from influence_cli.report_pages import example_thumbnail
    from influence_cli.task import load_split, load_splits

    try:
        loaded = load_config(config, ())
    except InfluenceError as error:
        raise InfluenceError(
            f"these results name no files, so --report needs the data set: {error.message}", error.hint
        ) from error
    # TEST examples are those of the training set where the config has no other.
    of_test = item is _TEST or {result.on for result in results} == {"test"}
    section = (loaded.test if of_test else None) or loaded.train
    if section is loaded.train:
        split = load_split(loaded, "train", section)
        classes = split.classes
    else:
        train, test = load_splits(loaded)
        split, classes = test or train, train.classes
    _check_labels(results, item, split, section, classes, config)
    return lambda row: example_thumbnail(split, int(row[item.index] or 0)) if row[item.index] is not None else None


def _check_labels(
    results: tuple[Result, Result],
    item: _Item,
    split: Split,
    section: DataConfig,
    classes: Sequence[str] | None,
    config: Path,
) -> None:
    """Refuse a data set whose labels are not those of the results: its images at these positions are others.

    A result from before ``labels`` in the config has the labels of the data set itself, which is right too.
    """
    from influence_cli.task import source_labels

    known = [split.labels] if section.labels is None else [split.labels, source_labels(split)]

    def name(number: int) -> str:
        return classes[number] if classes is not None and 0 <= number < len(classes) else str(number)

    for row, place in _placed(results):
        index, label = row[item.index], row.get(item.label)
        if not isinstance(index, int) or label is None:
            continue
        names = [name(int(labels[index])) for labels in known] if 0 <= index < len(split.labels) else []
        if str(label) not in names:
            there = f"labelled {names[0]}" if names else "not there"
            other = "another data set" + ("" if split.name == "test" else " (or of --on test)")
            raise InfluenceError(
                f"{place}: {item.word} {index} is labelled {label}, in the {split.name} data set of "
                f"{near_path(config)} it is {there}: these results are of {other}",
                "name the config of their data set with -c, or leave out --report",
            )


def _placed(results: tuple[Result, Result]) -> Iterator[tuple[Row, str]]:
    for result in results:
        yield from zip(result.rows, result.places, strict=True)


def _of_file(path: Path) -> str | None:
    from influence_cli.image_files import open_image

    try:
        return thumbnail(open_image(path))
    except InfluenceError:
        return None
