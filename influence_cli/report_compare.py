"""From two compared results to a page: a table, and the two lists side by side. Drawing it is report/html.py's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# Lists with images, and places of each, on one page.
LISTS, PLACES = 20, 50

Picture = Callable[[Row], str | None]


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
    value = VALUES[a.kind]
    picture = _pictures(results, comparisons, config)
    sections = []
    for found in comparisons[:LISTS]:
        ranked = [pair for pair in found.pairs if pair.change != "entered"]
        first = sorted(ranked, key=lambda pair: _rank(pair.a))[:PLACES]
        second = sorted((pair for pair in found.pairs if pair.change != "left"), key=lambda pair: _rank(pair.b))[
            :PLACES
        ]
        rows = (
            CardRow(f"A: {a.path.name}", "", tuple(_card(pair, pair.a, pair.b, value, picture) for pair in first)),
            CardRow(f"B: {b.path.name}", "", tuple(_card(pair, pair.b, pair.a, value, picture) for pair in second)),
        )
        sections.append(Section(_heading(found), None, rows, columns=True))
    notes = []
    if len(comparisons) > LISTS:
        notes.append(f"{len(comparisons) - LISTS:,} further lists are in the rows, not on this page.")
    if any(found.top > PLACES for found in comparisons[:LISTS]):
        notes.append(f"Of each list the first {PLACES} are shown.")
    return Page(
        title="influence compare",
        sentence=f"Two results of influence {a.kind}: A is {a.path}, B is {b.path}; {session.seconds:.1f} s.",
        meaning=(
            "Kept: among the first of both lists. Entered: only among the first of B. Left: only among the first of A.",
            "The rank correlation (Spearman) is of the values of all that both results list; 1 is the same order.",
        ),
        classes=_class_table(comparisons),
        sections=tuple(sections),
        histogram=None,
        charts=(),
        tables=(_table(comparisons),),
        notes=tuple(notes),
        command=command_line(),
        config="",
    )


def _heading(found: Comparison) -> str:
    test = found.test if found.test is not None else found.test_path and near_path(Path(found.test_path))
    name = "" if test is None else f"Test example {test}: "
    return (
        f"{name}{f'most {found.effect}' if found.effect else 'the most suspicious labels'}, {found.overlap:.0%} in both"
    )


def _card(pair: Pair, row: Row | None, other: Row | None, value: str, picture: Picture) -> Card:
    """Show a place of one list, and where the same stands in the other."""
    if row is None:
        raise ValueError("a place that is not in the list")
    label, index = str(row["label"]), str(row["index"])
    elsewhere = "not listed" if other is None else f"place {other['rank']}"
    relabelled = other is not None and other["label"] != row["label"]
    tones: dict[str, Tone] = {"kept": "plain", "entered": "entered", "left": "left"}
    return Card(
        image=picture(row),
        alt=f"example {index}, labelled {label}",
        title=f"{row['rank']}. {label}",
        facts=(
            (value, f"{row[value]:.4g}"),
            ("in the other", elsewhere),
            *((("its label there", str(other["label"])),) if other is not None and relabelled else ()),
            ("index", index),
            *((("path", str(near_path(Path(str(row["path"]))))),) if row["path"] is not None else ()),
        ),
        tone=tones[pair.change],
        group=label,
    )


def _class_table(comparisons: Sequence[Comparison]) -> Table:
    """Count kept, entered and left by label, in all lists."""
    counts: dict[str, dict[str, int]] = {}
    for found in comparisons:
        for pair in found.pairs:
            own = counts.setdefault(str(pair.row["label"]), dict.fromkeys(CHANGES, 0))
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


def _rank(row: Row | None) -> int:
    return int(row["rank"] or 0) if row is not None else 0


def _pictures(results: tuple[Result, Result], comparisons: Sequence[Comparison], config: Path) -> Picture:
    """Choose where images come from: the files that the results name, or the config's data set by position."""
    if all(row["path"] is not None for result in results for row in result.rows):
        places = {id(row): at for result in results for row, at in zip(result.rows, result.places, strict=True)}
        shown = [row for found in comparisons[:LISTS] for pair in found.pairs for row in (pair.a, pair.b)]
        for row in shown:
            if row is not None and not Path(str(row["path"])).is_file():
                raise InfluenceError(
                    f"{places[id(row)]}: there is no image {row['path']} any more",
                    "run from where the images were, or leave out --report",
                )
        return lambda row: _of_file(Path(str(row["path"])))
    from influence_cli.config import load_config
    from influence_cli.report_pages import example_thumbnail
    from influence_cli.task import load_split

    try:
        loaded = load_config(config, ())
    except InfluenceError as error:
        raise InfluenceError(
            f"these results name no files, so --report needs the data set: {error.message}", error.hint
        ) from error
    split = load_split(loaded, "train", loaded.train)
    return lambda row: example_thumbnail(split, int(row["index"] or 0))


def _of_file(path: Path) -> str | None:
    from influence_cli.data import open_image

    try:
        return thumbnail(open_image(path))
    except InfluenceError:
        return None
