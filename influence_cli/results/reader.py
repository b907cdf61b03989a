"""Reads back what `rank` and `mislabels` wrote with -o: the rows as they were, whatever the format."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_cli.errors import InfluenceError, counted
from influence_cli.report.table import Row, Scalar
from influence_cli.runtime.csv_cells import unguarded
from influence_cli.runtime.outputs import run_file

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# The columns of each kind of result that a comparison needs.
KINDS = {
    "rank": ("test", "test_path", "effect", "rank", "index", "path", "label", "influence"),
    "mislabels": ("rank", "index", "path", "label", "suggested", "score"),
}
WHOLE = ("test", "rank", "index")
NUMBERS = ("influence", "score")


@dataclass(frozen=True)
class Result:
    """Rows of one result file.

    Attributes:
        path: the file.
        kind: ``rank`` or ``mislabels``.
        rows: with at least the columns of the kind; numbers are numbers, null is None.
        places: where each row is in the file, such as ``a.csv:7``, for messages.
        on: which labels `mislabels` judged, ``train`` or ``test``, by the run file; None if there is none.
        quality: accuracy of the model on the test set, and its mean −log of the probability of the label, by the run
            file; None if the run did not predict the whole test set.
    """

    path: Path
    kind: str
    rows: tuple[Row, ...]
    places: tuple[str, ...]
    on: str | None = None
    quality: tuple[float, float] | None = None


def read_result(path: Path) -> Result:
    """Read a result file. Its suffix tells the format.

    Raises:
        InfluenceError: the file does not exist, has another format, is not a result of `rank` or `mislabels`, has a
            wrong row, or was cut off.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if not path.is_file():
        raise InfluenceError(f"{path}: there is no such file", "write one with influence rank or mislabels and -o FILE")
    if reader is None:
        raise InfluenceError(f"{path}: a result cannot be read from this format", f"known: {', '.join(SUFFIXES)}")
    try:
        placed = list(reader(path))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise InfluenceError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not placed:
        raise InfluenceError(
            f"{path} has no rows, so there is nothing to compare", "write it again with more rows (--top K)"
        )
    columns = placed[0][1].keys()
    kind = next((kind for kind, needed in KINDS.items() if columns >= set(needed)), None)
    if kind is None:
        raise InfluenceError(
            f"{path} is not a result of influence rank or mislabels: it has the columns {', '.join(columns)}",
            "write one with influence rank or mislabels and -o FILE",
        )
    rows = tuple(_typed(row, kind, place) for place, row in placed)
    run = _run_of(path)
    _refuse_cut_off(path, len(rows), run.get("rows"))
    places = tuple(at for at, _ in placed)
    return Result(path, kind, rows, places, _set_of(run.get("command")), _quality(run.get("test_set")))


def _quality(noted: object) -> tuple[float, float] | None:
    """Take accuracy and loss on the test set from the run; None where they are missing or damaged."""
    if not isinstance(noted, dict):
        return None
    examples, wrong, loss = (noted.get(key) for key in ("examples", "misclassified", "log_loss"))
    if not (isinstance(examples, int) and isinstance(wrong, int) and isinstance(loss, float) and examples > 0):
        return None
    return 1 - wrong / examples, loss


