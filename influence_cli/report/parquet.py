"""Writes rows as Parquet, one row group at a time. pyarrow is imported only here, and only when it is needed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from influence_cli.errors import InfluenceError
from influence_cli.report.table import Row, Scalar, word

# Rows per row group: this many are held in memory at one time, about ten megabytes.
GROUP = 16_384

# A column has the type of its first rows. If they are all null, its name decides; an unknown name means text.
KINDS = {
    "int64": ("test", "rank", "index", "rank_a", "rank_b"),
    "double": (
        *("confidence", "score", "loss", "self_influence", "influence"),
        *("value", "percentile", "value_a", "value_b", "distance"),
    ),
    "string": (
        *("test_path", "test_label", "test_predicted", "path", "label", "predicted", "suggested"),
        *("effect", "kind", "name", "change", "label_a", "label_b"),
    ),
}
_KIND_OF = {column: kind for kind, columns in KINDS.items() for column in columns}


def parquet_bytes(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[bytes]:
    """Encode rows as one Parquet file: int64, double, bool and string columns, all of them nullable.

    Text that is not UTF-8 (bytes of a file name) is written as in JSON: ``\\udcff``.

    Args:
        rows: each with the columns.
        columns: in this order.

    Yields:
        The pieces of the file, at least one per row group.

    Raises:
        InfluenceError: a later row has a value that does not fit the type of its column.
    """
    import pyarrow
    import pyarrow.parquet

    waiting, sink = iter(rows), _Sink()
    group = list(islice(waiting, GROUP))
    kinds = {column: _kind(column, [row[column] for row in group]) for column in columns}
    schema = pyarrow.schema([(column, pyarrow.type_for_alias(kind)) for column, kind in kinds.items()])
    with pyarrow.parquet.ParquetWriter(pyarrow.PythonFile(sink, mode="w"), schema) as writer:
        while group:
            arrays = [
                pyarrow.array([_fitting(row, field.name, kinds[field.name]) for row in group], field.type)
                for field in schema
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=GROUP)
            yield sink.take()
            group = list(islice(waiting, GROUP))
    yield sink.take()


class _Sink(io.RawIOBase):
    """The stream that pyarrow writes to: it keeps bytes until they are taken, and counts them, also for a pipe."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._position

    def take(self) -> bytes:
        """Give the bytes written since the last call."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _kind(column: str, values: Sequence[Scalar]) -> str:
    """Choose the narrowest type that holds the first values of a column."""
    types, named = {type(value) for value in values if value is not None}, _KIND_OF.get(column, "string")
    if not types:
        return named
    if types == {bool}:
        return "bool"
    if types == {int}:
        # A loss of exactly 0 may be written as a whole number.
        return "double" if named == "double" else "int64"
    return "double" if types <= {int, float} else "string"


def _fitting(row: Row, column: str, kind: str) -> Scalar:
    """Give a value in the type of its column."""
    value = row[column]
    if value is None:
        return None
    if kind == "string":
        return word(value).encode("utf-8", "backslashreplace").decode("utf-8")
    number = type(value) is int and -(2**63) <= value < 2**63
    if kind == "double" and (number or type(value) is float):
        return float(value)
    if (kind == "int64" and number) or (kind == "bool" and type(value) is bool):
        return value
    raise InfluenceError(
        f"{column} is {value!r}, but the first rows of this column are {kind}",
        "--format jsonl takes values of any type",
    )
