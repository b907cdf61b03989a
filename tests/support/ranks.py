"""Run jobs of several processes as torchrun starts them, forked from one that has loaded torch already.

Run by tests/runtime/test_distributed.py: a line of JSON on stdin is a job, a line on stdout says how it ended.
Of a job:

- ``words``: of the command; ``folder``: where it runs, or one a rank; ``ranks``: how many, 1 for a process alone;
- ``stdin``: what the first one reads; ``shared``: whether all have the same stdin, so that each reads what is left;
- ``kill``: [rank, work, number]: the rank that sends itself SIGKILL when it is about to begin that piece of work;
- ``interrupt``: [work, number]: at which piece Ctrl-C reaches each rank;
- ``pause``: seconds before each piece, so that every rank gets some; ``closed``: stdout's reader has gone;
- ``restart``: which start of a job this is: all meet at one store, as torchrun has it; ``late``: [rank, seconds].

Its answer: ``codes``, ``out`` and ``err`` of each rank, and ``work``, the pieces that were finished.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.rendezvous  # what a job would load

from influence_cli import cli
from influence_cli.curvature import ekfac
from influence_cli.precompute import fill_store, fit_file
from influence_cli.retrain import training
from tests.support import small_project

# Longer than any job takes that does not wait for ever.
PATIENCE = 60
# Pieces of work: what is called, and its argument that says which one it is.
WORK = {
    "block": (fill_store, "block_rows", lambda words: int(words[5][0])),
    "covariances": (ekfac, "_add_covariances", lambda words: int(words[2].indices[0])),
    "eigenvalues": (ekfac, "_add_eigenvalues", lambda words: int(words[2].indices[0])),
    "training": (training.Again, "outcomes", lambda words: 0),
}


def watch(log: Path, rank: int, job: dict[str, Any]) -> None:
    """Note every piece of work that is done, and end this process at the one where it is to end."""

    def wrap(name: str) -> None:
        holder, function, which = WORK[name]
        own, begun = getattr(holder, function), 0

        def call(*words: Any, **how: Any) -> Any:
            nonlocal begun
            if job.get("kill") == [rank, name, begun]:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.get("interrupt") == [name, begun]:
                os.kill(os.getpid(), signal.SIGINT)
            begun += 1
            time.sleep(job.get("pause", 0))
            result = own(*words, **how)
            with log.open("a") as file:
                file.write(f"{name} {which(words)}\n")
            return result

        setattr(holder, function, call)

    for name in WORK:
        wrap(name)


def child(job: dict[str, Any], rank: int, port: int, place: Path, stdin: int) -> None:
    """Be one process of a job, to its end."""
    count = job["ranks"]
    if count > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    if "restart" in job:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(job["restart"])}
    if job.get("late", [None])[0] == rank:
        time.sleep(job["late"][1])
    os.dup2(stdin if rank == 0 or job.get("shared") else os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(place / f"out.{rank}", os.O_WRONLY | os.O_CREAT)
    if job.get("closed"):
        reader, out = os.pipe()
        os.close(reader)
    os.dup2(out, 1)
    os.dup2(os.open(place / f"err.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, open(number, "r" if not number else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    folder = job["folder"]
    os.chdir(folder if isinstance(folder, str) else folder[rank])
    watch(place / "work", rank, job)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["influence", *job["words"]]
    code = 9
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def wait(children: list[int]) -> list[int | None]:
    """Wait until all have ended; those that wait for ever are killed, and have no code."""
    codes: dict[int, int | None] = {}
    until = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for one in set(children) - set(codes):
            found, status = os.waitpid(one, os.WNOHANG)
            if found:
                codes[one] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(one, signal.SIGKILL)
                os.waitpid(one, 0)
                codes[one] = None
        time.sleep(0.005)
    return [codes[one] for one in children]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@cache
def agent() -> int:
    """Start a process that has a store, as torchrun's is: it outlives the jobs that meet there. Give its port."""
    port = free_port()
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        held = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        os.read(reader, 1)  # until the one that writes has gone
        os._exit(held.port != port)
    return port


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job, and say how each of its processes ended."""
    port = agent() if "restart" in job else free_port()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "work").touch()
        (place / "stdin").write_text(job.get("stdin", ""))
        stdin = os.open(place / "stdin", os.O_RDONLY)  # one place in it for all
        children = []
        for rank in range(job["ranks"]):
            process = os.fork()
            if process == 0:
                child(job, rank, port, place, stdin)
            children.append(process)
        os.close(stdin)
        codes = wait(children)
        out, err = ([(place / f"{kind}.{rank}").read_text() for rank in range(job["ranks"])] for kind in ("out", "err"))
        return {"codes": codes, "out": out, "err": err, "work": (place / "work").read_text().splitlines()}


def warm_up() -> None:
    """Run each command once, so that every fork has loaded what it needs."""
    with (
        tempfile.TemporaryDirectory() as name,
        open(os.devnull, "w") as nowhere,  # noqa: PTH123
        contextlib.chdir(name),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        small_project.with_training(small_project.make(Path(name)))
        for words in (["gradients"], ["rank", "1"], ["mislabels"], ["verify", "--loo", "1"], ["gradients", "--fsck"]):
            with contextlib.suppress(SystemExit):
                cli.app(words)


def main() -> None:
    torch.set_num_threads(1)
    fit_file.SAVE_EVERY = -1.0
    warm_up()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
