"""Image files that a table lists, a row each: ``train: {csv: list.csv, image: file, label: breed, root: photos}``.

The table is a .csv, .tsv, .jsonl or .parquet file. The index of an example is its position among the rows in use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from influence_cli.data.tables import LABEL_NAMES, Table, number_labels, pick_column, read_table
from influence_cli.errors import InfluenceError, describe, did_you_mean, near_path, quoted, require_extra

IMAGE_NAMES = (
    ("image", "img", "file", "filename", "file_name", "path", "filepath", "file_path", "image_path", "image_file"),
    ("image_id", "id"),
)
SPLIT_NAMES = (("split", "set", "subset"),)
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
# Suffixes tried where a column of names has none.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG")


class ListedImages:
    """The image files of a table and their labels; item i is (RGB image, class number), as ImageFolder gives it.

    Args:
        file: the table.
        image: the column of paths; without it one with a usual name.
        label: the column of labels: whole numbers, which stay, or names, whose sorted order numbers the classes.
        root: the folder that the paths are in; without it that of the table.
        split: the rows in use, those with this word in the column ``split``, ``set`` or ``subset``; without it all.
        classes: the classes of the training examples, as ``number_labels`` takes them.

    Attributes:
        samples: path and class number of each example.
        targets: int64 [n].
        classes: class names by number, or None where labels are numbers.
        class_to_idx: numbers by class name, or None.
        remarks: what was guessed, for people.

    Raises:
        InfluenceError: naming the table, and the line where there is one.
    """

    def __init__(
        self,
        file: str | Path,
        image: str | None = None,
        label: str | None = None,
        root: str | Path | None = None,
        split: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        path = Path(file)
        table = read_list(path)
        label_column = pick_column(table.header, label, (LABEL_NAMES,), "label", table.file)
        others = [name for name in table.header if name != label_column or name == image]
        image_column = pick_column(others, image, IMAGE_NAMES, "image", table.file)
        rows = _rows_of_split(table, split)
        self._file, self._split = path, split
        folder = path.absolute().parent if root is None else Path(root)
        cells = _column(table, image_column)
        paths, self.remarks = _image_paths(table, [cells[row] for row in rows], rows, folder, image_column)
        labels = _column(table, label_column)
        self.targets, names = number_labels([labels[row] for row in rows], classes, lambda at: table.at(rows[at]))
        self.samples = list(zip(paths, self.targets.tolist(), strict=True))
        self.classes = None if names is None else list(names)
        self.class_to_idx = None if names is None else {word: number for number, word in enumerate(names)}

    def column(self, name: str) -> list[str] | None:
        """Give another column of the rows in use; None if the table has none of this name."""
        table = read_list(self._file)
        if name not in table.header:
            return None
        cells = _column(table, name)
        return [cells[row] for row in _rows_of_split(table, self._split)]

    def __len__(self) -> int:
        """Count the rows in use."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Read an image; any failure is the image's."""
        path, label = self.samples[index]
        with open(path, "rb") as file, Image.open(file) as image:  # noqa: PTH123 (for every example of every pass)
            return image.convert("RGB"), label


def read_list(path: Path) -> Table:
    """Read a table whose rows are examples, every cell as text, an empty one where there is no value.

    Raises:
        InfluenceError: no such file, of another kind, not readable, or without rows.
    """
    kind = path.suffix.lower()
    name = str(near_path(path))
    if kind not in KINDS:
        raise InfluenceError(f"{name} is not a table of examples", "expected a .csv, .tsv, .jsonl or .parquet file")
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InfluenceError(
            f"there is no file {path}",
            did_you_mean(path.name, [word for word in beside if Path(word).suffix.lower() in KINDS])
            if beside
            else "a path is relative to the folder of the YAML file",
        )
    if kind == ".parquet":
        table = _read_parquet(path, name)
    elif kind in (".jsonl", ".ndjson"):
        table = _read_json_lines(path, name)
    else:
        table = read_table(path)
    if not table.lines:
        raise InfluenceError(f"{name} has no rows")
    return Table(table.header, table.columns, table.lines, name)


def _read_json_lines(path: Path, name: str) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InfluenceError(
                            f"{name}:{number}: a line is {quoted(line.strip(), 40)}",
                            'expected an object: {"image": "a.jpg", "label": "cat"}',
                        )
                    rows.append(row)
                    lines.append(number)
    except (OSError, ValueError, RecursionError) as error:
        at = name if isinstance(error, OSError | UnicodeDecodeError) else f"{name}:{number}"
        raise InfluenceError(f"{at} is not readable as JSON lines: {describe(error)}") from error
    header = tuple(dict.fromkeys(key for row in rows for key in row))
    columns = {key: [_text(row.get(key)) for row in rows] for key in header}
    return _without_nested(Table(header, {}, lines, name), columns)


