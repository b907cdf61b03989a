"""From a ranking to a page: which images, which captions, which sentence. Drawing it is report/html.py's."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import yaml

from influence_cli.config.schema import Config
from influence_cli.data.images import file_input, raw_image
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, near_path
from influence_cli.influence.example_facts import TestFacts, TrainingFacts, explained
from influence_cli.influence.normalise import MEANING
from influence_cli.influence.scores import Strongest
from influence_cli.influence.test_selection import Selected
from influence_cli.model.task import Task
from influence_cli.perturb.attribution import attribution_cards
from influence_cli.pictures import thumbnail
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import Group
from influence_cli.report.charts import class_bars, histogram
from influence_cli.report.html import Card, Page, Row, Section, Table
from influence_cli.report_sweep import sweep_parts

if TYPE_CHECKING:
    from influence_cli.commands.session import Session

# Test examples with a gallery of their own on one page, and images in a row of it.
SHOWN, IMAGES = 20, 50


def rank_page(
    session: Session,
    stores: Sequence[Prepared],
    group: Group,
    kept: np.ndarray,
    facts: TrainingFacts,
    selected: Sequence[Selected],
    count: int,
    aggregate: bool,
    attribution: str | None = None,
) -> Page:
    """Lay out a ranking: each test example above its most helpful and most harmful training images.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        group: the first test examples and their strongest training examples.
        kept: all influence [m, n] on the first `SHOWN` of them, NaN of what could not be read.
        facts: of the training examples.
        selected: all test examples that were asked for.
        count: rows of each effect in the result; as many images, up to `IMAGES`.
        aggregate: whether the mean of all test examples is explained.
        attribution: the method that colours the pixels of each test image beside it; None for none.
    """
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
    for test, found, own, beside in zip(tests, group.strongest, values, pixels, strict=False):
        heading = f"Mean over {len(group.tests)} test examples" if test is None else test_title(test, classes)
        sections.append(
            Section(
                heading=heading,
                lead=None if test is None else test_card(prepared, test),
                beside=beside,
                rows=(
                    Row(
                        "Most helpful",
                        "removing one of these would raise the loss",
                        training_cards(prepared, facts, found, "helpful", shown),
                    ),
                    Row(
                        "Most harmful",
                        "removing one of these would lower the loss",
                        training_cards(prepared, facts, found, "harmful", shown),
                    ),
                ),
                bars=class_bars("Which labels it comes from", "sums over all training examples", own, labels, classes),
            )
        )
    notes = []
    if not aggregate and len(selected) > len(sections):
        notes.append(f"{len(selected) - len(sections)} further test examples are in the rows, not on this page.")
    if count > shown:
        notes.append(f"Of each row the first {shown} images are shown; the rows of the result have all {count:,}.")
    meaning = [
        "Influence is the estimated rise of the test example's loss if one training example were removed and the "
        "model trained again" + (", in nats." if session.config.has_unit else "; similarity of gradients has no unit."),
        "Above zero the example is helpful: removing it hurts. Below zero it is harmful: removing it helps.",
        "Look at the harmful ones first: a wrong label, a duplicate with another label, or a case that the classes do "
        "not cover.",
    ]
    if (normalise := session.run.get("normalise")) is not None:
        meaning.append(f"Images are ranked by `normalised`: {MEANING[normalise]}. Bars and histogram show influence.")
    most = float(np.abs(values).max(initial=0.0))
    tables, charts = sweep_parts(session)
    return Page(
        title="influence rank",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=tuple(meaning),
        classes=_class_table(values, labels, classes),
        sections=tuple(sections),
        histogram=histogram(
            "Influence by label",
            "influence on " + ("the mean" if aggregate else f"the {len(sections)} test examples above"),
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


def _class_table(values: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Table:
    """Sum the influence by label, mean of the test examples on the page."""
    mean = values.mean(axis=0)
    rows = []
    for number, name in enumerate(classes):
        own = labels == number
        if own.any():
            harmful, helpful = float(np.minimum(mean[own], 0).sum()), float(np.maximum(mean[own], 0).sum())
            sums = tuple(f"{value:+.3g}" for value in (helpful, harmful, helpful + harmful))
            rows.append((name, f"{int(own.sum()):,}", f"{int((mean[own] < 0).sum()):,}", *sums))
    note = "" if len(values) == 1 else f"mean over the {len(values)} test examples on this page"
    columns = ("label", "examples", "harmful ones", "helpful influence", "harmful influence", "sum")
    return Table("Training examples by label", columns, tuple(rows), note)


def training_cards(
    prepared: Prepared, facts: TrainingFacts, found: Strongest, tone: Literal["helpful", "harmful"], shown: int
) -> tuple[Card, ...]:
    """Give the cards of the strongest training images of one effect, with their influence."""
    split, classes = prepared.task.train, prepared.task.classes
    order, values, scores = found.of(tone)
    cards = []
    for number, (row, value) in enumerate(zip(order[:shown], values, strict=False)):
        index = int(facts.indices[row])
        label, predicted = classes[int(facts.labels[row])], classes[int(facts.predicted[row])]
        cards.append(
            Card(
                image=example_thumbnail(split, index),
                alt=f"training example {index}, labelled {label}",
                title=label,
                facts=(
                    ("influence", f"{value:+.3g}"),
                    *((("normalised", f"{scores[number]:+.3g}"),) if scores is not None else ()),
                    ("predicted", predicted),
                    ("index", str(index)),
                    *path_fact(split, index),
                ),
                tone=tone,
                group=label,
            )
        )
    return tuple(cards)


def test_title(test: TestFacts, classes: Sequence[str]) -> str:
    name = f"Test example {test.index}" if test.index is not None else str(near_path(Path(str(test.path))))
    return f"{name}: loss of {classes[test.target]}"


def plot_title(group: Group, classes: Sequence[str], aggregate: bool) -> str:
    """Say whose influence a plot of the first test example, or of the mean of all of them, shows."""
    if aggregate:
        return f"Mean over {len(group.tests)} test examples"
    return test_title(group.tests[0], classes) + (" (the first test example)" if len(group.tests) > 1 else "")


def test_card(prepared: Prepared, test: TestFacts) -> Card:
    task = prepared.task
    split = task.test or task.train
    if test.index is not None:
        image = example_thumbnail(split, test.index)
    else:
        image = thumbnail(file_input(split, Path(str(test.path)))[1])
    label, predicted = task.classes[test.label] if test.label is not None else "unknown", task.classes[test.predicted]
    return Card(
        image=image,
        alt=f"test example, labelled {label}, predicted {predicted}",
        title="",
        facts=(
            ("label", label),
            ("predicted", f"{predicted} ({test.confidence:.1%})"),
            ("loss", f"{test.loss:.4g}"),
            ("probability", f"{test.probability:.2%} of {task.classes[test.target]}"),
            *((("path", str(near_path(Path(test.path)))),) if test.path else ()),
        ),
        tone="plain",
    )


def example_thumbnail(split: Split, index: int, size: int = 96) -> str | None:
    """Give a small picture of an example; None where it cannot be read or is not like one."""
    try:
        image = raw_image(split, index)
    except InfluenceError:
        return None
    return thumbnail(image, size) if image is not None else None


def path_fact(split: Split, index: int) -> tuple[tuple[str, str], ...]:
    path = split.path(index)
    return (("path", str(near_path(Path(path)))),) if path else ()


def sentence(session: Session, tasks: Sequence[Task], stores: Sequence[Prepared], method: str = "") -> str:
    """Say what was run on what: model, data, method, curvature where there is any, seconds."""
    task, config = tasks[0], session.config
    if config.model.is_one_run:
        source = f"{tasks[-1].checkpoint.name}, the last of {len(tasks)} checkpoints of a run ({config.model.ensemble})"
    else:
        source = task.checkpoint.name + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
    found = (
        f"{config.model.factory} from {source}"
        + f", {_data_name(config)}: {len(task.train):,} training examples of {len(task.classes)} classes"
        + (f"; {method}" if method else "")
    )
    if stores:
        prepared, facts = stores[0], session.run.get("stores", [{}])[0]
        method = prepared.choice.method + ("" if prepared.choice.method == "identity" else f" {prepared.choice.matrix}")
        found += f"; curvature {method} over {prepared.choice.network.size:,} parameters"
        found += _damping_text(facts.get("damping")) + f", l2 = {task.l2:g}"
    return found + f"; {session.seconds:.1f} s."


def _data_name(config: Config) -> str:
    """Name the training data: the data set's class, and the folder that it is told."""
    root = config.train.args.get("root")
    return config.train.dataset.rpartition(".")[2] + (f" {root}" if isinstance(root, str) else "")


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
