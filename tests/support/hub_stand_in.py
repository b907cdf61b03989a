"""A stand-in for the datasets library: its class names and the methods that are used, on plain lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image as Pictures


class Value:
    """A column of plain values."""


class ClassLabel:
    """A column of class numbers with names."""

    def __init__(self, names: list[str]) -> None:
        self.names = names


class Image:
    """A column of pictures, or of paths to them."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Dataset:
    """Columns with their features; ``decoded`` notes the rows of which a picture was read."""

    def __init__(self, columns: dict[str, tuple[list[Any], Any]], decoded: list[int] | None = None) -> None:
        self.columns = columns
        self.decoded: list[int] = [] if decoded is None else decoded
        self.transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def features(self) -> dict[str, Any]:
        return {name: feature for name, (_, feature) in self.columns.items()}

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))[0])

    def __getitem__(self, key: int | slice) -> dict[str, Any]:
        if isinstance(key, slice):
            return {name: [self._cell(name, row) for row in range(len(self))[key]] for name in self.columns}
        row = {name: self._cell(name, key) for name in self.columns}
        return row if self.transform is None else self.transform(row)

    def _cell(self, name: str, row: int) -> Any:
        values, feature = self.columns[name]
        value = values[row]
        if not isinstance(feature, Image):
            return value
        if not feature.decode:
            return {"bytes": None, "path": value} if isinstance(value, str) else {"bytes": b"x", "path": None}
        self.decoded.append(row)
        return Pictures.open(value) if isinstance(value, str) else value

    def with_format(self, kind: None) -> Dataset:
        return Dataset(self.columns, self.decoded)

    def select_columns(self, names: list[str]) -> Dataset:
        return Dataset({name: self.columns[name] for name in names}, self.decoded)

    def cast_column(self, name: str, feature: Any) -> Dataset:
        return Dataset(self.columns | {name: (self.columns[name][0], feature)}, self.decoded)


class DatasetDict(dict[str, Dataset]):
    """Several sets under the names of their splits."""

    @property
    def column_names(self) -> dict[str, list[str]]:
        return {name: part.column_names for name, part in self.items()}


Dataset.__module__ = "datasets.arrow_dataset"
DatasetDict.__module__ = "datasets.dataset_dict"
