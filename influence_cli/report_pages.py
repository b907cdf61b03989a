"""From a result to a page: which images, which captions, which sentence. Drawing it is report/html.py's."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from influence_cli.data import Split, file_input, raw_image
from influence_cli.errors import InfluenceError, near_path
from influence_cli.facts import TestFacts, TrainingFacts
from influence_cli.mislabels import Mislabels
from influence_cli.precompute import Prepared
from influence_cli.rank import Group
from influence_cli.report.html import Card, Page, Row, Section, Table, thumbnail
from influence_cli.selection import Selected

if TYPE_CHECKING:
    from influence_cli.commands.session import Session

# Test examples with a gallery of their own on one page.
SHOWN = 20


def rank_page(
    session: Session,
    stores: Sequence[Prepared],
    group: Group,
    facts: TrainingFacts,
    selected: Sequence[Selected],
    count: int,
    aggregate: bool,
) -> Page:
    """Lay out a ranking: each test example above its most helpful and most harmful training images."""
    prepared, count = stores[0], min(count, 50)
    task = prepared.task
    sections = []
    tests: list[TestFacts | None] = [None] if aggregate else list(group.tests[:SHOWN])
    for test, found in zip(tests, group.strongest, strict=False):
        heading = f"Mean over {len(group.tests)} test examples" if test is None else _test_title(test, task.classes)
        sections.append(
            Section(
                heading=heading,
                lead=None if test is None else _test_card(prepared, test),
                rows=(
                    Row(
                        "Most helpful",
                        "removing one of these would raise the loss",
                        _cards(prepared, facts, found.helpful[:count], found.helpful_values, "helpful"),
                    ),
                    Row(
                        "Most harmful",
                        "removing one of these would lower the loss",
                        _cards(prepared, facts, found.harmful[:count], found.harmful_values, "harmful"),
                    ),
                ),
            )
        )
    notes = []
    if not aggregate and len(selected) > len(sections):
        notes.append(f"{len(selected) - len(sections)} further test examples are in the rows, not on this page.")
    meaning = [
        "Influence is the estimated rise of the test example's loss if one training example were removed and the "
        "model trained again"
        + (", in nats." if prepared.choice.method != "identity" else "; under identity it is gᵗg/n, without a unit."),
        "Above zero the example is helpful: removing it hurts. Below zero it is harmful: removing it helps.",
        "Look at the harmful ones first: a wrong label, a duplicate with another label, or a case that the classes do "
        "not cover.",
    ]
    return Page(
        title="influence rank",
        sentence=_sentence(session, stores),
        meaning=tuple(meaning),
        tables=(),
        sections=tuple(sections),
        notes=tuple(notes),
        command=_command(),
        config=_config(session),
    )


def mislabels_page(
    session: Session, stores: Sequence[Prepared], result: Mislabels, split: Split, count: int, signal: str
) -> Page:
    """Lay out suspicious labels: a table of classes and the gallery, most suspicious first."""
    classes, facts = stores[0].task.classes, result.facts
    cards = []
    for number, row in enumerate(result.order[:count], start=1):
        index, label, suggested = int(facts.indices[row]), int(facts.labels[row]), int(result.suggested[row])
        cards.append(
            Card(
                image=_thumbnail(split, index),
                alt=f"{split.name} example {index}, labelled {classes[label]}",
                title=f"{number}. {classes[label]}" + (f" → {classes[suggested]}?" if suggested != label else ""),
                facts=(
                    ("suggested", f"{classes[suggested]} ({facts.probabilities[row, suggested]:.0%})"),
                    ("score", f"{result.score[row]:.4f}"),
                    ("loss", f"{facts.losses[row]:.4g}"),
                    ("index", str(index)),
                    *_path_fact(split, index),
                ),
                tone="suspect" if suggested != label else "plain",
                group=classes[label],
            )
        )
    meaning = [
        f"Ordered by {signal}: {_SIGNAL_MEANING[signal]}",
        "suggested is the class that the model gives; a suggestion equal to the label means that the model agrees "
        "with the label but leans on this example.",
        "A high score is a reason to look, not a verdict: rare but right examples score high as well.",
    ]
    return Page(
        title="influence mislabels",
        sentence=_sentence(session, stores),
        meaning=tuple(meaning),
        tables=(*_truth_table(session), _class_table(result, classes)),
        sections=(Section("Most suspicious labels", None, (Row("", "", tuple(cards)),)),),
        notes=(f"The {len(cards)} most suspicious of {len(result.order):,} examples are shown.",),
        command=_command(),
        config=_config(session),
    )


_SIGNAL_MEANING = {
    "self-influence": "the estimated rise of an example's own loss if it were removed from training; "
    "large means that the model knows this label from this example alone.",
    "loss": "the model's loss on the given label.",
    "margin": "the probability of the best other class less that of the given label.",
}


def _class_table(result: Mislabels, classes: Sequence[str]) -> Table:
    facts, rows = result.facts, []
    differs = facts.read & (result.suggested != facts.labels)
    for number, name in enumerate(classes):
        own = facts.labels == number
        others = np.bincount(result.suggested[own & differs], minlength=len(classes))
        common = classes[int(others.argmax())] if others.any() else "–"
        rows.append((name, str(int(own.sum())), str(int(others.sum())), common))
    return Table(
        "Classes",
        ("label", "examples", "differ from the suggested", "most common suggestion"),
        tuple(rows),
        "all examples, not only those shown",
    )


def _truth_table(session: Session) -> tuple[Table, ...]:
    from influence_cli.mislabels import CHECKED

    if "truth" not in session.run:
        return ()
    rows = tuple(
        (q["signal"], f"{q['average_precision']:.3f}", f"{q['auroc']:.3f}", *(f"{share:.3f}" for share in q["found"]))
        for q in session.run["truth"]
    )
    columns = ("signal", "AP", "AUROC", *(f"{share:.0%} checked" for share in CHECKED))
    return (
        Table("Measured against the truth", columns, rows, "share of the wrong labels found at each share checked"),
    )


def _cards(
    prepared: Prepared, facts: TrainingFacts, order: np.ndarray, values: np.ndarray, tone: str
) -> tuple[Card, ...]:
    split, classes = prepared.task.train, prepared.task.classes
    cards = []
    for row, value in zip(order, values, strict=False):
        index = int(facts.indices[row])
        label, predicted = classes[int(facts.labels[row])], classes[int(facts.predicted[row])]
        cards.append(
            Card(
                image=_thumbnail(split, index),
                alt=f"training example {index}, labelled {label}",
                title=label,
                facts=(
                    ("influence", f"{value:+.3g}"),
                    ("predicted", predicted),
                    ("index", str(index)),
                    *_path_fact(split, index),
                ),
                tone="helpful" if tone == "helpful" else "harmful",
                group=label,
            )
        )
    return tuple(cards)


def _test_title(test: TestFacts, classes: Sequence[str]) -> str:
    name = f"Test example {test.index}" if test.index is not None else str(near_path(Path(str(test.path))))
    return f"{name}: loss of {classes[test.target]}"


def _test_card(prepared: Prepared, test: TestFacts) -> Card:
    task = prepared.task
    split = task.test or task.train
    if test.index is not None:
        image = _thumbnail(split, test.index)
    else:
        image = thumbnail(file_input(split, Path(str(test.path)))[1])
    label = task.classes[test.label] if test.label is not None else "unknown"
    return Card(
        image=image,
        alt=f"test example, labelled {label}, predicted {task.classes[test.predicted]}",
        title=f"{label}, predicted {task.classes[test.predicted]}",
        facts=(("loss", f"{test.loss:.4g}"), *((("path", str(near_path(Path(test.path)))),) if test.path else ())),
        tone="plain",
    )


def _thumbnail(split: Split, index: int) -> str | None:
    try:
        image = raw_image(split, index)
    except InfluenceError:
        return None
    return thumbnail(image) if image is not None else None


def _path_fact(split: Split, index: int) -> tuple[tuple[str, str], ...]:
    path = split.path(index)
    return (("path", str(near_path(Path(path)))),) if path else ()


def _sentence(session: Session, stores: Sequence[Prepared]) -> str:
    prepared = stores[0]
    task, config = prepared.task, session.config
    facts = session.run.get("stores", [{}])[0]
    damping = facts.get("damping")
    method = prepared.choice.method + ("" if prepared.choice.method == "identity" else f" {prepared.choice.matrix}")
    return (
        f"{config.model.factory} from {task.checkpoint.name}"
        + (f" and {len(stores) - 1} more" if len(stores) > 1 else "")
        + f", {len(task.train):,} training examples of {len(task.classes)} classes; curvature {method} over "
        f"{prepared.choice.network.size:,} parameters"
        + _damping_text(damping)
        + f", l2 = {task.l2:g}; {session.seconds:.1f} s."
    )


def _damping_text(damping: float | dict[str, float] | None) -> str:
    if damping is None:
        return ""
    if isinstance(damping, dict):
        return f", λ = {min(damping.values()):.3g} to {max(damping.values()):.3g} by layer"
    return f", λ = {damping:.4g}"


def _command() -> str:
    return shlex.join(["influence", *sys.argv[1:]])


def _config(session: Session) -> str:
    return yaml.safe_dump(session.config.resolved(), sort_keys=False, allow_unicode=True)
