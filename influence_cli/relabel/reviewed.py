"""Read all that a person has decided about a data set, from several files, each as the review page saves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.errors import InfluenceError, did_you_mean, near_path
from influence_cli.relabel.decisions import Decision, read_decisions, told

if TYPE_CHECKING:
    from influence_cli.data.split import Split


@dataclass(frozen=True)
class Reviewed:
    """Decisions of one or several files, one per example.

    Attributes:
        files: that were read.
        rows: the decisions, by position.
        sources: the file of each of them.
    """

    files: tuple[Path, ...]
    rows: tuple[Decision, ...]
    sources: tuple[Path, ...]

    def place(self, index: int) -> str:
        """Name the file and line of the decision on an example: ``decisions.csv:17``."""
        row, source = next(pair for pair in zip(self.rows, self.sources, strict=True) if pair[0].index == index)
        return f"{near_path(source)}:{row.line}"


def reviewed_files(given: Sequence[Path]) -> tuple[Path, ...]:
    """List the files of ``--reviewed``: each one that is named, and every ``.csv`` of a folder.

    Raises:
        InfluenceError: there is no such file, or a folder holds none.
    """
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(path.glob("*.csv"))
            if not inside:
                raise InfluenceError(
                    f"--reviewed {path}: the folder has no .csv file", "the review page saves decisions.csv"
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            near = [one.name for one in path.parent.glob("*.csv")] if path.parent.is_dir() else []
            raise InfluenceError(
                f"--reviewed {path}: there is no such file or folder",
                did_you_mean(path.name, near) if near else "the review page saves decisions.csv",
            )
    return tuple(dict.fromkeys(files))


def read_reviewed(
    files: Sequence[Path], split: Split, classes: Sequence[str], folder: Path, *, places: tuple[str, str] = ("", "")
) -> Reviewed:
    """Read decisions of several files, and check that they fit the data set and each other.

    A decision that the labels already follow fits too. ``unsure`` gives way to a decision of another file.

    Args:
        files: of decisions.
        split: the examples, with their current labels.
        classes: class names by number.
        folder: relative paths of images are taken from it, or else from the current one.
        places: where the config names the labels and the exclusions, for messages.

    Raises:
        InfluenceError: at the first line that does not fit, or that another file contradicts; it names both.
    """
    decided: dict[int, tuple[Decision, Path]] = {}
    for file in files:
        for row in read_decisions(file, split, classes, folder, places=places, applied=True).rows:
            earlier, source = decided.get(row.index, (row, file))
            if row.decision == "unsure" and earlier.decision != "unsure":
                continue
            if earlier.decision != "unsure" and _outcome(earlier) != _outcome(row):
                raise InfluenceError(
                    f"{near_path(file)}:{row.line}: {told(row, classes)} for index {row.index}, but "
                    f"{near_path(source)}:{earlier.line} says {told(earlier, classes)}",
                    "keep only one of the two lines",
                )
            if row.index not in decided or earlier.decision in (
                "unsure",
                "keep",
            ):  # a relabel that was applied stays one
                decided[row.index] = (row, file)
    rows, sources = zip(*(decided[index] for index in sorted(decided)), strict=True) if decided else ((), ())
    return Reviewed(tuple(files), rows, sources)


def _outcome(row: Decision) -> tuple[str, int]:
    """Say what an example is after a decision: a word, and its class if it is used."""
    if row.decision in ("drop", "unsure"):
        return row.decision, -1
    return "used", row.label if row.new_label is None else row.new_label
