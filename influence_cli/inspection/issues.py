"""`influence issues`: what is wrong with the images and labels of a data set, kind by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from influence_cli.data.split import Split, take
from influence_cli.errors import InfluenceError, counted
from influence_cli.inspection.appearance import KINDS as LOOKING
from influence_cli.inspection.appearance import odd_looks
from influence_cli.inspection.duplicates import Duplicates, announce, compare
from influence_cli.inspection.off_topic import find_off_topic
from influence_cli.inspection.pictures import Pictures, read_pictures
from influence_cli.inspection.properties import Properties, properties_of
from influence_cli.inspection.shortcuts import Shortcut, find_shortcuts
from influence_cli.inspection.slices import Slice, find_slices
from influence_cli.inspection.space import Points, image_space
from influence_cli.mislabels.find import find_mislabels
from influence_cli.model.task import Task, measure_loading
from influence_cli.runtime.terminal import Terminal, or_silent

# Every kind, in the order of the table. What is counted is an image; of the last two a property and a slice.
KINDS = ("mislabel", "leak", "duplicate", "off topic", "broken", *LOOKING, "shortcut", "weak slice")
# How the value that makes an image odd is written.
_VALUES = {
    "blank": "grey values deviate by {:.2f} of 255",
    "dark": "99% of the pixels are darker than {:.2f}",
    "bright": "95% of the pixels are brighter than {:.2f}",
    "blurred": "log of sharpness to contrast {:.2f}",
    "odd size": "exp({:.2f}) times larger or smaller than usual",
    "odd shape": "shorter side is {:.2f} of the longer one",
}


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong.

    Attributes:
        kind: one of ``KINDS``.
        split: ``train`` or ``test``.
        index: the image's position in its data set; None for a property or a slice.
        value: that it is ranked by; what it is depends on the kind.
        reason: in words.
    """

    kind: str
    split: str
    index: int | None
    value: float
    reason: str


@dataclass(frozen=True)
class Issues:
    """What is wrong, by kind.

    Attributes:
        splits: that were looked at, by name.
        by_kind: of each kind that could be looked for, the worst first.
        missing: why a kind could not be looked for, by kind.
        duplicates: the groups of copies.
        shortcuts: every property, also those that are none.
        slices: on which the model is worse.
        sliced: whose predictions these are of, ``train`` or ``test``.
    """

    splits: dict[str, Split]
    by_kind: dict[str, tuple[Issue, ...]]
    missing: dict[str, str]
    duplicates: Duplicates
    shortcuts: tuple[Shortcut, ...]
    slices: tuple[Slice, ...]
    sliced: str

    def count(self, kind: str, split: str) -> int:
        """Count what there is of a kind in a split."""
        return sum(issue.split == split for issue in self.by_kind.get(kind, ()))


@dataclass(frozen=True)
class _Read:
    """One split, read once."""

    split: Split
    pictures: Pictures
    points: Points
    properties: Properties

    @property
    def rows(self) -> np.ndarray:
        """Give the rows of the points among the pictures, int64."""
        return np.searchsorted(self.pictures.indices, self.points.indices)


def find_issues(task: Task, terminal: Terminal | None = None) -> Issues:
    """Look for every kind of issue. An image that cannot be read is one.

    Args:
        task: the checkpoint and its data.
        terminal: progress, what the work takes, kinds that could not be looked for.

    Raises:
        InfluenceError: no image can be read, too little memory.
    """
    terminal = or_silent(terminal)
    splits = [task.train] if task.test is None else [task.train, task.test]
    announce(sum(map(len, splits)), terminal)
    measure_loading(task, terminal)
    pictures = []
    with terminal.progress(sum(map(len, splits)), "pixels of every image") as advance:
        for split in splits:
            pictures.append(read_pictures(split, task.loading, advance, looks=True))
            if not len(pictures[-1].indices):
                raise InfluenceError(
                    f"{split.where}: no {split.name} example can be read: {pictures[-1].unreadable[0][1]}"
                )
    readable = [take(split, part.indices) for split, part in zip(splits, pictures, strict=True)]
    points = image_space(task, readable, terminal, skip=True)
    read = [
        _Read(split, part, place, properties_of(split, part, task.classes))
        for split, part, place in zip(splits, pictures, points, strict=True)
    ]
    duplicates = compare(splits, pictures, points, terminal, task.device)
    sliced = read[-1] if not read[-1].split.is_unlabelled else read[0]
    shortcuts = find_shortcuts(read[0].properties, read[0].split.labels[read[0].pictures.indices], task.seed)
    slices = find_slices(
        _some(sliced.properties, sliced.rows), sliced.split.labels[sliced.points.indices], sliced.points.predicted
    )
    by_kind = {kind: list[Issue]() for kind in KINDS}
    missing: dict[str, str] = {}
    for issue in (
        *_copies(duplicates),
        *_off_topic(read),
        *_broken(read),
        *_looking(read),
        *_shortcuts(shortcuts, task.classes),
        *_slices(slices, sliced.split.name, task.classes),
    ):
        by_kind[issue.kind].append(issue)
    by_kind["mislabel"] = _mislabels(task, [take(one.split, one.points.indices) for one in read], missing, terminal)
    return Issues(
        {split.name: split for split in splits},
        {kind: tuple(issues) for kind, issues in by_kind.items() if kind not in missing},
        missing,
        duplicates,
        shortcuts,
        slices,
        sliced.split.name,
    )


