"""A process that has loaded torch and the package, and becomes what a test starts: a fork takes 20 ms, not 3 seconds.

``Popen`` and ``run`` take what those of ``subprocess`` take, where the command is ``[sys.executable, "-m", ...]`` or
``[sys.executable, "-c", code, ...]``. Pipes, terminals, signals and exit codes are those of a process of its own, which
ends as Python ends. What Python does at its start is not seen this way: that a module is *not* loaded, a file in the
folder that hides a module. Tests of these take ``subprocess``. There is a server for each locale that is asked for.

The other side of a socket, ``python fork_server.py FOLDER``, starts no thread and runs no command itself. Its forks
know nothing of each other, and no module of a user is loaded in them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
# Of what Python reads at its start alone.
AT_START = ("PYTHONUTF8", "PYTHONIOENCODING", "PYTHONCOERCECLOCALE", "LC_ALL", "LC_CTYPE", "LANG")
# Modules that are not imported beforehand: what starts, and a file that is copied into a project.
LEFT_OUT = ("__main__", "project_model")
# What the command of a word imports when it runs, seconds of it: imported before the first fork that has the word.
LATE = {"mislabels": ("cleanlab.count", "pandas"), "--plot": ("matplotlib.figure",)}
# What the installed script does.
INSTALLED = """
import sys

sys.path.pop(0)
from influence_cli.__main__ import main

sys.argv[0] = "influence"
sys.exit(main())
"""
# What a shell finds as `influence`: a Python of 20 ms that gives its streams away, and ends as the fork ends.
SCRIPT = """#!{python} -IS
import json, os, signal, socket, sys

streams = []
for number in range(3):
    try:
        os.fstat(number)
    except OSError:
        continue
    streams.append(number)
line = socket.socket(socket.AF_UNIX)
line.connect({socket!r})
request = {{"words": ["-c", {code!r}, *sys.argv[1:]], "cwd": os.getcwd(), "environment": dict(os.environ)}}
request |= {{"open": streams, "session": False, "hook": []}}
socket.send_fds(line, [json.dumps(request).encode() + b"\\n"], streams)
line.recv(64)
for number in streams:
    os.close(number)
code = os.waitstatus_to_exitcode(int(line.recv(64)))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


# --- the test's side


class Popen(subprocess.Popen[Any]):
    """A process that is forked by the server.

    Args:
        words: begins with ``[sys.executable, "-m", module]`` or ``[sys.executable, "-c", code]``.
        hook: name of a function of fork_hooks.py that the fork calls before anything else, and its arguments.
        how: as for ``subprocess.Popen``; ``preexec_fn``, ``executable`` and ``pass_fds`` are not known here.
    """

    def __init__(self, words: list[str], *, hook: tuple[object, ...] = (), **how: Any) -> None:
        self.hook = hook
        self.line = socket.socket(socket.AF_UNIX)
        super().__init__(words, **how)

    def __del__(self, *_: Any) -> None:
        """Close the line: the server kills what still runs."""
        self.line.close()

    # subprocess calls these to start a process and to ask how it has ended; all else of it is used as it is.

    def _execute_child(
        self, words: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
        errread: int, errwrite: int, restore_signals: Any, gid: Any, gids: Any, uid: Any, umask: Any,
        start_new_session: bool, *others: Any,
    ) -> None:  # fmt: skip
        assert words[0] == sys.executable, words
        assert words[1] in ("-m", "-c"), words
        assert not any((executable, preexec_fn, pass_fds, shell)), "not for a fork"
        environment = dict(os.environ if env is None else env)
        request = {
            "words": list(map(str, words[1:])),
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
            "open": [0, 1, 2],
            "session": start_new_session,
            "hook": self.hook,
        }
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        try:
            self.line.connect(str(server_for(environment) / "socket"))
            socket.send_fds(self.line, [json.dumps(request).encode() + b"\n"], streams)
            self.pid = int(self.line.recv(64))
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if flags == os.WNOHANG and not select.select([self.line], [], [], 0)[0]:
            return 0, 0
        status = self.line.recv(64)
        assert status, "the fork server has ended"
        self.line.close()
        return self.pid, int(status)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            with contextlib.ExitStack() as stack:
                stack.callback(self._waitpid_lock.release)  # type: ignore[attr-defined]
                pid, status = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(
    words: list[str], *, input: Any = None, capture_output: bool = False, timeout: float | None = None,
    check: bool = False, **how: Any,
) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """Run a command in a fork to its end, as ``subprocess.run`` does in a process of its own."""
    if input is not None:
        how["stdin"] = subprocess.PIPE
    if capture_output:
        how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(words, **how) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(words, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def path(environment: Mapping[str, str]) -> dict[str, str]:
    """Give the environment for a shell in which `influence` is a fork."""
    return {**environment, "PATH": f"{server_for(environment)}:{environment['PATH']}"}


def server_for(environment: Mapping[str, str]) -> Path:
    """Give the folder of the server whose Python was started in the locale of an environment."""
    return start(tuple(environment.get(name) for name in AT_START))


@cache
def start(locale: tuple[str | None, ...]) -> Path:
    """Start a server, once for the process that runs the tests; give the folder of its socket and its script."""
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    left_out = ("INFLUENCE_", *AT_START)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    environment |= {name: value for name, value in zip(AT_START, locale, strict=True) if value is not None}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", str(folder)],
        cwd=folder,
        stdin=subprocess.PIPE,  # closes when this process ends, however it does: so does the server
        stdout=subprocess.PIPE,
        # The last: pyarrow, which pandas imports, starts a thread else.
        env=environment
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "JE_ARROW_MALLOC_CONF": "background_thread:false"},
        start_new_session=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def stop() -> None:
        with server:
            server.stdin.close()
        shutil.rmtree(folder)

    atexit.register(stop)
    assert server.stdout.readline() == b"ready\n", "the fork server did not start"
    return folder


