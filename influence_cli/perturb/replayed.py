"""`influence perturb` by a run that is replayed: slopes go back through its steps to the numbers of the image.

A step that takes x with c_t, the derivative of the test loss in the gradient of its batch's mean loss (|B| images),
passes (1/|B|) ∇ₓ(gᵢ(θ_t; x)ᵀc_t) on to x: the sum over the steps is the derivative of the test loss at the end of the
run in the image's numbers (steps/backward.py), and slope · δ the estimated rise of the loss. Nothing is divided by a
curvature, so there is no sign to turn. Where δ is not small, the run is taken again with x + δ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import Batch
from influence_cli.data.split import rows_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.scores import require_finite, weight_removal
from influence_cli.influence.test_gradients import explained_tests
from influence_cli.influence.test_selection import Selected
from influence_cli.model.task import Task
from influence_cli.perturb.change import Perturbed
from influence_cli.precompute.prepared import Effects
from influence_cli.runtime.terminal import Terminal


def replayed_changes(
    task: Task,
    effects: Effects,
    batch: Batch,
    selected: Sequence[Selected],
    change: Callable[[Tensor], Tensor] | None,
    target: str,
    terminal: Terminal,
    *,
    retrain: bool,
) -> list[Perturbed]:
    """Estimate what changes of a training image do to the losses of test examples at the end of a run.

    Args:
        task: the checkpoint and its data.
        effects: of its run.
        batch: the training image.
        selected: which test examples.
        change: from the slope [C, H, W] to a δ of its shape; None for the slope alone.
        target: whose loss is explained.
        terminal: progress.
        retrain: take the run again with each change.

    Raises:
        InfluenceError: the steps of the run took something else than this image, or a number is not finite.
    """
    row, title = int(rows_of(task.train.indices, batch.indices[:1])[0]), task.train.title(int(batch.indices[0]))
    with terminal.status("looking at the steps that take the image"):
        as_it_is = effects.takes_as_it_is(row, batch.inputs[0])
    if not as_it_is:
        raise InfluenceError(
            f"the steps of the run did not take {title} as it is: a replay gives the slopes of what they took",
            "-s curvature.method=auto, or a run without random changes of its images",
        )
    changes: list[Perturbed] = []
    for tests, inputs, targets in explained_tests(task, selected, target, terminal, skip=False):
        with terminal.progress(len(tests), "replaying the run, per test image") as advance:
            weights, slopes = effects.image_slopes(row, inputs, targets, advance)
        require_finite(slopes, "change", lambda number, *_, tests=tests: f"{title} on {tests[number].title()}")
        for test, rise, slope in zip(tests, weight_removal(weights), slopes, strict=True):
            one = Perturbed(test, float(rise), slope)
            if change is not None:
                delta = change(torch.from_numpy(slope)).cpu().double().numpy()
                one = replace(one, delta=delta, estimated=float((slope * delta).sum()))
            changes.append(one)
        if retrain:
            place = len(changes) - len(tests)
            changes[place:] = _with_actual(effects, row, batch.inputs[0], changes[place:], (inputs, targets), terminal)
    return changes


def _with_actual(
    effects: Effects,
    row: int,
    image: Tensor,
    changes: Sequence[Perturbed],
    explained: tuple[Tensor, Tensor],
    terminal: Terminal,
) -> list[Perturbed]:
    """Take the run again with every change: one training each, and one for all tests with the same change."""
    deltas: list[np.ndarray] = []
    for one in changes:
        if one.delta is not None and not any(np.array_equal(one.delta, other) for other in deltas):
            deltas.append(one.delta)
    actual = list(changes)
    with terminal.progress(len(deltas), "trainings with the changed image") as advance:
        for delta in deltas:
            moved = (image.double() + torch.from_numpy(delta)).to(image.dtype)
            rises = effects.rises_with(row, moved, *explained, advance)
            for number, one in enumerate(changes):
                if one.delta is not None and np.array_equal(one.delta, delta):
                    actual[number] = replace(one, actual=float(rises[number]))
    return actual
