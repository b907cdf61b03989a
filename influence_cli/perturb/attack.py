"""The training-set attack: change a few training images by less than an 8-bit file can show, and flip a prediction.

Koh & Liang (ICML 2017, section 5.2): the images with the largest gain are moved in small steps in the sign of
I_pert,loss. Each pixel is projected back to within half an 8-bit level of the original, and the top layer is retrained
to its minimum after every step, on a fixed body. The body runs once for all images, and in each round only for the
attacked images.

For defence, `rank_attackable` estimates for every test example how far one image could move its margin in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.batches import read_batches, refuse_unreadable
from influence_cli.data.split import rows_of
from influence_cli.errors import InfluenceError
from influence_cli.influence.scores import perturbation
from influence_cli.perturb.eight_bit import PixelScale, ball
from influence_cli.perturb.inputs import check_differentiable
from influence_cli.retrain.newton import Outputs, losses_under
from influence_cli.retrain.newton_update import STEP_TOLERANCE, follow, solve_at
from influence_cli.retrain.top_layer import (
    TopLayer,
    as_inputs,
    changed,
    feature_slopes,
    loss_slope,
    pixel_slopes,
    with_graph,
)
from influence_cli.runtime.terminal import Terminal, or_silent

# Training images whose pixels are checked for an attack, and per test example of `rank_attackable`.
LOOKED_AT, ASKED = 50, 10
# Images that go through the body together, and solves at once.
TOGETHER, SOLVED = 32, 128
# The first step in 8-bit levels, the number of steps, and how many without a larger loss end an attack. Larger steps
# gave smaller losses: the slope of a deep body turns within a fraction of a level.
STEP, ROUNDS, PATIENCE = 0.1, 60, 15
# Images that are tried alone if fewer are requested, and the rounds of each try.
TRIED, TRIAL = 5, 15


@dataclass(frozen=True)
class Attack:
    """The result of one attack.

    Attributes:
        test: position of the test example.
        label: its label, which was predicted before.
        after: the class predicted after it.
        images: positions of the attacked training images, largest gain first.
        inputs: the changed images, float32 [C, H, W] each.
        rounds: the number of steps.
        loss: of the test example before and after, with the top layer at its minimum.
        margin: its output for the label minus the largest other one, before and after.
        estimated: the rise of the loss to first order, with every pixel moved as far as allowed.
        flips: test predictions that changed, including its own.
        moved: the largest change of a pixel, in 8-bit levels.
    """

    test: int
    label: int
    after: int
    images: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    rounds: int
    loss: tuple[float, float]
    margin: tuple[float, float]
    estimated: float
    flips: int
    moved: float

    @property
    def flipped(self) -> bool:
        """Say whether the prediction has changed."""
        return self.after != self.label


@dataclass(frozen=True)
class Attackable:
    """What a single training image could do to a test prediction, estimated.

    Attributes:
        test: position of the test example.
        label: its label, which is the prediction.
        other: the class with the next largest output.
        margin: the output of the label minus that of the other.
        image: position of the training image with the largest gain.
        gain: the fall of the margin to first order, with every pixel moved as far as rounding to 8 bits hides.
    """

    test: int
    label: int
    other: int
    margin: float
    image: int
    gain: float

    @property
    def ratio(self) -> float:
        """Give gain / margin: from 1 on, one image alone could flip the prediction."""
        return self.gain / self.margin if self.margin > 0 else float("inf")


def margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """Give the output for the label minus the largest other one: [m]."""
    at = torch.arange(len(outputs), device=outputs.device)
    others = outputs.clone()
    others[at, labels] = -torch.inf
    return outputs[at, labels] - others.amax(dim=1)


def check_attack(top: TopLayer, scale: PixelScale) -> None:
    """Refuse a model without an input derivative, and a scale that the images do not fit, before any attack."""
    split = top.task.train
    batch = next(read_batches(split, split.indices[:1], 1))
    refuse_unreadable(batch)
    check_differentiable(top.task, batch)
    ball(scale, batch.inputs[0], split.title(int(batch.indices[0])))


def right_row(top: TopLayer, index: int) -> int:
    """Find a correctly predicted test example.

    Raises:
        InfluenceError: it is already misclassified.
    """
    row = int(rows_of(top.test_indices, [index])[0])
    outputs, label = top.outputs(top.w)[row], int(top.tests.targets[row])
    predicted = int(outputs.argmax())
    if predicted != label:
        classes = top.task.classes
        raise InfluenceError(
            f"{top.task.test_split().title(index)} is already misclassified: predicted {classes[predicted]}, "
            f"labelled {classes[label]}; "
            "there is nothing to flip",
            "attack a correctly predicted one; influence rank explains why this one is wrong",
        )
    return row


def attack_prediction(
    top: TopLayer,
    row: int,
    scale: PixelScale,
    *,
    images: int | Sequence[int] = 1,
    rounds: int = ROUNDS,
) -> Attack:
    """Attack one test prediction through a few training images.

    Args:
        top: the top layer.
        row: of the test example, from `right_row`.
        scale: of the pixels.
        images: how many of the first in `attack_order`; or which ones by position, in that order.
        rounds: most steps; it ends when the prediction flips, no pixel moves or `PATIENCE` steps do not raise the loss;
            the largest loss counts.
    """
    task = top.task
    if isinstance(images, int):
        images = attack_order(top, row, scale, images)[:images]
    chosen = torch.from_numpy(rows_of(task.train.indices, images))
    s = top.s_test(loss_slope(top.problem, top.w, top.tests, row)[None])[0]
    climbed = _climb(top, row, scale, chosen, rounds)
    before, after = top.outputs(top.w), top.outputs(climbed.w)
    losses = losses_under(top.problem, torch.stack([top.w, climbed.w]), _only(top.tests, row))[:, 0].tolist()
    distances = [
        float((scale.levels(new) - scale.levels(old)).abs().max())
        for new, old in zip(climbed.inputs, climbed.originals, strict=True)
    ]
    m = [float(margins(outputs, top.tests.targets)[row]) for outputs in (before, after)]
    return Attack(
        test=int(top.test_indices[row]),
        label=int(top.tests.targets[row]),
        after=int(after[row].argmax()),
        images=tuple(images),
        inputs=tuple(climbed.inputs),
        rounds=climbed.rounds,
        loss=(losses[0], losses[1]),
        margin=(m[0], m[1]),
        estimated=float(sum(gains_of(top, s, chosen, scale))),
        flips=int((before.argmax(dim=1) != after.argmax(dim=1)).sum()),
        moved=max(distances),
    )


def attack_order(top: TopLayer, row: int, scale: PixelScale, count: int) -> list[int]:
    """Order training images for an attack on one test prediction: positions, at least ``count`` if there are.

    Largest gain first. Fewer than `TRIED` are chosen by a short attack with each of the first `TRIED` alone: the gain
    is only first order, and an image that is moved far saturates. The image that raised the loss most comes first.
    """
    s = top.s_test(loss_slope(top.problem, top.w, top.tests, row)[None])[0]
    chosen, _ = choose_images(top, s, scale, max(count, TRIED))
    if count < TRIED:
        attacked, raised = _only(top.tests, row), []
        for one in chosen.tolist():
            climbed = _climb(top, row, scale, torch.tensor([one]), TRIAL)
            raised.append(float(losses_under(top.problem, climbed.w[None], attacked)))
        chosen = chosen[torch.argsort(torch.tensor(raised), descending=True, stable=True)]
    positions: list[int] = top.task.train.indices[chosen.numpy()].tolist()
    return positions


@dataclass(frozen=True)
class _Climbed:
    """The state of an attack: rounds, the images [k, …] before and now, the top layer at its minimum on these."""

    rounds: int
    originals: Tensor
    inputs: Tensor
    w: Tensor


def _climb(top: TopLayer, row: int, scale: PixelScale, chosen: Tensor, rounds: int) -> _Climbed:
    """Move training images until a prediction flips, with steps that shrink to zero; the largest loss counts.

    On the way the minimum and s_test are rough, because only the slope's sign is used; the returned state is exact.
    """
    task, rows, attacked = top.task, chosen.to(top.w.device), _only(top.tests, row)
    label = int(attacked.targets[0])
    batch = next(read_batches(task.train, task.train.indices[chosen.numpy()], len(chosen)))
    refuse_unreadable(batch)
    balls = [ball(scale, x, task.train.title(int(i))) for x, i in zip(batch.inputs, batch.indices, strict=True)]
    inputs = torch.stack([room.clamp(x) for room, x in zip(balls, batch.inputs, strict=True)])
    problem, w, taken = top.problem, top.w, 0
    best, highest = _Climbed(0, batch.inputs, inputs, w), float(losses_under(problem, w[None], attacked))
    x, a = with_graph(top, inputs)
    while taken < rounds and taken - best.rounds < PATIENCE:
        s = solve_at(problem, w, top.inverse, loss_slope(problem, w, attacked, 0)[None], STEP_TOLERANCE)[0]
        slopes = perturbation(pixel_slopes(x, a, feature_slopes(problem, w, s, rows, top.width)), problem.n)
        size = STEP * (1 - taken / rounds)
        moved = torch.stack(
            [room.stepped(old, slope, size) for room, old, slope in zip(balls, inputs, slopes, strict=True)]
        )
        if torch.equal(moved, inputs):
            break
        inputs, taken = moved, taken + 1
        x, a = with_graph(top, inputs)
        problem = changed(problem, rows, as_inputs(top, a))
        w = follow(problem, w, top.inverse, STEP_TOLERANCE)
        loss, flipped = float(losses_under(problem, w[None], attacked)), _predicted(attacked, w) != label
        if flipped:
            w = follow(problem, w, top.inverse)
            flipped = _predicted(attacked, w) != label
        if loss > highest or flipped:
            best, highest = replace(best, rounds=taken, inputs=inputs, w=w), loss
        if flipped:
            return best
    if best.rounds < taken:
        _, a = with_graph(top, best.inputs)
        problem = changed(problem, rows, as_inputs(top, a))
    return replace(best, w=follow(problem, best.w, top.inverse))


def _only(tests: Outputs, row: int) -> Outputs:
    at = slice(row, row + 1)
    return replace(tests, a=tests.a[at], fixed=tests.fixed[at], targets=tests.targets[at])


def _predicted(outputs: Outputs, w: Tensor) -> int:
    return int(outputs.logits(w).argmax())


def choose_images(top: TopLayer, s: Tensor, scale: PixelScale, count: int) -> tuple[Tensor, list[float]]:
    """Choose the training images with the largest gain: the possible rise of the loss while rounding hides the change.

    The pixels of `LOOKED_AT` images are checked, those with the largest slope at the top layer's input.

    Returns:
        Rows int64 [k] among the training examples in use, largest gain first, and the gains.
    """
    candidates = _largest(top, s, max(LOOKED_AT, 2 * count))
    gains = torch.tensor(gains_of(top, s, candidates, scale))
    order = torch.argsort(gains, descending=True, stable=True)[:count]
    return candidates[order], gains[order].tolist()


def gains_of(top: TopLayer, s: Tensor, rows: Tensor, scale: PixelScale) -> list[float]:
    """Compute, for training rows, the most that (minus 1/n) s·g can rise by pixels that rounding to 8 bits hides."""
    task, gains = top.task, []
    indices = task.train.indices[rows.cpu().numpy()]
    start = 0
    for batch in read_batches(task.train, indices, TOGETHER):
        refuse_unreadable(batch)
        here = rows[start : start + len(batch)].to(top.w.device)
        start += len(batch)
        x, a = with_graph(top, batch.inputs)
        v = feature_slopes(top.problem, top.w, s, here, top.width)
        slopes = perturbation(pixel_slopes(x, a, v), top.problem.n)
        for image, slope, index in zip(batch.inputs, slopes, batch.indices, strict=True):
            gains.append(ball(scale, image, task.train.title(int(index))).gain(image, slope))
    return gains


def _largest(top: TopLayer, s: Tensor, count: int) -> Tensor:
    """Find the training rows with the largest slope at the top layer's input; ties by position."""
    parts = torch.split(torch.arange(top.problem.n, device=top.w.device), 4096)
    norms = torch.cat([feature_slopes(top.problem, top.w, s, part, top.width).norm(dim=1) for part in parts])
    return torch.argsort(norms, descending=True, stable=True)[:count].cpu()


