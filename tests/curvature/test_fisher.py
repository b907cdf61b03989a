"""The second moment of stored gradients against a dense computation, and the scores that follow from it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from influence_cli.curvature import fisher
from influence_cli.curvature.fisher import stored_moment
from influence_cli.errors import InfluenceError
from influence_cli.store.layout import Layout, create
from influence_cli.store.store import READ, SKIPPED, Rows, Store
from tests.conftest import Command

L2, DAMPING, BLOCK = 0.01, 0.05, 16
METHOD = ("-s", "curvature.method=fisher", "-s", f"curvature.damping={DAMPING}")


def gradients(n: int, p: int, skipped: int = 0) -> np.ndarray:
    """Rows of very different directions, some of them zero: those of examples that could not be read."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(n, p)) * np.logspace(0, -3, p)
    rows[:skipped] = 0
    return rows.astype(np.float32)


def make(path: Path, rows: np.ndarray, dtype: str = "float32", skipped: int = 0) -> Path:
    """Write a complete store of raw gradients."""
    n, p = rows.shape
    layout = Layout(n, p, 2, BLOCK, dtype)
    create(path, layout, fingerprint={}, facts={}, labels=np.zeros(n, np.int64), indices=np.arange(n), arrays={})
    state = np.full(n, READ, dtype=np.uint8)
    state[:skipped] = SKIPPED
    with Store.open(path, write=True) as store:
        for block in range(layout.blocks):
            where = layout.rows(block)
            count = where.stop - where.start
            outputs, losses = np.zeros((count, 2), np.float32), np.zeros(count, np.float32)
            store.write(block, Rows(rows[where], losses, outputs, state[where], block))
    return path


def stored_rows(path: Path) -> np.ndarray:
    with Store.open(path) as store:
        return np.concatenate([rows for _, rows in store.scan()]).astype(np.float64)


# More examples than parameters, as many, and fewer; the last block is not full.
@pytest.mark.parametrize(("n", "p"), [(90, 20), (40, 40), (40, 120)])
@pytest.mark.parametrize("skipped", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_moment_is_that_of_a_dense_computation(tmp_path: Path, n: int, p: int, skipped: int, dtype: str) -> None:
    rows = gradients(n, p, skipped)
    path = make(tmp_path / "store.h5", rows, dtype, skipped)
    told: list[int] = []
    found = stored_moment(path, told.append, where="curvature fisher")
    assert sum(told) == n
    kept = stored_rows(path)
    assert np.allclose(kept, rows, rtol=0, atol=0 if dtype == "float32" else 1e-3 * np.abs(rows).max())
    dense = torch.from_numpy(kept.T @ kept / (n - skipped))
    exact = torch.linalg.eigvalsh(dense).flip(0)[: len(found.values)]
    assert len(found.values) == np.linalg.matrix_rank(kept)
    assert float((found.values - exact).abs().max() / exact[0]) <= 1e-6
    assert found.trace == pytest.approx(float(dense.trace()), rel=1e-6)
    assert bool((found.values.diff() <= 0).all())
    gram = found.vectors.T @ found.vectors
    assert float((gram - torch.eye(len(gram))).abs().max()) <= 1e-6
    rebuilt = found.vectors @ torch.diag(found.values) @ found.vectors.T
    assert float((rebuilt - dense).norm() / dense.norm()) <= 1e-6


def test_gradients_of_few_directions_give_no_others(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    rows = (generator.normal(size=(50, 3)) @ generator.normal(size=(3, 20))).astype(np.float32)
    for number, some in enumerate((rows, rows[:10])):
        found = stored_moment(make(tmp_path / f"{number}.h5", some), where="curvature fisher")
        # All others are the rounding of float32.
        assert int((found.values > 1e-6 * found.values[0]).sum()) == 3
        assert found.trace == pytest.approx(float((some.astype(np.float64) ** 2).sum() / len(some)), rel=1e-6)


def test_too_large_is_an_error_that_names_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "store.h5", gradients(90, 20))
    monkeypatch.setattr(fisher, "WIDEST", 20)
    stored_moment(path, where="w")
    monkeypatch.setattr(fisher, "WIDEST", 19)
    with pytest.raises(InfluenceError) as error:
        stored_moment(path, where="influence.yaml:9")
    assert error.value.message.startswith("influence.yaml:9: the second moment of 90 gradients of 20 parameters needs")
    assert "the limit is 19 parameters or examples" in error.value.message
    assert "gradients.layers" in error.value.hint
    # Either of the two may be the small one.
    stored_moment(make(tmp_path / "wide.h5", gradients(19, 120)), where="w")


@pytest.mark.parametrize(("n", "p", "numbers"), [(90, 20, 4 * 20 * 20), (20, 90, 3 * 20 * 20 + 2 * 20 * 90)])
def test_too_little_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, p: int, numbers: int
) -> None:
    path = make(tmp_path / "store.h5", gradients(n, p))
    monkeypatch.setattr(fisher, "available_bytes", lambda _device: 8 * numbers - 1)
    with pytest.raises(InfluenceError, match="is free"):
        stored_moment(path, where="w")
    monkeypatch.setattr(fisher, "available_bytes", lambda _device: 8 * numbers)
    stored_moment(path, where="w")


