"""Nearest neighbours among more examples than it pays to compare all of: lists of vectors by faiss, recall measured.

Each vector is in the list of its nearest centre, by k-means; a query reads the lists of the nearest centres. How many
of them is chosen by comparing with exact neighbours of some examples, and what share of those it finds is measured on
others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_cli.evidence.neighbours import HELD, NEIGHBOURS, nearest

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.runtime.terminal import Terminal

# Exact up to so many examples, on the CPU.
EXACT = 200_000
# Vectors per list for k-means, and its steps; lists read at first, doubled until the recall is reached.
SAMPLED, STEPS, PROBES, RECALL = 64, 10, 8, 0.95
# Examples whose exact neighbours choose the lists, and as many that measure the recall; queries at once.
TRIED, QUERIES = 500, 4_096


def is_exact(n: int, device: torch.device) -> bool:
    """Say whether the neighbours of so many examples are found by comparing all with all."""
    return n <= EXACT or device.type != "cpu" or not has_faiss()


def has_faiss() -> bool:
    """Say whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def lists_of(n: int) -> int:
    """Choose the number of lists: 2√n."""
    return int(2 * n**0.5 + 0.5)


def neighbours_of(
    features: Tensor, terminal: Terminal, on_examples: Callable[[int], None], part: slice
) -> tuple[Tensor, Tensor, float | None]:
    """Find the nearest others of a part of the examples, exactly where that pays.

    Args:
        features: float32 [n, w].
        terminal: what is being done.
        on_examples: called with the number of newly finished examples.
        part: rows whose neighbours are found, without a step.

    Returns:
        Rows int64 [m, k], similarities [m, k], as ``nearest`` gives them; and the recall, None where it is exact.
    """
    if is_exact(len(features), features.device):
        return *nearest(features, NEIGHBOURS, on_examples, part), None
    unit = torch.nn.functional.normalize(features, dim=1)
    with terminal.status(f"learning {lists_of(len(unit)):,} lists for the neighbours"):
        search = _lists(unit.numpy())
        recall = _with_recall(search, unit)
    begin, end, _ = part.indices(len(unit))
    rows = torch.empty(end - begin, NEIGHBOURS, dtype=torch.int64)
    near = torch.empty(end - begin, NEIGHBOURS)
    for start in range(begin, end, QUERIES):
        numbers = torch.arange(start, min(start + QUERIES, end))
        place = slice(start - begin, start - begin + len(numbers))
        rows[place], near[place] = _searched(search, unit, numbers)
        on_examples(len(numbers))
    return rows, near, recall


def _lists(unit: np.ndarray) -> Any:
    """Learn the centres from evenly spread vectors, and put all vectors into their lists."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    width, count = unit.shape[1], lists_of(len(unit))
    centres = faiss.IndexFlatIP(width)
    search = faiss.IndexIVFFlat(centres, width, count, faiss.METRIC_INNER_PRODUCT)
    search.cp.niter, search.cp.spherical, search.cp.seed = STEPS, True, 0
    search.train(unit[:: max(1, len(unit) // (SAMPLED * count))])
    for start in range(0, len(unit), QUERIES):
        search.add(unit[start : start + QUERIES])
    return search


def _with_recall(search: Any, unit: Tensor) -> float:
    """Choose how many lists a query reads, by some examples; give the share of the neighbours of others it finds."""
    numbers = torch.arange(0, len(unit), max(1, len(unit) // (2 * TRIED)))[: 2 * TRIED]
    exact = _exact(unit, numbers)
    choosing, measuring = slice(0, None, 2), slice(1, None, 2)
    search.nprobe = min(PROBES, search.nlist)
    while search.nprobe < search.nlist and _recall(search, unit, numbers[choosing], exact[choosing]) < RECALL:
        search.nprobe = min(2 * search.nprobe, search.nlist)
    return _recall(search, unit, numbers[measuring], exact[measuring])


def _exact(unit: Tensor, numbers: Tensor) -> Tensor:
    """Give the rows of the nearest others of some examples by comparing with all."""
    found = []
    for some in torch.split(numbers, max(1, HELD // len(unit))):
        similarity = unit[some] @ unit.T
        similarity[torch.arange(len(some)), some] = -torch.inf
        found.append(similarity.topk(NEIGHBOURS, dim=1).indices)
    return torch.cat(found)


def _recall(search: Any, unit: Tensor, numbers: Tensor, exact: Tensor) -> float:
    rows = _searched(search, unit, numbers)[0]
    return float((rows[:, :, None] == exact[:, None, :]).any(dim=1).float().mean())


def _searched(search: Any, unit: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Give the neighbours of some examples, without themselves; more lists are read where these hold too few."""
    probes = search.nprobe
    similarity, rows = map(torch.from_numpy, search.search(unit[numbers].numpy(), NEIGHBOURS + 1))
    while bool((rows < 0).any()):
        few = torch.nonzero((rows < 0).any(dim=1))[:, 0]
        search.nprobe = min(2 * search.nprobe, search.nlist)
        similarity[few], rows[few] = map(torch.from_numpy, search.search(unit[numbers[few]].numpy(), NEIGHBOURS + 1))
    search.nprobe = probes
    # An example that is not among its own nearest has as many copies: the last one is left out.
    itself = rows == numbers[:, None]
    itself[:, -1] |= ~itself.any(dim=1)
    return rows[~itself].view(len(rows), NEIGHBOURS), similarity[~itself].view(len(rows), NEIGHBOURS)
