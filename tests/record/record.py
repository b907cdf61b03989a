"""Record what a fixed list of commands prints and writes, and compare two recordings.

    python tests/record/record.py run --code DIR --out build/record/old
    python tests/record/record.py compare build/record/old build/record/new

The list is commands.py; what is taken out before texts are compared is normalise.py. Every recording works at the same
path, on the same bytes: a project that is made once.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import GROUPS, Group
from compare import compare
from keep import changes, describe, stamps
from project import make_project

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
# Seconds after which a command has hung.
PATIENCE = 300


def main() -> int:
    """Run the subcommand that the words name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="record the list of commands")
    run.add_argument("--code", type=Path, default=CHECKOUT, help="the checkout whose package runs; default: this one")
    run.add_argument("--out", type=Path, required=True, help="the folder of the recording")
    run.add_argument("--project", type=Path, default=CHECKOUT / "build/record/project", help="made if it is not there")
    run.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "influence-record")
    run.add_argument("--slow", action="store_true", help="also the groups that take minutes")
    run.add_argument("--only", default="", metavar="GROUP,…", help=f"not all of {', '.join(g.name for g in GROUPS)}")
    both = commands.add_parser("compare", help="compare two recordings; exit code 1 if a command differs")
    both.add_argument("a", type=Path)
    both.add_argument("b", type=Path)
    both.add_argument("--only", default="", metavar="GROUP,…", help="compare these groups alone")
    options = parser.parse_args()
    if options.command == "compare":
        lines, count, differ = compare(options.a, options.b, options.only)
        print("\n".join([*lines, f"{count} commands, {differ} differ"]))
        return int(differ > 0)
    record(
        options.code.resolve(),
        options.out.resolve(),
        options.project.resolve(),
        options.work.resolve(),
        _chosen(options.only, slow=options.slow),
    )
    return 0


def record(code: Path, out: Path, project: Path, work: Path, groups: list[Group]) -> None:
    """Run the groups on fresh copies of the project and keep what they print and write."""
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    with (work.with_name(work.name + ".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two recordings at one path would record each other
        shutil.rmtree(work)
        work.mkdir()
        environment = _environment(code, work)
        with _warm(code, work, environment):
            if not project.is_dir():
                make_project(project, environment)
            # The code last: it may be this checkout.
            places = {sys.prefix: "<python>", str(CHECKOUT): "<checkout>", str(work): "<work>", str(code): "<code>"}
            count = 0
            for group in groups:
                # Group by group: a recording that is cut off has those that it finished.
                _note(out, places, group.name, finished=False)
                count += _run_group(group, out, project, work, environment)
                _note(out, places, group.name, finished=True)
        shutil.rmtree(work)
    print(f"recorded {count} commands of {code} in {out}, {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _note(out: Path, places: dict[str, str], name: str, *, finished: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recording.json"
    known = json.loads(path.read_text(encoding="utf-8"))["groups"] if path.exists() else []
    groups = [other for other in known if other != name] + [name] * finished
    path.write_text(json.dumps({"places": places, "groups": groups}) + "\n", encoding="utf-8")


def _chosen(only: str, *, slow: bool) -> list[Group]:
    wanted = set(only.split(",")) if only else {group.name for group in GROUPS if slow or not group.slow}
    if unknown := wanted - {group.name for group in GROUPS}:
        raise SystemExit(f"there is no group {', '.join(sorted(unknown))}")
    for group in reversed(GROUPS):
        if group.name in wanted and group.start:
            wanted.add(group.start)
    return [group for group in GROUPS if group.name in wanted]


def _environment(code: Path, work: Path) -> dict[str, str]:
    """Fix all that a command may ask its surroundings."""
    (work / "bin").mkdir()
    (work / "home").mkdir()
    python, socket = shlex.quote(sys.executable), shlex.quote(str(work / "socket"))
    client = shlex.quote(str(HERE / "client.py"))
    _script(work / "bin/influence", f'exec {python} -I -S {client} {socket} "$@"')
    _script(work / "bin/torchrun", f'exec {python} -m torch.distributed.run --standalone "$@"')
    _script(work / "bin/python", f'exec {python} "$@"')
    return {
        "PATH": f"{work / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(work / "home"),
        "RECORD": str(HERE),
        "PYTHONPATH": str(code),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "COLUMNS": "120",
        "LINES": "50",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # The allocator of pyarrow, which pandas imports, would start a thread before the forks.
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)


@contextmanager
def _warm(code: Path, work: Path, environment: dict[str, str]) -> Iterator[None]:
    """Keep a warm process that runs the code of a checkout."""
    words = [sys.executable, str(HERE / "warm.py"), str(work / "socket")]
    server = subprocess.Popen(
        words, cwd=work, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        found = server.stdout.readline().strip()
        if found != str(code):
            raise SystemExit(f"the package of {found or 'nowhere'} was imported, not that of {code}")
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _run_group(group: Group, out: Path, project: Path, work: Path, environment: dict[str, str]) -> int:
    folder, recorded = work / "project", out / "commands" / group.name
    shutil.rmtree(recorded, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    # Times of change are kept: a store knows the files by them.
    shutil.copytree(work / "kept" / group.start if group.start else project, folder, symlinks=True)
    before = stamps(folder)
    for number, command in enumerate(group.commands, 1):
        place = recorded / f"{number:03d}"
        place.mkdir(parents=True)
        started = time.perf_counter()
        ended = _run(command.line, command.terminal, folder, place, environment)
        (place / "code").write_text(f"{ended}\n", encoding="utf-8")
        after = stamps(folder)
        written, gone = changes(before, after)
        for name in written:
            kept = place / "files" / f"{name}.txt"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(describe(folder / name), encoding="utf-8", newline="")
        if gone:
            (place / "gone").write_text("\n".join(gone) + "\n", encoding="utf-8")
        before = after
        facts = {"group": group.name, "line": command.line, "terminal": command.terminal}
        (place / "command.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{time.perf_counter() - started:6.1f} s  exit {ended}  [{group.name}] {command.line}", file=sys.stderr)
    if any(other.start == group.name for other in GROUPS):
        shutil.copytree(folder, work / "kept" / group.name, symlinks=True)
    return len(group.commands)


def _run(line: str, terminal: bool, folder: Path, place: Path, environment: dict[str, str]) -> int:
    """Run a line of the shell; stdout may be a terminal, stderr is a file."""
    with (place / "stdout").open("wb") as stdout, (place / "stderr").open("wb") as stderr:
        ours, theirs = pty.openpty() if terminal else (None, None)
        reader = None
        if ours is not None:
            reader = threading.Thread(target=_drain, args=(ours, stdout))
            reader.start()
        process = subprocess.Popen(
            ["bash", "--norc", "-o", "pipefail", "-c", line],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout if theirs is None else theirs,
            stderr=stderr,
        )
        if theirs is not None:
            os.close(theirs)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"after {PATIENCE} s this has not ended: {line}") from None
        if reader is not None:
            reader.join()
    return code


def _drain(source: int, target: object) -> None:
    """Read a terminal until its last writer has gone, which Linux tells by an error."""
    while True:
        try:
            data = os.read(source, 1 << 16)
        except OSError:
            data = b""
        if not data:
            os.close(source)
            return
        target.write(data)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
