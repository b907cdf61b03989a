"""From a checkpoint and data to the text of a config: look, try, decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.checkpoints.load import trained_model
from influence_cli.config.load import parse_config
from influence_cli.config.schema import Config
from influence_cli.data.datasets import load_splits
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.data.transforms import build_transform
from influence_cli.errors import InfluenceError, few
from influence_cli.model.heads import ProbabilitiesError, take_head
from influence_cli.model.task import Task, build_model, load_tasks
from influence_cli.passes.probe import by_predictions, near_chance
from influence_cli.runtime.terminal import Terminal
from influence_cli.setup.architecture import guess_model
from influence_cli.setup.class_order import Order, by_number, guess_order
from influence_cli.setup.data_form import guess_data
from influence_cli.setup.fitting import logits_beside
from influence_cli.setup.guesses import TransformGuess
from influence_cli.setup.training import guess_l2
from influence_cli.setup.transforms import Pictures, last_resort, plausible
from influence_cli.setup.trial import Outcome, choose, drawn, try_transforms
from influence_cli.setup.write_config import config_text

# Images looked at for their sizes and colours.
LOOKED_AT = 16
# A place in a config that is not written yet.
PLACE = re.compile(r"^influence\.yaml(:\d+)?: ")
# So much more of the images must be right before predictions outweigh the order of the folders.
GAIN = 0.25


def plan_config(
    path: Path, command: str, checkpoint: Path, data: Path, test: Path | None, named: str | None, terminal: Terminal
) -> str:
    """Find out everything that a config says, and give its text.

    Args:
        path: where it will be written.
        command: what was typed.
        checkpoint: a file or folder of weights.
        data: training examples, or both.
        test: test examples, or None.
        named: of ``--model``, or None.
        terminal: told what was guessed and how good the tried transforms are.

    Raises:
        InfluenceError: the model is not recognised or does not fit, or the data are of no known form.
    """
    form = guess_data(data, test)
    with terminal.status("reading the checkpoint"):
        model, inside = guess_model(checkpoint, named)
    l2 = guess_l2(inside)
    terminal.say(f"model: {model.factory} ({model.factory_why})")
    terminal.say(f"data: {form.train_why}" + (f"; test: {form.test_why}" if form.test is not None else ""))

    def draft(order: Order, transform: TransformGuess | None, why: str) -> str:
        return config_text(command, model, form, l2, order, transform, why)

    def config_of(order: Order, transform: TransformGuess | None) -> Config:
        return parse_config(draft(order, transform, ""), path)

    try:
        with terminal.status("reading the data"):
            train, _ = load_splits(config_of(Order(None), None))
            order = guess_order(model, train.classes, _count(train))
            pictures = _pictures(train)
        if order.remark:
            terminal.warn(order.remark)
        usual = [[model.transform]] if model.transform is not None else []
        usual += plausible(model, inside.settings, pictures)
        others = last_resort(model, pictures)
        with terminal.status("loading the model"):
            try:
                task, groups = _load(lambda guess: config_of(order, guess), usual, others)
            except ProbabilitiesError:
                output = _output(config_of(order, group[0]) for group in [*usual, *others])
                if output is None:
                    raise
                model = replace(model, output=output, output_why="logits; the first output has their probabilities")
                task, groups = _load(lambda guess: config_of(order, guess), usual, others)
        transforms, reason = _built([guess for group in groups for guess in group], lambda it: config_of(order, it))
        trial = try_transforms(task, transforms, terminal, any_order=order.open)
    except InfluenceError as error:
        hint = f"{error.hint}; nothing was written" if error.hint else "nothing was written"
        raise InfluenceError(PLACE.sub("", error.message), hint) from error
    order, outcomes = _settled(order, train.classes, trial.outcomes, terminal)
    chosen = choose(outcomes)
    if model.transform is not None and chosen.transform is not model.transform:
        _say_given_up(model.transform, chosen, outcomes, reason or trial.reason, terminal)
    return draft(order, chosen.transform, _report(chosen, outcomes, trial.dropped, terminal))


def _load(
    config_of: Callable[[TransformGuess], Config],
    usual: Sequence[Sequence[TransformGuess]],
    others: Sequence[Sequence[TransformGuess]],
) -> tuple[Task, list[Sequence[TransformGuess]]]:
    """Load the model with the first geometry that it takes, and give the geometries to try.

    Raises:
        InfluenceError: the reason of the first one, if it takes none, or if it is not a matter of the size.
        ProbabilitiesError: it takes one, and gives probabilities.
    """
    first: InfluenceError | None = None
    for number, group in enumerate([*usual, *others]):
        try:
            task = load_tasks(config_of(group[0]))[0]
        except ProbabilitiesError:  # it takes the size
            raise
        except InfluenceError as error:
            if first is not None and number >= len(usual) and error.message == first.message:
                break
            first = first or error
            continue
        return task, [*usual[number:], *([] if number < len(usual) else [group])]
    raise first or InfluenceError("there is no transform to try")


def _output(configs: Iterable[Config]) -> int | str | None:
    """Say which output of a model that gives probabilities the logits are, with the first input that it takes."""
    for config in configs:
        try:
            model = trained_model(partial(build_model, config), config.model.sources[0], "").eval()
            take_head(model)
            train, _ = load_splits(config)
            index = int(drawn(train, 1, 0)[0])
            image = to_input(train, raw_item(train, index)[0], train.title(index))
            with torch.no_grad():
                return logits_beside(model(image[None]))
        except Exception:  # of the user's model: another size may do
            continue
    return None


def _built(
    guesses: Sequence[TransformGuess], config_of: Callable[[TransformGuess], Config]
) -> tuple[list[tuple[TransformGuess, Callable[[Any], Any] | None]], str]:
    """Build transforms; and give the reason why the first of them cannot be built, if one cannot."""
    made, reason = [], ""
    for guess in guesses:
        config = config_of(guess)
        try:
            made.append((guess, build_transform(config, "train", config.train, None)[0]))
        except InfluenceError as error:
            reason = reason or error.message
    return made, reason


def _count(split: Split) -> int:
    return len(split.classes) if split.classes is not None else int(split.labels[split.indices].max(initial=-1)) + 1


def _pictures(split: Split) -> Pictures:
    """Look at a few images for what they have in common."""
    sizes, modes = set(), set()
    for index in drawn(split, LOOKED_AT, 0):
        try:
            image = raw_item(split, int(index))[0]
        except InfluenceError:
            continue  # unreadable: check, which init runs, names it
        if isinstance(image, Image.Image):
            sizes.add((image.height, image.width))
            modes.add(image.mode)
        elif isinstance(image, np.ndarray | Tensor) and image.ndim >= 2:
            sizes.add((int(image.shape[-2]), int(image.shape[-1])))
    return Pictures(frozenset(sizes), frozenset(modes))


def _settled(
    order: Order, classes: Sequence[str] | None, outcomes: list[Outcome], terminal: Terminal
) -> tuple[Order, list[Outcome]]:
    """Take the order of the classes from predictions, where nothing else says it and they are clear.

    Raises:
        InfluenceError: the model has more outputs than the data classes, and nothing says which is which.
    """
    if not order.open or classes is None:
        return order, outcomes
    best = max(outcomes, key=lambda outcome: outcome.accuracy)
    options = [by_number(classes), *(by_predictions(classes, item.labels, item.predicted) for item in outcomes)]
    taken, gained = None, best.accuracy + GAIN
    for option in options:
        if option is None or list(option.values()) == list(range(len(classes))):
            continue
        for outcome in outcomes:
            accuracy = _relabelled(outcome, option, classes).accuracy
            if accuracy > gained:
                taken, gained = option, accuracy
    if taken is not None:
        terminal.warn(
            f"the outputs of the model are not in the order of the classes: with {_shown(taken)} it is right on "
            f"{gained:.0%} of {len(best.labels)} training images instead of {best.accuracy:.0%}; see train.classes"
        )
        outcomes = [_relabelled(outcome, taken, classes) for outcome in outcomes]
        why = f"what the model says of {len(best.labels)} training images; nothing names its outputs"
        return Order(taken, why), outcomes
    if order.outputs is not None and near_chance(best.accuracy, len(classes)):
        raise InfluenceError(
            f"the model has more outputs than the data classes ({len(classes)}: {few(classes)}), and neither names "
            "nor predictions say which output is which class",
            "give the classes the names of the outputs, or write train.classes: {NAME: OUTPUT} into the starter "
            "of influence init; nothing was written",
        )
    if order.outputs is not None:
        return replace(order, why="in order: nothing names the outputs"), outcomes
    return order, outcomes


def _relabelled(outcome: Outcome, outputs: Mapping[str, int], classes: Sequence[str]) -> Outcome:
    numbers = np.array([outputs[name] for name in classes], dtype=np.int64)
    return replace(outcome, labels=numbers[outcome.labels])


def _shown(outputs: Mapping[str, int]) -> str:
    pairs = [f"{name}: {number}" for name, number in list(outputs.items())[:4]]
    return f"{{{', '.join(pairs)}{', …' if len(outputs) > 4 else ''}}}"


def _report(chosen: Outcome, outcomes: Sequence[Outcome], dropped: Sequence[Outcome], terminal: Terminal) -> str:
    """Tell how good each transform is, and give the comment on the chosen one."""
    count = len(chosen.labels)
    others = sorted((item for item in outcomes if item is not chosen), key=lambda item: -item.accuracy)
    terminal.say(f"transform: {chosen.transform.name}: {chosen.accuracy:.1%} of {count} training images right")
    for outcome in others:
        terminal.say(f"  {outcome.accuracy:.1%} with {outcome.transform.name}")
    for outcome in dropped:
        first = f" of the first {len(outcome.labels)}" if len(outcome.labels) < count else ""
        terminal.say(f"  {outcome.accuracy:.1%}{first} with {outcome.transform.name}")
    why = f"{chosen.transform.why}: " if chosen.transform.why else ""
    why += f"{chosen.accuracy:.0%} of {count} training images right"
    rest = [f"{outcome.accuracy:.0%} with {outcome.transform.name}" for outcome in others]
    return "; ".join([why, *rest])


def _say_given_up(
    named: TransformGuess, chosen: Outcome, outcomes: Sequence[Outcome], reason: str, terminal: Terminal
) -> None:
    mine = next((outcome for outcome in outcomes if outcome.transform is named), None)
    if mine is None:
        terminal.warn(f"the transform of {named.why} cannot be used: {PLACE.sub('', reason)}")
    else:
        terminal.warn(
            f"{named.why} names a transform with which the model is right on {mine.accuracy:.0%}, and on "
            f"{chosen.accuracy:.0%} with {chosen.transform.name}: the latter was written"
        )
