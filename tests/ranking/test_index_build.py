"""Building an index: whitened rows whose inner products are the influence, the rule for its kind, honest recall."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from influence_cli.config.load import load_config
from influence_cli.influence.ensemble import make_closed_forms
from influence_cli.influence.inverse import Identity
from influence_cli.influence.scores import Strongest, strongest
from influence_cli.model.task import load_tasks
from influence_cli.precompute.prepare import prepare_all
from influence_cli.ranking import index_build
from influence_cli.ranking.index_build import IndexPlan, build, plan_index, recall, stored_rows
from influence_cli.ranking.index_file import Index, write_index
from influence_cli.ranking.index_search import candidates, whitened
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.layout import Layout, create
from influence_cli.store.store import Rows, Store
from tests.conftest import Command
from tests.support.small_project import refusal

PLAIN = Identity()


def store_of(path: Path, rows: np.ndarray) -> Any:
    """Write rows to a store, and give as much of what is prepared as an index needs."""
    n, k = rows.shape
    layout = Layout(n, k, 2, 256)
    create(path, layout, fingerprint={}, facts={}, labels=np.zeros(n, int), indices=np.arange(n), arrays={})
    with Store.open(path, write=True) as store:
        for block in range(layout.blocks):
            part = rows[layout.rows(block)]
            some = np.zeros(len(part))
            store.write(block, Rows(part, some, np.zeros((len(part), 2)), some + 1, block))
    return SimpleNamespace(path=path, task=SimpleNamespace(seed=0, device=torch.device("cpu")))


def long_tailed(n: int, k: int, seed: int) -> np.ndarray:
    """Make rows around a few directions whose lengths differ by orders of magnitude."""
    generator = np.random.default_rng(seed)
    means = np.random.default_rng(9).standard_normal((6, k))
    rows = means[generator.integers(0, 6, n)] + generator.standard_normal((n, k)) / 2
    return (rows * np.exp(2 * generator.standard_normal((n, 1)))).astype(np.float32)


@pytest.mark.parametrize("method", ["explicit", "ekfac", "fisher", "identity"])
def test_inner_products_of_whitened_rows_are_those_with_s_test(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tiny)
    terminal = Terminal(quiet=True)
    config = load_config(Path("influence.yaml"), [f"curvature.method={method}", "curvature.damping=0.03"])
    (prepared,) = prepare_all(config, load_tasks(config), terminal)
    (inverse,) = make_closed_forms([prepared], terminal)
    rows = stored_rows(prepared, np.arange(24)).double()
    expected = (inverse.apply(rows[:5]) @ rows.T).numpy()
    own = whitened(inverse, rows).astype(np.float64)
    assert np.abs(own[:5] @ own.T - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_kind_follows_from_rows_and_coordinates() -> None:
    assert plan_index(9_999, 4_000) == IndexPlan("flat", 9_999, 4_000, 0)
    assert plan_index(10_000, 4_000) == IndexPlan("float16", 10_000, 4_001, 200)
    assert plan_index(10**6, 1_024) == IndexPlan("float16", 10**6, 1_025, 2_000)
    assert plan_index(10**7, 1_024) == IndexPlan("product codes", 10**7, 1_032, 6_325)


@pytest.mark.parametrize("kind", ["flat", "float16", "product codes"])
def test_its_size_is_known_before(tmp_path: Path, kind: str) -> None:
    rows = long_tailed(2_000, 31, 1)
    width = {"flat": 31, "float16": 32, "product codes": 32}[kind]
    plan = IndexPlan(kind, 2_000, width, 0 if kind == "flat" else 40)
    prepared = store_of(tmp_path / "store.h5", rows)
    write_index(tmp_path / "index", build(prepared, PLAIN, plan, np.arange(2_000), Terminal(quiet=True)))
    size = (tmp_path / "index").stat().st_size
    assert size <= plan.bytes() <= size + 2**16
    assert plan.memory() >= plan.bytes()


def test_few_lists_hold_what_is_long_and_no_long_row_is_lost(tmp_path: Path) -> None:
    n, k = 4_000, 32
    rows, tests = long_tailed(n, k, 1), long_tailed(40, k, 2)
    lengths = np.linalg.norm(rows, axis=1)
    rows[17] *= 50 * lengths.max() / lengths[17]
    prepared, plan = store_of(tmp_path / "store.h5", rows), IndexPlan("float16", n, k + 1, 126)
    search = write_index(tmp_path / "index", build(prepared, PLAIN, plan, np.arange(n), Terminal(quiet=True)))
    index = Index(tmp_path / "index", np.arange(n), {"lists": 126, "probes": 32, "factor": 2}, search)
    exact = [strongest(row, 10) for row in tests @ rows.T]
    found = candidates([index], [PLAIN], [torch.from_numpy(tests)], 10)
    row = recall(exact, found, 10)
    assert row["helpful"] > 0.95
    assert row["harmful"] > 0.95
    sizes = np.array([search.invlists.list_size(number) for number in range(126)])
    queries = np.pad(tests, ((0, 0), (0, 1)))
    queries[:, -1] = np.linalg.norm(tests, axis=1)
    looked = sizes[search.quantizer.search(queries, 32)[1]].sum(axis=1)
    assert looked.mean() < 32 / 126 * n
    assert sizes.sum() == n
    assert all(17 in own for own in found)


def test_recall_is_the_share_of_the_strongest_among_the_candidates() -> None:
    def best(helpful: list[int], harmful: list[int]) -> Strongest:
        return Strongest(
            np.array(helpful, dtype=np.int64), np.zeros(len(helpful)), np.array(harmful, dtype=np.int64), np.zeros(0)
        )

    exact = [best([1, 2, 3, 4], [5, 6]), best([7, 8], []), best([], [])]
    row = recall(exact, [np.array([1, 2, 5]), np.array([7, 8, 9]), np.array([0])], 4)
    assert row == {
        "at": 4,
        "helpful": pytest.approx(0.75),
        "harmful": pytest.approx(0.5),
        "mean": pytest.approx(0.75),
        "interval": pytest.approx(1.96 * np.std([0.5, 1.0], ddof=1) / np.sqrt(2)),
    }
    assert recall(exact[:1], [np.array([1, 2, 5])], 2)["helpful"] == 1.0
    assert recall(exact[1:2], [np.array([7])], 2)["harmful"] is None


def test_what_memory_or_disk_do_not_hold_is_refused_before_work(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("gradients", cwd=tiny)
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "available_bytes", lambda _: 1_000)
        message = refusal(influence, tiny, "index")
    assert "influence.h5.index needs" in message
    assert "1.0 kB is free" in message
    assert "influence rank without --approximate needs no index" in message
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000))
        assert "influence.h5.index needs" in refusal(influence, tiny, "index")
    assert not list(tiny.glob("*.index*"))


def test_recall_that_no_number_of_lists_reaches_is_warned_of(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_build, "candidates", lambda *_: [np.arange(0)] * 3)
    done = influence("index", cwd=tiny)
    assert "warning: recall@10 stays below 0.98 even if all lists are read: recall@10 0.000" in done.err
