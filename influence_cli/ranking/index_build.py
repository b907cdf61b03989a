"""`influence index`: build the index of a store, choose how far a search looks, measure what it finds.

Few rows are compared one by one (flat: exact). More rows are in lists, one around each of 2√n centres from k-means, as
float16 or, if that is too large, as product codes of one byte per 8 coordinates (Jégou et al. 2011). A query reads the
lists that may hold the largest inner products with it, by q·μ + ‖q‖ r √(2 ln m / k): μ is the mean of a list's m rows
and r their root mean square distance from it. The second term is about how far the largest of them is beyond μ, if
they spread evenly over the k directions.

Gradients differ in length by orders of magnitude, and nearly all strong influence is on the longest few percent.
So k-means uses Euclidean distances, and its sample contains rows in proportion to their length: long rows have most
of the lists to themselves, and the many short ones share a few lists that no query needs to read. By angle, as is
usual for inner products, every list has some of both (bench/approximate.py compares the two).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.influence.inverse import ClosedForm, Inverse
from influence_cli.influence.scores import Running, Strongest, removal
from influence_cli.influence.streams import averaged, stored_products
from influence_cli.influence.test_gradients import test_gradients
from influence_cli.influence.test_selection import at_position
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.index_file import Index, belongings, index_path, padded, seal_index, write_index
from influence_cli.ranking.index_search import candidates, inside, recall_text, whitened
from influence_cli.runtime import disk
from influence_cli.runtime.locks import claim
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Terminal, duration
from influence_cli.store.store import READ, Store

# Fewer rows need no lists; lists have float16 rows up to this many bytes, and product codes beyond.
FLAT_BELOW, HALF_BYTES = 10_000, 4 * 10**9
# Rows per list for k-means, and rows to learn product codes from.
SAMPLED, CODED = 40, 10_000
# Coordinates per byte of a product code.
PART = 8
# Test examples for measuring recall, at these numbers of rows; probes are chosen for this recall at the first number.
TESTS, AT, WANTED = 64, (10, 100), 0.98
# Candidates per requested row: with coarse codes or several checkpoints the best rows are further down.
NEAR, FAR = 2, 8
# Steps of k-means, for the lists and for product codes.
STEPS = 10


@dataclass(frozen=True)
class IndexPlan:
    """What an index will be.

    Attributes:
        kind: ``flat``, ``float16`` or ``product codes``.
        rows: in it.
        width: numbers of a vector: coordinates, one more where there are lists, a multiple of 8 in product codes.
        lists: number of lists of rows; 0 for a flat index.
    """

    kind: str
    rows: int
    width: int
    lists: int

    @property
    def sample(self) -> int:
        """Count the rows for learning lists and codes."""
        return min(self.rows, SAMPLED * self.lists)

    def bytes(self) -> int:
        """Estimate the bytes of the file."""
        each = {"flat": 4 * self.width, "float16": 2 * self.width + 8, "product codes": self.width // PART + 8}
        return self.rows * each[self.kind] + 4 * self.lists * self.width + 2**16

    def memory(self) -> int:
        """Bound the memory that making it takes: it grows by doubling; the sample twice, and three sets of centres."""
        return 2 * self.bytes() + 4 * self.width * (2 * self.sample + 3 * self.lists)

    def products(self) -> float:
        """Count the multiplications of vectors that it takes: k-means, then each row with each centre; and of codes."""
        codes = 256 * STEPS * CODED / PART if self.kind == "product codes" else 0.0
        return self.lists * (STEPS * self.sample + self.rows) + codes

    def text(self) -> str:
        """Describe it: ``float16 rows in 490 lists``."""
        if self.kind == "flat":
            return "flat (float32 rows, exact)"
        return f"{self.kind}{' of rows' if self.kind == 'product codes' else ' rows'} in {self.lists:,} lists"


def plan_index(rows: int, width: int) -> IndexPlan:
    """Choose the kind of index for so many rows and coordinates.

    Below 10,000 rows flat; else 2√n lists, of float16 rows up to 4 GB of them, of product codes beyond.
    """
    if rows < FLAT_BELOW:
        return IndexPlan("flat", rows, width, 0)
    lists = round(2 * rows**0.5)
    width += 1  # for a centre: how far its list reaches beyond it
    if 2 * rows * width <= HALF_BYTES:
        return IndexPlan("float16", rows, width, lists)
    return IndexPlan("product codes", rows, -(-width // PART) * PART, lists)


def build_indexes(
    stores: Sequence[Prepared], inverses: Sequence[ClosedForm], *, terminal: Terminal, skip_unreadable: bool = False
) -> list[Index]:
    """Make the index of every store, next to it, and measure their recall together.

    Args:
        stores: what was prepared for each checkpoint.
        inverses: of each.
        terminal: plans, progress, what was measured.
        skip_unreadable: continue without unreadable test examples.

    Returns:
        The indexes, as they are on disk.

    Raises:
        InfluenceError: memory or disk do not hold it; another process makes the same index.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    plans = [_announced(prepared, inverse, terminal) for prepared, inverse in zip(stores, inverses, strict=True)]
    indexes = []
    with ExitStack() as stack:
        for prepared, inverse, plan in zip(stores, inverses, plans, strict=True):
            started, path = time.perf_counter(), index_path(prepared.path)
            stack.enter_context(claim(path))
            part = disk.part_of(path)
            stack.callback(disk.remove, part)
            rows, blocks = _readable(prepared)
            search = write_index(part, build(prepared, inverse, plan, rows, terminal))
            near = plan.kind != "product codes" and len(stores) == 1
            description = asdict(plan) | {
                "factor": NEAR if near else FAR,
                "probes": 1,
                "blocks": blocks,
                "faiss": faiss.__version__,
                "seconds": time.perf_counter() - started,
            }
            indexes.append(Index(part, rows, description, search))
        indexes = _measured(stores, inverses, indexes, terminal, skip=skip_unreadable)
        for index, prepared, inverse in zip(indexes, stores, inverses, strict=True):
            path = index_path(prepared.path)
            seal_index(index, path, belongings(prepared, inverse))
            looked = "; each search reads {probes:,} of {lists:,} lists" if index.description["lists"] else ""
            size, seconds = human_bytes(path.stat().st_size), duration(index.description["seconds"])
            terminal.say(f"wrote {path} ({size}) in {seconds}{looked.format_map(index.description)}")
    return [replace(index, path=index_path(prepared.path)) for index, prepared in zip(indexes, stores, strict=True)]