def rank_attackable(
    top: TopLayer, rows: Sequence[int], scale: PixelScale, terminal: Terminal | None = None
) -> list[Attackable]:
    """Rank test examples by how easily one training image flips their prediction.

    The margin m is between the label and the next class. Its slope ∇_W(−m) replaces that of the loss, and the gain is
    the fall of m to first order if every pixel of one image moves as far as rounding to 8 bits hides. The pixels of
    `ASKED` images are checked per test example.

    Args:
        top: the top layer.
        rows: of test examples; misclassified ones are skipped.
        scale: of the pixels.
        terminal: progress.

    Returns:
        Largest gain / margin first; ties by position.
    """
    terminal = or_silent(terminal)
    outputs, labels = top.outputs(top.w), top.tests.targets
    right = [row for row in rows if int(outputs[row].argmax()) == int(labels[row])]
    attackable: list[Attackable] = []
    with terminal.progress(len(right), "effect of each single image") as advance:
        for start in range(0, len(right), SOLVED):
            part = right[start : start + SOLVED]
            second = [_next(outputs[row], int(labels[row])) for row in part]
            slopes = torch.zeros(len(part), outputs.shape[1], top.w.shape[1], dtype=top.w.dtype, device=top.w.device)
            for j, row in enumerate(part):
                slopes[j, second[j]] += top.tests.a[row]
                slopes[j, int(labels[row])] -= top.tests.a[row]
            slopes = slopes[:, -len(top.w) :]  # the first of two logits is 0 where the layer gives one
            for row, other, s in zip(part, second, top.s_test(slopes), strict=True):
                label = int(labels[row])
                candidates = _largest(top, s, ASKED)
                gains = gains_of(top, s, candidates, scale)
                best = int(np.argmax(gains))
                image = int(top.task.train.indices[int(candidates[best])])
                margin = float(outputs[row, label] - outputs[row, other])
                attackable.append(Attackable(int(top.test_indices[row]), label, other, margin, image, gains[best]))
                advance(1)
    return sorted(attackable, key=lambda one: (-one.ratio, one.test))


def _next(outputs: Tensor, label: int) -> int:
    others = outputs.clone()
    others[label] = -torch.inf
    return int(others.argmax())
