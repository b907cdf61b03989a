"""Parts that several pages share: cards of examples, titles, the config as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import yaml

from influence_cli.config.schema import Config
from influence_cli.data.images import file_input, raw_image
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, near_path
from influence_cli.influence.example_facts import TestFacts, TrainingFacts
from influence_cli.influence.scores import Strongest
from influence_cli.model.task import Task
from influence_cli.pictures import thumbnail
from influence_cli.precompute.prepared import Prepared
from influence_cli.report.html import Card

if TYPE_CHECKING:
    from influence_cli.results.run import Session

# Test examples that get their own gallery on one page, and images per row of it.
SHOWN, IMAGES = 20, 50
# The mark of a card whose label looks wrong.
WRONG = "label looks wrong"


def training_cards(
    prepared: Prepared,
    facts: TrainingFacts,
    strongest: Strongest,
    tone: Literal["helpful", "harmful"],
    shown: int,
    wrong: np.ndarray | None = None,
) -> tuple[Card, ...]:
    """Give the cards of the strongest training images of one effect, with their influence.

    Args:
        prepared: of the first checkpoint.
        facts: of the training examples.
        strongest: of one test example, or of their mean.
        tone: the effect.
        shown: cards at most.
        wrong: bool [n], training examples whose cards are marked because their labels look wrong.
    """
    split, classes = prepared.task.train, prepared.task.classes
    order, values, scores = strongest.of(tone)
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
                mark=WRONG if wrong is not None and wrong[row] else "",
            )
        )
    return tuple(cards)


def test_title(test: TestFacts, classes: Sequence[str]) -> str:
    """Say in a heading what a test example is and what the model says: ``#24: Ankle-boot, predicted Sneaker (82%)``."""
    return _test_title(test, classes, "predicted")


def test_answer(test: TestFacts, classes: Sequence[str]) -> str:
    """Say what a test example is and what it was taken for: ``#24: Ankle-boot, taken for Sneaker (82%)``."""
    return _test_title(test, classes, "predicted" if test.label in (None, test.predicted) else "taken for")


def _test_title(test: TestFacts, classes: Sequence[str], verb: str) -> str:
    name = f"#{test.index}" if test.index is not None else str(near_path(Path(str(test.path))))
    label = "" if test.label is None else f"{classes[test.label]}, "
    plain = test.target == (test.predicted if test.label is None else test.label)
    explained = "" if plain else f"; loss of {classes[test.target]}"
    return f"{name}: {label}{verb} {classes[test.predicted]} ({test.confidence:.0%}){explained}"


def test_key(index: int | None, path: Path | str | None) -> int | str:
    """Name a test example: by its position in the test set, or by its file where it has none."""
    return str(path) if index is None else index


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
    """Give a small picture of an example; None if it cannot be read or is not an image."""
    try:
        image = raw_image(split, index)
    except InfluenceError:
        return None  # the card stays without a picture
    return thumbnail(image, size) if image is not None else None


def path_fact(split: Split, index: int) -> tuple[tuple[str, str], ...]:
    path = split.path(index)
    return (("path", str(near_path(Path(path)))),) if path else ()


def sentence(session: Session, tasks: Sequence[Task], stores: Sequence[Prepared], method: str = "") -> str:
    """Say what was run on what: model, data, method, curvature if there is any, seconds."""
    task, config = tasks[0], session.config
    if config.model.is_one_run:
        source = (
            f"{tasks[-1].checkpoint.name}, the last of {len(tasks)} checkpoints of one run ({config.model.ensemble})"
        )
    else:
        source = task.checkpoint.name + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
    if session.run.proxy is not None:
        network = f"{session.run.proxy} in the place of {config.model.factory}"
    else:
        network = f"{config.model.factory} from {source}"
    text = (
        network
        + f", {_data_name(config)}: {len(task.train):,} training examples of {len(task.classes)} classes"
        + (f"; {method}" if method else "")
    )
    if stores and stores[0].effects is not None:
        run = stores[0].effects.summary
        verdict = f"; {run.verdict}" if run.verdict else ""
        text += f"; by replaying the run: {run.steps:,} steps, {stores[0].choice.network.size:,} parameters{verdict}"
    elif stores:
        prepared, scores = stores[0], session.run.scores
        method = prepared.choice.method + ("" if prepared.choice.method == "identity" else f" {prepared.choice.matrix}")
        text += f"; curvature {method} over {prepared.choice.network.size:,} parameters"
        text += _damping_text(scores.stores[0].damping if scores else None) + f", l2 = {task.objective.text()}"
    return text + f"; {session.seconds:.1f} s."


def _data_name(config: Config) -> str:
    """Name the training data: its table, folder or set, or the class of the data set and its folder."""
    train = config.train
    if train.kind != "dataset":
        return " ".join(map(str, filter(None, (getattr(train, train.kind), train.split))))
    root = config.train.args.get("root")
    return config.train.dataset.rpartition(".")[2] + (f" {root}" if isinstance(root, str) else "")


def _damping_text(damping: float | dict[str, float] | None) -> str:
    if damping is None:
        return ""
    if isinstance(damping, dict):
        return f", λ = {min(damping.values()):.3g} to {max(damping.values()):.3g} by layer"
    return f", λ = {damping:.4g}"


def capitalised(text: str) -> str:
    """Begin a sentence with a capital, the rest as it is."""
    return text[:1].upper() + text[1:]


def config_text(session: Session) -> str:
    return yaml.safe_dump(session.config.resolved(), sort_keys=False, allow_unicode=True)
