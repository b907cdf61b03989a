"""Writes the rows of every command: a table for people; jsonl, json, csv, tsv and parquet for programs.

Each format is a generator of text (bytes for parquet) from checked rows. Only `write_rows` writes. All formats but the
table stream: a row is written before the next one is computed (parquet: in groups of 16,384 rows).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import IO, AnyStr, TextIO

from influence_cli.errors import InfluenceError, did_you_mean, require_extra
from influence_cli.report.dialects import DIALECTS
from influence_cli.report.parquet import parquet_bytes
from influence_cli.report.table import Row, Scalar, plain_table, terminal_table, word
from influence_cli.runtime.csv_cells import guarded
from influence_cli.runtime.outputs import unwritable

FORMATS = ("table", "jsonl", "json", "csv", "tsv", "parquet")
SUFFIXES = {
    ".txt": "table",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}

_TSV_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def choose_format(format: str | None, output: Path | None, *, terminal: bool, dialects: Sequence[str] = ()) -> str:
    """Decide how rows are written.

    Args:
        format: what ``--format`` names; it overrides the suffix.
        output: the file of ``-o``, whose suffix decides next.
        terminal: whether stdout is a terminal, which decides last.
        dialects: those of `DIALECTS` that the command's rows can be written in.

    Returns:
        One of `FORMATS` and ``dialects``.

    Raises:
        InfluenceError: the format or the suffix is unknown or does not fit these rows, parquet would go to a terminal,
            or its package is not installed.
    """
    chosen = _named_format(format, output, terminal=terminal, dialects=dialects)
    if chosen == "parquet":
        require_extra("pyarrow", "parquet", "parquet")
        if output is None and terminal:
            raise InfluenceError("parquet is not text for a terminal", "write it to a file or a pipe: -o rows.parquet")
    return chosen


def _named_format(format: str | None, output: Path | None, *, terminal: bool, dialects: Sequence[str]) -> str:
    if format is not None:
        if format in DIALECTS and format not in dialects:
            raise InfluenceError(
                f"--format {format} is only for mislabels: it needs one row per label",
                "known here: " + ", ".join(FORMATS),
            )
        if format not in (*FORMATS, *dialects):
            raise InfluenceError(f"unknown format {format!r}", did_you_mean(format, (*FORMATS, *dialects)))
        return format
    if output is None:
        return "table" if terminal else "jsonl"
    suffix = output.suffix.lower()
    if not suffix:
        raise InfluenceError(
            f"{output} has no suffix, so the format is not known",
            f"add one of {', '.join(sorted(SUFFIXES))}, or choose with --format",
        )
    if suffix not in SUFFIXES:
        raise InfluenceError(
            f"{output}: no format has the suffix {suffix!r}",
            f"{did_you_mean(suffix, SUFFIXES)}; or choose with --format",
        )
    return SUFFIXES[suffix]


def write_rows(
    rows: Iterable[Mapping[str, object]],
    columns: Sequence[str],
    format: str,
    stream: TextIO,
    *,
    lines: int | None = None,
) -> int:
    """Write rows in one of the formats. All but ``table`` hold one row (parquet: one row group) at a time.

    Args:
        rows: mappings with at least the columns; values are strings, paths, numbers (Python or numpy), bools or None.
        columns: which keys are written, in this order.
        format: one of `FORMATS` and `DIALECTS`.
        stream: the output; ``table`` asks it whether it is a terminal, ``parquet`` writes to its ``buffer``.
        lines: of a longer ``table``, as many lines in place of all, and what has the rest; None for all.

    Returns:
        The number of rows.

    Raises:
        InfluenceError: a number is not finite, or the stream cannot be written.
    """
    count = 0

    def checked() -> Iterator[Row]:
        nonlocal count
        for row in rows:
            count += 1
            yield {column: _scalar(row[column], column, count) for column in columns}

    # The first row is made before anything is written, so an error in it leaves no header alone on stdout.
    waiting = checked()
    scalars = chain(list(islice(waiting, 1)), waiting)
    if format == "parquet":
        _write(parquet_bytes(scalars, columns), stream.buffer, stream)
    else:
        text = _text(scalars, columns, format, stream)
        _write(text if lines is None else _first_lines(text, lines), stream, stream)
    return count


def _first_lines(pieces: Iterable[str], lines: int) -> Iterator[str]:
    """Give the first lines of a text; of a longer one the last of them says where the others are."""
    found = list(islice(chain.from_iterable(piece.splitlines(keepends=True) for piece in pieces), lines + 1))
    if len(found) <= lines:
        yield from found
        return
    yield from found[: lines - 1]
    yield "… the page has the images; -o FILE writes all rows\n"


def _write(pieces: Iterable[AnyStr], to: IO[AnyStr], stream: TextIO) -> None:
    for piece in pieces:
        try:
            to.write(piece)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise unwritable(str(getattr(stream, "name", "the output")).strip("<>"), error) from error


def _scalar(value: object, column: str, number: int) -> Scalar:
    item = getattr(value, "item", None)
    if callable(item):
        value = item()  # a numpy scalar
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InfluenceError(
            f"row {number}: {column} is {value}, and only finite numbers are written",
            "influence check looks for losses and gradients that are not finite",
        )
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"row {number}: {column} is a {type(value).__name__}, not a string, a number, a bool or None")


def _text(rows: Iterable[Row], columns: Sequence[str], format: str, stream: TextIO) -> Iterator[str]:
    if format == "jsonl":
        return (_json(row) + "\n" for row in rows)
    if format == "json":
        return _json_array(rows)
    if format == "csv" or format in DIALECTS:
        return _csv(rows, columns)
    if format == "tsv":
        return _tsv(rows, columns)
    if format == "table":
        held = list(rows)
        if not held:
            return iter(["(no rows)\n"])
        shown = [column for column in columns if any(row[column] is not None for row in held)]
        return terminal_table(held, shown, stream) if stream.isatty() else iter([plain_table(held, shown)])
    raise InfluenceError(f"unknown format {format!r}", did_you_mean(format, FORMATS))


def _json(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # Only lone surrogates cannot be encoded. Python writes them as JSON does: \udcff.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _json_array(rows: Iterable[Row]) -> Iterator[str]:
    empty = True
    for row in rows:
        yield ("[\n" if empty else ",\n") + _json(row)
        empty = False
    yield "[]\n" if empty else "\n]\n"


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[str]:
    # With \r\n as line end, every Python quotes a bare \r and a bare \n in a value. The lines then end in \n.
    writer = csv.writer(SimpleNamespace(write=lambda line: line[:-2] + "\n"), lineterminator="\r\n")
    yield writer.writerow(columns)
    for row in rows:
        # Numbers stay numbers, also negative ones.
        yield writer.writerow([guarded(value) if isinstance(value, str) else word(value) for value in row.values()])


def _tsv(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[str]:
    yield "\t".join(columns) + "\n"
    for row in rows:
        yield "\t".join(word(value).translate(_TSV_ESCAPES) for value in row.values()) + "\n"
