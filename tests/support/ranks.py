"""Jobs of several processes, each a fork of fork_server.py with the variables that torchrun sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import fork_server

# Longer than any job takes that does not wait for ever.
PATIENCE = 60
# A store such as torchrun's is: it outlives the jobs that meet there.
AGENT = """
import sys
import torch

store = torch.distributed.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
sys.stdin.read()
"""


@dataclass
class Job:
    """How the processes of a job have ended.

    Attributes:
        codes: exit codes by rank; None for one that waited for ever.
        out: stdout by rank.
        err: stderr by rank.
        work: the pieces of work that were done.
    """

    codes: list[int | None]
    out: list[str]
    err: list[str]
    work: list[str]

    def done(self, what: str) -> list[int]:
        """List which pieces of one kind were done."""
        return sorted(int(line.split()[1]) for line in self.work if line.startswith(f"{what} "))


def run(folder: Path | Sequence[Path], *words: object, ranks: int = 2, code: int | None = 0, **how: Any) -> Job:
    """Run a job to its end; of more than one process only the first may speak.

    Args:
        folder: where it runs, or one per rank.
        words: of the command.
        ranks: how many processes; 1 for a process alone.
        code: what each has to end with, or None.
        how: ``stdin``, what the first one reads, or (``shared``) whichever reads first; ``kill``, [rank, work,
            number]: the rank that sends itself SIGKILL when it is about to begin that piece of work; ``interrupt``,
            [work, number]: at which piece Ctrl-C reaches each rank; ``pause``, seconds before each piece, so that every
            rank gets some; ``closed``: stdout's reader has gone; ``restart``: which start of a job this is, for all
            meet at one store, as torchrun has it; ``late``, [rank, seconds]; ``files``: the
            large arrays of mislabels are files.
    """
    port = agent()[1] if "restart" in how else free_port()
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as stdin:
        place = Path(name)
        (place / "work").touch()
        stdin.write(how.get("stdin", "").encode())
        stdin.seek(0)
        started = []
        for rank in range(ranks):
            with ExitStack() as stack:
                nothing = stack.enter_context(Path(os.devnull).open("rb"))
                streams = {
                    "stdin": stdin if rank == 0 or how.get("shared") else nothing,
                    "stdout": stack.enter_context((place / f"out.{rank}").open("wb")),
                    "stderr": stack.enter_context((place / f"err.{rank}").open("wb")),
                }
                if how.get("closed"):
                    reader, writer = os.pipe()
                    os.close(reader)
                    stack.callback(os.close, writer)
                    streams["stdout"] = writer
                started.append(
                    fork_server.Popen(
                        [sys.executable, "-m", "influence_cli", *map(str, words)],
                        cwd=folder if isinstance(folder, Path) else folder[rank],
                        env=variables(rank, ranks, port, how),
                        hook=("be_rank", str(place / "work"), rank, how),
                        **streams,
                    )
                )
        codes = wait(started)
        out, err = ([(place / f"{kind}.{rank}").read_text() for rank in range(ranks)] for kind in ("out", "err"))
        job = Job(codes, out, err, (place / "work").read_text().splitlines())
    assert "Traceback" not in "".join(job.err), "".join(job.err)
    if code is not None:
        assert job.codes == [code] * ranks, (job.codes, job.err)
        assert not any(job.out[1:]), job.out
    return job


def variables(rank: int, ranks: int, port: int, how: dict[str, Any]) -> dict[str, str]:
    """Give the environment of a process of a job."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    if ranks > 1:
        kept |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        kept |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    if "restart" in how:
        kept |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(how["restart"])}
    return kept


def wait(started: list[fork_server.Popen]) -> list[int | None]:
    """Wait until all have ended; those that wait for ever are killed, and have no code."""
    until = time.monotonic() + PATIENCE
    while any(one.poll() is None for one in started) and time.monotonic() < until:
        time.sleep(0.005)
    codes = [one.poll() for one in started]
    for one in started:
        one.kill()
        one.wait()
    return codes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@cache
def agent() -> tuple[fork_server.Popen, int]:
    """Start a process that has a store, to the end of the tests; give it and its port."""
    port = free_port()
    words = [sys.executable, "-c", AGENT, str(port)]
    return fork_server.Popen(words, stdin=subprocess.PIPE), port
