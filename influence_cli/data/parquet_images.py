"""Images in Parquet files, as a data set that a YAML file names: rows by number, through pyarrow.

    train:
      dataset: influence_cli.data.parquet_images.ParquetImages
      args: {files: data/train-*.parquet, image: image, label: label}

The index of an example is its position over all files, sorted by name, in the order of their rows. Use it for data
sets from the Hugging Face Hub, and for any table with a column of encoded images and one of labels.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from influence_cli.data.file_sets import DataFiles, RowPaths, find_files, near
from influence_cli.data.image_files import decode_rgb
from influence_cli.errors import InfluenceError, describe, did_you_mean, human_bytes, require_extra
from influence_cli.runtime.memory import available_bytes

# Row groups that a process keeps in memory, up to this many bytes: passes are in order, only a report jumps.
KEPT, KEPT_BYTES = 4, 256 * 10**6
# Share of the free memory for one row group: each loader process holds one.
SHARE = 0.25


class ParquetImages:
    """Images and labels of Parquet files; item i is (RGB image, class number), as torchvision's ImageFolder gives it.

    Args:
        files: a pattern such as ``data/train-*.parquet``, or a list of them.
        image: the column of encoded images: bytes, or Hugging Face's struct of bytes and path.
        label: the column of labels: whole numbers, or names, whose sorted order numbers the classes. Whole numbers
            have the names that Hugging Face's ``ClassLabel`` gives them, if the files say so.

    Attributes:
        files: where the examples lie.
        paths: a stand-in for the path of each: the file and the row in it, ``train-0.parquet#17``.
        targets: int64 [n], read without an image.
        classes: class names by number, or None.
        class_to_idx: numbers by class name, or None.

    Raises:
        InfluenceError: naming the file, and the row where there is one.
    """

    def __init__(self, files: str | Sequence[str], image: str = "image", label: str = "label") -> None:
        require_extra("pyarrow", "parquet", "a Parquet data set")
        names = find_files(files)
        self._image = image
        counts, labels, classes = [], [], []
        # Of each file, the first row of each row group, and the number of all rows.
        self._groups: list[np.ndarray] = []
        for name in names:
            with _open(name) as file:
                _check_columns(file, name, image, label)
                _check_memory(file, name, image)
                meta = file.metadata
                sizes = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]
                self._groups.append(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64))
                counts.append(meta.num_rows)
                labels.append(_labels(file, name, label))
                classes.append(_class_names(file, label))
            if classes[-1] != classes[0]:
                raise InfluenceError(
                    f"{near(name)} has different class names than {near(names[0])}",
                    "all files of a data set need the same classes",
                )
            if labels[-1].type != labels[0].type:
                raise InfluenceError(
                    f"{near(name)}: the column {label!r} is {labels[-1].type}, but {labels[0].type} in {near(names[0])}"
                )
        self.files = DataFiles(names, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        self.targets, label_names = _numbered(labels)
        self.paths = RowPaths(self.files)
        self.classes: list[str] | None = label_names or classes[0]
        self.class_to_idx = None if self.classes is None else {word: i for i, word in enumerate(self.classes)}
        self._forget()

    def __len__(self) -> int:
        """Count the rows of all files."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Read a row; any failure is the image's."""
        number, row = self.files.place(index)
        group = int(np.searchsorted(self._groups[number], row, side="right")) - 1
        cell = self._column(number, group)[row - int(self._groups[number][group])].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if content is None:
            outside = cell.get("path") if isinstance(cell, dict) else None
            raise ValueError(
                f"the row holds no image, only the path {outside}: write the files with the images inside"
                if outside
                else "the row holds no image"
            )
        return decode_rgb(content), int(self.targets[index])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: the open file and the held row groups."""
        return {name: value for name, value in vars(self).items() if name not in ("_open_file", "_held", "_owner")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._open_file: tuple[int, Any] | None = None
        self._held: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def _column(self, number: int, group: int) -> Any:
        """Give the images of a row group, from memory or from the file."""
        if self._owner != os.getpid():  # a fork shares the file position with its parent
            self._forget()
        held = self._held.get((number, group))
        if held is None:
            while self._held and (
                len(self._held) >= KEPT or sum(column.nbytes for column in self._held.values()) > KEPT_BYTES
            ):
                self._held.popitem(last=False)
            if self._open_file is None or self._open_file[0] != number:
                self._open_file = number, _open(self.files.names[number])
            held = self._open_file[1].read_row_group(group, columns=[self._image], use_threads=False).column(0)
            self._held[number, group] = held
        self._held.move_to_end((number, group))
        return held


def _open(name: str) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(name, pre_buffer=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InfluenceError(
            f"{near(name)} cannot be read as a Parquet file: {describe(error)}", "write or copy it again"
        ) from error


def _check_columns(file: Any, name: str, image: str, label: str) -> None:
    """Refuse a file without the columns, or with columns of the wrong type."""
    from pyarrow import types

    schema = file.schema_arrow
    for column in (image, label):
        if schema.get_field_index(column) < 0:
            raise InfluenceError(f"{near(name)} has no column {column!r}", did_you_mean(column, schema.names))
    kind = schema.field(image).type
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        inner = kind.field(place).type if place >= 0 else kind
    else:
        inner = kind
    if not (types.is_binary(inner) or types.is_large_binary(inner)):
        raise InfluenceError(
            f"{near(name)}: the column {image!r} is {kind}, not encoded images",
            "expected binary, or a struct with a binary field 'bytes'",
        )
    kind = schema.field(label).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise InfluenceError(
            f"{near(name)}: the column {label!r} is {kind}", "labels are whole numbers or names of classes"
        )


def _check_memory(file: Any, name: str, image: str) -> None:
    """Refuse row groups that a process could not hold."""
    meta = file.metadata
    groups = (meta.row_group(number) for number in range(meta.num_row_groups))
    largest = max(
        (
            sum(
                part.total_uncompressed_size
                for part in map(group.column, range(group.num_columns))
                if part.path_in_schema.partition(".")[0] == image
            )
            for group in groups
        ),
        default=0,
    )
    free = available_bytes(torch.device("cpu"))
    if largest > SHARE * free:
        raise InfluenceError(
            f"{near(name)}: a row group holds {human_bytes(largest)} of images, but {human_bytes(free)} of memory "
            "is free; each reading process holds one row group",
            "write the file with smaller ones: pyarrow.parquet.write_table(…, row_group_size=1000)",
        )


def _labels(file: Any, name: str, label: str) -> Any:
    """Read the labels of a file: int64, or text."""
    import pyarrow
    from pyarrow import compute, types

    try:
        column = file.read(columns=[label], use_threads=False).column(0)
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        column = column.cast(pyarrow.int64() if types.is_integer(kind) else pyarrow.large_string())
    except (OSError, ValueError) as error:
        raise InfluenceError(f"{near(name)}: the column {label!r} cannot be read: {describe(error)}") from error
    if column.null_count:
        row = compute.index(compute.is_null(column), True).as_py()
        raise InfluenceError(
            f"{near(name)}: row {row} has no {label!r}"
            + (f", and {column.null_count - 1:,} more" if column.null_count > 1 else ""),
            "give every row a label, or leave it out of the file",
        )
    return column


def _class_names(file: Any, label: str) -> list[str] | None:
    """Find the class names that the Hugging Face library leaves in a file's metadata."""
    try:
        text = (file.schema_arrow.metadata or {})[b"huggingface"]
        names = json.loads(text)["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _numbered(labels: Sequence[Any]) -> tuple[np.ndarray, list[str] | None]:
    """Give the labels of all files as class numbers, and the class names where they were names."""
    import pyarrow
    from pyarrow import compute, types

    whole = pyarrow.chunked_array([chunk for column in labels for chunk in column.chunks], type=labels[0].type)
    if types.is_integer(whole.type):
        return whole.to_numpy().astype(np.int64), None
    names = sorted(compute.unique(whole).to_pylist())
    numbers = compute.index_in(whole, value_set=pyarrow.array(names, type=whole.type))
    return numbers.to_numpy().astype(np.int64), names
