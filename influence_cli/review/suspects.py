"""The labels to decide on, most suspicious first: from a result file, or from labels that were judged just now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from influence_cli.errors import InfluenceError, counted, near_path
from influence_cli.report.html import Review
from influence_cli.results.mislabel_rows import NEIGHBOURS, mislabel_rows, nearest_examples
from influence_cli.results.reader import read_neighbours, read_result

if TYPE_CHECKING:
    from influence_cli.data.split import Split
    from influence_cli.mislabels.find import Mislabels
    from influence_cli.report.table import Row


@dataclass(frozen=True)
class Suspect:
    """A label to decide on.

    Attributes:
        review: the example, its label and the class that the evidence suggests.
        facts: (name, value) pairs of its card.
        neighbours: positions in the data set of the most similar examples, nearest first; empty if they are not known.
    """

    review: Review
    facts: tuple[tuple[str, str], ...]
    neighbours: tuple[int, ...]


def read_suspects(path: Path, split: Split, classes: Sequence[str], on: str) -> tuple[Suspect, ...]:
    """Read the suspects of a result of `influence mislabels`, and check that they are of this data set.

    Similar images come from its run file.

    Args:
        path: what ``mislabels -o`` wrote.
        split: the examples, with their current labels.
        classes: class names by number.
        on: ``train`` or ``test``.

    Raises:
        InfluenceError: it is not a result of `mislabels`, or is one of other labels, files or examples than these.
    """
    result = read_result(path)
    if result.kind != "mislabels":
        raise InfluenceError(
            f"{path} is a result of influence rank: it has no labels to decide on",
            "influence mislabels --all -o FILE writes one",
        )
    if result.on is not None and result.on != on:
        raise InfluenceError(f"{path} judges the {result.on} labels, not the {on} labels", f"add --on {result.on}")
    differ = [
        (place, reason)
        for row, place in zip(result.rows, result.places, strict=True)
        if (reason := _differs(row, split, classes))
    ]
    if differ:
        place, reason = differ[0]
        more = f" ({counted(len(differ), 'row')} of {len(result.rows):,} differ)" if len(differ) > 1 else ""
        raise InfluenceError(
            f"{place}: {reason}: the data set has changed since, or this is the result of another one{more}",
            f"influence mislabels --all -o {near_path(path)} judges the labels as they are now",
        )
    return _suspects(result.rows, read_neighbours(path, len(split.labels)), classes)


def judged_suspects(
    result: Mislabels, split: Split, names: tuple[str, ...], classes: Sequence[str]
) -> tuple[Suspect, ...]:
    """Give every label that was judged as a suspect, most suspicious first.

    Args:
        result: of the search.
        split: the examples.
        names: of the model's classes, by number.
        classes: that the data set has; no other one is suggested.
    """
    return _suspects(
        mislabel_rows(result, split, names, len(result.order)),
        nearest_examples(result, result.order, NEIGHBOURS),
        classes,
    )


def _differs(row: Row, split: Split, classes: Sequence[str]) -> str:
    """Say how a row differs from the data set; empty if it does not."""
    index = row["index"]
    if not isinstance(index, int) or not 0 <= index < len(split.labels):
        return f"there is no example {index}, the {split.name} data set has {len(split.labels):,}"
    label, now = str(row["label"]), classes[int(split.labels[index])]
    if label != now:
        return f"example {index} is labelled {label} there, {now} in the data set"
    path, given = split.path(index), row.get("path")
    # The project may have moved as a whole, so the end of the path decides.
    if path is not None and given is not None and PurePath(path).parts[-2:] != PurePath(str(given)).parts[-2:]:
        return f"example {index} is {given} there, {near_path(Path(path))} in the data set"
    return ""


def _suspects(
    rows: Iterable[Mapping[str, object]], neighbours: Mapping[int, Sequence[int]], classes: Sequence[str]
) -> tuple[Suspect, ...]:
    known, suspects = set(classes), []
    for row in rows:
        index, label = int(str(row["index"])), str(row["label"])
        suggested = str(row["suggested"]) if row.get("suggested") in known else label
        confidence = _number(row.get("confidence"))
        likely = suggested + ("" if confidence is None else f" ({confidence:.0%})")
        score, loss, path = _number(row.get("score")), _number(row.get("loss")), row.get("path")
        facts = (
            ("suggested", likely if row.get("suggested") in known else "not judged"),
            *((("score", f"{score:.4f}"),) if score is not None else ()),
            *((("loss", f"{loss:.4g}"),) if loss is not None else ()),
            ("index", str(index)),
            *((("path", str(near_path(Path(str(path))))),) if path is not None else ()),
        )
        review = Review(index, None if path is None else str(path), label, suggested)
        suspects.append(Suspect(review, facts, tuple(neighbours.get(index, ()))))
    return tuple(suspects)


def _number(value: object) -> float | None:
    try:
        return None if value is None or value == "" else float(str(value))
    except ValueError:
        return None
