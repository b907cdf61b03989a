"""`rank --approximate`: the strongest influences by an index, if a scan of all rows would take too long.

influence[t, i] = (1/n) q_tᵀ x_i with whitened coordinates x = (Λ + l2 + λ)^(−1/2) c on both sides: the helpful examples
are those of largest inner product with q, the harmful ones with −q. The index gives candidates for both; influence on
them is then computed from the store's own rows, whose blocks are verified as in a scan. So every number is exact; an
index can only miss an example, and recall says how often it does.

Recall is measured when the index is made, over test examples drawn at random, and printed at every run. An exact scan
for the current test examples would cost the time that the index saves.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.choice import SOLVERS
from influence_cli.errors import InfluenceError
from influence_cli.influence.ensemble import make_closed_forms, refuse_source
from influence_cli.influence.example_facts import TestFacts, TrainingFacts
from influence_cli.influence.inverse import ClosedForm, Inverse
from influence_cli.influence.run_facts import ScoreRecord, describe_run
from influence_cli.influence.scores import Strongest, removal, require_finite, strongest
from influence_cli.influence.test_gradients import gradient_groups, group_size
from influence_cli.influence.test_selection import Selected
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.index_file import Index, index_path, missing, open_index
from influence_cli.ranking.rank import RankedGroup
from influence_cli.runtime.terminal import Terminal, duration, or_silent
from influence_cli.store.store import Store


@dataclass
class Spent:
    """What searching the indexes and scoring the candidates took so far.

    Attributes:
        queries: test examples that were searched for.
        search_seconds: in the indexes.
        scoring_seconds: for exact influence on the candidates.
        blocks_read: blocks of the stores, for these.
    """

    queries: int = 0
    search_seconds: float = 0.0
    scoring_seconds: float = 0.0
    blocks_read: int = 0


@dataclass(frozen=True)
class SearchRecord:
    """What is known of a ranking by indexes as a whole.

    Attributes:
        spent: what it took.
        blocks: that the stores have.
        indexes: the file of each index, and what was noted when it was made.
    """

    spent: Spent
    blocks: int
    indexes: tuple[tuple[Path, dict[str, Any]], ...]


def check_method(method: str, what: str) -> None:
    """Refuse a solver, before any work: it solves for one test example, and cannot whiten rows.

    Args:
        method: ``curvature.method``.
        what: the option, such as ``--approximate``.
    """
    if method == "replay":
        raise InfluenceError(f"{what}: a replay has no rows to put into an index", "-s curvature.method=auto")
    if method in SOLVERS:
        raise InfluenceError(
            f"{what}: {method} has no spectrum to precondition index rows with",
            "-s curvature.method=auto (or explicit, ekfac, kfac, arnoldi, fisher, identity)",
        )


def check_index(method: str, ensemble: str, stores: Sequence[Path]) -> None:
    """Refuse, before any work, what needs an index if there is none or cannot be one.

    Unlike a store, it is not made on demand: that takes several scans, and the exact ranking takes only one.

    Args:
        method: ``curvature.method``.
        ensemble: ``model.ensemble``.
        stores: the store of every checkpoint, whether it is there or not.

    Raises:
        InfluenceError: the method is a solver, or a checkpoint's index is missing.
    """
    check_method(method, "--approximate")
    refuse_source(ensemble, "--approximate", "a row has no preconditioner of its own")
    for store in stores:
        path = index_path(store)
        if not path.exists():
            raise missing(path)


def rank_approximate(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    *,
    facts: TrainingFacts,
    count: int = 10,
    target: str = "label",
    aggregate: bool = False,
    terminal: Terminal | None = None,
    skip_unreadable: bool = False,
) -> Generator[RankedGroup, None, tuple[ScoreRecord, SearchRecord]]:
    """Rank the training examples by influence on the selected test examples, by the indexes of the stores.

    The arguments are those of ``rank.rank_training``. Of several checkpoints the candidates of every index are scored
    in every store.

    Yields:
        Groups of test examples, in order; one group for an aggregate. Their influence is exact.

    Returns:
        At the end, what is known of the run and of the search.

    Raises:
        InfluenceError: an index is missing, damaged or older than its store.
    """
    terminal = or_silent(terminal)
    inverses = make_closed_forms(stores, terminal)
    indexes = [
        open_index(index_path(prepared.path), prepared, inverse)
        for prepared, inverse in zip(stores, inverses, strict=True)
    ]
    _say_recall(indexes[0].description, count, terminal)
    size = group_size(stores, 2 * indexes[0].description["factor"] * count)
    spent = Spent()

    def search(gradients: Sequence[Tensor], tests: Sequence[TestFacts | None]) -> list[Strongest]:
        started = time.perf_counter()
        near = candidates(indexes, inverses, gradients, count)
        near = [rows[facts.read[rows]] for rows in near]
        spent.search_seconds += time.perf_counter() - started
        spent.queries += len(near)
        return _scored(stores, inverses, gradients, tests, near, count, spent)

    for tests, gradients, of in gradient_groups(
        stores, selected, size, target, aggregate=aggregate, terminal=terminal, skip=skip_unreadable
    ):
        yield RankedGroup(tests, search(gradients, of))
    record = describe_run(stores, inverses, None, terminal)
    return record, _say_spent(indexes, spent, terminal)


def candidates(
    indexes: Sequence[Index], inverses: Sequence[ClosedForm], gradients: Sequence[Tensor], count: int
) -> list[np.ndarray]:
    """Find rows that may be among the ``count`` most helpful or harmful of each test example.

    Args:
        indexes: of every checkpoint.
        inverses: of every checkpoint.
        gradients: coordinates of the test gradients [m, k] under each.
        count: rows per effect.

    Returns:
        Rising rows, int64, of each test example.
    """
    near: list[list[np.ndarray]] = [[] for _ in range(len(gradients[0]))]
    for index, inverse, coordinates in zip(indexes, inverses, gradients, strict=True):
        queries = whitened(inverse, coordinates)
        for side in (queries, -queries):
            for rows, each in zip(near, index.candidates(side, int(index.description["factor"]) * count), strict=True):
                rows.append(each)
    return [np.unique(np.concatenate(rows)) for rows in near]


def whitened(inverse: ClosedForm, coordinates: Tensor) -> np.ndarray:
    """Give (H + (l2 + λ)I)^(−1/2) c, float32 [b, k], of which inner products are s_testᵀgᵢ."""
    return np.ascontiguousarray(inverse.whiten(coordinates).cpu().numpy(), dtype=np.float32)


def _scored(
    stores: Sequence[Prepared],
    inverses: Sequence[Inverse],
    gradients: Sequence[Tensor],
    tests: Sequence[TestFacts | None],
    near: Sequence[np.ndarray],
    count: int,
    spent: Spent,
) -> list[Strongest]:
    """Compute influence on the candidates of each test example from the rows of every store, and order them."""
    started = time.perf_counter()
    tests_of = np.repeat(np.arange(len(near)), [len(rows) for rows in near])
    rows_of = np.concatenate(near)
    order = np.argsort(rows_of, kind="stable")
    values = np.zeros(len(rows_of))
    for prepared, inverse, coordinates in zip(stores, inverses, gradients, strict=True):
        left = removal(inverse.apply(coordinates), prepared.task.n).cpu()
        values[order] += pair_products(prepared, left, tests_of[order], rows_of[order], spent) / len(stores)
    split = stores[0].task.train
    ends = np.cumsum([len(rows) for rows in near])[:-1]
    results = []
    for test, (rows, influence) in enumerate(zip(near, np.split(values.astype(np.float32), ends), strict=True)):
        explained = tests[test]
        on = "the mean of the test examples" if explained is None else explained.title()
        require_finite(influence, "influence", partial(_title, split, rows, on))
        best = strongest(influence, count)
        results.append(replace(best, helpful=rows[best.helpful], harmful=rows[best.harmful]))
    spent.scoring_seconds += time.perf_counter() - started
    return results


def _title(split: Any, rows: np.ndarray, on: str, place: int) -> str:
    return f"{split.title(int(split.indices[rows[place]]))} on {on}"


def pair_products(
    prepared: Prepared, left: Tensor, tests: np.ndarray, rows: np.ndarray, spent: Spent | None = None
) -> np.ndarray:
    """Multiply vectors with single rows of a store, reading (and verifying) only the blocks that hold them.

    Args:
        prepared: the store.
        left: [m, k], on the CPU.
        tests: int64 [pairs], which of these.
        rows: int64 [pairs], rising, with which row.
        spent: ``blocks_read`` is counted up.

    Returns:
        float64 [pairs].
    """
    values = np.empty(len(rows))

    def work(where: slice, block: np.ndarray) -> tuple[slice, np.ndarray]:
        pairs = inside(rows, where)
        vectors, vector = np.unique(tests[pairs], return_inverse=True)
        some, row = np.unique(rows[pairs] - where.start, return_inverse=True)
        products = left[torch.from_numpy(vectors)] @ torch.from_numpy(block[some]).T
        return pairs, products.numpy()[vector, row]

    with Store.open(prepared.path) as store:
        blocks = np.unique(rows // store.layout.block).tolist()
        for pairs, products in store.map(work, blocks=blocks):
            values[pairs] = products
    if spent is not None:
        spent.blocks_read += len(blocks)
    return values


def inside(rows: np.ndarray, where: slice) -> slice:
    """Find the rows of a piece of a scan among some sorted rows."""
    return slice(*np.searchsorted(rows, (where.start, where.stop)))


def _say_recall(description: dict[str, Any], count: int, terminal: Terminal) -> None:
    """Print the recall measured when the index was made, at the number of rows nearest to the requested one."""
    measured = sorted(description["recall"], key=lambda row: row["at"])
    row = next((row for row in measured if row["at"] >= count), measured[-1])
    beyond = "" if row["at"] >= count else f"; it was not measured for more, but {count:,} are requested"
    terminal.say(f"approximate: {recall_text(row)}{beyond}")


def recall_text(row: dict[str, Any]) -> str:
    """Write a measured recall in one line: ``recall@10 .985 ± .010 against the exact scan …``."""
    sides = ", ".join(f"{side} {row[side]:.3f}" for side in ("helpful", "harmful") if row[side] is not None)
    return (
        f"recall@{row['at']} {row['mean']:.3f} ± {row['interval']:.3f} against the exact scan for {row['tests']:,} "
        f"{row['of']} examples drawn at random ({sides})"
    )


def _say_spent(indexes: Sequence[Index], spent: Spent, terminal: Terminal) -> SearchRecord:
    """Gather the facts of the run, and say how long the search took."""
    description = indexes[0].description
    total = sum(index.description["blocks"] for index in indexes)
    terminal.say(
        f"searched in {spent.search_seconds:.2f} s; {spent.blocks_read:,} of {total:,} blocks read for exact "
        f"influence in {duration(spent.scoring_seconds)} (the exact scan for {description['exact_tests']} examples "
        f"took {duration(description['exact_seconds'])} when the index was made)"
    )
    exact = description["exact_seconds"] * max(1.0, spent.queries / description["exact_tests"])
    if spent.search_seconds + spent.scoring_seconds > exact:
        terminal.say(f"without --approximate this many test examples are faster, about {duration(exact)}")
    return SearchRecord(spent, total, tuple((index.path, index.description) for index in indexes))
