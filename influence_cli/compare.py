"""Two results of the same kind, such as before and after cleaning: what stayed at the top, what entered, what left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.metrics import spearman
from influence_cli.report.table import Row, Scalar
from influence_cli.result_files import Result

VALUES = {"rank": "influence", "mislabels": "score"}
CHANGES = ("kept", "entered", "left")


@dataclass(frozen=True)
class Pair:
    """What stands at a place of either list.

    Attributes:
        change: ``kept`` (in both top lists), ``entered`` (only in the second's), ``left`` (only in the first's).
        a: its row in the first result, or None where that does not list it.
        b: its row in the second.
    """

    change: str
    a: Row | None
    b: Row | None

    @property
    def row(self) -> Row:
        """Give the row of the second result, or else of the first."""
        row = self.b or self.a
        if row is None:
            raise ValueError("a pair of nothing")
        return row


@dataclass(frozen=True)
class Comparison:
    """Two lists beside each other: of all labels, or of one test example and effect.

    Attributes:
        test: position of the test example, its file, and the effect; all None for `mislabels`.
        top: how many of each list are compared.
        overlap: the share of these that are in both.
        correlation: Spearman's, of the values of what both results list; None below three.
        common: how many those are.
        pairs: kept ones first, then entered, then left, each in the order of their list.
    """

    test: int | None
    test_path: str | None
    effect: str | None
    top: int
    overlap: float
    correlation: float | None
    common: int
    pairs: tuple[Pair, ...]

    def count(self, change: str) -> int:
        """Count the pairs of a change."""
        return sum(pair.change == change for pair in self.pairs)


def compare_results(a: Result, b: Result, top: int | None = None) -> tuple[list[Comparison], list[str]]:
    """Compare two results list by list.

    Args:
        a: the first.
        b: the second, of the same kind.
        top: how many of each list; None for as many as the shorter one has.

    Returns:
        A comparison for every list that both have, and a line for what only one of them has.

    Raises:
        InfluenceError: results of different kinds or data sets, or nothing in common.
    """
    if a.kind != b.kind:
        raise InfluenceError(
            f"{a.path} is a result of influence {a.kind}, {b.path} of influence {b.kind}",
            "compare two results of the same command",
        )
    _refuse_other_data(a, b)
    reverse = a.kind == "rank" and _of_one_training_example(a) and _of_one_training_example(b)
    about, item = (_index, _test) if reverse else (_test, _index)
    groups = [_grouped(result.rows, about) for result in (a, b)]
    shared = [key for key in groups[0] if key in groups[1]]
    if not shared:
        raise InfluenceError(
            f"{a.path} and {b.path} have no {'training' if reverse else 'test'} example in common",
            "rank the same TEST examples with both",
        )
    notes = [
        f"{len(own.keys() - other.keys()):,} test examples of {result.path} are not in {than.path}"
        for result, than, own, other in ((a, b, groups[0], groups[1]), (b, a, groups[1], groups[0]))
        if own.keys() - other.keys()
    ]
    return [
        found
        for key in shared
        for found in _compare(groups[0][key], groups[1][key], item, VALUES[a.kind], top, reverse)
    ], notes


def comparison_rows(comparisons: Sequence[Comparison], kind: str) -> list[Row]:
    """Give a row for every pair: where it stands and stood, with what value."""
    value = VALUES[kind]
    rows: list[Row] = []
    for found in comparisons:
        for pair in found.pairs:
            a, b, any_ = pair.a or {}, pair.b or {}, pair.row
            rows.append(
                {
                    "test": any_.get("test"),
                    "test_path": any_.get("test_path"),
                    "effect": found.effect,
                    "change": pair.change,
                    "index": any_["index"],
                    "path": any_["path"],
                    "label_a": a.get("label"),
                    "label_b": b.get("label"),
                    "rank_a": a.get("rank"),
                    "rank_b": b.get("rank"),
                    "value_a": a.get(value),
                    "value_b": b.get(value),
                }
            )
    return rows


def _compare(
    a: list[Row], b: list[Row], item: Callable[[Row], Scalar], value: str, top: int | None, reverse: bool
) -> Iterator[Comparison]:
    """Compare what two results say of one thing, effect by effect."""
    own_a, own_b = {item(row): row for row in a}, {item(row): row for row in b}
    both = [key for key in own_a if key in own_b]
    x, y = (np.array([own[key][value] for key in both], dtype=np.float64) for own in (own_a, own_b))
    correlation = spearman(x, y) if len(both) > 2 else float("nan")
    lists = [_grouped(sorted(rows, key=lambda row: int(row["rank"] or 0)), _effect) for rows in (a, b)]
    for effect in dict.fromkeys([*lists[0], *lists[1]]):
        one, two = lists[0].get(effect, []), lists[1].get(effect, [])
        count = min(len(one), len(two)) if top is None else min(top, max(len(one), len(two)))
        first, second = ({item(row): row for row in rows[:count]} for rows in (one, two))
        pairs = [Pair("kept", first[key], row) for key, row in second.items() if key in first]
        kept = len(pairs)
        pairs += [Pair("entered", own_a.get(key), row) for key, row in second.items() if key not in first]
        pairs += [Pair("left", row, own_b.get(key)) for key, row in first.items() if key not in second]
        if pairs:
            yield Comparison(
                test=None if reverse else _whole(a[0].get("test")),
                test_path=None if reverse else _text(a[0].get("test_path")),
                effect=_text(effect),
                top=count,
                overlap=kept / count,
                correlation=float(correlation) if np.isfinite(correlation) else None,
                common=len(both),
                pairs=tuple(pairs),
            )


def _grouped(rows: Iterable[Row], by: Callable[[Row], Scalar]) -> dict[Scalar, list[Row]]:
    found: dict[Scalar, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row), []).append(row)
    return found


def _test(row: Row) -> Scalar:
    """Name the test example of a row: its position, or the file where it has none; None for an aggregate."""
    return row["test_path"] if row.get("test") is None and "test_path" in row else row.get("test")


def _index(row: Row) -> Scalar:
    return row["index"]


def _effect(row: Row) -> Scalar:
    return row.get("effect")


def _of_one_training_example(result: Result) -> bool:
    """Tell the result of rank --train: one training example, several test examples."""
    tests = {(row["test"], row["test_path"]) for row in result.rows}
    return len({row["index"] for row in result.rows}) == 1 and len(tests) > 1


def _refuse_other_data(a: Result, b: Result) -> None:
    """Refuse results whose positions mean other files; a data set may have moved as a whole."""
    names = {row["index"]: row["path"] for row in a.rows if row["path"] is not None}
    for row, place in zip(b.rows, b.places, strict=True):
        other, own = names.get(row["index"]), row["path"]
        if other is not None and own is not None and PurePath(str(other)).name != PurePath(str(own)).name:
            raise InfluenceError(
                f"{place}: example {row['index']} is {PurePath(str(own)).name}, in {a.path} it is "
                f"{PurePath(str(other)).name}",
                "files were added or removed between the two; compare results on the same data set",
            )


def _whole(value: Scalar) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Scalar) -> str | None:
    return value if isinstance(value, str) else None
