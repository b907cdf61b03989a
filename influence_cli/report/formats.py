"""Rows to table, jsonl, json, csv or tsv, on stdout or in a file that appears only when complete."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from influence_cli.errors import InfluenceError, did_you_mean

FORMATS = ("table", "jsonl", "json", "csv", "tsv")
SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "table"}
TONES = {"helpful": "green", "harmful": "red"}

Row = Mapping[str, object]


def choose_format(format: str | None, output: Path | None, terminal: bool) -> str:
    """Choose by --format, else by the suffix of -o, else a table for a terminal and jsonl for a pipe.

    Raises:
        InfluenceError: an unknown format or suffix.
    """
    if format is not None:
        if format not in FORMATS:
            raise InfluenceError(f"--format {format}: there is no such format", did_you_mean(format, FORMATS))
        return format
    if output is not None:
        if output.suffix not in SUFFIXES:
            raise InfluenceError(
                f"-o {output}: the suffix {output.suffix!r} names no format", f"use {', '.join(SUFFIXES)}, or give --format"
            )
        return SUFFIXES[output.suffix]
    return "table" if terminal else "jsonl"


@contextmanager
def open_output(output: Path | None) -> Iterator[TextIO]:
    """Give stdout, or a file that is written under another name and renamed when all went well.

    Raises:
        InfluenceError: the file cannot be written.
    """
    if output is None:
        yield sys.stdout
        return
    part = output.with_name(output.name + ".part")
    try:
        if output.is_dir():
            raise InfluenceError(f"{output} is a folder", "give a file")
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            yield stream
        part.replace(output)
    except FileNotFoundError as error:
        raise InfluenceError(f"{output} cannot be written: there is no folder {output.parent}", "make it first") from error
    except OSError as error:
        raise InfluenceError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def write_rows(rows: Iterable[Row], columns: Sequence[str], format: str, stream: TextIO) -> int:
    """Write rows in a format, one by one except for a table.

    Args:
        rows: a value a column; None is null, a float round-trips.
        columns: their order.
        format: one of ``FORMATS``.
        stream: where to.

    Returns:
        The number of rows.

    Raises:
        InfluenceError: a number that is not finite.
    """
    writers: dict[str, Callable[[Iterable[list[Any]], Sequence[str], TextIO], int]] = {
        "table": _write_table,
        "jsonl": _write_jsonl,
        "json": _write_json,
        "csv": _write_csv,
        "tsv": _write_tsv,
    }
    return writers[format](([_plain(row[name], name) for name in columns] for row in rows), columns, stream)


def _plain(value: object, name: str) -> Any:
    """Turn numpy scalars and paths into what json and csv know; refuse what no reader should ever get."""
    if isinstance(value, Path):
        value = str(value)
    elif hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InfluenceError(f"the column {name!r} holds {value}, which is never written")
    return value


def _write_jsonl(rows: Iterable[list[Any]], columns: Sequence[str], stream: TextIO) -> int:
    count = 0
    for count, row in enumerate(rows, start=1):
        stream.write(_json(row, columns) + "\n")
    return count


def _write_json(rows: Iterable[list[Any]], columns: Sequence[str], stream: TextIO) -> int:
    count = 0
    for count, row in enumerate(rows, start=1):
        stream.write(("[\n" if count == 1 else ",\n") + _json(row, columns))
    stream.write("\n]\n" if count else "[]\n")
    return count


def _json(row: list[Any], columns: Sequence[str]) -> str:
    text = json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, allow_nan=False)
    # A file name that is not UTF-8 stays readable for any JSON reader, as an escape.
    return "".join(f"\\u{ord(letter):04x}" if 0xD800 <= ord(letter) <= 0xDFFF else letter for letter in text)


def _write_csv(rows: Iterable[list[Any]], columns: Sequence[str], stream: TextIO) -> int:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    count = 0
    for count, row in enumerate(rows, start=1):
        writer.writerow([_cell(value) for value in row])
    return count


def _write_tsv(rows: Iterable[list[Any]], columns: Sequence[str], stream: TextIO) -> int:
    stream.write("\t".join(columns) + "\n")
    count = 0
    for count, row in enumerate(rows, start=1):
        stream.write("\t".join(_escaped(_cell(value)) for value in row) + "\n")
    return count


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, float) else str(value)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escaped(text: str) -> str:
    for letter, escape in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(letter, escape)
    return text


def _write_table(rows: Iterable[list[Any]], columns: Sequence[str], stream: TextIO) -> int:
    kept = list(rows)
    shown = [i for i in range(len(columns)) if not kept or any(row[i] is not None for row in kept)]
    cells = [[_readable(columns[i], row[i]) for i in shown] for row in kept]
    numeric = [all(row[i] is None or isinstance(row[i], int | float) for row in kept) for i in shown]
    names = [columns[i] for i in shown]
    if stream.isatty():
        _write_rich(names, cells, numeric, stream)
    else:
        _write_aligned(names, cells, numeric, stream)
    return len(kept)


def _readable(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:+.4g}" if name == "influence" else f"{value:.4g}"
    # Nothing in a file name may move the cursor.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(value))


def _write_aligned(names: list[str], cells: list[list[str]], numeric: list[bool], stream: TextIO) -> None:
    lines = [names, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        stream.write("  ".join(parts).rstrip() + "\n")


def _write_rich(names: list[str], cells: list[list[str]], numeric: list[bool], stream: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name, right in zip(names, numeric, strict=True):
        path = name.endswith("path")
        table.add_column(name, justify="right" if right else "left", overflow="fold" if path else "ellipsis", no_wrap=not path)
    for row in cells:
        tone = next((TONES[cell] for name, cell in zip(names, row, strict=True) if name == "effect" and cell in TONES), "")
        table.add_row(*(Text(cell, style=tone if name in ("effect", "influence") else "") for name, cell in zip(names, row, strict=True)))
    Console(file=stream, highlight=False).print(table)
