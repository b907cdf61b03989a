"""The log of moved files: what is planned, before; what was done, after. A killed run is resumed or undone from it.

A ``.csv`` that is only appended to; every row is on the disk before the next step. A batch is one run of
--apply-moves: its moves (``plan``), ``go`` once all of them are logged, ``folder``/``move``/``moved`` as they are made,
``done``; and ``back``/``returned``, ``undone`` when they are undone. A row ends with a checksum, which distinguishes a
row torn by a kill from an edited one.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import xxhash

from influence_cli.errors import InfluenceError, near_path
from influence_cli.runtime import disk, locks

COLUMNS = ("batch", "move", "event", "from", "to", "hash", "time", "check")
STATES = {"done": "applied", "back": "undoing", "undone": "undone"}
# Longest row: two paths and the fields around them.
LONGEST = 100_000


@dataclass(frozen=True)
class Move:
    """A file that changes its folder.

    Attributes:
        source: its path now, absolute.
        target: its new path, absolute.
        hash: of its content, xxh3 of 128 bits; empty until it is planned in a log.
    """

    source: str
    target: str
    hash: str = ""


@dataclass(frozen=True)
class LoggedBatch:
    """One run of moves, as its log shows it.

    Attributes:
        number: from 1.
        decisions: the file that asked for it, and the hash of its content.
        time: when it began.
        moves: all of them, in order.
        begun: which of them were started, counted from 1.
        returned: which of them were undone.
        folders: the folders that it made, in order.
        state: ``applying``, ``applied``, ``undoing`` or ``undone``.
    """

    number: int
    decisions: tuple[str, str]
    time: str
    moves: tuple[Move, ...]
    begun: frozenset[int] = frozenset()
    returned: frozenset[int] = frozenset()
    folders: tuple[str, ...] = ()
    state: str = "applying"


def read_log(path: Path) -> list[LoggedBatch]:
    """Read the batches of a log whose plan is complete; none if there is no file.

    Raises:
        InfluenceError: not a log, or a row in its middle was changed.
    """
    return _batches(_rows(path)[0]) if path.exists() else []


def last_open(batches: Sequence[LoggedBatch]) -> LoggedBatch | None:
    """Give the last batch that is not undone."""
    return next((batch for batch in reversed(batches) if batch.state != "undone"), None)


class MoveLog:
    """A log that is open for appending and locked: no other run reads or writes moves meanwhile."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.path = path
        self._raw = raw

    def add(self, batch: int, move: int, event: str, source: str = "", target: str = "", hash: str = "") -> None:
        """Append a row and wait until it is on the disk."""
        self.add_all([(batch, move, event, source, target, hash)])

    def add_all(self, rows: Sequence[tuple[int, int, str, str, str, str]]) -> None:
        """Append rows and wait once until they are on the disk."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._write([[*map(str, row), time] for row in rows])

    def _write(self, rows: Sequence[list[str]]) -> None:
        text = io.StringIO(newline="")
        # All fields are quoted, so that every reader keeps a bare \r in a name.
        csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([*row, _check(row)] for row in rows)
        if not os.fstat(self._raw.fileno()).st_size:
            disk.append(self._raw, _HEADER.encode())
            disk.flush(self._raw)
            disk.flush_names(self.path.parent)
        disk.append(self._raw, text.getvalue().encode("utf-8", "surrogateescape"))
        disk.flush(self._raw)


@contextmanager
def open_log(path: Path) -> Iterator[MoveLog]:
    """Open a log for appending and lock it; create it if missing, and first remove a row that a kill has torn.

    What was read before locking may be outdated. A log that was created here and got no row is removed.

    Raises:
        InfluenceError: not a log, it cannot be written, or another run holds it.
    """
    made = not path.exists()
    try:
        raw = path.open("a+b", buffering=0)
    except OSError as error:
        raise InfluenceError(f"{path} cannot be written: {error.strerror or error}") from error
    with raw:
        _hold(path, raw)
        whole = _rows(path)[1]
        if os.fstat(raw.fileno()).st_size > whole:
            disk.cut(raw, whole)
        try:
            yield MoveLog(path, raw)
        finally:
            if made and not os.fstat(raw.fileno()).st_size:
                disk.remove(path)


def refuse_held(path: Path) -> None:
    """Refuse to continue while another run holds the log.

    Raises:
        InfluenceError: it does.
    """
    with suppress(OSError), path.open("r+b", buffering=0) as raw:
        _hold(path, raw)


def _hold(path: Path, raw: BinaryIO) -> None:
    """Lock an open log until it is closed, which a kill does too."""
    try:
        free = locks.take(raw, alone=True)
    except OSError:  # a file system without locks: as good as it gets there
        return
    # The other run may have removed an empty log between our opening and locking it.
    if not free or not path.exists() or not os.path.samestat(path.stat(), os.fstat(raw.fileno())):
        raise InfluenceError(
            f"{near_path(path)} is in use by another run", "wait until it is done, then run this again"
        )


_HEADER = ",".join(COLUMNS) + "\n"


def _check(row: Sequence[str]) -> str:
    return xxhash.xxh3_64_hexdigest("\0".join(row).encode("utf-8", "surrogateescape"))


def _rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """Read the complete rows of a log, and how many bytes they take: what follows was torn by a kill."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InfluenceError(f"{path} cannot be read: {error.strerror or error}") from error
    header = _HEADER.encode()
    if header.startswith(data):
        return [], len(data) if data == header else 0
    if not data.startswith(header):
        raise InfluenceError(f"{path} is not a log of moves", "influence relabel --apply-moves writes moves.log.csv")
    rows, length, taken = [], len(header), len(header)

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in io.BytesIO(data[len(header) :]):  # at \n alone: a \r of a name is none of its ends
            taken += len(line)
            yield line.decode("utf-8", "surrogateescape")

    try:
        for fields in csv.reader(lines(), strict=True):
            whole = len(fields) == len(COLUMNS) and fields[-1] == _check(fields[:-1])
            if not whole or data[taken - 1 : taken] != b"\n":
                break
            rows.append(dict(zip(COLUMNS, fields, strict=True)))
            length = taken
    except csv.Error:
        pass
    if _whole_row_after(data[length:]):
        line = data[:length].count(b"\n") + 1
        raise InfluenceError(
            f"{path}:{line}: this row was changed after it was written",
            "restore the log; without it, move files back by hand",
        )
    return rows, length


