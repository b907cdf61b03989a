"""The page of `influence perturb`: a training image, and which of its pixels change the loss of each test example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from influence_cli.data.batches import Batch
from influence_cli.pages.parts import (
    SHOWN,
    capitalised,
    config_text,
    example_thumbnail,
    path_fact,
    sentence,
    test_card,
    test_title,
)
from influence_cli.perturb.change import Perturbed
from influence_cli.perturb.eight_bit import PixelScale
from influence_cli.perturb.files import draw_map
from influence_cli.pictures import thumbnail
from influence_cli.precompute.prepared import Prepared
from influence_cli.report.html import Card, CardRow, Page, Section
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session

# Large enough to tell single pixels of a small image apart.
SIZE = 280


def perturb_page(
    session: Session,
    stores: Sequence[Prepared],
    batch: Batch,
    effects: Sequence[Perturbed],
    scale: PixelScale | None,
    delta: str | None,
) -> Page:
    """Lay out a page: each test example above the training image and its signed map.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        batch: the training example.
        effects: one per test example.
        scale: of the pixels, if it is known.
        delta: what the change is called; None if there is none.
    """
    prepared = stores[0]
    task, index = prepared.task, int(batch.indices[0])
    label = task.classes[int(batch.labels[0])]
    sections = []
    for one in effects[:SHOWN]:
        numbers = [("influence", f"{one.influence:+.3g}")]
        if one.estimated is not None:
            numbers.append(("estimated", f"{one.estimated:+.3g}"))
        if one.replaced is not None:
            numbers.append(("replaced", f"{one.replaced:+.3g}"))
        if one.actual is not None:
            numbers.append(("actual", f"{one.actual:+.3g}"))
        image = Card(
            image=example_thumbnail(task.train, index, SIZE),
            alt=f"training example {index}, labelled {label}",
            title=label,
            facts=(*numbers, ("index", str(index)), *path_fact(task.train, index)),
            tone="plain",
        )
        pixels = Card(
            image=thumbnail(draw_map(batch.inputs[0], one.slope, scale), SIZE),
            alt="the same image; colours show how its pixels change the loss",
            title="which pixels matter",
            facts=(
                ("red", "a lighter pixel raises the loss"),
                ("blue", "a lighter pixel lowers it"),
                ("largest slope", f"{abs(one.slope).max():.3g} per unit of the input"),
            ),
            tone="plain",
        )
        rows = (CardRow("The training image", "as it is, and as the model takes it", (image, pixels)),)
        sections.append(Section(test_title(one.test, task.classes), test_card(prepared, one.test), rows))
    notes = []
    if len(effects) > SHOWN:
        notes.append(f"{len(effects) - SHOWN} more test examples are in the rows of the result, not on this page.")
    meaning = [
        "The map shows, per pixel of the training image, the estimated rise of the test example's loss if that pixel "
        "became lighter and the model were trained again"
        + (" (Koh & Liang 2017, section 2.2)." if prepared.effects is None else " by the same run."),
    ]
    if delta is not None:
        hidden = "the one that raises the loss most among those that rounding to 8 bits hides"
        what = hidden if delta == "hidden" else delta
        meaning += [
            f"The change: {what}.",
            "estimated: the rise of the loss for this change, to first order in the change.",
        ]
        if any(one.replaced is not None for one in effects):
            meaning.append(
                "replaced: the influence of the old image minus that of the changed image, for changes that are not "
                "small."
            )
        meaning.append("actual: the rise of the loss after training again.")
    return Page(
        title="influence perturb",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=tuple(meaning),
        classes=None,
        sections=tuple(sections),
        histogram=None,
        charts=(),
        tables=(),
        notes=tuple(notes),
        command=command_line(),
        config=config_text(session),
        answer=_answer(effects, index, label),
        lead="The colours show which pixels of the training image change the loss.",
    )


def _answer(effects: Sequence[Perturbed], index: int, label: str) -> str:
    """Say what the change, or the whole image where there is none, does to the test examples."""
    image, first = f"training image {index} ({label})", effects[0]
    name = f"test image {first.test.path if first.test.index is None else first.test.index}"
    if len(effects) > 1:
        name = f"{len(effects):,} test images"
    if first.estimated is None:
        if len(effects) > 1:
            helped = sum(one.influence > 0 for one in effects)
            return f"{capitalised(image)} helps {helped:,} of {name}"
        way = "helps" if first.influence > 0 else "harms" if first.influence < 0 else "does nothing for"
        return f"{capitalised(image)} {way} {name}: influence {first.influence:+.3g}"
    either = [one.estimated if one.actual is None else one.actual for one in effects]
    changes = [change for change in either if change is not None]
    how = "estimated" if first.actual is None else "trained again"
    mean = "the mean loss" if len(effects) > 1 else "the loss"
    return f"The change to {image} moves {mean} of {name} by {sum(changes) / len(changes):+.3g} ({how})"
