"""Neighbours by lists against exact ones, and the recall that is told against a count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from influence_cli.evidence import approximate
from influence_cli.evidence.approximate import has_faiss, is_exact, lists_of, neighbours_of
from influence_cli.evidence.neighbours import NEIGHBOURS, nearest
from influence_cli.runtime.terminal import Terminal

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_faiss(), reason="faiss is an extra")


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search by lists from 1,000 examples on."""
    monkeypatch.setattr(approximate, "EXACT", 1_000)
    monkeypatch.setattr(approximate, "TRIED", 100)


def clusters(n: int, width: int = 16) -> Tensor:
    """Draw points around as many centres as a cluster has points."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, width, generator=generator)
    return centres.repeat(-(-n // 60), 1)[:n] + 0.7 * torch.randn(n, width, generator=generator)


def found(features: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor, float | None]:
    return neighbours_of(features, Terminal(silent=True), lambda _: None, part)


def share(rows: Tensor, exact: Tensor) -> float:
    """Count the share of the exact neighbours that are found, example by example."""
    both = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]
    return sum(both) / exact.numel()


@pytest.mark.usefixtures("lists")
def test_most_of_the_nearest_are_found_and_the_recall_is_told() -> None:
    features = clusters(3_000)
    rows, similarity, recall = found(features)
    exact, _ = nearest(features)
    assert recall is not None
    assert share(rows, exact) >= 0.93
    assert recall == pytest.approx(share(rows, exact), abs=0.03)
    assert not (rows == torch.arange(3_000)[:, None]).any(), "no example is its own neighbour"
    assert all(len(set(some)) == NEIGHBOURS for some in rows.tolist())
    unit = torch.nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(similarity, torch.einsum("nd,nkd->nk", unit, unit[rows]), rtol=1e-4, atol=1e-5)
    assert (similarity[:, :-1] >= similarity[:, 1:] - 1e-6).all()


@pytest.mark.usefixtures("lists")
def test_a_part_has_the_neighbours_that_it_has_among_all() -> None:
    features = clusters(3_000)
    rows, similarity, _ = found(features)
    some, near, _ = found(features, slice(700, 1_900))
    assert torch.equal(some, rows[700:1_900])
    assert torch.equal(near, similarity[700:1_900])


@pytest.mark.usefixtures("lists")
def test_more_copies_than_neighbours_leave_none_out() -> None:
    features = clusters(1_200)
    features[:70] = features[0]
    rows, similarity, _ = found(features)
    assert (similarity[:70] > 1 - 1e-5).all()
    assert (rows[:70] < 70).all()
    assert not (rows == torch.arange(1_200)[:, None]).any()


def test_few_examples_or_no_faiss_compare_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_exact(approximate.EXACT, CPU)
    assert not is_exact(approximate.EXACT + 1, CPU)
    assert lists_of(1_000_000) == 2_000
    monkeypatch.setattr(approximate, "EXACT", 100)
    monkeypatch.setattr(approximate, "has_faiss", lambda: False)
    features = clusters(200)
    rows, similarity, recall = found(features)
    exact = nearest(features)
    assert recall is None
    assert torch.equal(rows, exact[0])
    assert torch.equal(similarity, exact[1])


def test_the_evidence_tells_the_recall(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_cli.config.load import load_config
    from influence_cli.evidence.gather import gather_evidence
    from influence_cli.model.task import load_tasks

    monkeypatch.setattr(approximate, "EXACT", 200)
    monkeypatch.setattr(approximate, "TRIED", 50)
    monkeypatch.chdir(trained)
    (task,) = load_tasks(load_config(trained / "influence.yaml"))
    said: list[str] = []
    monkeypatch.setattr(Terminal, "say", lambda _, text: said.append(text))
    evidence = gather_evidence([task], task.train, Terminal(quiet=True), skip=False)
    assert evidence is not None
    recall = evidence.summary["recall"]
    assert recall > 0.9
    assert f"neighbours by faiss: {recall:.1%} of the 50 nearest, measured on 500 examples" in said