def _whole_row_after(tail: bytes) -> bool:
    """Say whether a complete row follows an incomplete one: a kill tears only the last."""
    start = tail.find(b"\n") + 1
    while 0 < start < len(tail):
        text = tail[start : start + LONGEST].decode("utf-8", "surrogateescape")
        with suppress(csv.Error):
            fields = next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
            if len(fields) == len(COLUMNS) and fields[-1] == _check(fields[:-1]):
                return True
        start = tail.find(b"\n", start) + 1
    return False


def _batches(rows: Sequence[dict[str, str]]) -> list[LoggedBatch]:
    batches: dict[int, LoggedBatch] = {}
    planned: dict[int, list[Move]] = {}
    steps: dict[tuple[int, str], set[int]] = {}
    folders: dict[int, list[str]] = {}
    for row in rows:
        number, event = int(row["batch"]), row["event"]
        if event == "plan":
            # A plan without its go was interrupted; the next one has the same number and starts again at move 1.
            moves = planned.setdefault(number, [])
            del moves[int(row["move"]) - 1 :]
            moves.append(Move(row["from"], row["to"], row["hash"]))
        elif event == "go":
            moves = planned[number][: int(row["move"])]
            batches[number] = LoggedBatch(number, (row["from"], row["hash"]), row["time"], tuple(moves))
        elif event == "folder":
            folders.setdefault(number, []).append(row["to"])
        elif event in ("move", "returned"):
            steps.setdefault((number, event), set()).add(int(row["move"]))
        elif event in STATES:
            batches[number] = replace(batches[number], state=STATES[event])
    return [
        replace(
            batch,
            begun=frozenset(steps.get((number, "move"), ())),
            returned=frozenset(steps.get((number, "returned"), ())),
            folders=tuple(folders.get(number, ())),
        )
        for number, batch in batches.items()
    ]
