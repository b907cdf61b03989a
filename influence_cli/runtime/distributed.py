"""Several processes that share one command's work, as torchrun starts them: their ranks and their communication.

torchrun, and whatever else sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts the same command N times. Work
is divided by rank; ``torch.distributed`` (Gloo, plus NCCL with CUDA) sums and exchanges. A single process is a job of
one: everything here then returns its own input. torch is imported only to connect.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from influence_cli.errors import InfluenceError

if TYPE_CHECKING:
    pass

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Rank 0 may take any time to decompose a matrix or write a page; a process that has died is noticed at once.
PATIENCE = timedelta(days=2)
# Which process said how the job ends, and with which exit code.
END = "influence/end"

Value = TypeVar("Value")


class PeerLost(InfluenceError):  # noqa: N818 (what happened, not whose mistake it is)
    """Another process of the job has ended, for whatever reason."""


class Finished(Exception):  # noqa: N818 (no error: the rest is the first process's to do)
    """This process has done its part of the job."""


@dataclass
class _Job:
    """What this process knows of the job.

    Attributes:
        rank: its number.
        size: how many processes there are.
        store: the key-value store that they share; None before they are connected, and for one process.
        counters: how many counts have been started, the same in every process.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    counters: int = 0


_job = _Job()


def started() -> tuple[int, int]:
    """Read this process's rank and the number of processes from the environment; (0, 1) where it is alone.

    Raises:
        InfluenceError: RANK and WORLD_SIZE do not fit together.
    """
    if not all(name in os.environ for name in NEEDED):
        return 0, 1
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise InfluenceError(
            f"RANK is {os.environ['RANK']!r} of WORLD_SIZE {os.environ['WORLD_SIZE']!r}",
            "torchrun sets them: torchrun --nproc-per-node 2 -m influence_cli …",
        )
    return rank, size


def rank() -> int:
    """Give this process's number, from 0."""
    return _job.rank


def size() -> int:
    """Give the number of processes that share the work."""
    return _job.size


def is_first() -> bool:
    """Say whether this is the process that prints, and writes what is written once."""
    return _job.rank == 0


def on_this_host() -> int:
    """Count the processes of the job on this host: they share its memory and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _job.size > 1 else 1


def local_device(count: int) -> int:
    """Choose one of this host's devices for this process."""
    return int(os.environ.get("LOCAL_RANK", "0")) % max(1, count) if _job.size > 1 else 0


def join() -> None:
    """Connect to the other processes of the job; do nothing if this one is alone or already connected.

    Raises:
        InfluenceError: they cannot connect to each other.
    """
    global _job
    number, count = started()
    if count == 1 or _job.store is not None:
        return
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, number, count = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))
        # torchrun keeps the store when it starts a job again: neither the addresses nor the counts of before hold.
        store = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {count}", store)
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise InfluenceError(
            f"the {count} processes of this job cannot connect to each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {' '.join(str(error).split())[:200]}",
            "check that every host can reach that address; GLOO_SOCKET_IFNAME sets the network interface",
        ) from error
    _job = _Job(number, count, store)


def stay_alone() -> None:
    """Do the work in this process alone, whatever else was started."""
    for name in NEEDED:
        os.environ.pop(name, None)


def leave() -> None:
    """Disconnect from the other processes, at the end of the program."""
    global _job
    if _job.store is not None:
        from torch import distributed

        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()
        _job = _Job(_job.rank, _job.size)


def dissolve() -> None:
    """Leave the rest to the first process, which continues as if it were alone.

    Raises:
        Finished: in every other one.
    """
    if _job.rank:
        raise Finished
    _job.size = 1


@contextmanager
def apart() -> Iterator[None]:
    """Work alone for a while, on something that concerns this process only."""
    global _job
    before = _job
    _job = _Job()
    try:
        yield
    finally:
        _job = before


