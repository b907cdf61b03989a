"""From a ranking to a page: which images, which captions, which sentence. report/html.py draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.errors import counted
from influence_cli.influence.example_facts import TestFacts, TrainingFacts, explained
from influence_cli.influence.normalise import MEANING
from influence_cli.influence.test_selection import Selected
from influence_cli.pages.attribution import attribution_cards
from influence_cli.pages.damping_sweep import sweep_parts
from influence_cli.pages.parts import IMAGES, SHOWN, config_text, sentence, test_card, test_title, training_cards
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankedGroup
from influence_cli.report.charts import class_bars, histogram
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session


@dataclass(frozen=True)
class FirstGroup:
    """The part of a ranking that the page shows.

    Attributes:
        group: the first test examples and their strongest training examples.
        kept: all influence [m, n] on the first `SHOWN` of them, NaN for examples that could not be read.
    """

    group: RankedGroup
    kept: np.ndarray


def rank_page(
    session: Session,
    stores: Sequence[Prepared],
    first: FirstGroup,
    facts: TrainingFacts,
    selected: Sequence[Selected],
    count: int,
    *,
    aggregate: bool,
    attribution: str | None = None,
) -> Page:
    """Lay out a ranking: each test example above its most helpful and most harmful training images.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        first: what is shown of it.
        facts: of the training examples.
        selected: all test examples that were asked for.
        count: rows per effect in the result; as many images, up to `IMAGES`.
        aggregate: whether the mean of all test examples is explained.
        attribution: the method that colours the pixels of each test image next to it; None for none.
    """
    group, kept = first.group, first.kept
    prepared, shown = stores[0], min(count, IMAGES)
    classes = prepared.task.classes
    tests: list[TestFacts | None] = [None] if aggregate else list(group.tests[:SHOWN])
    kept = kept[: len(tests)]
    read = np.isfinite(kept).all(axis=0)
    values, labels = kept[:, read].astype(np.float64), facts.labels[read]
    pixels: Sequence[Card | None] = [None] * len(tests)
    if attribution is not None:
        models = explained(stores)
        pixels = attribution_cards(models[0].task, group.tests[:SHOWN], attribution, len(models), session.terminal)
    sections = []
    for test, strongest, influence, beside in zip(tests, group.strongest, values, pixels, strict=False):
        heading = f"Mean over {len(group.tests)} test examples" if test is None else test_title(test, classes)
        sections.append(
            Section(
                heading=heading,
                lead=None if test is None else test_card(prepared, test),
                beside=beside,
                rows=(
                    CardRow(
                        "Most helpful",
                        "removing one of these would raise the loss",
                        training_cards(prepared, facts, strongest, "helpful", shown),
                    ),
                    CardRow(
                        "Most harmful",
                        "removing one of these would lower the loss",
                        training_cards(prepared, facts, strongest, "harmful", shown),
                    ),
                ),
                bars=class_bars("Influence by training class", "sums over all images", influence, labels, classes),
            )
        )
    notes = []
    if not aggregate and len(selected) > len(sections):
        more = len(selected) - len(sections)
        notes.append(f"{more} more test examples are in the rows of the result, not on this page.")
    if count > shown:
        notes.append(f"Each list shows the first {shown} images; the rows of the result have all {count:,}.")
    meaning = [
        "Influence is the estimated rise of the test example's loss if one training example were removed and the "
        "model trained again" + (", in nats." if session.config.has_unit else ". Gradient similarity has no unit."),
        "Above zero the example is helpful: removing it hurts. Below zero it is harmful: removing it helps.",
        "Look at the harmful images first. They may have a wrong label, duplicate an image with another label, or fit "
        "none of the classes.",
    ]
    if (normalise := session.run.normalise) is not None:
        meaning.append(f"Images are ranked by normalised: {MEANING[normalise]}. Bars and histogram show influence.")
    most = float(np.abs(values).max(initial=0.0))
    tables, charts = sweep_parts(session)
    return Page(
        title="influence rank",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=tuple(meaning),
        classes=_class_table(values, labels, classes),
        sections=tuple(sections),
        histogram=histogram(
            "Distribution of influence by label",
            "influence on " + ("the mean" if aggregate else f"the {counted(len(sections), 'test example')} above"),
            values.ravel(),
            np.tile(labels, len(values)),
            classes,
            (-most, most),
            bins=41,
        ),
        charts=charts,
        tables=tables,
        notes=tuple(notes),
        command=command_line(),
        config=config_text(session),
    )


def _class_table(values: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> PageTable:
    """Sum the influence per label, averaged over the test examples on the page."""
    mean = values.mean(axis=0)
    rows = []
    for number, name in enumerate(classes):
        labelled = labels == number
        if labelled.any():
            harmful, helpful = float(np.minimum(mean[labelled], 0).sum()), float(np.maximum(mean[labelled], 0).sum())
            sums = tuple(f"{value:+.3g}" for value in (helpful, harmful, helpful + harmful))
            rows.append((name, f"{int(labelled.sum()):,}", f"{int((mean[labelled] < 0).sum()):,}", *sums))
    note = "" if len(values) == 1 else f"mean over the {len(values)} test examples on this page"
    columns = ("label", "examples", "harmful examples", "helpful influence", "harmful influence", "sum")
    return PageTable("Training examples by label", columns, tuple(rows), note)


def plot_title(group: RankedGroup, classes: Sequence[str], *, aggregate: bool) -> str:
    """Title a plot of the influence on the first test example, or on the mean of all of them."""
    if aggregate:
        return f"Mean over {len(group.tests)} test examples"
    return test_title(group.tests[0], classes) + (" (the first test example)" if len(group.tests) > 1 else "")
