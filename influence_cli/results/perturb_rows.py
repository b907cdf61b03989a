"""Rows and columns of `influence perturb` and its attacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from influence_cli.data.batches import Batch
    from influence_cli.model.task import Task
    from influence_cli.perturb.attack import Attack
    from influence_cli.perturb.change import Perturbed

COLUMNS = (
    "test",
    "test_path",
    "test_label",
    "test_predicted",
    "test_loss",
    "index",
    "path",
    "label",
    "influence",
    "delta",
    "estimated",
    "replaced",
    "actual",
    "channel",
    "row",
    "column",
    "slope",
)
HIDDEN = "hidden"


def perturb_rows(
    task: Task, batch: Batch, effects: Sequence[Perturbed], delta: str | None
) -> Iterator[dict[str, object]]:
    """Give one row per test example."""
    import numpy as np

    classes, split, index = task.classes, task.train, int(batch.indices[0])
    for one in effects:
        test, slope = one.test, one.slope
        place = [int(number) for number in np.unravel_index(int(np.abs(slope).argmax()), slope.shape)]
        # An input with fewer dimensions than an image has its position in the last columns.
        channel, row, column = [None] * (3 - len(place)) + place if len(place) <= 3 else [None] * 3
        yield {
            "test": test.index,
            "test_path": test.path,
            "test_label": classes[test.label] if test.label is not None else None,
            "test_predicted": classes[test.predicted],
            "test_loss": test.loss,
            "index": index,
            "path": split.path(index),
            "label": classes[int(batch.labels[0])],
            "influence": one.influence,
            "delta": delta,
            "estimated": one.estimated,
            "replaced": one.replaced,
            "actual": one.actual,
            "channel": channel,
            "row": row,
            "column": column,
            "slope": float(slope.flat[int(np.abs(slope).argmax())]),
        }


ATTACK_COLUMNS = (
    "test",
    "test_path",
    "test_label",
    "predicted_before",
    "predicted_after",
    "flipped",
    "images",
    "rounds",
    "loss_before",
    "loss_after",
    "margin_before",
    "margin_after",
    "estimated",
    "flips",
    "moved",
)
ATTACKABLE_COLUMNS = (
    "rank",
    "test",
    "test_path",
    "test_label",
    "other",
    "margin",
    "index",
    "path",
    "gain",
    "ratio",
)


def attack_row(task: Task, attack: Attack) -> dict[str, object]:
    """Give the row of an attack."""
    classes = task.classes
    return {
        "test": attack.test,
        "test_path": task.test_split().path(attack.test),
        "test_label": classes[attack.label],
        "predicted_before": classes[attack.label],
        "predicted_after": classes[attack.after],
        "flipped": attack.flipped,
        "images": " ".join(map(str, attack.images)),
        "rounds": attack.rounds,
        "loss_before": attack.loss[0],
        "loss_after": attack.loss[1],
        "margin_before": attack.margin[0],
        "margin_after": attack.margin[1],
        "estimated": attack.estimated,
        "flips": attack.flips,
        "moved": attack.moved,
    }
