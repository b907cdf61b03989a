"""From decisions to labels: new labels and exclusions of a data set, and the files that hold them.

The data set itself is never changed. The files hold everything that differs from it, including what ``train.labels``
and ``train.exclude`` held before, so that they replace those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from influence_cli.config.schema import Config, DataConfig
from influence_cli.data.datasets import load_split, load_splits, source_labels
from influence_cli.data.label_files import read_indices, read_labels
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, near_path
from influence_cli.relabel.decisions import Decisions, read_decisions
from influence_cli.report.writer import write_rows
from influence_cli.runtime.transaction import NewFile

SUFFIXES = (".csv", ".npy")


@dataclass(frozen=True)
class Relabelled:
    """Labels and exclusions after decisions.

    Attributes:
        split: the examples before, with their labels and exclusions.
        original: int64 [length], the labels of the data set itself.
        labels: int64 [length], the new ones.
        exclude: int64 [k], ascending: the positions to leave out, including earlier ones.
        classes: class names by number.
        decisions: what was applied.
        root: the data set's folder of class folders, if it is an ImageFolder.
    """

    split: Split
    original: np.ndarray
    labels: np.ndarray
    exclude: np.ndarray
    classes: tuple[str, ...]
    decisions: Decisions
    root: Path | None

    @property
    def overrides(self) -> np.ndarray:
        """Give the positions whose label is not the data set's own, ascending."""
        return np.flatnonzero(self.labels != self.original)

    def pairs(self) -> list[tuple[str, str, int]]:
        """Count the relabels by (from, to), the most frequent first."""
        counts = Counter((row.label, row.new_label) for row in self.decisions.rows if row.new_label is not None)
        return [
            (self.classes[old], self.classes[new], count)
            for (old, new), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        ]


def apply_decisions(config: Config, path: Path, on: str = "train") -> Relabelled:
    """Apply a file of decisions to the labels of a data set, in memory; neither model nor checkpoint is loaded.

    Args:
        config: names the data set, and the earlier labels and exclusions.
        path: the decisions.
        on: ``train`` or ``test``.

    Raises:
        InfluenceError: an error in the data set, or the first line that does not fit it.
    """
    split, names, original, places = labelled_split(config, on)
    decisions = read_decisions(path, split, names, config.folder, places=places)
    labels, exclude = new_labels(split, decisions)
    if len(exclude) == len(labels):
        raise InfluenceError(f"{near_path(path)} leaves no {on} example", "drop fewer")
    root = getattr(split.source, "root", None)
    folder = config.folder / root if isinstance(root, str | Path) and split.mapping is not None else None
    return Relabelled(split, original, labels, exclude, names, decisions, folder)


def labelled_split(config: Config, on: str) -> tuple[Split, tuple[str, ...], np.ndarray, tuple[str, str]]:
    """Load the examples that decisions are about, without the model.

    Args:
        config: names the data set.
        on: ``train`` or ``test``.

    Returns:
        The examples, the class names by number, int64 [length] the labels of the data set itself, and where the config
        names ``labels`` and ``exclude``, empty where it does not.
    """
    section = data_section(config, on)
    if on == "train":
        split = load_split(config, "train", config.train)
        names = split.classes
    else:
        # Class names come from the training set, as everywhere else.
        train, test = load_splits(config)
        if test is None:  # data_section has refused that
            raise InfluenceError("the config has no test data set")
        split, names = test, train.classes
    original = source_labels(split) if section.labels is not None else split.labels
    if names is None:
        names = tuple(str(number) for number in range(1 + int(max(original.max(), split.labels.max()))))
    places = [config.where(on, key) if getattr(section, key) is not None else "" for key in ("labels", "exclude")]
    return split, names, original, (places[0], places[1])


@dataclass(frozen=True)
class ConfiguredLabels:
    """What the config says of the label files of a data set.

    Attributes:
        config: the config's file.
        on: ``train`` or ``test``.
        named: the files of ``labels`` and ``exclude``, None where one is not named; empty without such a data set.
        places: where each of them is set, for messages.
        tables: the tables that list the examples of either data set.
    """

    config: Path
    on: str
    named: dict[str, Path | None]
    places: dict[str, str]
    tables: tuple[Path, ...] = ()


