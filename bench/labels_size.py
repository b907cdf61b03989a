"""What size costs `influence mislabels`: memory and time by images, alone and as a job of two processes.

    python bench/labels_size.py --work build/labels-size [--before CHECKOUT]
        (about an hour on two cores, 6 GB of memory and 10 GB of disk; --sizes 25000 for less)

The images of bench/labels_size_project.py have 1,000 classes. Each run is the whole command, `influence mislabels
--top 10`, of processes with a thread each; memory is the largest that a process has held (its resident set, with what
it has mapped of files). A line through the sizes whose large arrays are files gives the constant and the bytes per
image, and what 1,300,000 images would take. `--before CHECKOUT` runs another version of this package on 100,000 images
as well, in the same minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

CODE = Path(__file__).resolve().parent.parent
CONFIG = """model: {{factory: ./project.py:build, args: {{classes: {classes}}}, checkpoint: model.pt}}
train: {{dataset: ./project.py:train, args: {{n: {n}, classes: {classes}}}}}
"""
CLASSES, ASKED, COMPARED = 1_000, 1_300_000, 100_000


@dataclass(frozen=True)
class Run:
    """What one command took.

    Attributes:
        n: images.
        seconds: of the clock.
        memory: bytes of each process at its peak.
        told: what it said on stderr.
        order: positions of the first rows.
    """

    n: int
    seconds: float
    memory: tuple[int, ...]
    told: str
    order: tuple[int, ...]

    @property
    def files(self) -> str:
        """Give the disk that was announced, empty where everything was in memory."""
        size = re.search(r"and ([\d.]+ [kMGT]?B) of disk", self.told)
        return size[1] if size else ""

    @property
    def announced(self) -> str:
        """Give the memory that was announced."""
        size = re.search(r"about ([\d.]+ [kMGT]?B) of memory", self.told)
        return size[1] if size else ""

    @property
    def recall(self) -> str:
        """Give the share of the neighbours that was found, empty where all were compared."""
        share = re.search(r"neighbours by faiss: ([\d.]+%)", self.told)
        return share[1] if share else "all compared"


def make(work: Path, n: int, classes: int) -> Path:
    """Write the project of n images."""
    folder = work / f"images-{n}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("labels_size_project.py"), folder / "project.py")
    (folder / "influence.yaml").write_text(CONFIG.format(n=n, classes=classes))
    if not (folder / "model.pt").exists():
        sys.path.insert(0, str(folder))
        from project import build

        torch.save(build(classes).state_dict(), folder / "model.pt")
    return folder


def run(folder: Path, n: int, processes: int, code: Path = CODE) -> Run:
    """Run the command, alone or as a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job |= {"LOCAL_WORLD_SIZE": str(processes)}
    words = [sys.executable, "-m", "influence_cli", "mislabels", "--top", "10", "--format", "jsonl", "-v"]
    started, streams = time.perf_counter(), []
    running = []
    for rank in range(processes):
        more = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", **more}
        streams.append([(folder / f"{kind}.{rank}").open("w+") for kind in ("out", "err")])
        running.append(
            subprocess.Popen(words, cwd=folder, env=environment, stdout=streams[-1][0], stderr=streams[-1][1])
        )
    ended = [os.wait4(one.pid, 0) for one in running]
    seconds = time.perf_counter() - started
    for files in streams:
        for file in files:
            file.seek(0)
    out, err = (streams[0][at].read() for at in (0, 1))
    if any(status for _, status, _ in ended):
        raise SystemExit(err)
    rows = [json.loads(line) for line in out.splitlines()]
    memory = tuple(usage.ru_maxrss * 1024 for _, _, usage in ended)
    return Run(n, seconds, memory, err, tuple(row["index"] for row in rows))


def row(name: str, one: Run, processes: int) -> str:
    """Write a row of the table."""
    memory = " and ".join(f"{size / 1e9:.2f}" for size in one.memory)
    return (
        f"| {name} | {processes} | {one.n:,} | {memory} GB | {one.announced} | {one.files or 'none'} | "
        f"{one.seconds:.0f} s | {1e3 * one.seconds / one.n:.2f} ms | {one.recall} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", default="50000,100000,200000,300000,400000")
    parser.add_argument("--job", type=int, default=200_000, help="images of the job of two processes")
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--before", type=Path)
    asked = parser.parse_args()
    sizes = [int(size) for size in asked.sizes.split(",")]
    print(f"{asked.classes:,} classes; {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| | processes | images | memory at the peak | announced | files | time | per image | neighbours found |")
    print("|---|---|---|---|---|---|---|---|---|")
    runs = {}
    for n in sizes:
        folder = make(asked.work, n, asked.classes)
        if asked.before and n == COMPARED:
            print(row("before", run(folder, n, 1, asked.before.absolute()), 1), flush=True)
        runs[n] = run(folder, n, 1)
        print(row("now", runs[n], 1), flush=True)
        if n == asked.job:
            both = run(folder, n, 2)
            print(row("now", both, 2), flush=True)
            same = "the same" if both.order == runs[n].order else "not the same"
            print(f"\nThe first ten rows of one process and of two: {same}.\n", file=sys.stderr)
    lean = [one for one in runs.values() if one.files]
    if len(lean) > 1:
        images, memory = np.array([one.n for one in lean]), np.array([one.memory[0] for one in lean])
        slope, constant = np.polyfit(images, memory, 1)
        rest = np.abs(memory - constant - slope * images).max()
        print(
            f"\nMemory by images, where the large arrays are files ({len(lean)} sizes): {constant / 1e9:.2f} GB + "
            f"{slope / 1e3:.2f} kB per image, to {rest / 1e9:.2f} GB. Extrapolated to {ASKED:,} images: "
            f"{(constant + slope * ASKED) / 1e9:.1f} GB."
        )


if __name__ == "__main__":
    main()
