"""Compares two results of the same kind, such as before and after cleaning: what stayed at the top, entered or left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from influence_cli.errors import InfluenceError, counted
from influence_cli.metrics import spearman
from influence_cli.report.table import Row, Scalar
from influence_cli.results.reader import Result

VALUES = {"rank": "influence", "mislabels": "score"}
CHANGES = ("kept", "entered", "left")


@dataclass(frozen=True)
class Pair:
    """An example of at least one of the two lists.

    Attributes:
        change: ``kept`` (in both top lists), ``entered`` (only in the second), ``left`` (only in the first).
        a: its row in the first result, or None if that does not list it.
        b: its row in the second result, or None.
    """

    change: str
    a: Row | None
    b: Row | None

    @property
    def row(self) -> Row:
        """Give the row of the second result, otherwise that of the first."""
        row = self.b or self.a
        if row is None:
            raise ValueError("a pair of nothing")
        return row


@dataclass(frozen=True)
class Comparison:
    """Two compared lists: of all labels, or of one test example and effect.

    Attributes:
        test: position of the test example, its file, and the effect; all None for `mislabels`.
        train: position of the training example whose test examples are compared (`rank --train`), otherwise None.
        listed: how many examples the first result has in this list, and the second.
        top: how many of each list are compared.
        overlap: the share of these that are in both.
        correlation: Spearman's correlation of the values of the examples in both lists; None for fewer than three.
        common: how many examples are in both lists.
        pairs: first kept, then entered, then left, each in the order of their list.
    """

    test: int | None
    test_path: str | None
    train: int | None
    effect: str | None
    listed: tuple[int, int]
    top: int
    overlap: float
    correlation: float | None
    common: int
    pairs: tuple[Pair, ...]

    @property
    def key(self) -> Scalar:
        """Name the test example as `test_of` does for a row."""
        return self.test_path if self.test is None else self.test

    def count(self, change: str) -> int:
        """Count the pairs with this change."""
        return sum(pair.change == change for pair in self.pairs)

    def numbers(self) -> dict[str, object]:
        """Give the numbers of the comparison by name, and how many pairs there are of each change."""
        plain = {key: value for key, value in vars(self).items() if key != "pairs"}
        return plain | {change: self.count(change) for change in CHANGES}


def compare_results(a: Result, b: Result, top: int | None = None) -> tuple[list[Comparison], list[str]]:
    """Compare two results list by list.

    Args:
        a: the first.
        b: the second, of the same kind.
        top: how many of each list at most; never more than the shorter list has.

    Returns:
        One comparison per list that both have, and one line per list that only one of them has.

    Raises:
        InfluenceError: the results have different kinds or data sets, list something twice, or have nothing in common.
    """
    if a.kind != b.kind:
        raise InfluenceError(
            f"{a.path} is a result of influence {a.kind}, {b.path} of influence {b.kind}",
            "compare two results of the same command",
        )
    for result in (a, b):
        _refuse_repeated(result)
    _refuse_other_sets(a, b)
    for index, path in (("index", "path"), ("test", "test_path")):
        _refuse_other_files(a, b, index, path)
    reverse = a.kind == "rank" and _of_one_training_example(a) and _of_one_training_example(b)
    about, item = (_index, test_of) if reverse else (test_of, _index)
    groups = [grouped(result.rows, about) for result in (a, b)]
    shared = [key for key in groups[0] if key in groups[1]]
    if not shared:
        raise InfluenceError(
            f"{a.path} and {b.path} have no {'training' if reverse else 'test'} example in common",
            "rank the same TEST examples with both",
        )
    comparisons = [
        comparison
        for key in shared
        for comparison in _compare(groups[0][key], groups[1][key], item, VALUES[a.kind], top, reverse=reverse)
    ]
    if not comparisons:
        raise InfluenceError(
            f"{a.path} and {b.path} have no list in common: one lists helpful examples, the other harmful ones",
            "compare results that list the same effects",
        )
    lists = [{(about(row), _effect(row)) for row in result.rows if about(row) in shared} for result in (a, b)]
    notes = []
    for side, (result, than) in enumerate(((a, b), (b, a))):
        examples = len(groups[side].keys() - groups[1 - side].keys())
        if examples:
            what = "training example" if reverse else "test example"
            notes.append(f"{than.path} lacks {counted(examples, what)} of {result.path}")
        if lists[side] - lists[1 - side]:
            number = counted(len(lists[side] - lists[1 - side]), "list")
            notes.append(f"{than.path} lacks {number} of {result.path} (helpful or harmful)")
        if top is not None:
            notes += _shorter(comparisons, side, result, top)
    return comparisons, notes


def _shorter(comparisons: Sequence[Comparison], side: int, result: Result, top: int) -> Iterator[str]:
    """Say that a result lists fewer than --top: only as many as it lists are compared."""
    listed = [comparison.listed[side] for comparison in comparisons if comparison.listed[side] < top]
    if listed:
        where = "" if len(comparisons) == 1 else f" in {len(listed):,} of {counted(len(comparisons), 'list')}"
        fewest = f"{min(listed):,}" if len(set(listed)) == 1 else f"{min(listed):,} to {max(listed):,}"
        yield f"{result.path} has only {fewest} of the {top:,} rows of --top{where}: only as many are compared"


def comparison_rows(
    comparisons: Sequence[Comparison], kind: str, more: Callable[[Row], Row] | None = None
) -> list[Row]:
    """Give one row per pair: its rank and value in both results.

    Args:
        comparisons: list by list.
        kind: of the results, ``rank`` or ``mislabels``.
        more: gives more columns for a row of the second result, or of the first if the second does not list it.
    """
    value = VALUES[kind]
    rows: list[Row] = []
    for comparison in comparisons:
        for pair in comparison.pairs:
            a, b, any_ = pair.a or {}, pair.b or {}, pair.row
            rows.append(
                {
                    "test": any_.get("test"),
                    "test_path": any_.get("test_path"),
                    "effect": comparison.effect,
                    "change": pair.change,
                    "index": any_["index"],
                    "path": any_["path"],
                    "label_a": a.get("label"),
                    "label_b": b.get("label"),
                    "rank_a": a.get("rank"),
                    "rank_b": b.get("rank"),
                    "value_a": a.get(value),
                    "value_b": b.get(value),
                    **({} if more is None else more(any_)),
                }
            )
    return rows


def _compare(
    a: list[Row], b: list[Row], item: Callable[[Row], Scalar], value: str, top: int | None, *, reverse: bool
) -> Iterator[Comparison]:
    """Compare what two results say about one example, effect by effect."""
    rows_a, rows_b = {item(row): row for row in a}, {item(row): row for row in b}
    lists = [grouped(sorted(rows, key=lambda row: int(row["rank"] or 0)), _effect) for rows in (a, b)]
    for effect in dict.fromkeys([*lists[0], *lists[1]]):
        one, two = lists[0].get(effect, []), lists[1].get(effect, [])
        count = min(len(one), len(two)) if top is None else min(top, len(one), len(two))
        if not count:
            continue
        correlation, common = _correlation(one, two, item, value)
        first, second = ({item(row): row for row in rows[:count]} for rows in (one, two))
        pairs = [Pair("kept", first[key], row) for key, row in second.items() if key in first]
        kept = len(pairs)
        pairs += [Pair("entered", rows_a.get(key), row) for key, row in second.items() if key not in first]
        pairs += [Pair("left", row, rows_b.get(key)) for key, row in first.items() if key not in second]
        yield Comparison(
            test=None if reverse else _whole(a[0].get("test")),
            test_path=None if reverse else _text(a[0].get("test_path")),
            train=_whole(a[0]["index"]) if reverse else None,
            effect=_text(effect),
            listed=(len(one), len(two)),
            top=count,
            overlap=kept / count,
            correlation=correlation,
            common=common,
            pairs=tuple(pairs),
        )


def _correlation(one: list[Row], two: list[Row], item: Callable[[Row], Scalar], value: str) -> tuple[float | None, int]:
    """Correlate the values of the examples that two lists of the same effect both have, and count them.

    Each effect has its own correlation: over both effects together, helpful above harmful would count as agreement.
    """
    x, y = ({item(row): row[value] for row in rows} for rows in (one, two))
    both = [key for key in x if key in y]
    if len(both) < 3:
        return None, len(both)
    correlation = spearman(*(np.array([values[key] for key in both], dtype=np.float64) for values in (x, y)))
    return (float(correlation) if np.isfinite(correlation) else None), len(both)


def grouped(rows: Iterable[Row], by: Callable[[Row], Scalar]) -> dict[Scalar, list[Row]]:
    """Group rows by the value of a function, in their order."""
    groups: dict[Scalar, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def test_of(row: Row) -> Scalar:
    """Name the test example of a row: its position, or its file if it has no position; None for an aggregate."""
    return row["test_path"] if row.get("test") is None and "test_path" in row else row.get("test")


def _index(row: Row) -> Scalar:
    return row["index"]


def _effect(row: Row) -> Scalar:
    return row.get("effect")


def _of_one_training_example(result: Result) -> bool:
    """Tell whether this is a result of rank --train: one training example, several test examples."""
    tests = {(row["test"], row["test_path"]) for row in result.rows}
    return len({row["index"] for row in result.rows}) == 1 and len(tests) > 1


def _refuse_repeated(result: Result) -> None:
    """Refuse a result that lists an example twice: the second row would silently replace the first."""
    seen: dict[tuple[Scalar, ...], str] = {}
    for row, place in zip(result.rows, result.places, strict=True):
        first = seen.setdefault((test_of(row), _effect(row), _index(row)), place)
        if first is not place:
            raise InfluenceError(
                f"{place}: example {row['index']} is already in the same list at {first}",
                "a list has each example once: remove one of the two rows",
            )


def _refuse_other_sets(a: Result, b: Result) -> None:
    """Refuse to compare training labels with test labels, if the run files tell."""
    if a.kind == "mislabels" and a.on is not None and b.on is not None and a.on != b.on:
        raise InfluenceError(
            f"by their run files, {a.path} is about the {a.on} labels and {b.path} about the {b.on} labels",
            "compare results of the same set (--on)",
        )


def _refuse_other_files(a: Result, b: Result, index: str, path: str) -> None:
    """Refuse results whose positions mean different files. The whole data set may have moved."""
    names, others = ({row.get(index): _name(row[path]) for row in result.rows if row.get(path)} for result in (a, b))
    for row, place in zip(b.rows, b.places, strict=True):
        position = row.get(index)
        if position is None or position not in names or names[position] == others.get(position, names[position]):
            continue
        what = f"{'test ' if index == 'test' else ''}example {position}"
        hint = "files were added or removed between the two; compare results on the same data set"
        # This file has another position in A, or the file of A has another position here.
        if others[position] in names.values() or names[position] in others.values():
            same = set(names.values()) == set(others.values())
            hint = (
                "positions have changed (relabel --apply-moves, "
                f"{'or a renamed class folder' if same else 'a renamed class folder, or files added or removed'}); "
                "compare results made with train.labels and train.exclude instead of moves"
            )
        raise InfluenceError(f"{place}: {what} is {others[position]}, but in {a.path} it is {names[position]}", hint)


def _name(path: Scalar) -> str:
    return PurePath(str(path)).name


def _whole(value: Scalar) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Scalar) -> str | None:
    return value if isinstance(value, str) else None


def quality_change(a: Result, b: Result) -> str | None:
    """Say how accuracy and loss on the test set changed from one result to the other.

    Args:
        a: before.
        b: after.

    Returns:
        Such as ``test accuracy rose from 85.0% to 91.3%, loss fell from 0.412 to 0.287``; None unless both runs
        predicted the test set.
    """
    if a.quality is None or b.quality is None:
        return None
    (accuracy, loss), (later, less) = a.quality, b.quality
    return (
        f"test accuracy {_moved(f'{accuracy:.1%}', f'{later:.1%}', later - accuracy)}, "
        f"loss {_moved(f'{loss:.3g}', f'{less:.3g}', less - loss)}"
    )


def _moved(before: str, after: str, change: float) -> str:
    if before == after:
        return f"stayed at {after}"
    return f"{'rose' if change > 0 else 'fell'} from {before} to {after}"


def labels_changed(comparison: Comparison) -> int:
    """Count the examples of the first result's compared list that have another label in the second result."""
    pairs = [pair for pair in comparison.pairs if pair.a is not None and pair.b is not None]
    return sum(pair.change != "entered" and pair.a["label"] != pair.b["label"] for pair in pairs if pair.a and pair.b)