def _read_parquet(path: Path, name: str) -> Table:
    require_extra("pyarrow", "parquet", "a list in a Parquet file")
    import pyarrow.parquet
    from pyarrow import types

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            flat = [field.name for field in schema if not (types.is_nested(field.type) or types.is_binary(field.type))]
            data = file.read(columns=flat, use_threads=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InfluenceError(f"{name} cannot be read as a Parquet file: {describe(error)}") from error
    columns: dict[str, list[str | None]] = {key: [_text(cell) for cell in data.column(key).to_pylist()] for key in flat}
    # A row of a Parquet file is numbered from 0, as everywhere here.
    return _without_nested(Table(tuple(schema.names), {}, list(range(data.num_rows)), name), columns)


def _text(cell: Any) -> str | None:
    """Write a cell as text; None for a list or an object."""
    if cell is None or cell != cell:  # pandas writes a missing number as NaN
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    return str(cell) if isinstance(cell, str | int | float) else None


def _without_nested(table: Table, columns: dict[str, list[str | None]]) -> Table:
    """Keep the columns of plain values."""
    plain = {key: [cell for cell in cells if cell is not None] for key, cells in columns.items() if None not in cells}
    return Table(table.header, plain, table.lines, table.file)


def _column(table: Table, name: str) -> list[str]:
    if name not in table.columns:
        raise InfluenceError(
            f"{table.file}: the column {name!r} has lists, objects or bytes, not one word or number in each row",
            "images inside a Parquet file: dataset: influence_cli.data.parquet_images.ParquetImages"
            if table.file.endswith(".parquet")
            else "an example has one path and one label",
        )
    return table.columns[name]


def _rows_of_split(table: Table, split: str | None) -> list[int]:
    """Choose the rows of a split.

    Raises:
        InfluenceError: no such column or word; or training and other rows, and the config does not choose.
    """
    everything = list(range(len(table.lines)))
    column = next((name for name in table.header if name.casefold() in SPLIT_NAMES[0]), None)
    if split is None:
        words = sorted({cell.strip() for cell in table.columns.get(column or "", ())})
        training = [word for word in words if word.casefold().startswith("train")]
        if len(words) > 1 and training:
            raise InfluenceError(
                f"{table.file} has rows of several splits: column {column!r} has {', '.join(map(repr, words[:6]))}",
                f"say which are meant: split: {training[0]}",
            )
        return everything
    cells = _column(table, pick_column(table.header, None, SPLIT_NAMES, "split", table.file))
    rows = [row for row in everything if cells[row].strip() == split]
    if not rows:
        raise InfluenceError(f"{table.file} has no rows of the split {split!r}", did_you_mean(split, cells))
    return rows


def _image_paths(
    table: Table, cells: Sequence[str], rows: Sequence[int], folder: Path, column: str
) -> tuple[list[str], tuple[str, ...]]:
    """Find the file of each row.

    Returns:
        Absolute paths, and what was guessed.

    Raises:
        InfluenceError: the first row whose file does not exist.
    """
    suffix = ""
    remarks: tuple[str, ...] = ()
    if not os.path.splitext(cells[0])[1] and not os.path.lexists(folder / cells[0]):  # noqa: PTH122
        fitting = [end for end in SUFFIXES if os.path.isfile(folder / (cells[0] + end))]  # noqa: PTH113
        if len(fitting) == 1:
            suffix = fitting[0]
            remarks = (f"{table.file}: column {column!r} has no suffixes; the images are taken to end in {suffix}",)
    base = str(folder.absolute())
    paths = [os.path.normpath(os.path.join(base, cell + suffix)) for cell in cells]  # noqa: PTH118 (a million of them)
    missing = [at for at, path in enumerate(paths) if not os.path.isfile(path)]  # noqa: PTH113
    if missing:
        first = missing[0]
        count = f", nor those of {len(missing) - 1:,} more of {len(rows):,} rows" if len(missing) > 1 else ""
        raise InfluenceError(
            f"{table.at(rows[first])}there is no file {paths[first]}{count}"
            if cells[first].strip()
            else f"{table.at(rows[first])}there is no path in the column {column!r}",
            next(_advice(cells[first], folder)),
        )
    return paths, remarks


def _advice(cell: str, folder: Path) -> Iterator[str]:
    """Say what may be wrong with the path of a row, the likeliest first."""
    if "://" in cell:
        yield "addresses are not read: copy the images here, and give their paths"
    if "\\" in cell and (folder / cell.replace("\\", "/")).is_file():
        yield "a path has / between its folders here: replace the \\ in the column"
    if (Path.cwd() / cell).is_file():
        yield "that path is right from the folder of the YAML file: root: ."
    if cell != cell.strip() and (folder / cell.strip()).is_file():
        yield "remove the spaces around the paths"
    beside = next((end for end in SUFFIXES if (folder / (cell + end)).is_file()), None)
    if beside is not None:
        yield f"{cell}{beside} exists: write the suffixes into the column"
    yield f"paths are relative to {folder}; root: names another folder; remove rows without an image"
