"""A long run in flat memory: gradients, rank and mislabels over many synthetic images, each command on a terminal.

    python bench/long_run.py --work build/long-run          (200,000 images; half an hour on two cores, 2 GB of disk)
    python bench/long_run.py --work build/long-run --images 20000,200000

For every command: seconds; the memory of its own that the process holds (resident and not a mapped file) when a
quarter, half, three quarters and all of the time has passed, and the peak; and the longest time in which the terminal
did not change. The images are made when they are read, and two in a hundred labels are wrong: the share found says that
the numbers are no nonsense.
"""

from __future__ import annotations

import argparse
import csv
import os
import pty
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from long_run_project import WRONG, Images, build
from torch import nn

CONFIG = """
model: {{factory: {project}:build, checkpoint: model.pt}}
l2: 1e-3
train: {{dataset: {project}:Images, args: {{count: {count}, seed: 1, wrong: {wrong}}}}}
test: {{dataset: {project}:Images, args: {{count: 2000, seed: 2}}}}
gradients: {{store: influence-{count}.h5, budget: {budget}}}
"""
COMMANDS = (
    ("gradients",),
    ("rank", "0:100", "--top", "10", "-o", "rank.csv"),
    ("mislabels", "--signal", "self-influence", "--all", "-o", "self.csv"),
    ("mislabels", "--all", "-o", "labels.csv"),
)
EVERY = 0.25


@dataclass(frozen=True)
class Watched:
    """What was seen of a command: its own memory by time, in bytes, and the longest silence of its terminal."""

    seconds: float
    memory: tuple[int, ...]
    silence: float


def train(path: Path) -> None:
    """Train the network for a moment, on other images than those that are looked at."""
    torch.manual_seed(0)
    model, data = build(), Images(20_000, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-3)
    loader = torch.utils.data.DataLoader(data, batch_size=256, shuffle=True)
    for _ in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.save(model.state_dict(), path)


def watch(words: tuple[str, ...], folder: Path) -> Watched:
    """Run a command on a terminal of its own."""
    started = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "influence_cli", *words])
    memory, last, silence, said = [], started, 0.0, b""
    while True:
        ready, _, _ = select.select([terminal], [], [], EVERY)
        now = time.monotonic()
        if ready:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            silence, last = max(silence, now - last), now
        if not memory or now - started > EVERY * len(memory):
            memory.append(own_memory(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    if code:
        sys.exit(f"influence {' '.join(words)} ended with {code}\n{said.decode(errors='replace')[-2000:]}")
    return Watched(time.monotonic() - started, tuple(memory), silence)


def own_memory(pid: int) -> int:
    """Read the resident memory of a process that is no file, in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def found(path: Path, data: Images) -> float:
    """Give the share of the wrong labels among as many first rows as there are."""
    wrong = set(np.flatnonzero(np.array(data.targets) != data.truth).tolist())
    with path.open(newline="") as file:
        first = [int(row["index"]) for row, _ in zip(csv.DictReader(file), range(len(wrong)), strict=False)]
    return len(wrong & set(first)) / len(wrong)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the project and its stores")
    parser.add_argument("--images", default="200000", help="training images, several with commas")
    parser.add_argument("--budget", default="1GB", help="of the store")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "model.pt").exists():
        train(given.work / "model.pt")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; memory in MB at 1/4, 1/2, 3/4 and the end; peak\n")
    print("| images | command | seconds | 1/4 | 1/2 | 3/4 | end | peak | longest silence, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count in map(int, given.images.split(",")):
        project = os.path.relpath(Path(__file__).with_name("long_run_project.py"), given.work)
        text = CONFIG.format(project=project, count=count, wrong=WRONG, budget=given.budget)
        (given.work / "influence.yaml").write_text(text)
        (given.work / f"influence-{count}.h5").unlink(missing_ok=True)
        for words in COMMANDS:
            seen = watch(words, given.work)
            at = [seen.memory[min(len(seen.memory) - 2, len(seen.memory) * part // 4)] for part in (1, 2, 3, 4)]
            row = " | ".join(f"{value / 1e6:.0f}" for value in (*at, max(seen.memory)))
            shown = " ".join(word for word in words if not word.endswith(".csv") and word != "-o")
            print(f"| {count:,} | {shown} | {seen.seconds:.0f} | {row} | {seen.silence:.1f} |", flush=True)
        data = Images(count, 1, WRONG)
        shares = [found(given.work / name, data) for name in ("self.csv", "labels.csv")]
        print(
            f"\nof the wrong labels among as many first rows: self-influence {shares[0]:.3f}, default {shares[1]:.3f}\n"
        )


if __name__ == "__main__":
    main()
