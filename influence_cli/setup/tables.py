"""The columns of a list of images or of Parquet files: which hold images, labels and splits."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_cli.data.listed_images import IMAGE_NAMES, SPLIT_NAMES, SUFFIXES, read_list
from influence_cli.data.tables import LABEL_NAMES
from influence_cli.errors import InfluenceError, describe, require_extra

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
TRAIN_WORDS = ("train", "training")
TEST_WORDS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
IMAGE_COLUMNS = tuple(name for group in IMAGE_NAMES for name in group)
LABEL_COLUMNS = (*LABEL_NAMES, "breed", "y")
ENDINGS = ("", *SUFFIXES)


def read_table_form(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the sections for a list of images.

    Returns:
        Of the training examples, and of the test examples where a column says which row is of which split.

    Raises:
        InfluenceError: it cannot be read, or no column is one of images or of labels.
    """
    columns = read_list(path).columns
    splits = next((name for name in columns if name.lower() in SPLIT_NAMES[0]), None)
    label = _label(path, columns, splits)
    image, root = _image(path, columns, {label, splits})
    section: dict[str, Any] = {"csv": str(path), "image": image, "label": label}
    if root is not None:
        section["root"] = root
    if splits is None:
        return section, None
    words = list(dict.fromkeys(word.strip() for word in columns[splits]))
    train = next((word for word in words if word.lower() in TRAIN_WORDS), None)
    if train is None:
        return section, None
    test = next((word for wanted in TEST_WORDS for word in words if word.lower() == wanted), None)
    return section | {"split": train}, section | {"split": test} if test else None


def parquet_section(files: str) -> dict[str, Any]:
    """Write the section for Parquet files: of images in them, or of paths.

    Raises:
        InfluenceError: they cannot be read, or no column is one of images or of labels.
    """
    require_extra("pyarrow", "parquet", "a Parquet data set")
    import pyarrow.parquet
    from pyarrow import types

    first = sorted(glob.glob(files))  # noqa: PTH207 (relative to the current folder, as the config is)
    try:
        schema = pyarrow.parquet.read_schema(first[0])
    except (OSError, ValueError, IndexError) as error:
        raise InfluenceError(f"{files} cannot be read as Parquet: {describe(error)}") from error
    names = list(schema.names)
    inside = [name for name in names if types.is_nested(schema.field(name).type) or _is_bytes(schema.field(name).type)]
    image = next((name for name in inside if name.lower() in IMAGE_COLUMNS), inside[0] if len(inside) == 1 else None)
    label = next((name for wanted in LABEL_COLUMNS for name in names if name.lower() == wanted), None)
    paths = next((name for name in names if name.lower() in IMAGE_COLUMNS and name not in inside), None)
    if image is None and paths is not None and label is not None and len(first) == 1:
        return {"csv": first[0], "image": paths, "label": label}
    if image is None or label is None:
        missing = "images" if image is None else "labels"
        raise InfluenceError(
            f"{first[0]}: no column is known to hold {missing}; the columns are {', '.join(names[:12])}",
            "rename the column to image or label",
        )
    args = {"files": files, "image": image, "label": label}
    return {"dataset": "influence_cli.data.parquet_images.ParquetImages", "args": args}


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _label(path: Path, columns: Mapping[str, Sequence[str]], splits: str | None) -> str:
    for wanted in LABEL_COLUMNS:
        for name in columns:
            if name.lower() == wanted:
                return name
    # The only column with fewer values than rows, where all others are paths.
    rest = [name for name in columns if name != splits and name.lower() not in (*IMAGE_COLUMNS, "", "index")]
    repeated = [name for name in rest if 1 < len(set(columns[name])) <= max(2, len(columns[name]) // 2)]
    if len(repeated) == 1:
        return repeated[0]
    raise InfluenceError(
        f"{path}: no column is known to hold labels; the columns are {', '.join(list(columns)[:12])}",
        "rename the column to label",
    )


def _image(path: Path, columns: Mapping[str, Sequence[str]], others: set[str | None]) -> tuple[str, str | None]:
    """Find the column of images and the folder that they are in: None for that of the table."""
    folder = path.parent
    inner = _folders(folder, path.stem)
    deeper = [below for place in inner[:50] for below in _folders(place, path.stem)]
    # A list called train.csv means the folder train/ first, or images/train/.
    deeper.sort(key=lambda entry: entry.name.lower() != path.stem.lower())
    names = [name for name in columns if name not in others]
    names.sort(key=lambda name: name.lower() not in IMAGE_COLUMNS)
    for name in names:
        cell = columns[name][0]
        if not cell or len(cell) > 4000 or "\0" in cell:
            continue
        for place in (folder, *inner[:50], Path(), *deeper[:50]):
            if any((place / (cell + ending)).is_file() for ending in ENDINGS):
                return name, None if place == folder else str(place)
    raise InfluenceError(
        f"{path}: no column names images that exist; the first row is "
        + ", ".join(f"{name}: {columns[name][0][:40]}" for name in names[:4]),
        f"write paths that are relative to {folder}",
    )


def _folders(folder: Path, first: str) -> list[Path]:
    """List the folders in a folder that are not hidden: that of a name first."""
    inner = (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(inner, key=lambda entry: (entry.name.lower() != first.lower(), entry))
