"""Retrainings on disk: one file each, and claims, with which several processes share the work.

A file is written under another name, flushed and renamed: it is complete or absent. A claim is a lock on one byte of
the file ``claims``. The system releases it when its process ends, in any way, so there are no stale claims.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from influence_cli.errors import InfluenceError, Stopped, describe, near_path
from influence_cli.runtime import disk, locks
from influence_cli.runtime.terminal import Advance, Terminal, duration

FACTS, CLAIMS, TURNS = "made_of.json", "claims", "turns"
# Seconds between checks whether the other processes are done, when nothing is left to claim.
LOOK = 0.5


@dataclass(frozen=True)
class Job:
    """One retraining.

    Attributes:
        name: of its file, without the suffix.
        number: of its claim, ≥ 1; no other job of the folder has it.
    """

    name: str
    number: int


Arrays = dict[str, np.ndarray]


def open_folder(
    folder: Path, describe_work: Callable[[Mapping[str, str]], Mapping[str, str]], meaning: Mapping[str, str]
) -> None:
    """Make the folder, or resume in one that was made from the same.

    Args:
        folder: for the files.
        describe_work: gives what the retrainings depend on, part by part, from what the folder was made from; that is
            empty if it is yet to be made.
        meaning: what each part is called.

    Raises:
        InfluenceError: it was made from something else, naming what differs; or it cannot be written.
    """
    path, shown = folder / FACTS, near_path(folder)
    try:
        disk.make_folder(folder)
        with _claims(folder) as claims:
            # If two processes start together, the first one writes, and the other waits for that.
            locks.take_byte(claims, 0, wait=True)
            if not path.exists():
                disk.write_whole(path, (json.dumps(dict(describe_work({})), indent=2) + "\n").encode())
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InfluenceError(f"{shown} cannot be used: {describe(error)}", "move it away, or fix it") from error
    wanted = describe_work(recorded)
    different = [meaning[name] for name in meaning if recorded.get(name) != wanted.get(name)]
    if different:
        raise InfluenceError(
            f"{shown} holds retrainings of another run ({count_files(folder):,}); what differs: {'; '.join(different)}",
            f"undo the change to continue with them, or move {shown} away to start over",
        )


def count_files(folder: Path) -> int:
    """Count the finished retrainings."""
    return sum(1 for _ in folder.glob("*.npz"))


def read(folder: Path, job: Job) -> Arrays | None:
    """Read a finished retraining; None if there is none, or if the file is not one."""
    try:
        # Opened here, because numpy leaves a file open that it cannot read.
        with (folder / f"{job.name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def do_all(
    folder: Path,
    jobs: Sequence[Job],
    run: Callable[[Job, Callable[[float], None]], Arrays],
    terminal: Terminal,
    what: str,
    *,
    needs: str | None = None,
) -> list[Arrays]:
    """Do every job once, in this process or in others that work on the folder, and give all results.

    Args:
        folder: from ``open_folder``.
        jobs: in the wanted order.
        run: does one; gets a function to call with the finished share, in [0, 1].
        terminal: progress.
        what: the bar's title.
        needs: an array without which a result is done again: files of an earlier release have fewer.

    Returns:
        The arrays of each job, in order.

    Raises:
        InfluenceError: from ``run``, saying what is kept; or a file cannot be written.
    """
    shown = near_path(folder)

    def is_done(job: Job) -> bool:
        arrays = read(folder, job)
        return arrays is not None and (needs is None or needs in arrays)

    left, timed, waiting = [job for job in jobs if not is_done(job)], False, False
    if len(left) < len(jobs):
        terminal.say(f"{len(jobs) - len(left):,} of {len(jobs):,} retrainings are already in {shown}")
    try:
        with _claims(folder) as claims, terminal.progress(len(jobs), what) as advance:
            if left and not locks.hold(claims):
                terminal.warn(
                    f"this system has no file locks: two commands that train in {shown} at one time would disturb "
                    "each other; run one after the other"
                )
            advance(len(jobs) - len(left))
            while left:
                before = len(left)
                for job in list(left):
                    if is_done(job):  # another process has finished it
                        advance(1)
                    elif locks.take_byte(claims, job.number, wait=False):
                        started = time.perf_counter()
                        try:
                            # Another process may have finished it between the check and the claim.
                            if is_done(job):
                                advance(1)
                            else:
                                _do(folder, job, run, advance)
                        finally:
                            locks.give_byte(claims, job.number)
                        if not timed and len(left) > 1:
                            timed, rest = True, len(left) - 1
                            spent = time.perf_counter() - started
                            terminal.say(
                                f"one retraining took {duration(spent)}: the {rest:,} left take about "
                                f"{duration(rest * spent)}, or less if other shells run the same command too"
                            )
                    else:
                        continue
                    left.remove(job)
                if left and len(left) == before:
                    if not waiting:
                        terminal.say(f"waiting for {len(left):,} that other processes are training")
                        waiting = True
                    time.sleep(LOOK)
    except InfluenceError as error:
        kept = f"finished retrainings are kept in {shown} ({count_files(folder):,})"
        raise InfluenceError(error.message, f"{error.hint}; {kept}" if error.hint else kept) from error
    except KeyboardInterrupt:
        raise Stopped(
            f"finished retrainings are kept in {shown} ({count_files(folder):,}); run the same command to resume"
        ) from None
    except OSError as error:
        raise InfluenceError(f"{shown} cannot be written: {describe(error)}") from error
    results = [read(folder, job) for job in jobs]
    if any(arrays is None for arrays in results):
        raise InfluenceError(f"a file in {shown} disappeared while it was in use", "run the same command again")
    return [arrays for arrays in results if arrays is not None]


def _do(folder: Path, job: Job, run: Callable[[Job, Callable[[float], None]], Arrays], advance: Advance) -> None:
    shown = 0.0

    def part(share: float) -> None:
        nonlocal shown
        share = min(1.0, max(shown, share))
        advance(share - shown)
        shown = share

    arrays = run(job, part)
    part(1.0)
    _write(folder / f"{job.name}.npz", arrays)


def _write(path: Path, arrays: Arrays) -> None:
    # Only the holder of the claim writes it.
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    disk.write_whole(path, data.getvalue())


@contextmanager
def turn(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Be the only process that runs the block, such as making stores.

    Args:
        folder: from ``open_folder``.
        wait: for the process whose turn it is; otherwise continue without.

    Yields:
        Whether it is this process's turn.
    """
    with (folder / TURNS).open("ab") as file:
        yield locks.take_byte(file, 0, wait=wait)


@contextmanager
def _claims(folder: Path) -> Iterator[BinaryIO]:
    with (folder / CLAIMS).open("ab") as file:
        yield file
