"""Serve the command line from one warm process: torch is imported once, and every command is a fork of it.

A client (client.py) sends its words, its environment, its folder and its three standard streams through a Unix socket,
and receives the exit code. No thread runs here, so a fork is safe. Only ``influence_cli.__main__.main`` is called by
name: the modules of the package may move.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# Imported before the first fork where they are installed, so that no command pays for them; not what few commands
# need, for a fork takes longer, the more memory there is.
SLOW_IMPORTS = (
    "torch",
    "torchvision.transforms.v2",
    "torchvision.datasets",
    "torch.func",
    "torch.utils.data",
    "typer",
    "rich.progress",
    "rich.table",
    "pydantic",
    "yaml",
    "jinja2",
    "h5py",
    "PIL.Image",
    "safetensors.torch",
    "xxhash",
    "cleanlab",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "matplotlib.backends.backend_agg",
)


def main() -> None:
    """Import everything, listen at the socket of the first argument, and say on stdout that it is ready."""
    # The folder of this script: its modules are not those of a user.
    sys.path.pop(0)
    # How data is read, and what is said of it, is planned by the cores and a measurement: one core needs none. Really
    # being tied to a core would make a busy machine slower.
    os.sched_getaffinity = lambda _: {0}
    _import_all()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    # Else every child copies all of this memory at its first collection.
    gc.collect()
    gc.freeze()
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise SystemExit("a thread runs before the first fork")
    import influence_cli

    print(Path(influence_cli.__file__).parents[1], flush=True)
    _serve(listener)


def _serve(listener: socket.socket) -> None:
    """Fork a child for every connection, and send its exit code when it has ended."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([listener, *running], [], [])
        for ended in ready:
            if ended is listener:
                connection, _ = listener.accept()
                child = os.fork()
                if child == 0:
                    _answer(
                        connection, [listener.fileno(), *running, *(other.fileno() for _, other in running.values())]
                    )
                running[os.pidfd_open(child)] = (child, connection)
            else:
                child, connection = running.pop(ended)
                os.close(ended)
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(OSError):
                    connection.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
                connection.close()


def _import_all() -> None:
    for name in SLOW_IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed", file=sys.stderr)
    import torch

    torch.set_num_threads(1)
    package = importlib.import_module("influence_cli")
    for module in pkgutil.walk_packages(package.__path__, "influence_cli."):
        # A module that cannot be imported is for the command that needs it to report.
        try:
            importlib.import_module(module.name)
        except Exception:
            print(f"{module.name} cannot be imported:\n{traceback.format_exc()}", file=sys.stderr)


def _answer(connection: socket.socket, others: list[int]) -> None:
    """Read what the client wants and become it; this never returns."""
    for other in others:
        os.close(other)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(head, "big")
    body = b""
    while len(body) < size:
        part = connection.recv(1 << 16)
        if not part:
            os._exit(1)
        body += part
    # The server has it too, and sends the code.
    connection.close()
    _run(json.loads(body), streams)


def _run(request: dict[str, Any], streams: list[int]) -> None:
    """Become the process that the client stands for."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["influence", *request["words"]]
    # As Python opens them itself: a pipe has no line buffering, a terminal has.
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1 if os.isatty(1) else -1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os._exit(_exit_code())


def _exit_code() -> int:
    """Call the command line, and end as Python does."""
    import atexit

    try:
        from influence_cli.__main__ import main as run

        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    main()
