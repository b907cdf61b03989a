"""Eigenpairs of the symmetric matrices of a curvature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices A = V Λ Vᵀ.

    Rows that are zero in all of them are left out of the decomposition: pixels that never vary, or padding that a
    kernel reads around an image of one pixel. They cost the most and have eigenvalue 0.

    Args:
        matrix: [g, w, w]; its two triangles may differ by rounding.

    Returns:
        Λ [g, w], falling, and V [g, w, w], eigenvectors in columns.
    """
    matrix = (matrix + matrix.transpose(1, 2)).div_(2)
    used = matrix.ne(0).any(dim=2).any(dim=0)
    if bool(used.all()):
        values, vectors = _decompose(matrix)
        return values.flip(1), vectors.flip(2)
    inner, outer = torch.nonzero(used)[:, 0], torch.nonzero(~used)[:, 0]
    parts = _decompose(matrix[:, inner[:, None], inner])
    values, order = torch.cat([parts[0], matrix.new_zeros(len(matrix), len(outer))], dim=1).sort(dim=1, descending=True)
    vectors = torch.zeros_like(matrix)
    for whole, part, place in zip(vectors, parts[1], order.argsort(dim=1), strict=True):
        whole[inner[:, None], place[: len(inner)]] = part
        whole[outer, place[len(inner) :]] = 1
    return values, vectors


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Give eigenvalues in ascending order and their vectors; use another LAPACK if the first does not converge."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except torch.linalg.LinAlgError as first:  # type: ignore[attr-defined]
        # Divide and conquer can fail for many equal eigenvalues; another library often succeeds.
        try:
            pair = np.linalg.eigh(matrix.double().cpu().numpy())
        except np.linalg.LinAlgError:
            raise InfluenceError(
                f"the eigenvectors of a matrix of {matrix.shape[-1]:,} × {matrix.shape[-1]:,} did not converge",
                "leave its layer out (gradients.layers), or use curvature.method: identity",
            ) from first
        values, vectors = (torch.from_numpy(np.ascontiguousarray(part)).to(matrix) for part in pair)
        return values, vectors
