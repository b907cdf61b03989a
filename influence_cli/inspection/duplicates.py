"""`influence duplicates`: copies inside the training set, inside the test set and between the two, as groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.inspection.candidates import HELD, SEARCHES
from influence_cli.inspection.copies import find_links
from influence_cli.inspection.grouping import Group, make_groups
from influence_cli.inspection.pictures import Pictures, joined, read_pictures
from influence_cli.inspection.space import Points, image_space
from influence_cli.model.task import Task, measure_loading
from influence_cli.precompute.cost import operations_a_second
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal, duration, or_silent

# Numbers per image and product in a search, and passes over the similarities; bytes that an image takes: its small
# pictures, its whitened components twice, coarse ones, the network's.
WIDTH, PASSES, BYTES = 64, 4, 3_072 + 4 * (2 * 128 + 2 * 32 + 2 * 64)
# Told before it starts if it takes more; otherwise with -v alone.
LONG, LARGE = 60.0, 5 * 10**8


@dataclass(frozen=True)
class Place:
    """Where an image is: its split (a number of ``Duplicates.splits``), and its position in that data set."""

    split: int
    index: int


@dataclass(frozen=True)
class Copies:
    """A group of copies.

    Attributes:
        places: of its images, training images first.
        labels: int64 [m].
        exact: bool [m], whether another member has the same pixels.
        similarity: float64 [m], the correlation of its whitened pixels with those of the member it is most like.
        kept: bool [m], False for a training image that can be left out: of a group without test images all but one.
    """

    places: tuple[Place, ...]
    labels: np.ndarray
    exact: np.ndarray
    similarity: np.ndarray
    kept: np.ndarray

    def inside(self, split: int) -> np.ndarray:
        """Mark the members in one split, bool [m]."""
        return np.array([place.split == split for place in self.places])

    @property
    def leaks(self) -> bool:
        """Say whether it has training images and test images."""
        return len({place.split for place in self.places}) > 1

    @property
    def disagrees(self) -> bool:
        """Say whether its labels differ; an unknown one does not."""
        return len(set(self.labels[self.labels >= 0].tolist())) > 1

    @property
    def is_exact(self) -> bool:
        """Say whether all of it are the same pixels."""
        return bool(self.exact.all()) and bool((self.similarity == 1).all())


@dataclass(frozen=True)
class Leak:
    """What the test images that are training images as well are worth.

    Attributes:
        indices: int64 [k], these test images, by position.
        right: labels that the model names among them.
        others: labelled test images besides them, and how many of those the model names.
    """

    indices: np.ndarray
    right: int
    others: tuple[int, int]

    @property
    def accuracies(self) -> tuple[float, float, float]:
        """Give the test accuracy with them, without them, and on them."""
        count, right = self.others
        whole = (right + self.right) / max(1, count + len(self.indices))
        return whole, right / max(1, count), self.right / max(1, len(self.indices))


@dataclass(frozen=True)
class Duplicates:
    """The copies among the images of some splits.

    Attributes:
        splits: that were compared: training examples, and test examples if there are any.
        groups: those that leak first, then those whose labels differ, the largest first.
        compared: images of each split that were.
        pictured: whether all of them are pictures; of other inputs only exact copies are found.
        leak: of the test images, or None without labelled ones.
    """

    splits: tuple[Split, ...]
    groups: tuple[Copies, ...]
    compared: tuple[int, ...]
    pictured: bool
    leak: Leak | None

    @property
    def superfluous(self) -> np.ndarray:
        """Give the training images that can be left out, rising positions, int64 [k]."""
        left_out = [
            place.index
            for group in self.groups
            for place, kept in zip(group.places, group.kept, strict=True)
            if not kept
        ]
        return np.array(sorted(left_out), dtype=np.int64)


def find_duplicates(task: Task, terminal: Terminal | None = None, *, skip_unreadable: bool = False) -> Duplicates:
    """Find copies of images: the same pixels, and pictures that are one after a crop, a flip, light or compression.

    Args:
        task: the checkpoint, in whose activations candidates are looked for, and its data.
        terminal: progress, what the work takes.
        skip_unreadable: continue without unreadable examples.

    Raises:
        InfluenceError: an example that cannot be read, too little memory.
    """
    terminal = or_silent(terminal)
    splits = (task.train,) if task.test is None else (task.train, task.test)
    announce(sum(map(len, splits)), terminal)
    measure_loading(task, terminal)
    pictures = []
    with terminal.progress(sum(map(len, splits)), "pixels of every image") as advance:
        for split in splits:
            read = read_pictures(split, task.loading, advance)
            _tell_unreadable(read, terminal, skip=skip_unreadable)
            pictures.append(read)
    points = image_space(task, splits, terminal, skip=skip_unreadable)
    return compare(splits, pictures, points, terminal, task.device)


def compare(
    splits: Sequence[Split],
    pictures: Sequence[Pictures],
    points: Sequence[Points],
    terminal: Terminal,
    device: torch.device,
) -> Duplicates:
    """Find the copies among images that have been read.

    Args:
        splits: training examples, then test examples if there are any.
        pictures: of each split.
        points: of each split, of the same examples.
        terminal: progress.
        device: that does the work.
    """
    small = joined([part.small for part in pictures])
    count = len(small)
    hashes = np.concatenate([part.hashes for part in pictures])
    with terminal.progress(SEARCHES * count, "copies of every image") as advance:
        links = find_links(small, hashes, _features(pictures, points), advance, device)
    groups = make_groups(links, count)
    owner = np.repeat(np.arange(len(splits)), [len(part.indices) for part in pictures])
    index = np.concatenate([part.indices for part in pictures])
    labels = np.concatenate([split.labels[part.indices] for split, part in zip(splits, pictures, strict=True)])
    every = [_copies(group, owner, index, labels) for group in groups]
    # sorted() is stable: of equals the first image decides.
    every.sort(key=lambda group: (not group.leaks, not group.disagrees, -len(group.places)))
    leak = _leak(splits[1], points[1], every) if len(splits) > 1 and not splits[1].is_unlabelled else None
    return Duplicates(
        tuple(splits),
        tuple(every),
        tuple(len(part.indices) for part in pictures),
        all(bool(part.pictured.all()) for part in pictures),
        leak,
    )


def announce(count: int, terminal: Terminal) -> None:
    """Say what comparing ``count`` images takes, before it starts; refuse what does not fit the memory."""
    memory = count * BYTES + 4 * 4 * HELD
    operations = SEARCHES * 2.0 * count**2 * (WIDTH + 8 * PASSES)
    seconds = operations / operations_a_second(torch.device("cpu"))
    text = f"comparing {count:,} images: about {human_bytes(memory)} of memory and {duration(seconds)}"
    (terminal.say if seconds > LONG or memory > LARGE else terminal.detail)(text)
    free = available_bytes(torch.device("cpu"))
    if memory > free:
        raise InfluenceError(
            f"comparing {count:,} images takes about {human_bytes(memory)}, but {human_bytes(free)} of memory is free",
            "train.exclude: FILE leaves images out",
        )


def _tell_unreadable(read: Pictures, terminal: Terminal, *, skip: bool) -> None:
    if read.unreadable and not skip:
        raise InfluenceError(
            read.unreadable[0][1],
            "fix or remove it, list it under exclude, or pass --skip-unreadable to continue without it",
        )
    for _, reason in read.unreadable:
        terminal.warn(f"skipped: {reason}")


def _features(pictures: Sequence[Pictures], points: Sequence[Points]) -> torch.Tensor | None:
    """Give the network's points of the pictures; None where the two passes did not read the same images."""
    if any(not np.array_equal(a.indices, b.indices) for a, b in zip(pictures, points, strict=True)):
        return None
    return torch.cat([part.features for part in points])


def _copies(group: Group, owner: np.ndarray, index: np.ndarray, labels: np.ndarray) -> Copies:
    rows = group.rows
    inside = owner[rows] == 0
    kept = np.ones(len(rows), dtype=bool)
    if inside.any():
        kept[inside] = False
        if inside.all():  # one is kept: the first with the most frequent label
            values, counts = np.unique(labels[rows], return_counts=True)
            common = values[counts == counts.max()]
            kept[int(np.flatnonzero(np.isin(labels[rows], common))[0])] = True
    return Copies(
        tuple(Place(int(owner[row]), int(index[row])) for row in rows),
        labels[rows],
        group.exact,
        group.similarity,
        kept,
    )


def _leak(test: Split, points: Points, groups: Sequence[Copies]) -> Leak:
    leaked = sorted(place.index for group in groups if group.leaks for place in group.places if place.split == 1)
    known = test.labels[points.indices] >= 0
    right = (points.predicted == test.labels[points.indices]) & known
    among = np.isin(points.indices, leaked) & known
    others = known & ~among
    return Leak(points.indices[among], int(right[among].sum()), (int(others.sum()), int(right[others].sum())))
