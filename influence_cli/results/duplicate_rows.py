"""Rows and columns of `influence duplicates`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from influence_cli.inspection.duplicates import Copies, Duplicates

COLUMNS = ("group", "kind", "split", "index", "path", "label", "exact", "similarity", "keep")


def duplicate_rows(result: Duplicates, classes: Sequence[str], count: int | None) -> Iterator[dict[str, object]]:
    """Give one row per image of each group, groups across splits first, then those whose labels differ.

    Args:
        result: the groups.
        classes: names by number.
        count: how many groups, None for all.
    """
    for number, group in enumerate(result.groups[:count], start=1):
        for at, place in enumerate(group.places):
            split, label = result.splits[place.split], int(group.labels[at])
            yield {
                "group": number,
                "kind": kind_of(group),
                "split": split.name,
                "index": place.index,
                "path": split.path(place.index),
                "label": classes[label] if label >= 0 else None,
                "exact": bool(group.exact[at]),
                "similarity": float(group.similarity[at]),
                "keep": bool(group.kept[at]),
            }


def kind_of(group: Copies) -> str:
    """Name the kind of a group: across splits, different labels or same label."""
    return "across splits" if group.leaks else "different labels" if group.disagrees else "same label"