def configured_labels(config: Config, on: str) -> ConfiguredLabels:
    """Give the label files that the config names for the training or the test data set."""
    section = config.train if on == "train" else config.test
    named = {} if section is None else {"labels": section.labels, "exclude": section.exclude}
    tables = tuple(part.csv for part in (config.train, config.test) if part is not None and part.csv is not None)
    return ConfiguredLabels(config.path, on, named, {key: config.where(on, key) for key in named}, tables)


def data_section(config: Config, on: str) -> DataConfig:
    """Give the section of the training or the test data set; an error if the config names none."""
    section = config.train if on == "train" else config.test
    if section is None:
        raise InfluenceError("the config has no test data set", "add a section test: {dataset: …, args: {…}}")
    return section


def new_labels(split: Split, decisions: Decisions) -> tuple[np.ndarray, np.ndarray]:
    """Apply decisions to a split.

    Returns:
        Labels int64 [length], and the positions to leave out, int64, rising.
    """
    labels, left = split.labels.copy(), np.ones(len(split.labels), dtype=bool)
    left[split.indices] = False
    for row in decisions.rows:
        if row.new_label is not None:
            labels[row.index] = row.new_label
        left[row.index] |= row.decision == "drop"
    return labels, np.flatnonzero(left)


def decision_rows(result: Relabelled) -> Iterator[dict[str, object]]:
    """Give the rows of the changes: relabels and drops."""
    for row in result.decisions.rows:
        if row.decision in ("relabel", "drop"):
            yield {
                "index": row.index,
                "path": result.split.path(row.index),
                "label": result.classes[row.label],
                "decision": row.decision,
                "new_label": None if row.new_label is None else result.classes[row.new_label],
            }


def label_files(result: Relabelled, labels: Path, exclude: Path) -> list[NewFile]:
    """Give the files for ``train.labels`` and ``train.exclude``, each verified by reading it as a config does.

    Args:
        result: the result of the decisions.
        labels: a ``.csv`` with one row per label that differs from the data set's own, or a ``.npy`` of all labels.
        exclude: a ``.csv`` or a ``.npy`` of positions.

    Raises:
        InfluenceError: another suffix.
    """
    for path in (labels, exclude):
        if path.suffix not in SUFFIXES:
            raise InfluenceError(f"{path}: labels and exclusions are .csv or .npy", "choose one of the two suffixes")
    split = result.split

    def write_labels(path: Path) -> None:
        if path.suffix == ".npy":
            np.save(path, result.labels)
        else:
            # If the data set has no class names, labels are read as numbers.
            names = split.classes or [str(number) for number in range(len(result.classes))]
            _write_csv(path, split, result.overrides, {"label": [names[label] for label in result.labels]})

    def verify_labels(path: Path) -> None:
        written = read_labels(path, result.original, split.classes, str(labels), split.paths)
        if not np.array_equal(written, result.labels):
            raise InfluenceError(
                f"{labels}: class names cannot be read back from a .csv (two are written the same)",
                "--labels labels.npy",
            )

    return [NewFile(labels, write_labels, verify_labels), exclusion_file(exclude, split, result.exclude)]


def exclusion_file(file: Path, split: Split, indices: np.ndarray) -> NewFile:
    """Give the file for ``train.exclude``, verified by reading it as a config does.

    Args:
        file: a ``.csv`` or a ``.npy`` of positions.
        split: whose examples they are.
        indices: int64 [k], rising, positions to leave out.
    """

    def write(path: Path) -> None:
        if path.suffix == ".npy":
            np.save(path, indices)
        else:
            _write_csv(path, split, indices, {})

    def verify(path: Path) -> None:
        if not np.array_equal(read_indices(path, len(split.labels), str(file), split.paths), indices):
            raise InfluenceError(f"{file}: positions cannot be read back")

    return NewFile(file, write, verify)


def _write_csv(path: Path, split: Split, indices: np.ndarray, columns: dict[str, list[str]]) -> None:
    named = ["path"] if split.paths is not None else []
    rows = (
        {"index": index, "path": split.path(index), **{name: values[index] for name, values in columns.items()}}
        for index in indices.tolist()
    )
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        write_rows(rows, ["index", *named, *columns], "csv", stream)
