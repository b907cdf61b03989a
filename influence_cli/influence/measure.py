"""What influence is on: the loss of a test example, or the margin of its label.

Both are measured so that a rise is bad, and influence above zero is helpful: the loss as it is, the margin
log(p_y/(1 − p_y)) with its sign changed. The training examples keep their loss, and the curvature is that of the loss.
"""

from __future__ import annotations

from dataclasses import replace

from influence_cli.errors import InfluenceError
from influence_cli.model.losses import negative_margin
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared

LOSS, MARGIN = "loss", "margin"
MEASURES = (LOSS, MARGIN)
# Losses by name that are convex in the outputs without reading them as a softmax.
HINGES = ("hinge", "smooth_hinge")


def measured_by(prepared: Prepared, measure: str) -> Prepared:
    """Give a checkpoint as test examples are measured under it: their gradients are those of the measure."""
    if measure == LOSS:
        return prepared
    if prepared.effects is not None:
        return replace(prepared, effects=prepared.effects.on_margins())
    network = replace(prepared.choice.network, loss=negative_margin)
    return replace(prepared, choice=replace(prepared.choice, network=network))


def check_measure(task: Task, measure: str) -> None:
    """Refuse a margin where there are no probabilities.

    Raises:
        InfluenceError: the loss does not read the outputs as a softmax does.
    """
    if measure == MARGIN and (not task.softmax_loss or task.loss_name.split(" ")[0] in HINGES):
        raise InfluenceError(
            f"--measure margin is of probabilities, but the loss {task.loss_name} reads no softmax of the outputs",
            "leave it out: the loss is then measured",
        )
