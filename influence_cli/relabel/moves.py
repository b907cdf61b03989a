"""Moves of files between class folders: plan them, make them, undo them.

An ImageFolder's labels are its folders. A relabelled image goes to the folder of its new class, a dropped one to
``dropped/CLASS`` next to the root. No file is ever overwritten, and a changed file stays where it is. The place of a
file is read from the disk, not from the log, so a kill between the two leaves no doubt.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from influence_cli.errors import InfluenceError, Stopped, describe, near_path, typed_path
from influence_cli.relabel.labels import Relabelled
from influence_cli.relabel.move_log import LoggedBatch, Move, MoveLog, last_open, open_log, read_log
from influence_cli.report.writer import write_rows
from influence_cli.runtime import disk
from influence_cli.runtime.transaction import NewFile

COLUMNS = ("from", "to")
DROPPED = "dropped"
Advance = Callable[[int], None]
# Errors of a file system without hard links, or of a kernel that protects the files of other users.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


@dataclass(frozen=True)
class MovePlan:
    """How the folders must change to match the labels.

    Attributes:
        moves: in the order of the data set.
        dropped: how many of them leave the data set.
        renamed: how many get another name, because theirs is taken in the new folder.
        emptied: class folders that would have no images left.
    """

    moves: tuple[Move, ...]
    dropped: int
    renamed: int
    emptied: tuple[str, ...]


def plan_moves(result: Relabelled) -> MovePlan:
    """Plan the moves after which the folders match the labels and exclusions.

    Raises:
        InfluenceError: the data set is not one of class folders.
    """
    split, root, folders = result.split, result.root, _class_folders(result)
    if root is None or split.paths is None:
        raise InfluenceError(f"{split.where}: the {split.name} data set is not an ImageFolder")
    out = root.parent / DROPPED
    taken: set[str] = set()
    moves, renamed = [], 0
    left = Counter(int(label) for label in result.original)
    excluded = set(result.exclude.tolist())
    for index in sorted(excluded | set(result.overrides.tolist())):
        source = Path(split.paths[index])
        inside = source.relative_to(root)
        label = int(result.labels[index])
        wanted = out / inside if index in excluded else root.joinpath(folders[label], *inside.parts[1:])
        target = _free(wanted, taken)
        renamed += target != wanted
        taken.add(str(target))
        moves.append(Move(str(source), str(target)))
        left[int(result.original[index])] -= 1
        if index not in excluded:
            left[label] += 1
    emptied = tuple(folders[label] for label, count in sorted(left.items()) if not count)
    return MovePlan(tuple(moves), len(excluded), renamed, emptied)


def manifest(path: Path, plan: MovePlan) -> NewFile:
    """Give the moves of a plan as a file for people: a ``.csv`` of absolute paths, ``from,to``."""

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            write_rows(({"from": move.source, "to": move.target} for move in plan.moves), COLUMNS, "csv", stream)

    return NewFile(path, write)


def apply_plan(log: MoveLog, plan: MovePlan, decisions: Path, advance: Advance = lambda _: None) -> LoggedBatch:
    """Make the moves of a plan, and log each one before and after.

    Args:
        log: the log, locked since before the plan was made; earlier batches in it stay.
        plan: the moves.
        decisions: the file that asked for them.
        advance: called after each move.

    Raises:
        InfluenceError: before anything is moved, where a file or its place is not as it has to be; or where a move
            fails: those before it are made, and logged.
    """
    if plan.emptied:
        raise InfluenceError(
            f"these moves would leave the class folder {plan.emptied[0]} empty, which ImageFolder refuses",
            "put an image into it first, or remove the class folder after the other moves",
        )
    batches = read_log(log.path)
    number = 1 + max((batch.number for batch in batches), default=0)
    moves = tuple(replace(move, hash=file_hash(Path(move.source))) for move in plan.moves)
    for move in moves:
        _check_way(Path(move.source), Path(move.target))
        if os.path.lexists(move.target):
            raise InfluenceError(
                f"{near_path(Path(move.target))} exists now", "run the same command again: it chooses another name"
            )
    digest = file_hash(decisions)
    # Absolute, so that a hint can name the file from any folder.
    source = str(decisions.absolute())
    rows = [(number, at, "plan", move.source, move.target, move.hash) for at, move in enumerate(moves, start=1)]
    log.add_all([*rows, (number, len(moves), "go", source, "", digest)])
    return continue_moves(log, LoggedBatch(number, (source, digest), "", moves), advance)


def continue_moves(log: MoveLog, batch: LoggedBatch, advance: Advance = lambda _: None) -> LoggedBatch:
    """Make the remaining moves of a batch of a log that has been locked since it was read.

    Raises:
        InfluenceError: before anything is moved, where a file is not where the log says it is or has changed; or where
            a move fails.
    """
    waiting = []
    undo = f"influence relabel --undo {typed_path(log.path)}"
    for number, move in enumerate(batch.moves, start=1):
        if _lies(move, log.path, "source" if number in batch.begun else "") == "source":
            _refuse_changed(move.source, move)
            waiting.append((number, move))
        elif number not in batch.begun:
            raise InfluenceError(
                f"{near_path(Path(move.source))} was moved to {near_path(Path(move.target))}, but not by this run",
                f"{undo} undoes the moves of this run",
            )
        else:
            advance(1)
    total, made = len(batch.moves), len(batch.moves) - len(waiting)
    try:
        for number, move in waiting:
            _make_folders(log, batch, Path(move.target).parent)
            log.add(batch.number, number, "move", move.source, move.target, move.hash)
            _rename(move.source, move.target)
            log.add(batch.number, number, "moved", move.source, move.target, move.hash)
            made += 1
            advance(1)
        log.add(batch.number, total, "done")
    except KeyboardInterrupt as error:
        raise Stopped(
            f"{made:,} of {total:,} files are moved; run the same command to resume, or undo: {undo}"
        ) from error
    except OSError as error:
        raise InfluenceError(
            f"{made:,} of {total:,} files are moved, then: {describe(error)}",
            f"run the same command to resume, or undo: {undo}",
        ) from error
    return replace(batch, state="applied")


def undo_moves(log: Path, advance: Advance = lambda _: None) -> tuple[LoggedBatch, list[Move]]:
    """Undo the last batch of a log that is not undone yet, its last move first.

    Args:
        log: the log; it is locked meanwhile.
        advance: called after each move that is undone.

    Returns:
        The batch, and the moves that were undone, as they were made: ``source`` is where a file is again.

    Raises:
        InfluenceError: before anything is moved, where a file has changed since, or its old place is taken; or where
            a move fails.
    """
    if not log.is_file():
        raise InfluenceError(f"there is no log {near_path(log)}", "influence relabel --undo LOG names another")
    with open_log(log) as open_:
        batch = last_open(read_log(log))
        if batch is None:
            raise InfluenceError(f"{near_path(log)}: nothing is left to undo")
        waiting = []
        for number, move in reversed(list(enumerate(batch.moves, start=1))):
            if number in batch.begun - batch.returned and _lies(move, log, "target") == "target":
                _refuse_changed(move.target, move)
                _check_way(Path(move.target), Path(move.source))
                waiting.append((number, move))
            else:
                advance(1)
        done: list[Move] = []
        try:
            open_.add(batch.number, len(waiting), "back")
            for number, move in waiting:
                disk.make_folder(Path(move.source).parent)
                _rename(move.target, move.source)
                open_.add(batch.number, number, "returned", move.target, move.source, move.hash)
                done.append(move)
                advance(1)
            for folder in reversed(batch.folders):
                with suppress(OSError):  # not empty: other files were added
                    disk.remove_folder(Path(folder))
            open_.add(batch.number, len(batch.moves), "undone")
        except KeyboardInterrupt as error:
            raise Stopped(
                f"{len(done):,} of {len(waiting):,} files are back; run the same command to resume"
            ) from error
        except OSError as error:
            raise InfluenceError(
                f"{len(done):,} of {len(waiting):,} files are back, then: {describe(error)}",
                "run the same command to resume",
            ) from error
    return batch, done


def file_hash(path: Path) -> str:
    """Hash the content of a file (xxh3, 128 bits)."""
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        raise InfluenceError(f"{near_path(path)} cannot be read: {describe(error)}") from error


def _class_folders(result: Relabelled) -> dict[int, str]:
    """Give the folder of each class; an error if the folders do not match the labels."""
    split, root = result.split, result.root
    where = split.where
    if root is None or split.paths is None or split.mapping is None:
        raise InfluenceError(f"{where}: the {split.name} data set is not an ImageFolder")
    for index, path in enumerate(split.paths):
        inside = Path(path).relative_to(root).parts if Path(path).is_relative_to(root) else ()
        if len(inside) < 2 or split.mapping.get(inside[0]) != result.original[index]:
            raise InfluenceError(
                f"{where}: {split.title(index)} is not in the folder of its class",
                "its labels are not folders: use the label file",
            )
    folders = {number: name for name, number in split.mapping.items()}
    for label in set(result.labels.tolist()):
        if label not in folders:
            raise InfluenceError(f"{where}: the class {result.classes[label]} has no folder")
    return folders


def _free(path: Path, taken: set[str]) -> Path:
    """Give the path, or the first of ``name-2.png``, ``name-3.png``, … that is free and not planned."""
    candidate, number = path, 1
    while str(candidate) in taken or os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _lies(move: Move, by: Path, half: str) -> str:
    """Find where the file of a move is: at its ``source`` or its ``target``, or ``half`` if a kill left it at both."""
    here, there = os.path.lexists(move.source), os.path.lexists(move.target)
    if half and here and there and _is_one(move.source, move.target):
        return half
    if here and there:
        raise InfluenceError(
            f"{near_path(by)}: both {near_path(Path(move.source))} and {near_path(Path(move.target))} exist",
            "one of the two was added since: move it away, then run this again",
        )
    if not here and not there:
        raise InfluenceError(
            f"{near_path(by)}: neither {near_path(Path(move.source))} nor {near_path(Path(move.target))} exists",
            "put the file back at one of the two, then run this again",
        )
    return "source" if here else "target"


def _refuse_changed(path: str, move: Move) -> None:
    if file_hash(Path(path)) != move.hash:
        raise InfluenceError(
            f"{near_path(Path(path))} has changed since its move was logged", "restore it, or move it by hand"
        )


def _check_way(source: Path, target: Path) -> None:
    """Refuse a move that a rename cannot make, or that would break a link."""
    near = next(folder for folder in target.parents if folder.exists())
    for folder in (source.parent, near):
        if not os.access(folder, os.W_OK):
            raise InfluenceError(f"{near_path(source)} cannot be moved: no permission to write {near_path(folder)}")
    if source.parent.stat().st_dev != near.stat().st_dev:
        raise InfluenceError(
            f"{near_path(source)} and {near_path(near)} are on different file systems",
            "a move there could be interrupted half-way: use the label file instead, or move it by hand",
        )
    if source.is_symlink() and os.path.realpath(source) != os.path.realpath(target.parent / source.readlink()):
        raise InfluenceError(
            f"{near_path(source)} is a relative link, which {near_path(target.parent)} would break", "make it absolute"
        )


def _make_folders(log: MoveLog, batch: LoggedBatch, folder: Path) -> None:
    """Make a folder and those above it, and log each, so that an undo removes the new ones."""
    for path in disk.missing_folders(folder):
        log.add(batch.number, 0, "folder", target=str(path))
        disk.make_folder(path)


def _rename(source: str, target: str) -> None:
    """Rename a file, but never onto another one, not even one created at the same moment, as ``os.rename`` would.

    A kill between the two steps leaves one file with both names: the first step then fails, and the second remains.
    Each step is on the disk before the next: after a power cut the file has one of its names, or both.
    """
    try:
        disk.link(source, target)
    except FileExistsError as error:
        if not _is_one(source, target):
            raise FileExistsError(f"{target} exists now") from error
        disk.flush_names(Path(target).parent)  # the interrupted step may not have done that
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists now") from error
        disk.rename(source, target)
        return
    disk.unlink(source)


def _is_one(first: str, second: str) -> bool:
    """Say whether two names, without following links, belong to one file."""
    return os.path.samestat(os.lstat(first), os.lstat(second))
