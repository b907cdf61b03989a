"""Data sets in a few large files: which files a pattern names, and which file holds an example."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from influence_cli.errors import InfluenceError, did_you_mean, near_path

# The innermost {000..009} or {train,extra} of a pattern.
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")


@dataclass(frozen=True)
class DataFiles:
    """Files with many examples each; an example's index is its position over all of them, in this order.

    Attributes:
        names: absolute paths, sorted.
        starts: int64 [files + 1], the index of each file's first example, then the total number.
        rows: int64 [examples], where each example lies among those of the files, if only some are taken; None for all.
    """

    names: tuple[str, ...]
    starts: np.ndarray
    rows: np.ndarray | None = None

    def place(self, index: int) -> tuple[int, int]:
        """Give the number of the file that holds an example, and its row there."""
        if not 0 <= index < self.starts[-1]:
            raise IndexError(f"{index} of {self.starts[-1]} examples")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def used(self, indices: np.ndarray) -> list[str]:
        """Name the files that hold some examples."""
        rows = indices if self.rows is None else self.rows[indices]
        return [self.names[number] for number in np.unique(np.searchsorted(self.starts, rows, side="right") - 1)]

    def take(self, indices: np.ndarray) -> DataFiles:
        """Give the files with only some of these examples, in another order perhaps."""
        return DataFiles(self.names, self.starts, indices if self.rows is None else self.rows[indices])


@dataclass(frozen=True)
class RowPaths(Sequence[str]):
    """A stand-in for the path of each example, written on demand: ``data/train-0.parquet#17``."""

    files: DataFiles

    def __len__(self) -> int:
        return int(self.files.starts[-1])

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices are taken of paths
        number, row = self.files.place(index + len(self) if index < 0 else index)
        return f"{self.files.names[number]}#{row}"


def joined(parts: Sequence[DataFiles]) -> DataFiles:
    """Put the files of several data sets one after another, as ``torch.utils.data.ConcatDataset`` does the examples."""
    sizes = [int(part.starts[-1]) for part in parts]
    before = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    starts = [part.starts[:-1] + first for part, first in zip(parts, before, strict=False)]
    rows = [
        first + (np.arange(size) if part.rows is None else part.rows)
        for part, first, size in zip(parts, before, sizes, strict=False)
    ]
    names = tuple(name for part in parts for name in part.names)
    return DataFiles(names, np.concatenate([*starts, before[-1:]]), np.concatenate(rows))


def is_within(path: str) -> bool:
    """Say whether the example of this path is in an existing data file, and not an image file of its own."""
    return "#" in path and not os.path.lexists(path) and os.path.isfile(path.partition("#")[0])  # noqa: PTH113


def find_files(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Find the files that patterns name, each once, sorted by their whole path.

    Args:
        patterns: one or several, with ``*``, ``?``, ``[…]``, ``**`` and ``{000..009}``, from the current folder.

    Raises:
        InfluenceError: a pattern, or one of the names that its braces expand to, matches no file.
    """
    files: set[str] = set()
    given = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(given, list | tuple) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise InfluenceError(f"files is {patterns!r}: expected a pattern or a list of them", "such as data/*.parquet")
    # Relative to the current folder, whose own name may contain special characters of patterns.
    for pattern in itertools.chain.from_iterable(_expanded(near(pattern)) for pattern in given):
        here = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)  # noqa: PTH207
        if not here:
            folder = Path(pattern).parent
            raise InfluenceError(
                f"no file matches {pattern}",
                "a path is relative to the folder of the YAML file"
                if not folder.is_dir()
                else did_you_mean(
                    Path(pattern).name, [entry.name for entry in itertools.islice(folder.iterdir(), 1000)]
                ),
            )
        files.update(os.path.abspath(path) for path in here)  # noqa: PTH100 (as it is given: links are not followed)
    return tuple(sorted(files))


def _expanded(pattern: str) -> list[str]:
    """Expand ``{000..009}`` and ``{a,b}`` as a shell does."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if ends is None:
        words = braces[1].split(",")
    else:
        first, last = int(ends[1]), int(ends[2])
        width = max(map(len, ends.groups())) if any(re.match("0.", end) for end in ends.groups()) else 0
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [text for word in words for text in _expanded(before + word + after)]


def near(path: str) -> str:
    """Name a data file in a message."""
    return str(near_path(Path(path)))
