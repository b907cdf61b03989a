"""The largest eigenvalue and the ends of a symmetric matrix's spectrum, from products with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

# Random vectors that estimate the mean eigenvalue outside the Krylov space.
PROBES = 4


class Ends(NamedTuple):
    """Eigenvalues of a symmetric matrix; the ends are estimates from inside the spectrum."""

    smallest: float
    mean: float
    largest: float


def power_iteration(product: Product, size: int, *, like: Tensor, iterations: int = 30, seed: int = 0) -> float:
    """Estimate the largest |eigenvalue| of a symmetric matrix, or of one preconditioned: M⁻¹A has real ones too.

    Args:
        product: V [1, p] to V A [1, p].
        size: p.
        like: a tensor of the dtype and device to work in.
        iterations: products.
        seed: of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, size, generator=generator).to(like)
    value = 0.0
    for _ in range(iterations):
        vector = vector / vector.norm().clamp_min(1e-30)
        vector = product(vector)
        value = float(vector.norm())
    return value


def beside(known: Tensor, vector: Tensor) -> Tensor:
    """Take out of a vector what lies in the span of orthonormal rows."""
    for _ in range(2):  # twice is enough (Kahan)
        vector = vector - known.T @ (known @ vector)
    return vector


def tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    """Give what a symmetric matrix is in its Krylov space: float64 [m, m].

    Args:
        alphas: the m numbers on the diagonal.
        betas: those beside it, at least m − 1.
    """
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    for row in range(len(alphas) - 1):
        matrix[row, row + 1] = matrix[row + 1, row] = betas[row]
    return matrix


def lanczos(product: Product, size: int, *, like: Tensor, iterations: int = 30, seed: int = 0) -> Ends:
    """Measure the ends of a symmetric matrix's spectrum (Lanczos 1950) and its mean (Meyer et al. 2021, "Hutch++").

    Full reorthogonalisation in float64, on the CPU: not every device has that.

    Args:
        product: V [1, p] to V A [1, p].
        size: p.
        like: a tensor of the dtype and device of the products.
        iterations: products, at most p; a few more for the mean.
        seed: of the start.

    Returns:
        (smallest, mean, largest) eigenvalue; the ends are estimates from inside the spectrum. For a large repeated
        eigenvalue one direction is known, and probes must find the others.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).double()
    basis = [start / start.norm()]

    def image_of(vector: Tensor) -> Tensor:
        return product(vector[None].to(like))[0].cpu().double()

    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(iterations, size)):
        image = image_of(basis[-1])
        alphas.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        image = beside(known, image)
        beta = float(image.norm())
        if beta <= 1e-10 * max(map(abs, alphas)):
            break
        betas.append(beta)
        basis.append(image / beta)
    values = torch.linalg.eigvalsh(tridiagonal(alphas, betas))
    # The trace is known in the Krylov space, which holds the largest eigenvalues; probes estimate the rest.
    known, trace = torch.stack(basis[: len(alphas)]), sum(alphas)
    for _ in range(PROBES if len(alphas) < size else 0):
        probe = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).double()
        probe -= known.T @ (known @ probe)
        trace += float(probe @ image_of(probe)) / PROBES
    return Ends(float(values[0]), trace / size, float(values[-1]))
