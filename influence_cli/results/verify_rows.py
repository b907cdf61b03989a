"""Rows and columns of `influence verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from influence_cli.influence.example_facts import TrainingFacts
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.retrain.lds import Datamodeling
    from influence_cli.retrain.leave_one_out import LeftOut
    from influence_cli.retrain.strongest import StrongestLeftOut

CHECK_COLUMNS = ("item", "value", "unit", "meaning")
LOO_COLUMNS = (
    "test",
    "test_path",
    "test_label",
    "test_predicted",
    "chosen",
    "index",
    "path",
    "label",
    "predicted",
    "loss",
    "estimated",
    "actual",
)
LDS_COLUMNS = (
    "method",
    "lds",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "subsets",
    "repeats",
    "tests",
    "checkpoints",
    "gain",
    "gain_low",
    "gain_high",
    "left_out",
    "measure",
    "pearson",
    "pearson_low",
    "pearson_high",
    "slope",
    "slope_low",
    "slope_high",
)
TOP_COLUMNS = (
    "test",
    "test_path",
    "test_label",
    "test_predicted",
    "left_out",
    "estimated",
    "actual",
    "random",
    "repeats",
    "measure",
)


def loo_rows(prepared: Prepared, effects: Sequence[LeftOut], facts: TrainingFacts) -> Iterator[dict[str, object]]:
    """Give the rows of --loo: one per left-out training example."""
    from influence_cli.results.rank_rows import training_columns

    classes = prepared.task.classes
    for left_out in effects:
        test = left_out.test
        for number, (row, estimated, actual) in enumerate(
            zip(left_out.rows, left_out.estimated, left_out.actual, strict=True)
        ):
            yield {
                "test": test.index,
                "test_path": test.path,
                "test_label": classes[test.label] if test.label is not None else None,
                "test_predicted": classes[test.predicted],
                "chosen": "influential" if number < left_out.influential else "random",
                **training_columns(prepared, facts, int(row)),
                "estimated": float(estimated),
                "actual": float(actual),
            }


def lds_rows(lds: Datamodeling) -> Iterator[dict[str, object]]:
    """Give the rows of --lds: one per method and number of checkpoints; the row with all checkpoints comes last.

    difference is to the first method with as many checkpoints, gain to the same method with one fewer. pearson
    and slope are of the same run alone.
    """
    repeats, tests, subsets = lds.actual.shape
    none = (None, None, None)
    for number, name in enumerate(lds.methods):
        for at in range(lds.scores.shape[1]):
            value, low, high = lds.mean(number, at)
            difference = lds.difference(number, at) if number else none
            gain = lds.gain(number, at) if at else none
            pearson, slope = lds.fit(number, at) or (none, none)
            yield {
                "method": name,
                "lds": value,
                "low": low,
                "high": high,
                **dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True)),
                "subsets": subsets,
                "repeats": repeats,
                "tests": tests,
                "checkpoints": at + 1,
                **dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True)),
                "left_out": lds.left_out,
                "measure": lds.plan.measure,
                **dict(zip(("pearson", "pearson_low", "pearson_high"), pearson, strict=True)),
                **dict(zip(("slope", "slope_low", "slope_high"), slope, strict=True)),
            }


def top_rows(classes: Sequence[str], found: StrongestLeftOut) -> Iterator[dict[str, object]]:
    """Give the rows of --top: one per test example; the rises are means over the repeats."""
    actual, random = found.actual.mean(axis=0), found.random.mean(axis=0)
    for number, test in enumerate(found.tests):
        yield {
            "test": test.index,
            "test_path": test.path,
            "test_label": classes[test.target],
            "test_predicted": classes[test.predicted],
            "left_out": found.rows.shape[1],
            "estimated": float(found.estimated[number]),
            "actual": float(actual[number]),
            "random": float(random[number]),
            "repeats": len(found.actual),
            "measure": found.measure,
        }
