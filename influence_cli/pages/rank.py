"""From a ranking to a page: which images, which captions, which sentence. report/html.py draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.errors import counted
from influence_cli.influence.example_facts import TestFacts, TrainingFacts, explained
from influence_cli.influence.normalise import MEANING
from influence_cli.pages.attribution import attribution_cards
from influence_cli.pages.damping_sweep import sweep_parts
from influence_cli.pages.doubts import Doubts, label_doubts
from influence_cli.pages.overview import (
    MANY,
    OPEN,
    WORST,
    Collected,
    confusions,
    errors,
    most_hurting,
    named,
    overview_section,
    rest_section,
)
from influence_cli.pages.parts import IMAGES, config_text, sentence, test_answer, test_card, test_title, training_cards
from influence_cli.precompute.prepared import Prepared
from influence_cli.report.charts import class_bars, histogram
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session


def rank_page(
    session: Session,
    stores: Sequence[Prepared],
    collected: Collected,
    facts: TrainingFacts,
    count: int,
    *,
    aggregate: bool,
    attribution: str | None = None,
) -> Page:
    """Lay out a ranking: each test example above its most harmful and most helpful training images.

    Many test examples begin with what hurts most of them; the first ten galleries are open.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        collected: what is shown of the ranking.
        facts: of the training examples.
        count: rows per effect in the result; as many images, up to `IMAGES`.
        aggregate: whether the mean of all test examples is explained.
        attribution: the method that colours the pixels of each test image next to it; None for none.
    """
    prepared, shown = stores[0], min(count, IMAGES)
    classes = prepared.task.classes
    tests: list[TestFacts | None] = [None] if aggregate else list(collected.group.tests)
    kept = collected.held.values[: len(tests)]
    read = np.isfinite(kept).all(axis=0)
    values, labels = kept[:, read].astype(np.float64), facts.labels[read]
    doubts = label_doubts(facts, session.config.loss)
    pixels: Sequence[Card | None] = [None] * len(tests)
    if attribution is not None:
        models = explained(stores)
        pixels = attribution_cards(models[0].task, collected.group.tests, attribution, len(models), session.terminal)
    sections = []
    if not aggregate and len(collected.everyone) >= MANY:
        sections.append(overview_section(prepared, facts, collected, doubts))
    for number, (test, strongest, influence, beside) in enumerate(
        zip(tests, collected.group.strongest, values, pixels, strict=True)
    ):
        sections.append(
            Section(
                heading=_mean_title(collected.everyone) if test is None else test_answer(test, classes),
                lead=None if test is None else test_card(prepared, test),
                beside=beside,
                rows=(
                    CardRow(
                        "Most harmful",
                        "removing one of these would lower the loss",
                        training_cards(prepared, facts, strongest, "harmful", shown, doubts.wrong),
                    ),
                    CardRow(
                        "Most helpful",
                        "removing one of these would raise the loss",
                        training_cards(prepared, facts, strongest, "helpful", shown, doubts.wrong),
                    ),
                ),
                bars=class_bars("Influence by training class", "sums over all images", influence, labels, classes),
                folded=number >= OPEN,
            )
        )
    folded = sum(section.folded for section in sections)
    rest = None if aggregate else rest_section(prepared, collected)
    behind = len(collected.everyone) - len(tests) if rest is not None else folded
    notes = []
    if rest is not None:
        sections.append(rest)
        unseen = behind - len(rest.rows[0].cards)
        if unseen:
            notes.append(f"{unseen:,} more test examples are in the rows of the result, not on this page.")
    if count > shown:
        notes.append(f"Each list shows the first {shown} images; the rows of the result have all {count:,}.")
    meaning = [
        "Influence is the estimated rise of the test example's loss if one training example were removed and the "
        "model trained again" + (", in nats." if session.config.has_unit else ". Gradient similarity has no unit."),
        "Above zero the example is helpful: removing it hurts. Below zero it is harmful: removing it helps.",
        "Look at the harmful images first. They may have a wrong label, duplicate an image with another label, or fit "
        "none of the classes.",
        doubts.why,
    ]
    if (normalise := session.run.normalise) is not None:
        meaning.append(f"Images are ranked by normalised: {MEANING[normalise]}. Bars and histogram show influence.")
    most = float(np.abs(values).max(initial=0.0))
    tables, charts = sweep_parts(session)
    answer, lead = _answer(collected, facts, doubts, classes, aggregate=aggregate)
    return Page(
        title="influence rank",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=tuple(meaning),
        classes=_class_table(values, labels, classes),
        sections=tuple(sections),
        histogram=histogram(
            "Distribution of influence by label",
            "influence on " + ("the mean" if aggregate else f"the {counted(len(tests), 'test example')} with images"),
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
        answer=answer,
        lead=lead,
        more=f"{behind:,} more {named(collected.everyone)}",
    )


def _answer(
    collected: Collected, facts: TrainingFacts, doubts: Doubts, classes: Sequence[str], *, aggregate: bool
) -> tuple[str, str]:
    """Say what was found, in a heading and a sentence."""
    tests, group = collected.everyone, collected.group
    if aggregate:
        harm = np.bincount(facts.labels, np.fmin(np.nan_to_num(collected.held.values[0]), 0), minlength=len(classes))
        if not harm.any():
            return f"No training image harms these {len(tests):,} test examples", ""
        worst = f"{classes[int(harm.argmin())]} images do most of the harm to these {len(tests):,} test examples"
        return worst, _wrong_labels(group.strongest[0].harmful[:WORST], "most harmful training images", doubts)
    if len(tests) >= MANY:
        wrong, pairs = errors(tests), confusions(tests, classes)
        what = f"{len(tests):,} errors" if len(wrong) == len(tests) else f"{len(tests):,} test images"
        if 0 < len(wrong) < len(tests):
            what += f", {counted(len(wrong), 'error')}"
        if pairs:
            label, predicted, count = pairs[0]
            what += f": most often {label} taken for {predicted} ({count:,})"
        most = most_hurting(collected)
        if not doubts.weighed and len(most):
            return what, f"The first training image below hurts {int(collected.hurts[most[0]]):,} of them."
        return what, _wrong_labels(most, f"training images that hurt the most {named(tests)}", doubts)
    answer = "; ".join(test_answer(test, classes) for test in tests)
    first = group.strongest[0].harmful[:WORST] if group.strongest else np.empty(0, dtype=np.int64)
    return answer, _wrong_labels(first, "most harmful training images", doubts)


def _wrong_labels(rows: np.ndarray, what: str, doubts: Doubts) -> str:
    """Say how many of these labels look wrong."""
    if not len(rows):
        return "No training image is harmful here."
    if not doubts.weighed:
        return f"First come the {what}."
    many = int(doubts.wrong[rows].sum())
    if len(rows) == 1:
        return f"The label of the only one of the {what} {'looks wrong' if many else 'looks right'}."
    verb = "has a label that looks wrong" if many < 2 else "have a label that looks wrong"
    return f"{many or 'None'} of the {len(rows)} {what} {verb}."


def _mean_title(tests: Sequence[TestFacts]) -> str:
    return f"Mean over {counted(len(tests), 'test example')}"


def _class_table(values: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> PageTable:
    """Sum the influence per label, averaged over the test examples on the page: the most harmful label first."""
    mean = values.mean(axis=0)
    rows = []
    worst = np.argsort(np.bincount(labels, np.minimum(mean, 0), minlength=len(classes)), kind="stable")
    for number, name in ((int(number), classes[number]) for number in worst):
        labelled = labels == number
        if labelled.any():
            harmful, helpful = float(np.minimum(mean[labelled], 0).sum()), float(np.maximum(mean[labelled], 0).sum())
            sums = tuple(f"{value:+.3g}" for value in (helpful, harmful, helpful + harmful))
            rows.append((name, f"{int(labelled.sum()):,}", f"{int((mean[labelled] < 0).sum()):,}", *sums))
    note = "" if len(values) == 1 else f"mean over the {len(values)} test examples on this page"
    columns = ("label", "examples", "harmful examples", "helpful influence", "harmful influence", "sum")
    return PageTable("Training examples by label", columns, tuple(rows), note)


def plot_title(tests: Sequence[TestFacts], classes: Sequence[str], *, aggregate: bool) -> str:
    """Title a plot of the influence on the first test example, or on the mean of all of them."""
    if aggregate:
        return f"Mean over {len(tests)} test examples"
    return test_title(tests[0], classes) + (" (the first test example)" if len(tests) > 1 else "")