def test_gradients_that_are_all_zero_are_an_error(tmp_path: Path) -> None:
    for number, shape in enumerate(((40, 10), (10, 40))):
        path = make(tmp_path / f"{number}.h5", np.zeros(shape, np.float32))
        with pytest.raises(InfluenceError, match="every stored gradient is zero"):
            stored_moment(path, where="w")


# --- through the command line: 320 examples, 500 parameters


def closed_form(project: Path, part: str) -> Tensor:
    """Give the gradients [n, 500] of the softmax regression by its formula, in float64."""
    data = ImageFolder(project / part)
    x = torch.stack([torch.tensor(np.array(image.convert("L"))).double() / 255 for image, _ in data])
    x = x.view(-1, 7, 4, 7, 4).mean(dim=(2, 4)).flatten(1)
    state = torch.load(project / "model.pt")
    delta = (x @ state["2.weight"].double().T + state["2.bias"].double()).softmax(dim=1)
    delta -= torch.nn.functional.one_hot(torch.tensor(data.targets), 10)
    return torch.cat([(delta[:, :, None] * x[:, None, :]).flatten(1), delta], dim=1)


def solved(rows: Tensor, sides: Tensor) -> Tensor:
    """Give (F + (l2 + λ)I)⁻¹ of some vectors [m, p] by a dense solve, F = (1/n) Σ gᵢgᵢᵀ."""
    moment = rows.T @ rows / len(rows) + (L2 + DAMPING) * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(moment, sides.T).T


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("float16", 3e-3)])
def test_rank_equals_a_dense_solve(influence: Command, project: Path, dtype: str, close: float) -> None:
    words = (*METHOD, "-s", f"gradients.store_dtype={dtype}", "--matrix", "m.h5", "-o", "rows.jsonl")
    done = influence("rank", "3", "17", "40:44", *words, cwd=project)
    with h5py.File(project / "m.h5") as file:
        ours = np.asarray(file["influence"])
    rows, tests = closed_form(project, "train"), closed_form(project, "test")[[3, 17, 40, 41, 42, 43]]
    exact = (solved(rows, tests) @ rows.T / 320).numpy()
    assert ours.shape == (6, 320)
    assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) <= close
    run = json.loads((project / "rows.jsonl.run.json").read_text())["stores"][0]
    values = torch.linalg.eigvalsh(rows @ rows.T / 320)
    d_eff = float((values / (values + L2 + DAMPING)).sum())
    assert run["method"] == "fisher"
    assert run["damping"] == DAMPING
    assert run["effective_dimension"] == pytest.approx(d_eff, rel=1e-2)
    assert f"damping λ = {DAMPING}" in done.err
    with h5py.File(project / "influence.h5") as file:
        assert file["coordinates"].shape[1] == 500
        assert file["coordinates"].dtype == dtype


def test_the_question_turned_round_has_the_same_answer(influence: Command, project: Path) -> None:
    done = influence("rank", "--train", 7, *METHOD, "--all", cwd=project)
    rows = [json.loads(line) for line in done.out.splitlines()]
    ours = {row["test"]: row["influence"] for row in rows}
    train, tests = closed_form(project, "train"), closed_form(project, "test")
    exact = (tests @ solved(train, train[7:8])[0] / 320).numpy()
    assert np.allclose([ours[index] for index in range(80)], exact, rtol=1e-3, atol=1e-5 * np.abs(exact).max())


def test_mislabels_equals_a_dense_solve(influence: Command, project: Path) -> None:
    done = influence("mislabels", "--signal", "self-influence", "--all", *METHOD, cwd=project)
    rows = [json.loads(line) for line in done.out.splitlines()]
    ours = np.empty(320)
    ours[[row["index"] for row in rows]] = [row["self_influence"] for row in rows]
    train = closed_form(project, "train")
    exact = ((solved(train, train) * train).sum(dim=1) / 320).numpy()
    assert np.allclose(ours, exact, rtol=1e-3)


def test_of_a_test_example_the_part_in_the_span_of_the_training_gradients_counts(
    influence: Command, project: Path
) -> None:
    done = influence("mislabels", "--on", "test", "--signal", "self-influence", "--all", *METHOD, cwd=project)
    rows = [json.loads(line) for line in done.out.splitlines()]
    ours = np.empty(80)
    ours[[row["index"] for row in rows]] = [row["self_influence"] for row in rows]
    train, tests = closed_form(project, "train"), closed_form(project, "test")
    span = torch.linalg.svd(train, full_matrices=False)[2]
    inside = tests @ span.T @ span
    exact = ((solved(train, inside) * inside).sum(dim=1) / 320).numpy()
    assert np.allclose(ours, exact, rtol=1e-3)


def test_too_large_ends_the_command(influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "WIDEST", 100)
    done = influence("rank", 3, *METHOD, cwd=project, code=2)
    assert "the limit is 100 parameters or examples" in done.err
    assert "gradients.layers" in done.err
