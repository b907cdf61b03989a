"""How cost grows with examples and processes: measured here, beside what docs/scaling.md predicts from one small run.

    python bench/scaling.py --work build/scaling            (20 minutes on two cores, 3 GB of disk)
    python bench/scaling.py --work build/scaling --part scan

Part `commands`: a real store end to end, the demo's CNN with EK-FAC on images of Fashion-MNIST, by 1, 2 and 4 processes
of one thread each. Whole commands, starting included, and the time that the command itself says the gradients took.
Efficiency is t(1) / (N · t(N)); on a machine of fewer cores than processes it is bounded by cores / N.
Part `scan`: influence of 10 tests on 10⁴ to 10⁶ rows of 1,024 float16 coordinates in shards, by 1, 2 and 4 processes;
the memory of its own that a scanning process gains; and the largest beside the same product from memory.
Predicted is what the two smallest runs of one process make of the others: fixed + each · size / N.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from influence_cli.influence.scores import influence
from influence_cli.store.layout import Layout
from influence_cli.store.scan import in_order
from influence_cli.store.shards import create_sharded
from influence_cli.store.store import Rows, Store

DATA = Path(__file__).parents[2] / "shared" / "data" / "fashion-mnist" / "FashionMNIST" / "raw"
CONFIG = """
model: {factory: ./model.py:build, checkpoint: model.pt}
l2: 1e-4
train: {dataset: ./images.py:Images, args: {file: images.npz}}
test: {dataset: ./images.py:Images, args: {file: tests.npz}}
curvature: {method: ekfac}
"""
IMAGES = """
import numpy as np
import torch


class Images:
    def __init__(self, file):
        held = np.load(file)
        self.inputs, self.targets = held["inputs"], held["targets"]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.from_numpy(self.inputs[index].astype(np.float32) / 255)[None], int(self.targets[index])
