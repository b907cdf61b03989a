"""Kill commands by SIGKILL at moments that nobody chose, and compare what their reruns leave with what one pass leaves.

Run by tests/system/test_kills.py, in a folder with a project for each command: ``-m tests.support.kill_forks KILLS
COMMAND...``. What is killed is a fork, so that torch is loaded once. It prints how many kills there were, and what
they left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

from influence_cli import metrics
from influence_cli.cli import app
from influence_cli.curvature import ekfac
from influence_cli.metrics import bootstrap_lds
from influence_cli.precompute import fill_store, fit_file
from influence_cli.relabel.move_log import read_log
from influence_cli.retrain import training
from influence_cli.runtime import disk
from influence_cli.store.store import Store
from tests.support.crash_points import STORE, Moments, State

SEED = 2
# Every finished piece of work is a byte of this file, beside the projects, whichever process has done it.
WORK = Path("work").absolute()


@dataclass(frozen=True)
class Victim:
    """A command that is killed.

    Attributes:
        words: of the command.
        patterns: of what it writes.
        stage: says how far it has come, of what is there and what one pass leaves; an error where it is damaged.
        ignored: what of it may differ from one pass.
        once: done again after its end it is refused, as what it was asked for is there already.
    """

    words: tuple[str, ...]
    patterns: tuple[str, ...]
    stage: Callable[[State, State], str]
    ignored: tuple[str, ...] = ()
    once: bool = False


def store_stage(state: State, _: State) -> str:
    """Say which blocks a store has; none may be damaged."""
    if "influence.h5" not in state:
        return fit_stage() if "influence.h5.fit" in state else "no store"
    with Store.open(Path("influence.h5")) as store:
        assert not len(store.damaged())
        done = int(store.done().sum())
    return "store without a block" if not done else "some blocks" if done < store.layout.blocks else "all blocks"


def fit_stage() -> str:
    with safe_open("influence.h5.fit", "pt") as file:
        return str(json.loads(file.metadata()["progress"])["stage"])


def verify_stage(state: State, _: State) -> str:
    """Say how many retrainings there are."""
    done = sum(name.endswith(".npz") for name in state)
    if "rows.csv" in state:
        return "rows written"
    if done:
        return "some retrainings" if done < 24 else "all retrainings"
    return "store" if "influence.h5" in state else "before the store"


def labels_stage(state: State, whole: State) -> str:
    """Say where the renames stand."""
    if any(name.endswith("changes.json") for name in state):
        return "between the renames"
    if any("influence-part" in name for name in state):
        return "files beside their places"
    return "all renamed" if state["labels.csv"] == whole["labels.csv"] else "before the files"


def moves_stage(_state: State, _whole: State) -> str:
    """Say what the log says."""
    batches = read_log(Path("moves.log.csv"))
    return batches[-1].state if batches else "before the first move"


BLOCKS = ("gradients", "-q", "-s", "gradients.block=1")
FIT = ("gradients", "-q", "-s", "gradients.block=2")
LDS = ("--lds", "--subsets", "12", "--repeats", "2", "--tests", "6")
VICTIMS = {
    "gradients": Victim(BLOCKS, STORE, store_stage),
    "fit": Victim((*FIT, "-s", "curvature.method=ekfac"), STORE, store_stage),
    "verify": Victim(
        ("verify", *LDS, "-q", "-o", "rows.csv", "-s", "gradients.block=24"),
        (*STORE, "influence.retrained", "influence.retrained/**/*", "rows.csv*"),
        verify_stage,
        ("rows.csv.run.json",),
    ),
    "labels": Victim(
        ("relabel", "decisions.csv", "-q", "--force", "-o", "rows.tsv"),
        ("labels.csv*", "exclude.csv*", "moves.csv*", ".*", "rows.tsv*"),
        labels_stage,
        ("rows.tsv", "rows.tsv.run.json", "rows.tsv.part", "rows.tsv.run.json.part"),
        once=True,
    ),
    "moves": Victim(
        ("relabel", "decisions.csv", "--apply-moves", "-q"),
        ("data", "data/**/*", "moves.log.csv"),
        moves_stage,
        ("moves.log.csv",),
        once=True,
    ),
    "undo": Victim(
        ("relabel", "--undo", "-q"),
        ("data", "data/**/*", "moves.log.csv"),
        moves_stage,
        ("moves.log.csv",),
        once=True,
    ),
}


def run(words: tuple[str, ...]) -> int:
    try:
        app(list(words))
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    return 9


def begin(words: tuple[str, ...]) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rows
        os._exit(run(words))
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_work(holder: object, *names: str) -> None:
    """Note in WORK whenever one of some functions has come to its end."""

    def wrap(name: str) -> None:
        own = getattr(holder, name)

        def call(*args: object, **how: object) -> object:
            result = own(*args, **how)
            with WORK.open("ab", buffering=0) as file:
                file.write(b".")
            return result

        setattr(holder, name, call)

    for name in names:
        wrap(name)


def seen() -> list[int]:
    """Say when names in the folder, or the log of moves, have changed."""
    return [path.stat().st_mtime_ns for path in (Path(), Path("moves.log.csv")) if path.exists()]


def wait_for_change(before: list[int], seconds: float) -> None:
    until = time.perf_counter() + seconds
    while seen() == before and time.perf_counter() < until:
        time.sleep(0.0005)


def kill(name: str, kills: int) -> None:
    """Kill a command so often, run it to its end again and again, and check each time what it leaves."""
    victim, generator = VICTIMS[name], random.Random(SEED)
    moments = Moments(Path.cwd(), victim.patterns, lambda: 0)
    before = moments.read()

    def reset() -> None:
        moments.put(tuple(before.items()))
        WORK.write_bytes(b"")

    def left() -> State:
        return {name: content for name, content in moments.read().items() if name not in victim.ignored}

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        assert run(victim.words) == 0  # here, so that every fork has loaded all that it needs
    gc.freeze()
    reset()
    unchanged, started = seen(), time.perf_counter()
    child = begin(victim.words)
    wait_for_change(unchanged, 60)
    first = time.perf_counter() - started
    assert end(child) == 0
    spent = time.perf_counter() - started
    whole, total = left(), WORK.stat().st_size
    reset()
    count = passes = in_pass = most = 0
    stages: Counter[str] = Counter()
    while count < kills or in_pass:
        unchanged, started = seen(), time.perf_counter()
        child = begin(victim.words)
        if count < kills:
            if count % 4:  # once something is written; of every four one at any moment at all
                wait_for_change(unchanged, spent)
                time.sleep(generator.uniform(0, spent - min(first, spent / 2)))
            else:
                time.sleep(generator.uniform(0, spent))
            pause = time.perf_counter() - started
            os.kill(child, signal.SIGKILL)
        code = end(child)
        if code == -signal.SIGKILL:
            count, in_pass = count + 1, in_pass + 1
            stages[victim.stage(moments.read(), whole)] += 1
            if generator.random() < 0.75:
                continue  # what goes on is killed as well
            code = end(begin(victim.words))
        elif count < kills and not in_pass:
            spent = (spent + min(spent, pause)) / 2  # over by then: most kills are to find it at work
        assert code == 0 or (code == 2 and victim.once and in_pass), code
        assert left() == whole, sorted(name for name in {*left(), *whole} if left().get(name) != whole.get(name))
        # A kill costs one piece of work at most: one that was done and not yet on the disk.
        most = max(most, WORK.stat().st_size - total)
        assert WORK.stat().st_size <= total + in_pass, (WORK.stat().st_size, total, in_pass)
        passes, in_pass = passes + 1, 0
        reset()
    assert count == kills
    if name == "gradients":  # and of two processes at one time, one does it, or both after each other
        codes = sorted(map(end, [begin(victim.words), begin(victim.words)]))
        assert codes in ([0, 0], [0, 2]), codes
        assert left() == whole
    shown = ", ".join(f"{stage}: {number}" for stage, number in stages.most_common())
    print(
        f"{count} kills of {name} in {passes} passes of {total} pieces, at most {most} of them twice in one ({shown})"
    )


def main() -> None:
    torch.set_num_threads(1)
    fit_file.SAVE_EVERY = -1.0
    training.time = SimpleNamespace(perf_counter=lambda: 0.0)  # a file of a retraining has its seconds
    metrics.bootstrap_lds = partial(bootstrap_lds, draws=10)
    count_work(fill_store, "block_rows")
    count_work(ekfac, "_add_covariances", "_add_eigenvalues", "_decompose_layer")
    count_work(training.Again, "outcomes")
    count_work(disk, "unlink")
    for name in sys.argv[2:]:
        with contextlib.chdir(name):
            kill(name, int(sys.argv[1]))


if __name__ == "__main__":
    main()
