"""From the influence of one training image on all test images to a page. report/html.py draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from influence_cli.data.split import row_of
from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.scores import strongest
from influence_cli.pages.parts import IMAGES, config_text, example_thumbnail, path_fact, sentence, test_card, test_title
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankedTests
from influence_cli.report.charts import class_bars, histogram
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session


def train_page(
    session: Session, stores: Sequence[Prepared], ranked: RankedTests, facts: TrainingFacts, train: int, count: int
) -> Page:
    """Lay out what one training image does: the image above the test images that it hurts and helps most.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        ranked: its influence on every test image.
        facts: of the training examples.
        train: its position in the data set.
        count: rows per effect in the result; as many images, up to `IMAGES`.
    """
    prepared, shown = stores[0], min(count, IMAGES)
    classes = prepared.task.classes
    values = ranked.influence.astype(np.float64)
    explained = np.array([test.target for test in ranked.tests])
    lead = _lead(prepared, facts, train)
    section = Section(
        heading=f"Training image #{train}: {lead.title}",
        lead=replace(lead, title=""),
        rows=(
            CardRow(
                "Hurts most",
                "without the training image the loss of these test images would fall",
                _cards(prepared, ranked, "harmful", shown),
            ),
            CardRow(
                "Helps most",
                "without the training image the loss of these test images would rise",
                _cards(prepared, ranked, "helpful", shown),
            ),
        ),
        bars=class_bars("Influence by test class", "sums over all test images", values, explained, classes),
    )
    notes = []
    if count > shown:
        notes.append(f"Each list shows the first {shown} images; the rows of the result have all.")
    most = float(np.abs(values).max(initial=0.0))
    unit = ", in nats." if session.config.has_unit else ". Gradient similarity has no unit."
    return Page(
        title="influence rank --train",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=(
            f"Influence is the estimated rise of a test image's loss if training image #{train} were removed and the "
            f"model trained again{unit}",
            "Above zero the training image is helpful to the test image, below zero it is harmful.",
        ),
        classes=_class_table(values, explained, classes),
        sections=(section,),
        histogram=histogram(
            "Distribution of influence by test class",
            f"influence of training image #{train}",
            values,
            explained,
            classes,
            (-most, most),
            bins=41,
        ),
        charts=(),
        tables=(),
        notes=tuple(notes),
        command=command_line(),
        config=config_text(session),
    )


def _lead(prepared: Prepared, facts: TrainingFacts, train: int) -> Card:
    task = prepared.task
    row = row_of(facts.indices, train)
    if row is None:
        raise ValueError(f"training example {train} is not in use")
    label, predicted = task.classes[int(facts.labels[row])], task.classes[int(facts.predicted[row])]
    return Card(
        image=example_thumbnail(task.train, train),
        alt=f"training example {train}, labelled {label}",
        title=f"{label}, predicted {predicted}",
        facts=(
            ("label", label),
            ("predicted", predicted),
            ("loss", f"{float(facts.losses[row]):.4g}"),
            *path_fact(task.train, train),
        ),
        tone="plain",
    )


def _cards(
    prepared: Prepared, ranked: RankedTests, tone: Literal["helpful", "harmful"], shown: int
) -> tuple[Card, ...]:
    order, values, _ = strongest(ranked.influence, shown).of(tone)
    classes, cards = prepared.task.classes, []
    for at, value in zip(order, values, strict=True):
        test = ranked.tests[int(at)]
        card = test_card(prepared, test)
        facts = (("influence", f"{value:+.3g}"), *card.facts)
        group = "" if test.label is None else classes[test.label]
        cards.append(replace(card, title=test_title(test, classes), facts=facts, tone=tone, group=group))
    return tuple(cards)


def _class_table(values: np.ndarray, explained: np.ndarray, classes: Sequence[str]) -> PageTable:
    """Sum the influence per class of the test images."""
    rows = []
    for number, name in enumerate(classes):
        of_class = values[explained == number]
        if len(of_class):
            harmful, helpful = float(np.minimum(of_class, 0).sum()), float(np.maximum(of_class, 0).sum())
            sums = tuple(f"{value:+.3g}" for value in (helpful, harmful, helpful + harmful))
            rows.append((name, f"{len(of_class):,}", f"{int((of_class < 0).sum()):,}", *sums))
    columns = ("test class", "images", "hurt", "helpful influence", "harmful influence", "sum")
    return PageTable("Test images by class", columns, tuple(rows))