def _some(properties: Properties, rows: np.ndarray) -> Properties:
    return Properties(
        {name: values[rows] for name, values in properties.numbers.items()},
        {name: values[rows] for name, values in properties.words.items()},
        properties.modes[rows],
    )


def _mislabels(task: Task, splits: Sequence[Split], missing: dict[str, str], terminal: Terminal) -> list[Issue]:
    """List the labels that are probably wrong; without an estimate of their number there is no such list."""
    issues = []
    named = replace(task, train=splits[0], test=splits[1] if len(splits) > 1 else None)
    for split in splits:
        if split.is_unlabelled:
            continue
        try:
            result = find_mislabels([named], on=split.name, terminal=Terminal(silent=True))
        except InfluenceError as error:
            missing["mislabel"] = error.message
            continue
        if result.noise is None:
            missing["mislabel"] = result.doubt or "there is no readout"
            continue
        for row in result.flagged:
            label, suggested = int(result.facts.labels[row]), int(result.suggested[row])
            reason = f"labelled {task.classes[label]}, looks like {task.classes[suggested]}"
            issues.append(
                Issue("mislabel", split.name, int(result.facts.indices[row]), float(result.score[row]), reason)
            )
    if issues:
        missing.pop("mislabel", None)
    if "mislabel" in missing:
        terminal.warn(f"mislabels were not looked for: {missing['mislabel']}")
    return sorted(issues, key=lambda issue: -issue.value)


def _copies(duplicates: Duplicates) -> Iterator[Issue]:
    """Give the images of each group but the first, and of a leak the test images."""
    for group in duplicates.groups:
        names = [duplicates.splits[place.split].name for place in group.places]
        for at, place in enumerate(group.places):
            if at == 0 or (group.leaks and place.split == 0):
                continue
            others = "" if len(names) == 2 else f" and {counted(len(names) - 2, 'other')}"
            kind = "leak" if group.leaks else "duplicate"
            labels = ", labels differ" if group.disagrees else ""
            reason = f"copy of {names[0]} {group.places[0].index}{others}{labels}"
            yield Issue(kind, names[at], place.index, float(group.similarity[at]), reason)


def _off_topic(read: Sequence[_Read]) -> Iterator[Issue]:
    features = torch.cat([one.points.features for one in read])
    labels = np.concatenate([one.split.labels[one.points.indices] for one in read])
    owner = np.repeat(np.arange(len(read)), [len(one.points.indices) for one in read])
    index = np.concatenate([one.points.indices for one in read])
    off = find_off_topic(features, labels)
    middle = float(np.median(off.distance))
    for row in off.rows:
        value = float(off.distance[row])
        yield Issue(
            "off topic",
            read[owner[row]].split.name,
            int(index[row]),
            value,
            f"{value / middle:.1f} times as far from every class as usual",
        )


def _broken(read: Sequence[_Read]) -> Iterator[Issue]:
    for one in read:
        for index, reason in one.pictures.unreadable:
            yield Issue("broken", one.split.name, int(index), 1.0, reason)
        for index in np.setdiff1d(one.pictures.indices, one.points.indices):
            yield Issue("broken", one.split.name, int(index), 1.0, "the transform fails on it")


def _looking(read: Sequence[_Read]) -> Iterator[Issue]:
    """Give the images that look odd; both sets together say what is usual."""
    pictured = [one.pictures.pictured for one in read]
    looks = np.concatenate([one.pictures.looks[rows] for one, rows in zip(read, pictured, strict=True)])
    modes = np.concatenate([one.properties.modes[rows] for one, rows in zip(read, pictured, strict=True)])
    index = np.concatenate([one.pictures.indices[rows] for one, rows in zip(read, pictured, strict=True)])
    owner = np.repeat(np.arange(len(read)), [int(rows.sum()) for rows in pictured])
    for kind, (rows, values) in odd_looks(looks, modes).items():
        for row, value in zip(rows, values, strict=True):
            text = _VALUES[kind].format(value) if kind in _VALUES else _mode(modes[row], coloured=bool(value))
            yield Issue(kind, read[owner[row]].split.name, int(index[row]), float(value), text)


def _mode(mode: str, *, coloured: bool) -> str:
    return ("colours" if coloured else "no colours") + (f", mode {mode}" if mode else "")


def _shortcuts(shortcuts: Sequence[Shortcut], classes: Sequence[str]) -> Iterator[Issue]:
    for one in shortcuts:
        if one.is_one:
            best = ", ".join(f"{classes[label]} {one.recall[label]:.0%}" for label in one.classes)
            reason = f"{one.name} tells the label: {one.accuracy:.0%} right, {one.guessing:.0%} by guessing ({best})"
            yield Issue("shortcut", "train", None, one.share, reason)


def _slices(slices: Sequence[Slice], split: str, classes: Sequence[str]) -> Iterator[Issue]:
    for one in slices:
        accuracy, other = one.accuracies
        where, rest = (f", {one.text}", "the rest of it") if one.text else ("", "the other classes")
        reason = f"{classes[one.label]}{where}: {accuracy:.0%} right of {len(one.rows):,}, {other:.0%} of {rest}"
        yield Issue("weak slice", split, None, one.excess, reason)
