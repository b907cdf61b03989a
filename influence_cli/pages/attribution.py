"""Cards of attribution maps on the page of `influence rank`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from influence_cli.data.images import file_input
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.influence.example_facts import TestFacts
from influence_cli.model.task import Task
from influence_cli.perturb.attribution import attribute, last_convolution, patch
from influence_cli.pictures import overlay, scaled, thumbnail, view
from influence_cli.report.html import Card
from influence_cli.runtime.terminal import Terminal


def attribution_cards(
    task: Task, tests: Sequence[TestFacts], method: str, checkpoints: int, terminal: Terminal
) -> list[Card]:
    """Give a picture per test image that shows which of its pixels drive its loss.

    Args:
        task: of the first checkpoint, which is the one explained.
        tests: test examples that could be read.
        method: one of `METHODS`.
        checkpoints: how many checkpoints the ranking averages.
        terminal: progress.

    Returns:
        One card per test example. Its image is what the model sees: cropped and resized by the transform, as the
        attributions are.
    """
    cards = []
    with terminal.progress(len(tests), "attributing to pixels") as advance:
        for test in tests:
            cards.append(_card(task, test, method, checkpoints))
            advance(1)
    return cards


def _card(task: Task, test: TestFacts, method: str, checkpoints: int) -> Card:
    split = task.test or task.train
    if test.index is not None:
        x = to_input(split, raw_item(split, test.index)[0], split.title(test.index))
    else:
        x = file_input(split, Path(str(test.path)))[0]
    values = scaled(attribute(task, x, test.target, method))
    name = task.classes[test.target]
    meaning = [("red", f"lowers the loss of {name}")]
    if method != "grad-cam":
        meaning.append(("blue", "raises it"))
    if not values.any():
        meaning = [("note", f"no pixel changes the loss of {name}")]
    return Card(
        image=thumbnail(overlay(view(x.detach().cpu().numpy()), values), 160),
        alt=f"the same image; colours show which pixels lower and raise the loss of {name}",
        title="",
        facts=(
            *_caption(task, split, x, method),
            *meaning,
            *((("of", f"{task.checkpoint.name}, the first of {checkpoints} checkpoints"),) if checkpoints > 1 else ()),
        ),
        tone="plain",
    )


def _caption(task: Task, split: Split, x: Tensor, method: str) -> tuple[tuple[str, str], ...]:
    """Say how the pixels were found, and relative to what."""
    if method == "integrated-gradients":
        zeros = "an input of zeros" + (" (Normalize's mean)" if "Normalize" in split.transform_text else "")
        return ("pixels", "integrated gradients"), ("baseline", zeros)
    if method == "grad-cam":
        names: dict[nn.Module, str] = {module: name for name, module in task.model.named_modules()}
        layer = names[last_convolution(task.model, x.to(task.device))]
        return ("pixels", "Grad-CAM"), ("layer", f"{layer}, the last convolution")
    return ("pixels", "occlusion"), ("patches", " × ".join(map(str, patch(x))) + ", set to the image's mean")
