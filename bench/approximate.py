"""What does an index save? The strongest influences by `influence index`, beside the exact scan of the same store.

    python bench/approximate.py                       (100,000 × 512: 0.6 GB of disk, 1 GB of memory, minutes)
    python bench/approximate.py --shapes 1000000x256  (2 GB of disk, 3 GB of memory)

Rows are made up, in the form that gradients of a classifier's output layer have: (p − e_y) aᵀ, eight classes, inputs a
around a mean of their class with a spectrum that falls as j^-1/2, probabilities p that are wrong for one in some fifty.
So their lengths differ by orders of magnitude, as real ones do. The tests are other rows like them, of those that the
classifier is not sure of. In turn, on the same store, medians over tests one at a time:
exact      one test example, Store.map over all rows
index      the same by the index: candidates (search), and their exact influence from the store's blocks (score)
by angle   lists as faiss makes them for inner products, by spherical k-means, in place of ours: the share of all rows
           that is looked into for the same recall
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import torch

from influence_cli.influence.inverse import Identity
from influence_cli.influence.scores import Running, Strongest, removal, strongest
from influence_cli.ranking.index_build import AT, NEAR, WANTED, build, plan_index, recall
from influence_cli.ranking.index_file import Index, padded, write_index
from influence_cli.ranking.index_search import candidates, pair_products
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.layout import Layout, create
from influence_cli.store.store import Rows, Store

BLOCK, CLASSES, TESTS, ALONE = 256, 8, 64, 8
INVERSE = Identity()


def gradients(count: int, k: int, generator: np.random.Generator, means: np.ndarray) -> np.ndarray:
    """Make whitened gradients of an output layer, float32 [count, k]."""
    width = k // CLASSES
    y = generator.integers(0, CLASSES, count)
    inputs = means[y] + generator.standard_normal((count, width), dtype=np.float32)
    inputs *= np.arange(1, width + 1, dtype=np.float32) ** -0.25  # the root of the spectrum
    logits = 3 * generator.standard_normal((count, CLASSES), dtype=np.float32)
    logits[np.arange(count), y] += 12
    slopes = np.exp(logits - logits.max(axis=1, keepdims=True))
    slopes /= slopes.sum(axis=1, keepdims=True)
    slopes[np.arange(count), y] -= 1
    return (slopes[:, :, None] * inputs[:, None, :]).reshape(count, k)


def write_store(path: Path, layout: Layout, means: np.ndarray) -> None:
    """Write a store of made-up rows, block by block."""
    every = np.arange(layout.n)
    create(path, layout, fingerprint={}, facts={}, labels=0 * every, indices=every, arrays={})
    generator = np.random.default_rng(1)
    with Store.open(path, write=True) as store:
        for block in range(layout.blocks):
            where = layout.rows(block)
            count = where.stop - where.start
            rows = gradients(count, layout.k, generator, means)
            store.write(block, Rows(rows, np.zeros(count), np.zeros((count, layout.classes)), np.ones(count), block))


def exact_scan(path: Path, tests: torch.Tensor, n: int) -> list[Strongest]:
    """Find the strongest influences by a scan of all rows."""
    running, left = Running(len(tests), max(AT)), removal(tests, n)
    with Store.open(path) as store:
        work = lambda where, part: (where.start, (left @ torch.from_numpy(part).T).numpy())  # noqa: E731
        for start, values in store.map(work):
            running.add(np.arange(start, start + values.shape[1]), values)
    return running.results()


def chosen_probes(index: Index, tests: torch.Tensor, exact: list[Strongest]) -> tuple[Index, float, float]:
    """Look into more lists until recall is as wanted; give the index, its recall, and the share of rows looked into."""
    probes, found = 1, 0.0
    while True:
        index = replace(index, description=index.description | {"probes": min(probes, index.description["lists"])})
        found = recall(exact, candidates([index], [INVERSE], [tests], AT[0]), AT[0])["mean"]
        if found >= WANTED or probes >= index.description["lists"]:
            break
        probes *= 2
    sizes = np.array([index.search.invlists.list_size(number) for number in range(index.description["lists"])])
    both = np.concatenate([tests.numpy(), -tests.numpy()])
    queries = padded(both, index.search.d)
    queries[:, -1] = np.linalg.norm(both, axis=1)
    lists = index.search.quantizer.search(queries, index.description["probes"])[1]
    return index, found, float(sizes[lists].sum(axis=1).mean() / sizes.sum())


def by_angle(rows: np.ndarray, lists: int, sample: int) -> Any:
    """Make lists as faiss does for inner products."""
    rows = padded(rows, rows.shape[1] + 1)  # of a centre here: 0
    search = faiss.index_factory(rows.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    search.cp.min_points_per_centroid = 1
    search.train(rows[np.random.default_rng(0).choice(len(rows), sample, replace=False)])
    search.add(rows)
    return search


def median(work: Any, tests: torch.Tensor) -> float:
    """Give the median seconds of one test example at a time."""
    spent = []
    for number in range(ALONE):
        started = time.perf_counter()
        work(tests[number : number + 1])
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def measure(n: int, k: int, folder: Path, compare: bool) -> None:
    """Make a store and its index, and print a line of each measurement."""
    means = np.random.default_rng(0).standard_normal((CLASSES, k // CLASSES)).astype(np.float32)
    tests = gradients(64 * TESTS, k, np.random.default_rng(2), means)
    tests = torch.from_numpy(tests[np.linalg.norm(tests, axis=1).argsort()[-8 * TESTS :: 8]])
    path = folder / "store.h5"
    write_store(path, Layout(n, k, CLASSES, BLOCK), means)
    prepared: Any = SimpleNamespace(path=path, task=SimpleNamespace(seed=0))
    plan = plan_index(n, k)
    print(f"\n{n:,} rows × {k:,} coordinates ({path.stat().st_size / 1e9:.2f} GB), load {os.getloadavg()[0]:.1f}")
    started = time.perf_counter()
    search = write_index(folder / "store.h5.index", build(prepared, INVERSE, plan, np.arange(n), Terminal(quiet=True)))
    size = (folder / "store.h5.index").stat().st_size
    print(f"  index: {plan.text()}, {size / 1e9:.2f} GB, made in {time.perf_counter() - started:.0f} s", flush=True)
    exact = exact_scan(path, tests, n)
    index = Index(folder / "store.h5.index", np.arange(n), asdict(plan) | {"probes": 1, "factor": NEAR}, search)
    index, _, share = chosen_probes(index, tests[::2], exact[::2])
    for at in AT:
        row = recall(exact[1::2], candidates([index], [INVERSE], [tests[1::2]], at), at)
        print(f"  recall@{at} {row['mean']:.3f} ± {row['interval']:.3f} over {TESTS // 2} other tests", end="; ")
    print(f"{index.description['probes']} of {plan.lists} lists, {share:.1%} of the rows looked into", flush=True)

    def found(test: torch.Tensor) -> list[np.ndarray]:
        return candidates([index], [INVERSE], [test], AT[0])

    def score(test: torch.Tensor) -> None:
        (rows,) = found(test)
        strongest(pair_products(prepared, removal(test, n), np.zeros(len(rows), dtype=np.int64), rows), AT[0])

    whole, near, both = (median(work, tests) for work in (lambda test: exact_scan(path, test, n), found, score))
    print(
        f"  one test: exact scan {whole * 1e3:,.0f} ms; index {both * 1e3:,.1f} ms (search {near * 1e3:,.1f}, score "
        f"{(both - near) * 1e3:,.1f}): {whole / both:.0f} times as fast",
        flush=True,
    )
    if compare:
        with Store.open(path) as store:
            rows = np.concatenate([part.copy() for _, part in store.scan()])
        index = replace(index, search=by_angle(rows, plan.lists, plan.sample))
        index, reached, other = chosen_probes(index, tests[::2], exact[::2])
        print(
            f"  by angle: {index.description['probes']} of {plan.lists} lists, {other:.1%} of the rows looked into for "
            f"a recall@{AT[0]} of {reached:.3f}: {other / share:.1f} times as many",
            flush=True,
        )


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["100000x512"], help="rows x columns")
    parser.add_argument("--no-angle", action="store_true", help="without the lists by angle (and their memory)")
    parser.add_argument("--folder", type=Path, default=None, help="where store and index go")
    words = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, faiss {faiss.__version__}"
    )
    for shape in words.shapes:
        n, k = (int(number) for number in shape.split("x"))
        with tempfile.TemporaryDirectory(dir=words.folder) as name:
            measure(n, k, Path(name), not words.no_angle)


if __name__ == "__main__":
    main()
