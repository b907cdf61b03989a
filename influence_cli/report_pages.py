"""From a ranking to a page: which images, which captions, which sentence. Drawing it is report/html.py's."""

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
from influence_cli.precompute import Prepared
from influence_cli.rank import Group
from influence_cli.report.html import Card, Page, Row, Section, thumbnail
from influence_cli.selection import Selected
from influence_cli.task import Task

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
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=tuple(meaning),
        tables=(),
        sections=tuple(sections),
        notes=tuple(notes),
        command=command_line(),
        config=config_text(session),
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
                image=example_thumbnail(split, index),
                alt=f"training example {index}, labelled {label}",
                title=label,
                facts=(
                    ("influence", f"{value:+.3g}"),
                    ("predicted", predicted),
                    ("index", str(index)),
                    *path_fact(split, index),
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
        image = example_thumbnail(split, test.index)
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


def example_thumbnail(split: Split, index: int) -> str | None:
    try:
        image = raw_image(split, index)
    except InfluenceError:
        return None
    return thumbnail(image) if image is not None else None


def path_fact(split: Split, index: int) -> tuple[tuple[str, str], ...]:
    path = split.path(index)
    return (("path", str(near_path(Path(path)))),) if path else ()


def sentence(session: Session, tasks: Sequence[Task], stores: Sequence[Prepared]) -> str:
    """Say what was run on what: model, data, curvature where there is any, seconds."""
    task, config = tasks[0], session.config
    found = (
        f"{config.model.factory} from {task.checkpoint.name}"
        + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
        + f", {len(task.train):,} training examples of {len(task.classes)} classes"
    )
    if stores:
        prepared, facts = stores[0], session.run.get("stores", [{}])[0]
        method = prepared.choice.method + ("" if prepared.choice.method == "identity" else f" {prepared.choice.matrix}")
        found += f"; curvature {method} over {prepared.choice.network.size:,} parameters"
        found += _damping_text(facts.get("damping")) + f", l2 = {task.l2:g}"
    return found + f"; {session.seconds:.1f} s."


def _damping_text(damping: float | dict[str, float] | None) -> str:
    if damping is None:
        return ""
    if isinstance(damping, dict):
        return f", λ = {min(damping.values()):.3g} to {max(damping.values()):.3g} by layer"
    return f", λ = {damping:.4g}"


def command_line() -> str:
    return shlex.join(["influence", *sys.argv[1:]])


def config_text(session: Session) -> str:
    return yaml.safe_dump(session.config.resolved(), sort_keys=False, allow_unicode=True)