def _run_of(path: Path) -> dict[str, Any]:
    """Read the facts of the run. There are none if the file is missing or damaged; the rows do not need them."""
    try:
        run = json.loads(run_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def read_neighbours(path: Path, count: int) -> dict[int, tuple[int, ...]]:
    """Read from the run file of a result of `mislabels` which examples are most similar to each.

    Args:
        path: the result.
        count: examples of the data set; other positions are left out.

    Returns:
        Positions by position, nearest first; empty if there is no run file, or an older one.
    """
    noted = _run_of(path).get("neighbours")
    if not isinstance(noted, dict):
        return {}
    return {
        int(index): tuple(int(word) for word in str(others).split() if word.isdecimal() and int(word) < count)
        for index, others in noted.items()
        if index.isdecimal()
    }


def _set_of(command: object) -> str | None:
    """Tell from the command of a run which labels it judged; None if that is not known."""
    if not isinstance(command, list):
        return None
    chosen = "train"
    for word, after in zip(command, [*command[1:], None], strict=True):
        if word == "--on" and isinstance(after, str):
            chosen = after
        elif isinstance(word, str) and word.startswith("--on="):
            chosen = word.removeprefix("--on=")
    return chosen


def _refuse_cut_off(path: Path, count: int, written: object) -> None:
    """Refuse a text file that ends within a line and has fewer rows than were written.

    One of the two alone is fine: editors leave the last line without an end, and people cut lists with head.
    """
    if not isinstance(written, int) or written <= count or path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        return
    with path.open("rb") as file:
        file.seek(-1, 2)
        if file.read(1) == b"\n":
            return
    raise InfluenceError(
        f"{path} has {counted(count, 'row')}, but its run file says {written:,}: the file was cut off",
        "copy it again, or write it again with influence rank or mislabels and -o FILE",
    )


def _typed(row: dict[str, Scalar], kind: str, place: str) -> Row:
    """Convert the numbers of a row."""
    typed = dict(row)
    for column, value in row.items():
        if isinstance(value, float):
            _refuse_not_finite(value, column, place)
    for column in KINDS[kind]:
        if column not in row:
            raise InfluenceError(f"{place}: the column {column} is missing", "write the result again")
        value = row[column]
        if column not in (*WHOLE, *NUMBERS) or (value is None and column == "test"):
            continue
        try:
            typed[column] = int(str(value)) if column in WHOLE else float(str(value))
        except ValueError as error:
            raise InfluenceError(f"{place}: {column} is {value!r}, not a number") from error
        _refuse_not_finite(typed[column], column, place)
    return typed


def _refuse_not_finite(value: Scalar, column: str, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InfluenceError(
            f"{place}: {column} is {value}, which is not a finite number", "influence never writes that: write it again"
        )


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    # The error counts lines from this one.
                    message = f"{place} cannot be read: {error.msg} at column {error.colno}"
                    raise InfluenceError(message, "the file may have been cut off or edited; write it again") from error
                yield place, _object(row, place)


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"{path}: row {number}", _object(row, f"{path}: row {number}")


def _object(row: object, place: str) -> Row:
    if not isinstance(row, dict):
        raise InfluenceError(f"{place} is a {type(row).__name__}, not an object with columns")
    return row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        yield from _fields(path, reader, lambda: reader.line_num, unguarded)


def _tsv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        lines = 0

        def split() -> Iterator[list[str]]:
            nonlocal lines
            for line in file:
                lines += 1
                yield line.removesuffix("\n").split("\t")

        yield from _fields(path, split(), lambda: lines, _unescaped)


def _fields(
    path: Path, rows: Iterator[list[str]], line: Callable[[], int], spell: Callable[[str], str]
) -> Iterator[tuple[str, Row]]:
    header = next(rows, [])
    for fields in rows:
        place = f"{path}:{line()}"
        if len(fields) != len(header):
            raise InfluenceError(
                f"{place}: {counted(len(fields), 'field')}, but the header has {len(header)}", "write the result again"
            )
        yield place, {name: spell(value) or None for name, value in zip(header, fields, strict=True)}


def _unescaped(text: str) -> str:
    r"""Undo the escapes of TSV: ``\t``, ``\n``, ``\r``, ``\\``."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\t", "\t").replace("\\n", "\n").replace("\\r", "\r") for part in parts)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InfluenceError(f"{path}: Parquet needs pyarrow", "pip install 'influence-cli[parquet]'") from error
    for number, row in enumerate(parquet.read_table(path).to_pylist(), start=1):
        yield f"{path}: row {number}", row
