"""Every kind of inverse against a dense float64 solve with the matrix that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from influence_cli.curvature.coordinates import Joint
from influence_cli.curvature.damping import Damping
from influence_cli.curvature.fisher import Moment
from influence_cli.curvature.spectrum import Group, Spectrum, joint, relaxation
from influence_cli.errors import InfluenceError
from influence_cli.influence.ensemble import SourcePart, solved_vectors
from influence_cli.influence.inverse import (
    ClosedForm,
    Identity,
    Inverse,
    Solver,
    Spectral,
    StoredMoment,
    Summary,
    all_closed,
)
from influence_cli.influence.iterative import Iterative
from influence_cli.solvers.cg import SolveInfo, conjugate_gradients

P, L2 = 8, 0.02
OTHER = Damping((0.7,), "another")
# A division in a basis leaves no more than rounding; so does the whole second moment of the rows themselves.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def curvature() -> Tensor:
    """Give a positive definite matrix with eigenvalues over some orders of magnitude."""
    rows = torch.randn(30, P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(0, -2, P)
    return rows.T @ rows / 30


def gradients(count: int) -> Tensor:
    """Give some gradients [count, p]."""
    return torch.randn(count, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def whole(damping: float = 0.05) -> tuple[Spectral, Tensor, Tensor]:
    """Give a division in all of a joint basis, that basis [p, k], and the matrix H + (l2 + λ)I."""
    h = curvature()
    values, basis = torch.linalg.eigh(h)
    spectrum = joint(values, size=P, trace=float(values.sum()), smallest=float(values[0]))
    return Spectral(spectrum, Damping((damping,), "given"), L2), basis, h + (L2 + damping) * torch.eye(P).double()


def layered() -> tuple[Spectral, Tensor, Tensor]:
    """Give the same of two layers, each with its own basis and λ."""
    h = torch.zeros(P, P, dtype=torch.float64)
    h[:3, :3], h[3:, 3:] = curvature()[:3, :3], curvature()[3:, 3:]
    parts = [torch.linalg.eigh(h[:3, :3]), torch.linalg.eigh(h[3:, 3:])]
    values, basis = torch.cat([part[0] for part in parts]), torch.block_diag(*(part[1] for part in parts))
    groups = tuple(
        Group(name, len(part[0]), float(part[0].sum()), part[0]) for name, part in zip("ab", parts, strict=True)
    )
    spectrum = Spectrum(values, torch.tensor([0] * 3 + [1] * 5), groups, 0.0)
    shift = torch.tensor([L2 + 0.1] * 3 + [L2 + 0.4] * 5, dtype=torch.float64)
    return Spectral(spectrum, Damping((0.1, 0.4), "given"), L2), basis, h + shift.diag()


def moment(count: int) -> tuple[StoredMoment, Tensor, Tensor, Tensor]:
    """Give a division by the second moment of some rows, the rows, that moment F and F + (l2 + λ)I."""
    rows = gradients(count)
    f = rows.T @ rows / count
    values, vectors = torch.linalg.eigh(f)
    used = values > 1e-10
    inverse = StoredMoment(
        Moment(values[used].flip(0), vectors[:, used].flip(1), float(values.sum())), Damping((0.05,), "given"), L2
    )
    return inverse, rows, f, f + (L2 + 0.05) * torch.eye(P).double()


def check(inverse: ClosedForm, rows: Tensor, matrix: Tensor) -> None:
    """Compare with a dense solve: ``rows`` are coordinates in the basis in which ``matrix`` is given."""
    solved = torch.linalg.solve(matrix, rows.T).T
    products = rows @ solved.T
    assert torch.allclose(inverse.apply(rows), solved, **CLOSE)
    assert torch.allclose(inverse.self_influence(rows), products.diag(), **CLOSE)
    white = inverse.whiten(rows)
    assert torch.allclose(white @ white.T, products, **CLOSE)


def test_a_division_in_a_basis_over_all_parameters() -> None:
    inverse, basis, matrix = whole()
    check(inverse, gradients(5) @ basis, basis.T @ matrix @ basis)
    h = curvature()
    assert inverse.summary.effective_dimension == pytest.approx(float(torch.linalg.solve(matrix, h).trace()))
    assert inverse.effective_dimension == inverse.summary.effective_dimension
    assert inverse.summary.kept == pytest.approx(1)
    at = inverse.at(OTHER)
    assert at.damping is OTHER
    check(at, gradients(5) @ basis, basis.T @ (h + (L2 + 0.7) * torch.eye(P).double()) @ basis)


def test_a_division_in_a_basis_per_layer() -> None:
    inverse, basis, matrix = layered()
    check(inverse, gradients(5) @ basis, basis.T @ matrix @ basis)
    assert inverse.summary.groups == ("a", "b")


def test_a_part_of_a_basis_says_what_share_it_keeps() -> None:
    inverse, basis, matrix = whole()
    values = inverse.spectrum.values[-3:]
    spectrum = joint(values, size=P, trace=float(inverse.spectrum.values.sum()), smallest=float(values[0]))
    part = replace(inverse, spectrum=spectrum)
    check(part, gradients(5) @ basis[:, -3:], basis[:, -3:].T @ matrix @ basis[:, -3:])
    # What is left out is bounded by its trace over l2 + λ.
    left_out = float(inverse.spectrum.values[:-3].sum()) / (L2 + 0.05)
    kept = part.effective_dimension
    assert part.summary.kept == pytest.approx(kept / (kept + left_out))


# More rows than parameters, and fewer: then what lies outside their span is no stored gradient.
@pytest.mark.parametrize("count", [20, 5])
def test_a_division_by_the_second_moment_of_the_stored_gradients(count: int) -> None:
    inverse, rows, f, matrix = moment(count)
    check(inverse, rows, matrix)
    assert inverse.effective_dimension == pytest.approx(float(torch.linalg.solve(matrix, f).trace()))
    check(inverse.at(OTHER), rows, f + (L2 + 0.7) * torch.eye(P).double())


@pytest.mark.parametrize("make", [lambda: whole()[0], lambda: moment(5)[0]])
def test_float32_rows_stay_float32(make: Any) -> None:
    inverse, rows = make(), gradients(3).float()
    for values in (inverse.apply(rows), inverse.self_influence(rows), inverse.whiten(rows)):
        assert values.dtype == torch.float32


def test_no_curvature() -> None:
    check(Identity(), gradients(4), torch.eye(P).double())
    assert (Identity().damping, Identity().shift, Identity().summary) == (None, 0.0, Summary())


def test_the_weight_of_a_checkpoint_is_in_scores_but_not_in_the_order_of_an_index() -> None:
    rows = gradients(4)
    weighted = Identity(weight=0.25)
    assert torch.equal(weighted.apply(rows), rows / 4)
    assert torch.allclose(weighted.self_influence(rows), rows.square().sum(dim=1) / 4)
    assert torch.equal(weighted.whiten(rows), rows)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_pole_is_refused_where_it_is_made_and_at_another_damping(damping: float) -> None:
    values = torch.tensor([-0.03, 1.0], dtype=torch.float64)
    spectrum = joint(values, size=2, trace=0.97, smallest=-0.03)
    with pytest.raises(InfluenceError, match="singular or indefinite"):
        Spectral(spectrum, Damping((damping,), "given"), L2)
    inverse = Spectral(spectrum, Damping((0.05,), "given"), L2)
    with pytest.raises(InfluenceError, match="singular or indefinite"):
        inverse.at(Damping((damping,), "given"))
    with pytest.raises(InfluenceError, match="singular or indefinite"):
        replace(moment(5)[0], l2=0.0).at(Damping((0.0,), "given"))


def test_a_solver_notes_each_solve_and_knows_no_self_influence() -> None:
    _, _, matrix = whole()
    noted: list[SolveInfo] = []

    def apply(rows: Tensor) -> Tensor:
        solution, info = conjugate_gradients(lambda v: v @ matrix, rows, tolerance=1e-10)
        noted.append(info)
        return solution

    inverse = Solver(Iterative(apply, L2 + 0.05, Damping((0.05,), "given"), smallest=-0.001, solves=noted))
    assert inverse.summary == Summary(smallest=-0.001, solves=noted)
    rows = gradients(3)
    assert torch.allclose(inverse.apply(rows), torch.linalg.solve(matrix, rows.T).T, rtol=1e-7)
    assert len(inverse.summary.solves) == 1
    kinds: list[Inverse] = [Identity(), whole()[0], moment(5)[0]]
    assert all_closed(kinds)
    assert not all_closed([*kinds, inverse])


@pytest.mark.parametrize("k", [P, 3])
def test_a_part_of_a_run_is_a_matrix_exponential(k: int) -> None:
    h, time = curvature(), 4.0
    values, basis = (part[..., -k:] for part in torch.linalg.eigh(h))
    kept = basis @ values.diag() @ basis.T + L2 * torch.eye(P).double()
    factors, decay = relaxation(values + L2, time), torch.expm1(-time * values)
    network: Any = None  # of a joint basis the layout of the parameters plays no part
    part = SourcePart(network, Joint(basis), 0, factors, decay, time, L2, Summary())
    v = gradients(3)
    decayed = torch.linalg.matrix_exp(-time * kept)
    assert torch.allclose(part.carry(v), v @ decayed, **CLOSE)
    # Without what a step along gᵢ left out: (I − exp(−ηKH))H⁻¹ in the span of what is kept.
    expected = v @ (torch.eye(P).double() - decayed) @ torch.linalg.inv(kept) @ basis
    assert torch.allclose(part.apply(part.project(v)), expected, **CLOSE)
    first, last = solved_vectors([part, replace(part, segment=1)], [v])
    assert torch.allclose(last, expected, **CLOSE)
    assert torch.allclose(first, part.apply(part.project(v @ decayed)), **CLOSE)