# --- the server's side


def main(folder: Path) -> NoReturn:
    """Load what commands load, answer requests until stdin closes, and become the command in each fork."""
    load()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        script = folder / "influence"
        script.write_text(SCRIPT.format(python=sys.executable, socket=str(folder / "socket"), code=INSTALLED))
        script.chmod(0o755)
        os.write(1, b"ready\n")
        request, streams = answer(listener)
    become(request, streams)


def load() -> None:
    """Import the package and what it imports in functions, but for what would start a thread."""
    import torch
    import torch.distributed.rendezvous  # what a job of several processes loads
    import torchvision.transforms.v2  # noqa: F401

    import influence_cli
    from tests.support import fork_hooks  # noqa: F401

    for module in pkgutil.walk_packages(influence_cli.__path__, "influence_cli."):
        if not module.name.endswith(LEFT_OUT):
            importlib.import_module(module.name)
    torch.set_num_threads(1)
    keep_parser_and_speed()
    check_alone()


def load_late(words: list[str]) -> None:
    """Import what the command of these words would import in each of its forks."""
    for word in [word for word in LATE if any(word in other for other in words)]:
        for module in LATE.pop(word):
            importlib.import_module(module)
        check_alone()


def check_alone() -> None:
    """Check that this process has one thread, and keep the garbage collector from touching what forks share."""
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a fork would lack the other threads"
    gc.collect()
    gc.freeze()


def keep_parser_and_speed() -> None:
    """Build the parser of the command line once, and measure the speed of this machine once, not for every command.

    The one takes a tenth of a second, the other a third for every store.
    """
    import torch
    import typer.main

    from influence_cli.cli import app
    from influence_cli.precompute import cost

    typer.main.get_command = cache(typer.main.get_command)
    typer.main.get_command(app)
    cost.operations_a_second(torch.device("cpu"))


def answer(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request, and say how the fork has ended; return in the forks alone.

    A fork whose line is closed from the other side is killed.
    """
    ended, ending = os.pipe()
    for number in (ended, ending):
        os.set_blocking(number, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # else one that comes just after the fork is lost
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ending)
    lines: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for source in (0, ended, listener):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:  # the tests are over
                for pid in lines:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj == ended:
                with contextlib.suppress(BlockingIOError):
                    os.read(ended, 1 << 16)
                for pid in list(lines):
                    if (found := os.waitpid(pid, os.WNOHANG))[0]:
                        with contextlib.suppress(OSError):
                            lines[pid].send(str(found[1]).encode())
                        selector.unregister(lines[pid])
                        lines.pop(pid).close()
            elif key.fileobj is listener:
                line = listener.accept()[0]
                request, streams = receive(line)
                load_late(request["words"])
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for own in (ended, ending):
                        os.close(own)
                    for other in (line, *lines.values()):
                        other.close()
                    return request, streams
                for number in streams:
                    os.close(number)
                lines[pid] = line
                selector.register(line, selectors.EVENT_READ, pid)
                with contextlib.suppress(OSError):
                    line.send(str(pid).encode())
            elif key.data in lines:
                os.kill(key.data, signal.SIGKILL)
                selector.modify(key.fileobj, 0)


def receive(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request and its streams."""
    content, streams, _, _ = socket.recv_fds(line, 1 << 16, 3)
    while content and not content.endswith(b"\n"):
        content += line.recv(1 << 16)
    return json.loads(content), streams


def become(request: Mapping[str, Any], streams: list[int]) -> NoReturn:
    """Be the process that was asked for."""
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    take_streams(dict(zip(request["open"], streams, strict=True)))
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if request["hook"]:
            name, *words = request["hook"]
            getattr(sys.modules["tests.support.fork_hooks"], name)(*words)
        execute(*request["words"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    end(code)


def execute(kind: str, what: str, *words: str) -> None:
    """Run a module, or code, as Python does."""
    if kind == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = [what, *words]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = ""
        sys.argv = ["-c", *words]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))


def end(code: int) -> NoReturn:
    """Do what Python does at its end, but for taking every module apart: of torch's that takes most of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(2, f"Exception ignored in: {stream!r}\n{traceback.format_exc()}".encode())
            code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def take_streams(given: Mapping[int, int]) -> None:
    """Put the streams that were given in the place of this process's own, and close those that were not."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        own = getattr(sys, f"__{name}__")
        stream = None
        if number in given:
            os.dup2(given[number], number)
            raw = io.FileIO(number, mode, closefd=False)
            raw.name = f"<{name}>"  # which errors call it by
            through = mode == "w" and bool(os.environ.get("PYTHONUNBUFFERED"))
            buffer = raw if through else io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
            lines = not through and (name == "stderr" or os.isatty(number))
            stream = io.TextIOWrapper(buffer, own.encoding, own.errors, line_buffering=lines, write_through=through)
            stream.mode = mode
        else:
            os.close(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for number in given.values():
        os.close(number)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