"""
COMMANDS = {
    "gradients": ("gradients",),
    "rank, 100 tests": ("rank", "0:100", "-o", "rank.csv"),
    "self-influence": ("mislabels", "--signal", "self-influence", "-o", "self.csv"),
}
K, TESTS, BLOCK = 1_024, 10, 256


def read_idx(path: Path) -> np.ndarray:
    """Read one of the data set's gzipped files."""
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def make_project(folder: Path, count: int) -> None:
    """Write the project: images, the demo's network, trained for a moment."""
    folder.mkdir(parents=True)
    from influence_cli.demo.project_model import build

    inputs, targets = read_idx(DATA / "train-images-idx3-ubyte.gz"), read_idx(DATA / "train-labels-idx1-ubyte.gz")
    np.savez(folder / "images.npz", inputs=inputs[:count], targets=targets[:count])
    tests = read_idx(DATA / "t10k-images-idx3-ubyte.gz"), read_idx(DATA / "t10k-labels-idx1-ubyte.gz")
    np.savez(folder / "tests.npz", inputs=tests[0], targets=tests[1])
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(0, 10_000, 128):
        x = torch.tensor(inputs[step : step + 128], dtype=torch.float32)[:, None] / 255
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor(targets[step : step + 128]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
    shutil.copy(Path(sys.modules[build.__module__].__file__ or ""), folder / "model.py")
    (folder / "images.py").write_text(IMAGES)
    (folder / "influence.yaml").write_text(CONFIG)


def run(folder: Path, words: tuple[str, ...], processes: int) -> tuple[float, str]:
    """Run a command by so many processes of one thread, and give its seconds and its stderr."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = torchrun if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *start, "-m", "influence_cli", *(["--"] if start else []), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began, done.stderr


def line(known: dict[float, float], at: float, processes: int) -> float | None:
    """Predict seconds as fixed + each · size / N, both from the two smallest runs of one process; None before these."""
    if len(known) < 2:
        return None
    (x, y), (u, v) = list(known.items())[:2]
    each = (v - y) / (u - x)
    return max(0.0, y - each * x) + each * at / min(processes, os.cpu_count() or 1)


def text(seconds: float | None) -> str:
    """Write a prediction; nothing where it would be what it is made from."""
    return "" if seconds is None else f"{seconds:.2f}"


def commands(work: Path, counts: list[int], processes: list[int]) -> None:
    """Time whole commands on a real store, and print them beside the model's prediction."""
    print("\n| command | images | processes | seconds | efficiency | predicted |")
    print("|---|---|---|---|---|---|")
    known: dict[str, dict[float, float]] = {name: {} for name in COMMANDS}
    for count in counts:
        alone: dict[str, float] = {}
        folder = work / f"project-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        make_project(folder, count)
        for n in processes:
            for old in folder.glob("influence.h5*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            for name, words in COMMANDS.items():
                seconds, said = run(folder, words, n)
                predicted = line(known[name], count, n)
                if n == 1:
                    alone[name] = seconds
                    known[name].setdefault(count, seconds)
                efficiency = alone[name] / (n * seconds)
                print(
                    f"| {name} | {count:,} | {n} | {seconds:.1f} | {efficiency:.2f} | {text(predicted)} |", flush=True
                )
                for spent in re.findall(r"wrote \d+ of .* in (.*)", said):
                    print(f"| of it the rows | {count:,} | {n} | {spent} | | |", flush=True)
                if name == "gradients":
                    # The same command with nothing left to do: what it takes to start, to meet and to probe the model.
                    work = seconds - run(folder, words, n)[0]
                    alone["work"] = work if n == 1 else alone["work"]
                    print(
                        f"| of it the work | {count:,} | {n} | {work:.1f} | {alone['work'] / (n * work):.2f} | |",
                        flush=True,
                    )
        shutil.rmtree(folder)


def write_store(path: Path, n: int) -> None:
    """Write a store of random float16 rows in 16 shards."""
    layout = Layout(n, K, 10, BLOCK, "float16")
    create_sharded(
        path,
        layout,
        count=16,
        fingerprint={},
        facts={"batch": BLOCK},
        labels=np.zeros(n, dtype=np.int64),
        indices=np.arange(n),
        arrays={},
    )
    rows = np.random.default_rng(0).standard_normal((BLOCK, K), dtype=np.float32)
    with Store.open(path, write=True) as store:
        for block in range(layout.blocks):
            where = layout.rows(block)
            size = where.stop - where.start
            values = rows[:size] * np.float32(1 + block % 7)
            nothing = np.zeros(size, dtype=np.float32)
            store.write(block, Rows(values, nothing, np.zeros((size, 10), np.float32), np.ones(size, np.uint8), block))


def own_memory() -> int:
    """Give the bytes that this process holds and that are no mapped file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def scan_part(path: Path, rank: int, size: int, rounds: int) -> dict[str, float]:
    """Scan a process's part of a store some times: the median seconds, and the memory gained."""
    s_test = torch.randn(TESTS, K, generator=torch.Generator().manual_seed(0))
    with Store.open(path) as store:
        n, blocks = store.layout.n, store.layout.blocks
        own = range(blocks * rank // size, blocks * (rank + 1) // size)

        def work(_: slice, rows: np.ndarray) -> float:
            return float(influence(s_test, torch.from_numpy(rows), n).abs().amax())

        before, spent, most = own_memory(), [], 0
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in store.map(work, blocks=own):
                most = max(most, own_memory())
            spent.append(time.perf_counter() - began)
    return {"seconds": statistics.median(spent), "memory": max(0, most - before)}


def beside_memory(path: Path, tests: int, rounds: int) -> tuple[float, float]:
    """Time a scan and the same product from the rows in memory, converted as a scan does; in turn, on one thread."""
    torch.set_num_threads(1)
    s_test = torch.randn(tests, K, generator=torch.Generator().manual_seed(0))
    with Store.open(path) as store:
        n = store.layout.n
        held = np.concatenate([rows.astype(np.float16) for _, rows in store.scan()])
        step = 2 * BLOCK
        room = torch.empty(step, K)

        def of_rows(rows: torch.Tensor) -> float:
            return float(influence(s_test, rows, n).abs().amax())

        def from_memory(where: slice) -> float:
            part = torch.from_numpy(held[where])
            return of_rows(room[: len(part)].copy_(part))

        spent: dict[str, list[float]] = {"scan": [], "memory": []}
        for _ in range(1 + rounds):
            began = time.perf_counter()
            for _ in store.map(lambda _, rows: of_rows(torch.from_numpy(rows))):
                pass
            middle = time.perf_counter()
            for _ in in_order(from_memory, (slice(at, at + step) for at in range(0, n, step)), 1):
                pass
            spent["scan"].append(middle - began)
            spent["memory"].append(time.perf_counter() - middle)
    return statistics.median(spent["scan"][1:]), statistics.median(spent["memory"][1:])


def scans(work: Path, counts: list[int], processes: list[int], rounds: int) -> None:
    """Time scans by several processes, each a part, and print them beside the model's prediction."""
    print("\n| rows | GB | processes | seconds | GB/s | efficiency | predicted | memory gained, MB |")
    print("|---|---|---|---|---|---|---|---|")
    known: dict[float, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=work) as name:
            path = Path(name) / "store.h5"
            write_store(path, count)
            size, alone = 2 * count * K / 1e9, 0.0
            for n in processes:
                words = [sys.executable, __file__, "--scan-part", str(path), "--rounds", str(rounds)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                started = [
                    subprocess.Popen([*words, str(rank), str(n)], stdout=subprocess.PIPE, text=True, env=environment)
                    for rank in range(n)
                ]
                found = [json.loads(one.communicate()[0]) for one in started]
                seconds, gained = max(one["seconds"] for one in found), max(one["memory"] for one in found)
                predicted = line(known, size, n)
                if n == 1:
                    alone = seconds
                    known.setdefault(size, seconds)
                print(
                    f"| {count:,} | {size:.2f} | {n} | {seconds:.3f} | {size / seconds:.2f} | "
                    f"{alone / (n * seconds):.2f} | {text(predicted)} | {gained / 1e6:.0f} |",
                    flush=True,
                )
            for tests in (TESTS, 10 * TESTS) if count == counts[-1] else ():
                scan, memory = beside_memory(path, tests, rounds)
                print(
                    f"\n{count:,} float16 rows × {tests} tests, one process, in turn: scan {scan:.3f} s, the product "
                    f"from memory {memory:.3f} s: the scan reaches {memory / scan:.0%} of its speed",
                    flush=True,
                )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/scaling"))
    parser.add_argument("--part", choices=["commands", "scan", "all"], default="all")
    parser.add_argument("--images", type=int, nargs="+", default=[5_000, 20_000, 60_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scan-part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("place", type=int, nargs="*", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.scan_part:
        torch.set_num_threads(1)
        print(json.dumps(scan_part(words.scan_part, *words.place, words.rounds)))
        return
    words.work.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread a process")
    if words.part in ("commands", "all"):
        commands(words.work, words.images, words.processes)
    if words.part in ("scan", "all"):
        scans(words.work, words.rows, words.processes, words.rounds)


if __name__ == "__main__":
    main()