def build(prepared: Prepared, inverse: ClosedForm, plan: IndexPlan, rows: np.ndarray, terminal: Terminal) -> Any:
    """Make faiss's index of the whitened rows of a store, in three scans (a flat one in one).

    Args:
        prepared: the store.
        inverse: its curvature, λ chosen.
        plan: of ``plan_index``.
        rows: int64, those that could be read.
        terminal: progress.
    """
    import faiss

    name = index_path(prepared.path).name
    if plan.kind == "flat":
        flat = faiss.IndexFlatIP(plan.width)
        with terminal.progress(plan.rows, name) as advance:
            for vectors in _vectors(prepared, inverse, plan, rows):
                flat.add(vectors)
                advance(len(vectors))
        return flat
    generator = np.random.default_rng(prepared.task.seed)
    with terminal.status(f"{name}: learning {plan.lists:,} lists from {plan.sample:,} rows"):
        norms = [np.linalg.norm(vectors, axis=1) for vectors in _vectors(prepared, inverse, plan, rows)]
        weights = np.concatenate(norms).astype(np.float64) + 1e-30
        # Scaled into float16's range by a power of two, which rounds nothing, so the order stays the same.
        scale = np.float32(2.0 ** (np.ceil(np.log2(weights.max())) - 14))
        weights += 1e-3 * weights.mean()
        chosen = np.sort(generator.choice(rows, plan.sample, replace=False, p=weights / weights.sum()))
        sample = np.concatenate([vectors / scale for vectors in _vectors(prepared, inverse, plan, chosen)])
        means = faiss.Kmeans(
            plan.width,
            plan.lists,
            niter=STEPS,
            seed=prepared.task.seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        means.train(sample)
        search, learn = _empty(plan)
        learn(sample[generator.permutation(len(sample))[:CODED]])
        del sample
    nearest = faiss.IndexFlatL2(plan.width)
    nearest.add(means.centroids)
    sums, squares = torch.zeros(plan.lists, plan.width), torch.zeros(plan.lists, dtype=torch.float64)
    with terminal.progress(plan.rows, name) as advance:
        for vectors in (points / scale for points in _vectors(prepared, inverse, plan, rows)):
            lists = np.ascontiguousarray(nearest.search(vectors, 1)[1][:, 0])
            search.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))
            points, into = torch.from_numpy(vectors), torch.from_numpy(lists)
            sums.index_add_(0, into, points)
            squares.index_add_(0, into, points.square().sum(dim=1, dtype=torch.float64))
            advance(len(vectors))
    counts = torch.tensor([search.invlists.list_size(number) for number in range(plan.lists)], dtype=torch.float64)
    some = counts.clamp_min(1)
    centres = (sums / some[:, None]).float()
    spread = (squares / some - centres.double().square().sum(dim=1)).clamp_min(0)
    centres[:, -1] = (spread * 2 * some.log() / plan.width).sqrt()
    search.quantizer.add(centres.numpy())
    return search


