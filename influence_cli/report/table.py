"""Turns rows into a table for people: coloured and fitted on a terminal, plain and never cut anywhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence_cli.errors import near_path, printable

Scalar = str | int | float | bool | None
Row = dict[str, Scalar]

# The columns that describe one example. A terminal shows them once above the rows, which then fit 80 columns.
TEST_COLUMNS = ("test", "test_path", "test_label", "test_predicted")
TRAINING_COLUMNS = ("index", "path", "label", "predicted", "loss")
# Effects on a loss, which are shown with their sign.
SIGNED = ("influence", "estimated", "actual", "difference", "difference_low", "difference_high")
EFFECT_STYLE = {"helpful": "green", "harmful": "red"}
NULL = "–"
# Rows of a terminal table that are laid out at a time.
CHUNK = 500


def word(value: Scalar) -> str:
    """Write a value as every text format does: null is empty, floats round-trip."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _cell(value: Scalar, column: str) -> str:
    if value is None:
        return NULL
    if isinstance(value, float):
        if value == 0:
            return "0"
        return format(value, "+#.4g" if column in SIGNED else "#.4g").rstrip(".")
    if column.endswith("path"):
        return printable(str(near_path(Path(word(value)))))
    return printable(word(value))


def _is_numeric(rows: Sequence[Row], column: str) -> bool:
    values = [row[column] for row in rows if row[column] is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def plain_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Align rows with spaces, as wide as they are.

    Args:
        rows: at least one, each with the columns.
        columns: in this order, under their names.

    Returns:
        A heading and one line per row.
    """
    lines = [list(columns), *([_cell(row[column], column) for column in columns] for row in rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    right = [_is_numeric(rows, column) for column in columns]

    def align(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, to_right in zip(cells, widths, right, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if to_right else cell + space)
        return "  ".join(padded).rstrip() + "\n"

    return "".join(map(align, lines))


def terminal_table(rows: Sequence[Row], columns: Sequence[str], stream: TextIO) -> Iterator[str]:
    """Lay out rows for a terminal: fitted to its width, in colour unless NO_COLOR is set.

    What all rows of a test example share is shown once above them.

    Args:
        rows: at least one, each with the columns.
        columns: in this order.
        stream: the terminal. Only its width and colours are read; nothing is written to it.

    Yields:
        Lines with the terminal's colour codes, some hundred rows at a time: Rich lays out 1,000 rows per second.
    """
    console = Console(file=stream, highlight=False, width=_width(stream))
    blocks = _blocks(rows)
    shared = [column for column in columns if column in blocks[0][0]]
    body = [column for column in columns if column not in shared]
    numeric = {column for column in body if _is_numeric(rows, column)}
    gap, widths = _fit(rows, body, numeric, console.width)
    room = console.width
    # If it is still too wide, the terminal wraps the lines, and nothing is cut.
    console.width = max(room, sum(widths.values()) + gap * len(widths))
    for number, (head, members) in enumerate(blocks):
        with console.capture() as capture:
            if number:
                console.print()
            if shared:
                known = [column for column in shared if head[column] is not None]
                console.print(_heading(head, known, room), soft_wrap=True)
        yield capture.get()
        for start in range(0, len(members), CHUNK):
            table = _rich_table(members[start : start + CHUNK], body, numeric, gap, widths)
            table.show_header = start == 0
            with console.capture() as capture:
                console.print(table)
            yield capture.get()


def _width(stream: TextIO) -> int | None:
    """Ask the terminal itself: Rich asks the numbers 0 to 2. None for what Rich takes, such as COLUMNS."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def _blocks(rows: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    """Split rows into runs of one test example or (``rank --train``) of one training example, if the runs are long."""
    blocks: list[tuple[Row, list[Row]]] = []
    for shared in (TEST_COLUMNS, TRAINING_COLUMNS, ()):

        def head(row: Row, shared: tuple[str, ...] = shared) -> Row:
            return {column: row[column] for column in shared if column in row}

        blocks = [(key, list(members)) for key, members in groupby(rows, head)]
        if 2 * len(blocks) <= len(rows):
            break
    return blocks


def _fit(rows: Sequence[Row], columns: Sequence[str], numeric: set[str], room: int) -> tuple[int, dict[str, int]]:
    """Find the gap and the widths that fit: first paths shrink, then the gap, then names. Numbers never shrink."""
    heading = {column: max(cell_len(part) for part in _spoken(column).split()) for column in columns}
    natural = {
        column: max(heading[column], *(cell_len(_cell(row[column], column)) for row in rows)) for column in columns
    }
    widths = natural
    for gap, path, name in ((2, 16, None), (1, 16, None), (1, 8, 8)):
        widths = dict(natural)
        least = {}
        for column in columns:
            limit = path if _is_path(column) else None if column in numeric else name
            least[column] = natural[column] if limit is None else min(natural[column], max(limit, heading[column]))
        while sum(widths.values()) + gap * (len(columns) - 1) > room:
            wide = [column for column in columns if widths[column] > least[column]]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
        else:
            return gap, widths
    return 1, widths


def _heading(head: Row, columns: Sequence[str], room: int) -> Text:
    """Give in one line what the rows of a block share."""
    cells = {column: _cell(head[column], column) for column in columns}
    # A path needs no name before it.
    names = {column: "" if _is_path(column) else f"{_spoken(column)} " for column in columns}
    excess = sum(cell_len(names[column] + cells[column]) + 3 for column in columns) - 3 - room
    for column in columns:
        if _is_path(column) and excess > 0:
            cells[column] = _shorten(cells[column], max(16, cell_len(cells[column]) - excess))
    return Text(" · ").join(Text.assemble((names[column], "dim"), (cells[column], "bold")) for column in columns)


def _rich_table(
    rows: Sequence[Row], columns: Sequence[str], numeric: set[str], gap: int, widths: Mapping[str, int]
) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(
            _spoken(column),
            justify="right" if column in numeric else "left",
            overflow="fold",
            width=widths[column],
            vertical="top",
        )
    for row in rows:
        cells = []
        for column in columns:
            text = _cell(row[column], column)
            if _is_path(column):
                text = _shorten(text, widths[column])
            style = EFFECT_STYLE.get(str(row.get("effect")), "") if column in ("effect", "influence") else ""
            cells.append(Text(text, style="dim" if row[column] is None else style))
        table.add_row(*cells)
    return table


def _spoken(column: str) -> str:
    # A long heading can wrap at a space; at an underscore it would be cut.
    return column.replace("_", " ")


def _is_path(column: str) -> bool:
    return column == "path" or column.endswith("_path")


def _shorten(text: str, width: int) -> str:
    """Cut the middle of a path: the end, the file name, matters most."""
    if cell_len(text) <= width:
        return text
    start = (width - 1) // 3
    end = width - 1 - start
    return f"{set_cell_size(text, start)}…{set_cell_size(text[::-1], end)[::-1]}"
