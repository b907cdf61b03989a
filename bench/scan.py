"""Does a verified scan keep up with the maths? A product over the store beside the same product from memory.

    python bench/scan.py              (3 GB of disk, 6 GB of memory, 10 minutes; --shapes 4096x10000 for less)

A store of random rows is written as `influence gradients` writes it, so it lies in the page cache. In turn, in one run:
scan       Store.map: every block's checksum verified, influence of all tests on its rows, on all threads
verify     Store.map without any influence: what the scan does beside the maths. Where memory was scarce when the file
           was written, the page cache holds it in pages of 4 kB, and this takes three times as long
torch      the same influence from one array in memory, in one call: what torch makes of it
padded     the same, with the tests padded to a multiple of 16 and as the second factor
threads    the same influence from memory, cut in parts as the scan does: one thread each, parts of 4 or 32 MB
Seconds are medians. On a machine that others use as well, seconds of the processors say more than those of the clock;
the ratios of both are with the fastest of the products from memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from influence_cli.influence.scores import influence
from influence_cli.store.layout import Layout, create
from influence_cli.store.scan import in_order
from influence_cli.store.store import Rows, Store

BLOCK = 256


def write_store(path: Path, layout: Layout) -> None:
    """Write a store of random rows, each block of another size."""
    create(
        path,
        layout,
        fingerprint={},
        facts={},
        labels=np.zeros(layout.n, dtype=np.int64),
        indices=np.arange(layout.n),
        arrays={},
    )
    rows = np.random.default_rng(0).standard_normal((layout.block, layout.k), dtype=np.float32)
    with Store.open(path, write=True) as store:
        for block in range(layout.blocks):
            where = layout.rows(block)
            count = where.stop - where.start
            store.write(
                block,
                Rows(
                    coordinates=rows[:count] * np.float32(1 + block / 7),
                    losses=np.zeros(count),
                    outputs=np.zeros((count, layout.classes)),
                    state=np.ones(count),
                    digest=block,
                ),
            )


def candidates(store: Store, memory: np.ndarray, tests: int) -> dict[str, Callable[[], object]]:
    """Give the scan and the products from memory, ready to run."""
    n, k = memory.shape
    s_test = torch.randn(tests, k, generator=torch.Generator().manual_seed(0))
    wide = torch.zeros(-(-tests // 16) * 16, k)
    wide[:tests] = s_test
    rows = torch.from_numpy(memory)

    def work(_: slice, part: np.ndarray) -> torch.Tensor:
        return influence(s_test, torch.from_numpy(part), n)

    def scan() -> object:
        return torch.cat(list(store.map(work)), dim=1)

    def threads(size: int) -> object:
        step = max(1, size // (4 * k * BLOCK)) * BLOCK
        parts = (slice(start, min(n, start + step)) for start in range(0, n, step))
        return torch.cat(
            list(in_order(lambda where: work(where, memory[where]), parts, torch.get_num_threads())), dim=1
        )

    return {
        "scan": scan,
        "verify": lambda: list(store.map(lambda *_: None)),
        "torch": lambda: influence(s_test, rows, n),
        "padded": lambda: rows @ (wide / n).T,
        "threads, 4 MB": lambda: threads(4 * 2**20),
        "threads, 32 MB": lambda: threads(32 * 2**20),
    }


def measure(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Give the median seconds of each, of the clock and of the processors, run in turn."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for counts in [False] + [True] * rounds:  # the first round warms up
        for name, work in works.items():
            clock, processors = time.perf_counter(), time.process_time()
            work()
            if counts:
                spent[name].append((time.perf_counter() - clock, time.process_time() - processors))
    return {
        name: (statistics.median(clock for clock, _ in times), statistics.median(cpu for _, cpu in times))
        for name, times in spent.items()
    }


def report(found: dict[str, tuple[float, float]], memory: np.ndarray, tests: int) -> None:
    """Print what was measured, and the scan's speed relative to the products from memory."""
    n, k = memory.shape
    print(f"\n{n:,} rows × {k:,} columns × {tests} tests, load {os.getloadavg()[0]:.1f}")
    for label, (clock, cpu) in found.items():
        print(f"  {label:15} {clock:7.3f} s {memory.nbytes / clock / 1e9:6.2f} GB/s {cpu:8.3f} s of CPU")
    scan = found["scan"]
    others = [times for label, times in found.items() if label not in ("scan", "verify")]
    clock, cpu = (min(times[which] for times in others) / scan[which] for which in (0, 1))
    print(f"  scan reaches {found['torch'][0] / scan[0]:.0%} of torch's speed from memory,", end=" ")
    print(f"{clock:.0%} of the fastest's ({cpu:.0%} by CPU)", flush=True)


def main() -> None:
    """Measure every shape and number of tests and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x40000", "55338x10000"], help="columns x rows")
    parser.add_argument("--tests", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "int8"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores go")
    words = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {words.dtype} rows")
    for shape in words.shapes:
        k, n = (int(number) for number in shape.split("x"))
        with tempfile.TemporaryDirectory(dir=words.folder) as name:
            path = Path(name) / "store.h5"
            write_store(path, Layout(n, k, 10, BLOCK, words.dtype))
            memory = np.empty((n, k), dtype=np.float32)
            with Store.open(path) as store:
                for where, rows in store.scan():
                    memory[where] = rows
                for tests in words.tests:
                    report(measure(candidates(store, memory, tests), words.rounds), memory, tests)


if __name__ == "__main__":
    main()
