"""Plant each fault in a copy of the checkout, run the tests that have to notice, and say which faults live on.

    python tests/faults/run.py                      all of them: some minutes on two cores
    python tests/faults/run.py --only influence-sign
    python tests/faults/run.py --code ../other      the faults of this checkout in the package and suite of another

Each test that has noticed a fault then runs without it: one that fails by itself notices nothing. Exit code 1 where a
fault lives on, does not apply, or was noticed by such a test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fault import DoesNotApplyError, Fault, nodes_of, place_of, planted

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("influence_cli", "tests")
# What a copy goes without: results of work, and folders that hold other copies.
LEFT_OUT = ("build", "__pycache__", ".git", ".venv")
KILLED, SURVIVED, NOT_APPLIED, BROKEN, USELESS = (
    "killed",
    "SURVIVED",
    "DOES NOT APPLY",
    "BREAKS",
    "TESTS FAIL WITHOUT IT",
)
# Of a test with a fault: one that makes a loop endless is noticed by that.
SECONDS = 120
# Of all tests of a fault: nothing interrupts a wait inside a library.
LONGEST = 900
# The first word of a run of tests, which is this file too: it writes down how each test ended.
TESTS = "--run-tests"


@dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    Attributes:
        fault: which.
        word: ``killed``, or what is wrong.
        seconds: that its tests took.
        test: what noticed it, as pytest names it.
        detail: more about what is wrong.
    """

    fault: Fault
    word: str
    seconds: float = 0.0
    test: str = ""
    detail: str = ""