def speaks(code: int) -> bool:
    """Say whether this process reports how the job ends: only the first one with something to report does.

    Args:
        code: the exit code.
    """
    if _job.store is None:
        return started_first()
    with contextlib.suppress(RuntimeError):  # the store can have gone with the process that had it
        return str(_job.store.compare_set(END, "", f"{_job.rank} {code}").decode()).split()[0] == str(_job.rank)
    return code != 130  # Ctrl-C reaches all: that process has reported it


def ending(code: int) -> int:
    """Give the exit code of the job: that of the process that reported, otherwise this one's."""
    if _job.store is not None:
        with contextlib.suppress(RuntimeError):
            if _job.store.check([END]):
                return int(_job.store.get(END).decode().split()[1])
    return code


def started_first() -> bool:
    """Say whether this is the first process, from the environment: before they meet all see the same command line."""
    try:
        return started()[0] == 0
    except InfluenceError:
        return True  # the rank is unknown; silence would be worse


def whose() -> str:
    """Name this process in an error, where there are several: ``rank 3 on host b: ``."""
    return f"rank {_job.rank} on {socket.gethostname()}: " if _job.store is not None and _job.rank else ""


def barrier() -> None:
    """Wait until every process has reached this point."""
    gathered(None)


def gathered(value: Value) -> list[Value]:
    """Give every process the value of each, by rank."""
    if _job.size == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _job.size
    with listening():
        distributed.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], Value]) -> Value:
    """Give every process what ``make`` returns in the first one; it is not called in the others."""
    if _job.size == 1:
        return make()
    from torch import distributed

    made: list[Any] = [make() if is_first() else None]
    with listening():
        distributed.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[no-any-return]


def smallest(value: int) -> int:
    """Give the smallest of the processes' numbers."""
    return min(gathered(value))


def share(count: int) -> slice:
    """Give this process's part of ``count`` things in order: parts are as equal as possible and may be empty."""
    return slice(count * _job.rank // _job.size, count * (_job.rank + 1) // _job.size)


def turns(count: int) -> Iterator[int]:
    """Give out the numbers below ``count`` one at a time, to whichever process asks first."""
    if _job.size == 1:
        yield from range(count)
        return
    _job.counters += 1
    name = f"influence/turns/{_job.counters}"
    while True:
        with listening():
            number = int(_job.store.add(name, 1)) - 1
        if number >= count:
            return
        yield number


def counted(advance: Callable[[float], None]) -> Callable[[float], None]:
    """Make a bar that shows what all processes have finished together, in the first one.

    Args:
        advance: takes what is new.
    """
    if _job.size == 1:
        return advance
    _job.counters += 1
    name, shown = f"influence/count/{_job.counters}", 0

    def note(count: float) -> None:
        nonlocal shown
        with listening():
            total = int(_job.store.add(name, int(count)))
        advance(total - shown)
        shown = total

    return note


def agree(inputs: Mapping[str, str], meaning: Mapping[str, str]) -> None:
    """Refuse to start if the processes do not see the same inputs.

    Args:
        inputs: what this one sees, part by part.
        meaning: what each part is called.

    Raises:
        InfluenceError: naming the process and what differs.
    """
    first, *others = gathered((socket.gethostname(), dict(inputs)))
    for number, (host, seen) in enumerate(others, start=1):
        different = [meaning.get(name, name) for name in {**first[1], **seen} if first[1].get(name) != seen.get(name)]
        if different:
            raise InfluenceError(
                f"rank {number} (host {host}) does not see the same as rank 0 (host {first[0]}); what differs: "
                f"{'; '.join(different)}",
                "every process needs the same config and the same data: a folder that all hosts share, or equal copies",
            )


def hear(warnings: Sequence[str], warn: Callable[[str], None]) -> None:
    """Let the first process print the warnings of the others, since only it prints."""
    for texts in gathered(list(warnings)):
        for text in texts:
            warn(text)


@contextmanager
def listening() -> Iterator[None]:
    """Report in one line that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            "another process of this job has ended",
            "finished work is kept; run the same command to resume (torchrun --max-restarts N restarts it by itself)",
        ) from error
