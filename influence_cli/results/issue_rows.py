"""Rows and columns of `influence issues`: the kinds with counts, or the issues of one kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from influence_cli.inspection.issues import Issues

KIND_COLUMNS = ("kind", "train", "test", "worst", "next")
COLUMNS = ("kind", "rank", "split", "index", "path", "label", "value", "reason")
# Commands that say more of a kind than its list does.
NEXT = {
    "mislabel": "influence mislabels --report mislabels.html",
    "leak": "influence duplicates --exclude copies.csv",
    "duplicate": "influence duplicates --exclude copies.csv",
    "weak slice": "influence groups misclassified",
}


def kind_rows(result: Issues) -> Iterator[dict[str, object]]:
    """Give one row per kind; counts are None where a kind was not looked for, or there is no test set."""
    from influence_cli.inspection.issues import KINDS

    for kind in KINDS:
        issues = result.by_kind.get(kind)
        yield {
            "kind": kind,
            **{name: counted_in(result, kind, name) for name in ("train", "test")},
            "worst": result.missing.get(kind) if issues is None else _where(issues[0]) if issues else None,
            "next": NEXT.get(kind, f"influence issues --kind '{kind}'") if issues else None,
        }


def counted_in(result: Issues, kind: str, split: str) -> int | None:
    """Count a kind in a split; None where it was not looked for there."""
    looked = kind in result.by_kind and split in result.splits
    looked = looked and not (kind == "shortcut" and split == "test")
    looked = looked and not (kind == "leak" and split == "train")
    looked = looked and not (kind == "weak slice" and split != result.sliced)
    return result.count(kind, split) if looked else None


def _where(issue: object) -> str:
    index, split, reason = (getattr(issue, name) for name in ("index", "split", "reason"))
    return str(reason) if index is None else f"{split} {index}: {reason}"


def issue_rows(result: Issues, kind: str, classes: Sequence[str], count: int | None) -> Iterator[dict[str, object]]:
    """Give the issues of one kind, the worst first."""
    for number, issue in enumerate(result.by_kind.get(kind, ())[:count], start=1):
        split = result.splits[issue.split]
        label = -1 if issue.index is None else int(split.labels[issue.index])
        yield {
            "kind": kind,
            "rank": number,
            "split": issue.split,
            "index": issue.index,
            "path": None if issue.index is None else split.path(issue.index),
            "label": classes[label] if label >= 0 else None,
            "value": issue.value,
            "reason": issue.reason,
        }
