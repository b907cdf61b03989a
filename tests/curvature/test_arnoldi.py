"""Top eigenpairs against a dense decomposition, and the influence restricted to their span."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from influence_cli.curvature.arnoldi import PROBES, RESIDUAL, Ritz, top_eigenvectors
from influence_cli.errors import InfluenceError
from tests.conftest import Command

L2, DAMPING = 0.01, 0.01


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues, float64."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return turn @ torch.diag(values.double()) @ turn.T


def found_in(matrix: Tensor, **options: object) -> Ritz:
    like = options.pop("like", matrix)
    own = matrix.to(like)
    return top_eigenvectors(lambda v: v @ own, len(matrix), like=like, **options)  # type: ignore[arg-type]


def restricted(values: Tensor, vectors: Tensor, grads: Tensor, shift: float) -> Tensor:
    """Influence of every pair, without 1/n, in the span of some directions."""
    c = grads @ vectors.double()
    return (c / (values + shift)) @ c.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_eigenpairs_equal_a_dense_decomposition(dtype: torch.dtype) -> None:
    values = torch.logspace(0, -6, 300)
    matrix, kept = symmetric(values), 20
    found = found_in(matrix, like=torch.empty(0, dtype=dtype), krylov=120, kept=kept)
    exact_values, exact_vectors = torch.linalg.eigh(matrix)
    exact_values, exact_vectors = exact_values.flip(0)[:kept], exact_vectors.flip(1)[:, :kept]
    assert found.vectors.shape == (300, kept)
    assert found.vectors.dtype == dtype
    assert found.values.dtype == torch.float64
    assert found.residual <= 1e-6
    assert bool((found.values.diff() < 0).all())
    assert float((found.values - exact_values).abs().max()) <= 1e-6
    gram = found.vectors.double().T @ found.vectors.double()
    assert float((gram - torch.eye(kept)).abs().max()) <= (1e-12 if dtype == torch.float64 else 1e-5)
    grads = torch.randn(30, 300, dtype=torch.float64)
    ours = restricted(found.values, found.vectors, grads, 1e-2)
    exact = restricted(exact_values, exact_vectors, grads, 1e-2)
    assert float((ours - exact).norm() / exact.norm()) <= 1e-5


def test_the_residual_is_that_of_the_pairs() -> None:
    matrix = symmetric(torch.linspace(1, 0.01, 200))
    found = found_in(matrix, krylov=60, kept=50)
    # This spectrum is hard: of 50 that were asked for, those are given back that have converged.
    assert 1 <= len(found.values) < 50
    actual = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    largest = float(torch.linalg.eigvalsh(matrix).abs().max())
    assert float(actual.max()) / largest == pytest.approx(found.residual, rel=0.05)
    assert found.residual <= RESIDUAL


def test_a_negative_eigenvalue_is_kept_and_reported() -> None:
    values = torch.cat([torch.logspace(0, -4, 99), torch.tensor([-0.3])])
    matrix = symmetric(values)
    found = found_in(matrix, krylov=80, kept=20)
    exact = torch.linalg.eigvalsh(matrix)
    assert found.smallest == pytest.approx(-0.3, abs=1e-6)
    assert float(found.values[-1]) == pytest.approx(-0.3, abs=1e-6)
    top = exact[exact.abs().argsort(descending=True)[:20]].sort(descending=True).values
    assert float((found.values - top).abs().max()) <= 1e-6


def test_a_whole_krylov_space_is_exact() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 40))
    found = found_in(matrix, krylov=200, kept=100)
    exact_values, exact_vectors = torch.linalg.eigh(matrix)
    assert found.products == 40 + PROBES
    assert float((found.values - exact_values.flip(0)).abs().max()) <= 1e-10
    assert found.smallest == pytest.approx(-1)
    grads = torch.randn(9, 40, dtype=torch.float64)
    exact = restricted(exact_values, exact_vectors, grads, 1.5)
    assert float((restricted(found.values, found.vectors, grads, 1.5) - exact).norm() / exact.norm()) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "values",
    [
        torch.full((12,), 0.5),
        torch.tensor([3.0, 3, 3, 2, 2, 1, 0, 0, 0, 0, 0, 0]),
        torch.tensor([2.0, 2, 1, -1, -1] + [0.0] * 20),
    ],
    ids=["all the same", "with a null space", "of both signs"],
)
def test_an_eigenvalue_that_occurs_several_times_is_found_as_often(values: Tensor, dtype: torch.dtype) -> None:
    matrix = symmetric(values)
    found = found_in(matrix, like=torch.empty(0, dtype=dtype))
    wanted = values[values != 0].double()
    used = found.values.abs() > 1e-3
    assert found.values[used].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    vectors = found.vectors[:, used].double()
    assert float((vectors.T @ vectors - torch.eye(len(wanted))).abs().max()) <= 1e-5
    assert float((matrix @ vectors - vectors * found.values[used]).abs().max()) <= 1e-5
    # The rest of the space is null, and is not searched to its end.
    assert found.products <= len(wanted) + 4 + PROBES


def test_the_trace_is_estimated_without_bias_where_it_is_not_known() -> None:
    matrix = symmetric(torch.logspace(0, -3, 60))
    traces = [found_in(matrix, krylov=30, kept=2, seed=seed).trace for seed in range(40)]
    spread = float(np.std(traces))
    assert float(np.mean(traces)) == pytest.approx(float(matrix.trace()), abs=4 * spread / np.sqrt(len(traces)))
    # Random vectors alone would vary by √(2/8)‖H‖ or so: the large eigenvalues are in the Krylov space.
    assert spread < 0.1 * float(matrix.norm())
    assert found_in(matrix, krylov=60, kept=2).trace == pytest.approx(float(matrix.trace()), rel=1e-9)


def test_the_seed_decides_and_products_are_counted() -> None:
    matrix, told = symmetric(torch.logspace(0, -3, 60)), []
    first = found_in(matrix, krylov=15, kept=3, seed=4, on_product=told.append)
    again = found_in(matrix, krylov=15, kept=3, seed=4)
    assert torch.equal(first.vectors, again.vectors)
    assert first.trace == again.trace
    assert first.trace != found_in(matrix, krylov=15, kept=3, seed=5).trace
    assert sum(told) == first.products == 15 + PROBES


def test_too_little_memory_is_an_error_that_names_a_remedy() -> None:
    matrix = symmetric(torch.logspace(0, -3, 60))
    enough = 2 * 24 * 8 * 60
    with pytest.raises(InfluenceError) as error:
        found_in(matrix, free=enough - 1)
    assert "24 vectors of 60 numbers (23.0 kB)" in error.value.message
    assert "23.0 kB is free" in error.value.message
    assert "gradients.layers" in error.value.hint
    assert "ekfac" in error.value.hint
    assert found_in(matrix, free=enough).products == 24 + PROBES


def test_a_curvature_of_zero_is_an_error() -> None:
    with pytest.raises(InfluenceError, match="zero along every direction"):
        found_in(torch.zeros(30, 30))


# --- through the command line


def gradient(project: Path, part: str, index: int) -> tuple[Tensor, Tensor]:
    """Give ∇L of an image under the softmax regression, by its formula: weight then bias, float64; and its loss."""
    image, label = ImageFolder(project / part)[index]
    pixels = torch.tensor(np.array(image.convert("L"))).double() / 255
    x = pixels.reshape(7, 4, 7, 4).mean(dim=(1, 3)).flatten()
    state = torch.load(project / "model.pt")
    outputs = state["2.weight"].double() @ x + state["2.bias"].double()
    delta = outputs.softmax(dim=0)
    delta[label] -= 1
    return torch.cat([torch.outer(delta, x).flatten(), delta]), -outputs.log_softmax(dim=0)[label]


@pytest.mark.slow
def test_rank_equals_the_explicit_basis_cut_to_as_many_directions(
    influence: Command, stored: Path, project: Path
) -> None:
    words = ("-s", "curvature.method=arnoldi", "-s", f"curvature.damping={DAMPING}", "--matrix", "m.h5")
    done = influence("rank", 3, *words, "-v", "-o", "rows.jsonl", cwd=project)
    with h5py.File(project / "m.h5") as file:
        ours = np.asarray(file["influence"])[0]
    with h5py.File(project / "influence.h5") as file:
        k = len(file["spectrum"])
        spectrum = np.asarray(file["spectrum"])
    assert 20 <= k <= 100
    with h5py.File(stored / "influence.h5") as file:
        exact = {name: np.asarray(file[name]) for name in ("spectrum", "basis", "coordinates")}
    assert np.abs(spectrum[:10] - exact["spectrum"][:10]).max() <= 1e-6

    def explicit(count: int) -> np.ndarray:
        own = gradient(project, "test", 3)[0].numpy() @ exact["basis"][:, :count]
        scaled = own / (exact["spectrum"][:count] + L2 + DAMPING)
        return exact["coordinates"][:, :count] @ scaled / 320

    cut = explicit(k)
    assert np.linalg.norm(ours - cut) / np.linalg.norm(cut) <= 1e-2
    whole = explicit(len(exact["spectrum"]))
    assert np.corrcoef(ours, whole)[0, 1] > 0.99
    run = json.loads((project / "rows.jsonl.run.json").read_text())["stores"][0]
    kept = exact["spectrum"][:k]
    assert run["method"] == "arnoldi"
    assert run["coordinates"] == k
    assert run["parameters"] == 500
    assert run["damping"] == DAMPING
    d_eff = float((kept / (kept + L2 + DAMPING)).sum())
    assert run["effective_dimension"] == pytest.approx(d_eff, rel=1e-2)
    # What is not kept counts by its trace, which is estimated in part: at most a little too much of it.
    dimension = float((exact["spectrum"] / (exact["spectrum"] + L2 + DAMPING)).sum())
    assert run["kept_share"] == pytest.approx(d_eff / dimension, abs=0.03)
    assert f"arnoldi: {k} eigenpairs from" in done.err
    assert f"{k} of 500 coordinates kept" in done.err


def test_too_little_memory_ends_the_command(influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_cli.precompute.fit.available_bytes", lambda _device: 1000)
    done = influence("rank", 3, "-s", "curvature.method=arnoldi", cwd=project, code=2)
    assert "curvature arnoldi needs at least 24 vectors of 500 numbers" in done.err
    assert "use curvature.method: ekfac" in done.err
    assert not (project / "influence.h5").exists()
