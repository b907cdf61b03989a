"""Eigenpairs equal a plain decomposition's, with rows of zeros left out and where LAPACK gives up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.solvers.eigen import eigenpairs


def symmetric(groups: int, width: int, zero: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(groups * width)
    matrix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.transpose(1, 2)
    matrix[:, list(zero)] = 0
    matrix[:, :, list(zero)] = 0
    return matrix


def check(matrix: Tensor) -> None:
    values, vectors = eigenpairs(matrix)
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix).flip(1), atol=1e-12)
    assert bool((values.diff(dim=1) <= 0).all())
    assert torch.allclose(vectors @ torch.diag_embed(values) @ vectors.transpose(1, 2), matrix, atol=1e-12)
    unit = torch.eye(matrix.shape[1], dtype=torch.float64).expand_as(matrix)
    assert torch.allclose(vectors.transpose(1, 2) @ vectors, unit, atol=1e-12)


@pytest.mark.parametrize("zero", [(), (0,), (1, 2, 6), tuple(range(7))])
@pytest.mark.parametrize("groups", [1, 3])
def test_indefinite_matrices_with_rows_of_zeros(groups: int, zero: tuple[int, ...]) -> None:
    check(symmetric(groups, 7, zero))


def test_a_row_that_is_zero_in_one_group_only_stays() -> None:
    matrix = symmetric(2, 5)
    matrix[0, 3] = matrix[0, :, 3] = 0
    check(matrix)


def refuse(*_: object) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def test_another_library_takes_over_where_the_first_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    check(symmetric(2, 6, (4,)))


def test_where_neither_converges_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_too(_: object) -> None:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(np.linalg, "eigh", refuse_too)
    with pytest.raises(InfluenceError, match="6 × 6 did not converge"):
        eigenpairs(symmetric(1, 6))
