"""The decisions of a review: every one is on disk, in a whole file, before the browser is told that it is kept."""

from __future__ import annotations

import csv
import getpass
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.relabel.decisions import COLUMNS, DECISIONS, NOTED, read_decisions, read_noted
from influence_cli.runtime import disk, locks
from influence_cli.runtime.csv_cells import guarded

if TYPE_CHECKING:
    from influence_cli.data.split import Split

# What identifies the content of the file without reading it: size, time, place on the disk.
Stamp = tuple[int, int, int] | None


class Conflict(Exception):  # noqa: N818
    """The decision on an example is not the one that the browser saw: another tab was first."""


@dataclass(frozen=True)
class Kept:
    """The decision on one example.

    Attributes:
        decision: one of ``keep``, ``relabel``, ``drop`` and ``unsure``.
        new_label: the class of a relabel, otherwise empty.
        who: decided; empty where that is not known.
        when: in UTC, such as ``2026-01-31T12:00:00Z``; empty where that is not known.
    """

    decision: str
    new_label: str = ""
    who: str = ""
    when: str = ""

    @property
    def word(self) -> tuple[str, str]:
        """Give what was decided, without who and when."""
        return self.decision, self.new_label


@dataclass
class Ledger:
    """The file of decisions, and what it holds.

    Attributes:
        path: the ``.csv``.
        split: the examples that the decisions are about.
        classes: class names by number.
        folder: of the config; relative paths of images are taken from it.
        places: where the config names labels and exclusions, for messages.
        lock: of the file beside it, held as long as this process; None if another server has it: then this one reads.
        rows: by position in the data set.
        version: counts the changes that this server has seen, so that a browser asks for what is new.
    """

    path: Path
    split: Split
    classes: tuple[str, ...]
    folder: Path
    places: tuple[str, str] = ("", "")
    lock: BinaryIO | None = None
    rows: dict[int, Kept] = field(default_factory=dict)
    version: int = 0
    _stamp: Stamp = None
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    @property
    def writes(self) -> bool:
        """Say whether this server may write the file."""
        return self.lock is not None

    def state(self) -> tuple[int, dict[int, Kept]]:
        """Give the version and all decisions, read again if somebody else has changed the file.

        Raises:
            InfluenceError: the file has become one that does not fit the data set.
        """
        with self._one_at_a_time:
            self._refresh()
            return self.version, dict(self.rows)

    def change(self, changes: Sequence[tuple[int, tuple[str, str], tuple[str, str]]]) -> int:
        """Write decisions, all of them or none. On return they are on disk.

        Args:
            changes: position, what the browser saw decided, what is decided now; ``("", "")`` is undecided.

        Returns:
            The new version.

        Raises:
            Conflict: an example was decided otherwise in the meantime.
            InfluenceError: another server has the file, a decision is not one of this data set, or the disk is full.
        """
        if not self.writes:
            raise InfluenceError(
                f"{self.path.name} is open in another influence review: this one only reads", "decide in that one"
            )
        for index, _, after in changes:
            self._check(index, after)
        with self._one_at_a_time:
            self._refresh()
            rows = dict(self.rows)
            who, when = _user(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            for index, before, after in changes:
                if (rows[index].word if index in rows else ("", "")) != before:
                    raise Conflict
                if after == ("", ""):
                    rows.pop(index, None)
                elif before != after:
                    rows[index] = Kept(*after, who, when)
            self._write(rows)
            self.rows, self.version = rows, self.version + 1
            return self.version

    def close(self) -> None:
        """Let another server write the file."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def _check(self, index: int, after: tuple[str, str]) -> None:
        if not 0 <= index < len(self.split.labels) or not np.isin(index, self.split.indices):
            raise InfluenceError(f"there is no example {index}, or it is excluded")
        decision, new = after
        if after == ("", ""):
            return
        if decision not in DECISIONS:
            raise InfluenceError(f"there is no decision {decision!r}", f"known: {', '.join(DECISIONS)}")
        if (decision == "relabel") != bool(new) or (new and new not in self.classes):
            raise InfluenceError(f"example {index}: {decision} to {new!r} is no decision", "name a class for a relabel")
        if new and new == self.classes[int(self.split.labels[index])]:
            raise InfluenceError(f"example {index} is labelled {new} already", "keep it instead")

    def _refresh(self) -> None:
        """Read the file if it is not the one that was last read or written."""
        if (now := _stamp(self.path)) == self._stamp:
            return
        rows: dict[int, Kept] = {}
        if now is not None:
            given = read_decisions(self.path, self.split, self.classes, self.folder, places=self.places)
            noted = read_noted(self.path)
            for row in given.rows:
                new = "" if row.new_label is None else self.classes[row.new_label]
                rows[row.index] = Kept(row.decision, new, *noted.get(row.line, ("", "")))
        self.rows, self._stamp, self.version = rows, now, self.version + 1

    def _write(self, rows: Mapping[int, Kept]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*COLUMNS, *NOTED))
        for index, row in sorted(rows.items()):
            label = self.classes[int(self.split.labels[index])]
            cells = (self.split.path(index) or "", label, row.decision, row.new_label, row.who, row.when)
            writer.writerow((index, *(guarded(cell) for cell in cells)))
        try:
            disk.write_whole(self.path, text.getvalue().encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise InfluenceError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._stamp = _stamp(self.path)


def open_ledger(
    path: Path, split: Split, classes: tuple[str, ...], folder: Path, *, places: tuple[str, str] = ("", "")
) -> Ledger:
    """Open a file of decisions, or begin one; a second server on the same file only reads it.

    Args:
        path: the ``.csv``; it need not exist.
        split: the examples.
        classes: class names by number.
        folder: of the config.
        places: where the config names labels and exclusions.

    Raises:
        InfluenceError: the file is not one of this data set as it is now, or its folder cannot be written.
    """
    lock: BinaryIO | None = None
    try:
        # The file itself is replaced at every decision, so its lock is on one that stays.
        lock = path.with_name(f".{path.name}.lock").open("ab", buffering=0)
    except OSError as error:
        raise InfluenceError(f"{path} cannot be written: {error.strerror or error}") from error
    if not locks.take(lock, alone=True):
        lock.close()
        lock = None
    ledger = Ledger(path, split, classes, folder, places, lock)
    try:
        ledger.state()
    except InfluenceError:
        ledger.close()
        raise
    return ledger


def _stamp(path: Path) -> Stamp:
    try:
        known = path.stat()
    except FileNotFoundError:
        return None
    return known.st_size, known.st_mtime_ns, known.st_ino


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in some containers
        return ""
