"""Kill commands by SIGKILL at moments that nobody chose, and compare what their reruns leave with what one pass leaves.

What is killed is a fork of fork_server.py, so that torch is loaded once.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from influence_cli.relabel.move_log import read_log
from influence_cli.store.store import Store
from tests.support import fork_server
from tests.support.crash_points import STORE, Moments, State

SEED = 2


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


def train_stage(state: State, whole: State) -> str:
    """Say how many states of the run are kept."""
    if "model.pt" in state:
        return "checkpoint written"
    kept, all_kept = (sum("state-" in name and name.endswith(".h5") for name in names) for names in (state, whole))
    return "before the first state" if not kept else "some states" if kept < all_kept else "all states"


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
    "train": Victim(("train", "-q"), ("model.pt*", "influence.run", "influence.run/**/*"), train_stage),
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


def begin(words: tuple[str, ...], work: Path) -> fork_server.Popen:
    """Begin a command here; every finished piece of its work is a byte of a file, whichever process has done it."""
    return fork_server.Popen(
        [sys.executable, "-m", "influence_cli", *words], stdout=subprocess.DEVNULL, hook=("be_victim", str(work))
    )


def end(child: fork_server.Popen) -> int:
    return child.wait()


def seen() -> list[int]:
    """Say when names in the folder, or the log of moves, have changed."""
    return [path.stat().st_mtime_ns for path in (Path(), Path("moves.log.csv")) if path.exists()]


def wait_for_change(before: list[int], seconds: float) -> None:
    until = time.perf_counter() + seconds
    while seen() == before and time.perf_counter() < until:
        time.sleep(0.0005)


def kill(name: str, kills: int, work: Path) -> str:
    """Kill a command so often, run it to its end again and again, and check each time what it leaves.

    Args:
        name: of the victim, whose project is the current folder.
        kills: how many.
        work: a file for the count of finished work.

    Returns:
        How many kills there were, and what they left.
    """
    victim, generator = VICTIMS[name], random.Random(SEED)
    moments = Moments(Path.cwd(), victim.patterns, lambda: 0)
    before = moments.read()

    def reset() -> None:
        moments.put(tuple(before.items()))
        work.write_bytes(b"")

    def left() -> State:
        return {name: content for name, content in moments.read().items() if name not in victim.ignored}

    reset()
    unchanged, started = seen(), time.perf_counter()
    child = begin(victim.words, work)
    wait_for_change(unchanged, 60)
    first = time.perf_counter() - started
    assert end(child) == 0
    spent = time.perf_counter() - started
    whole, total = left(), work.stat().st_size
    reset()
    count = passes = in_pass = most = 0
    stages: Counter[str] = Counter()
    while count < kills or in_pass:
        unchanged, started = seen(), time.perf_counter()
        child = begin(victim.words, work)
        if count < kills:
            if count % 4:  # once something is written; of every four one at any moment at all
                wait_for_change(unchanged, spent)
                time.sleep(generator.uniform(0, spent - min(first, spent / 2)))
            else:
                time.sleep(generator.uniform(0, spent))
            pause = time.perf_counter() - started
            child.kill()
        code = end(child)
        if code == -signal.SIGKILL:
            count, in_pass = count + 1, in_pass + 1
            stages[victim.stage(moments.read(), whole)] += 1
            if generator.random() < 0.75:
                continue  # what goes on is killed as well
            code = end(begin(victim.words, work))
        elif count < kills and not in_pass:
            spent = (spent + min(spent, pause)) / 2  # over by then: most kills are to find it at work
        assert code == 0 or (code == 2 and victim.once and in_pass), code
        assert left() == whole, sorted(name for name in {*left(), *whole} if left().get(name) != whole.get(name))
        # A kill costs one piece of work at most: one that was done and not yet on the disk.
        most = max(most, work.stat().st_size - total)
        assert work.stat().st_size <= total + in_pass, (work.stat().st_size, total, in_pass)
        passes, in_pass = passes + 1, 0
        reset()
    assert count == kills
    if name == "gradients":  # and of two processes at one time, one does it, or both after each other
        codes = sorted(map(end, [begin(victim.words, work), begin(victim.words, work)]))
        assert codes in ([0, 0], [0, 2]), codes
        assert left() == whole
    shown = ", ".join(f"{stage}: {number}" for stage, number in stages.most_common())
    return (
        f"{count} kills of {name} in {passes} passes of {total} pieces, at most {most} of them twice in one ({shown})"
    )