def _empty(plan: IndexPlan) -> tuple[Any, Callable[[np.ndarray], None]]:
    """Make an index with empty lists, and what learns its codes from some vectors."""
    import faiss

    means = faiss.IndexFlatIP(plan.width)
    if plan.kind == "float16":
        kind = faiss.ScalarQuantizer.QT_fp16
        search = faiss.IndexIVFScalarQuantizer(
            means,
            plan.width,
            plan.lists,
            kind,
            faiss.METRIC_INNER_PRODUCT,
            False,  # noqa: FBT003  SWIG takes no keywords: codes of the vectors themselves, not of residuals
        )
        search.is_trained = True
        return search, lambda _: None
    search = faiss.IndexIVFPQ(means, plan.width, plan.lists, plan.width // PART, 8, faiss.METRIC_INNER_PRODUCT)
    # Codes of the rows themselves: codes of their residuals in a list would depend on a centre that moves.
    search.by_residual, search.is_trained = False, True
    search.pq.cp.niter, search.pq.cp.min_points_per_centroid = STEPS, 1
    return search, search.pq.train


def _vectors(prepared: Prepared, inverse: ClosedForm, plan: IndexPlan, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Whiten some rows of a store, float32 [b, width], in order, from one scan."""

    def work(where: slice, block: np.ndarray) -> np.ndarray:
        some = block[rows[inside(rows, where)] - where.start]
        return padded(whitened(inverse, torch.from_numpy(some)), plan.width)

    with Store.open(prepared.path) as store:
        yield from (vectors for vectors in store.map(work) if len(vectors))


def _readable(prepared: Prepared) -> tuple[np.ndarray, int]:
    """Give the rows that could be read, and the number of blocks."""
    with Store.open(prepared.path) as store:
        return np.flatnonzero(store.column("state") == READ), store.layout.blocks


def _announced(prepared: Prepared, inverse: ClosedForm, terminal: Terminal) -> IndexPlan:
    """Plan an index, say what it takes, and refuse it if memory or disk do not suffice."""
    with Store.open(prepared.path) as store:
        rows, width = store.readable(), whitened(inverse, torch.zeros(1, store.layout.k)).shape[1]
    plan, path = plan_index(rows, width), index_path(prepared.path)
    need, free = plan.memory(), available_bytes(torch.device("cpu"))
    terminal.say(
        f"making {path}: {plan.rows:,} rows of {width:,} coordinates, {plan.text()}; {human_bytes(plan.bytes())} on "
        f"disk, at most {human_bytes(need)} of memory, about {duration(_seconds(plan))}"
    )
    if need > free:
        raise InfluenceError(
            f"{path} needs {human_bytes(need)} of memory, but {human_bytes(free)} is free",
            "influence rank without --approximate needs no index; fewer coordinates (gradients.budget) make it smaller",
        )
    disk.check_space(path, plan.bytes())
    return plan


def _seconds(plan: IndexPlan) -> float:
    """Estimate how long an index takes: three scans, and its products at the speed of one that is tried."""
    side = torch.ones(512, plan.width)
    torch.mm(side[:8], side.T)  # the first call also warms up
    started = time.perf_counter()
    torch.mm(side, side.T)
    return plan.products() / 512**2 * (time.perf_counter() - started) + 3 * 4 * plan.rows * plan.width / 1e9


def _measured(
    stores: Sequence[Prepared],
    inverses: Sequence[ClosedForm],
    indexes: Sequence[Index],
    terminal: Terminal,
    *,
    skip: bool,
) -> list[Index]:
    """Choose how many lists to read with one half of the test examples, and measure recall with the other half."""
    name, gradients = _sampled(stores, terminal, skip=skip)
    exact, seconds = _exact(stores, inverses, gradients, terminal)
    numbers = np.arange(len(exact))
    first, second = (numbers[::2], numbers[1::2]) if len(exact) > 1 else (numbers, numbers)

    def measure(searched: Sequence[Index], chosen: np.ndarray, count: int) -> dict[str, Any]:
        near = candidates(searched, inverses, [rows[torch.from_numpy(chosen)] for rows in gradients], count)
        return recall([exact[number] for number in chosen], near, count)

    most, probes = max(index.description["lists"] for index in indexes), 1
    while True:
        row = measure(indexes, first, AT[0])
        enough = all(row[side] is None or row[side] >= WANTED for side in ("helpful", "harmful"))
        if enough or probes >= most:
            break
        probes = min(most, max(probes + 1, 3 * probes // 2))
        indexes = [replace(index, description=index.description | {"probes": probes}) for index in indexes]
    rows = [measure(indexes, second, count) | {"tests": len(second), "of": name} for count in AT]
    for row in rows:
        terminal.say(recall_text(row))
    if not enough:
        terminal.warn(f"recall@{AT[0]} stays below {WANTED} even if all lists are read: {recall_text(rows[0])}")
    measured = {"recall": rows, "exact_seconds": seconds, "exact_tests": len(exact)}
    return [replace(index, description=index.description | measured) for index in indexes]


def _sampled(stores: Sequence[Prepared], terminal: Terminal, *, skip: bool) -> tuple[str, list[Tensor]]:
    """Draw the test examples for measuring recall; training examples if the config has no test set.

    Returns:
        ``test`` or ``training``, and coordinates of their gradients under every checkpoint, [m, k] each.
    """
    task = stores[0].task
    split, generator = task.test, np.random.default_rng(task.seed)
    if split is None:
        rows = _readable(stores[0])[0]
        chosen = np.sort(generator.choice(rows, min(TESTS, len(rows)), replace=False))
        return "training", [stored_rows(prepared, chosen) for prepared in stores]
    chosen = np.sort(generator.choice(split.indices, min(TESTS, len(split)), replace=False))
    selected = [at_position(split, int(index)) for index in chosen]
    target = "predicted" if split.is_unlabelled else "label"
    tests, gradients = test_gradients(stores, selected, target, terminal, skip=skip)
    if not tests:
        raise InfluenceError("none of the test examples for measuring recall could be read")
    return "test", gradients


def stored_rows(prepared: Prepared, rows: np.ndarray) -> Tensor:
    """Read some rows of a store, rising: float32 [b, k]."""

    def work(where: slice, block: np.ndarray) -> np.ndarray:
        return np.asarray(block[rows[inside(rows, where)] - where.start])

    with Store.open(prepared.path) as store:
        blocks = np.unique(rows // store.layout.block).tolist()
        return torch.from_numpy(np.concatenate(list(store.map(work, blocks=blocks)))).to(prepared.task.device)


def _exact(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], gradients: Sequence[Tensor], terminal: Terminal
) -> tuple[list[Strongest], float]:
    """Find the strongest influences by an exact scan of every store, and say how long that takes."""
    started = time.perf_counter()
    running = Running(len(gradients[0]), max(AT))
    with ExitStack() as stack:
        streams = []
        for prepared, inverse, coordinates in zip(stores, inverses, gradients, strict=True):
            advance = stack.enter_context(terminal.progress(len(prepared.task.train), f"scanning {prepared.path.name}"))
            streams.append(stored_products(prepared, removal(inverse.apply(coordinates), prepared.task.n), advance))
        for where, values in averaged(streams):
            running.add(np.arange(where.start, where.stop), values)
    return running.results(), time.perf_counter() - started


def recall(exact: Sequence[Strongest], proposed: Sequence[np.ndarray], count: int) -> dict[str, Any]:
    """Compute the share of the ``count`` strongest of each effect that is among the candidates.

    Args:
        exact: the strongest of each test example.
        proposed: rows of the candidates of each.
        count: of each effect.

    Returns:
        ``at`` (count), ``helpful`` and ``harmful`` (mean over the test examples that have any; None of none), ``mean``
        of both, and ``interval``, the half width of its 95% interval over test examples.
    """
    shares = np.full((2, len(exact)), np.nan)
    for test, (best, near) in enumerate(zip(exact, proposed, strict=True)):
        for side, rows in enumerate((best.helpful[:count], best.harmful[:count])):
            if len(rows):
                shares[side, test] = np.isin(rows, near).mean()
    known = ~np.isnan(shares)
    each = [float(share[has].mean()) if has.any() else None for share, has in zip(shares, known, strict=True)]
    both = np.nansum(shares, axis=0)[known.any(axis=0)] / known.sum(axis=0)[known.any(axis=0)]
    mean = float(both.mean()) if len(both) else 1.0
    interval = 1.96 * float(both.std(ddof=1)) / len(both) ** 0.5 if len(both) > 1 else 0.0
    return {"at": count, "helpful": each[0], "harmful": each[1], "mean": mean, "interval": interval}