class Recorder:
    """A plugin of pytest that writes down which tests passed and which did not, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended: dict[str, list[str]] = {"passed": [], "failed": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take one phase of a test."""
        if report.failed or (report.passed and report.when == "call"):
            self._ended["failed" if report.failed else "passed"].append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write all of it."""
        self._path.write_text(json.dumps(self._ended))


@dataclass
class Tree:
    """A copy of the checkout, and the run of tests that it is in."""

    path: Path
    fault: Fault | None = None
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Name the file that takes what the tests print."""
        return self.path.with_name(self.path.name + ".log")

    def ended(self, kind: str) -> list[str]:
        """Give the tests of the last run that ``passed`` or ``failed``."""
        path = self.log.with_suffix(".json")
        return list(json.loads(path.read_text())[kind]) if path.exists() else []

    def start(self, words: Sequence[str]) -> int:
        """Run pytest on this copy's package, in a process of its own, and give its number."""
        self.started, ended = time.perf_counter(), self.log.with_suffix(".json")
        ended.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={self.path}", f"--timeout={SECONDS}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, TESTS, str(ended), *options, *words],
                cwd=self.path,
                # Before the package that is installed; one thread: those of several copies would share the cores.
                env=os.environ | {"PYTHONPATH": str(self.path), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self.process.pid

    def plant(self, fault: Fault, code: Path) -> None:
        """Put a fault into this copy."""
        self.fault = fault
        path = place_of(fault, code)
        _write(self.path / path.relative_to(code), planted(fault, path.read_text(encoding="utf-8")))

    def mend(self, code: Path) -> None:
        """Take it out again."""
        if self.fault is not None:
            path = place_of(self.fault, code)
            _write(self.path / path.relative_to(code), path.read_text(encoding="utf-8"))
            self.fault = None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # A compiled file is known by size and whole seconds: of two versions within one it would be the wrong one.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def copy_of(code: Path, tree: Path) -> Tree:
    """Make a copy of a checkout: the package and the tests are copied, what else lies beside them is linked."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for path in code.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        elif path.name not in LEFT_OUT:
            (tree / path.name).symlink_to(path)
    return Tree(tree)


def wait_for(running: dict[int, Tree]) -> tuple[Tree, int]:
    """Wait until one of the runs ends: its copy, and the exit code of pytest; one that hangs is ended."""
    while True:
        for number, tree in running.items():
            if tree.process is not None and (code := tree.process.poll()) is not None:
                return running.pop(number), code
            if tree.process is not None and time.perf_counter() - tree.started > LONGEST:
                tree.process.kill()
        time.sleep(0.05)


def passing(trees: Sequence[Tree], tests: Sequence[str]) -> set[str]:
    """Run tests without a fault, those of a file in one copy, and give the ones that pass."""
    files: dict[str, list[str]] = {}
    for test in dict.fromkeys(tests):
        files.setdefault(test.partition("::")[0], []).append(test)
    running = {}
    for at, tree in enumerate(trees):
        if share := [test for some in list(files.values())[at :: len(trees)] for test in some]:
            running[tree.start(share)] = tree
    passed = set[str]()
    while running:
        passed |= set(wait_for(running)[0].ended("passed"))
    return passed


def judge(
    faults: Sequence[Fault], code: Path, work: Path, jobs: int, tell: Callable[[str], None] = print
) -> list[Verdict]:
    """Give the verdict on each fault, in order; each is told as it is there.

    Args:
        faults: to be planted.
        code: the checkout whose package takes them and whose tests have to notice.
        work: folder of the copies, one a job.
        jobs: how many are tried at one time.
        tell: takes a line.
    """
    trees = [copy_of(code, work / str(number)) for number in range(jobs)]
    verdicts: dict[str, Verdict] = {}
    nodes: dict[str, tuple[str, ...]] = {}
    for fault in faults:
        try:
            place_of(fault, code)
            nodes[fault.name] = nodes_of(fault, code)
        except DoesNotApplyError as error:
            verdicts[fault.name] = Verdict(fault, NOT_APPLIED, detail=str(error))
    left = [fault for fault in faults if fault.name not in verdicts]
    running: dict[int, Tree] = {}
    while left or running:
        while left and trees:
            tree, fault = trees.pop(), left.pop(0)
            tree.plant(fault, code)
            running[tree.start(["-x", *nodes[fault.name]])] = tree
        tree, exit_code = wait_for(running)
        verdict = _verdict(tree, exit_code)
        verdicts[verdict.fault.name] = verdict
        tell(f"{verdict.word:<10} {verdict.seconds:6.1f} s  {verdict.fault.name}")
        tree.mend(code)
        trees.append(tree)
    killed = [verdict for verdict in verdicts.values() if verdict.word == KILLED]
    started = time.perf_counter()
    passed = passing(trees, [verdict.test for verdict in killed])
    tell(f"the tests that noticed, without a fault: {time.perf_counter() - started:.0f} s")
    for verdict in killed:
        if verdict.test not in passed:
            verdicts[verdict.fault.name] = replace(verdict, word=USELESS, detail=verdict.test)
    return [verdicts[fault.name] for fault in faults]


def _verdict(tree: Tree, exit_code: int) -> Verdict:
    if tree.fault is None:
        raise ValueError("nothing was planted")
    # 1: tests failed. Anything else but 0 is no verdict: the copy cannot even be imported, or no test was found.
    test = next(iter(tree.ended("failed")), "")
    word = SURVIVED if exit_code == 0 else KILLED if exit_code == 1 and test else BROKEN
    detail = "" if word == KILLED else tree.log.read_text(errors="replace")[-1500:]
    return Verdict(tree.fault, word, time.perf_counter() - tree.started, test, detail)


def table(verdicts: Sequence[Verdict]) -> str:
    """Lay the verdicts out, with what is wrong below."""
    width = max((len(verdict.fault.name) for verdict in verdicts), default=0)
    lines = [f"{'fault':<{width}}  {'verdict':<22} seconds  noticed by"]
    lines += [
        f"{one.fault.name:<{width}}  {one.word:<22} {one.seconds:7.1f}  {one.test.rpartition('/')[2]}".rstrip()
        for one in verdicts
    ]
    killed = sum(one.word == KILLED for one in verdicts)
    lines += ["", f"{len(verdicts)} faults, {killed} killed"]
    for one in verdicts:
        if one.word != KILLED:
            lines += ["", f"{one.fault.name}: {one.word}: {one.fault.why}", one.detail.rstrip()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=(), help="these faults alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults tried at one time")
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout to plant them in")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "faults", help="folder of the copies")
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    given = parser.parse_args(words)
    from faults import FAULTS

    unknown = set(given.only) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not given.only or fault.name in given.only]

    def tell(line: str) -> None:
        print(line, flush=True)

    verdicts = judge(chosen, given.code.resolve(), given.work.resolve(), given.jobs, tell)
    text = table(verdicts)
    tell(text)
    if given.table is not None:
        given.table.write_text(text + "\n", encoding="utf-8")
    return int(any(one.word != KILLED for one in verdicts))


def run_tests(words: Sequence[str]) -> int:
    """Run pytest, and write how each test ended to the file that comes first."""
    # A shell lets what it starts in the background ignore Ctrl-C, which tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return int(pytest.main(list(words[1:]), plugins=[Recorder(Path(words[0]))]))


if __name__ == "__main__":
    raise SystemExit(run_tests(sys.argv[2:]) if sys.argv[1:2] == [TESTS] else main())
