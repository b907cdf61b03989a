"""Leave-one-out of a logistic readout, to first order: one Newton step from the fit with the example.

For multinomial logistic regression f = Wφ with the objective (1/n)Σ ℓ(f_j, y_j) + (ridge/2)‖W‖², the outputs without
example i are, one Newton step away (Pregibon 1981; Rad & Maleki 2020, approximate leave-one-out),

    f₋ᵢ = fᵢ + Kᵢ(I − WᵢKᵢ)⁻¹(pᵢ − yᵢ),  Kᵢ = (φᵢᵀ ⊗ I) H⁻¹ (φᵢ ⊗ I)/n  [C, C],  Wᵢ = diag(pᵢ) − pᵢpᵢᵀ

H is the Hessian of the objective: evidence/readout.py's ridge regression is the case in which this is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.errors import InfluenceError

# The penalty of components of unit variance. Most weights: the Hessian is dense, 8·WEIGHTS² bytes.
RIDGE, WEIGHTS = 1e-2, 2_560
# Most Newton steps, and the decrement (a drop of the objective, in nats) at which they end.
STEPS, DECREMENT = 30, 1e-9
CHUNK = 4_096


def leave_one_out_logistic(components: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Fit a logistic readout and give its outputs without each example, as log-probabilities.

    Args:
        components: float32 [n, q], of unit variance, leading ones first; ``WEIGHTS`` limits how many are used.
        targets: int64 [n].
        classes: C.

    Returns:
        log softmax f₋ᵢ, float32 [n, C], on the components' device.

    Raises:
        InfluenceError: more classes than a dense Hessian allows.
    """
    width = min(components.shape[1], WEIGHTS // classes - 1)
    if width < 1:
        raise InfluenceError(
            f"--signal logistic: a dense Hessian allows up to {WEIGHTS // 2:,} classes, but there are {classes:,}",
            "use --signal readout",
        )
    wide = torch.float32 if components.device.type == "mps" else torch.float64
    phi = functional.pad(components[:, :width].to(wide), (0, 1), value=1.0)
    onehot = functional.one_hot(targets, classes).to(phi)
    weights, factor = _newton(phi, onehot)
    inverse = torch.cholesky_inverse(factor).view(classes, width + 1, classes, width + 1)
    parts = []
    for rows, given in zip(torch.split(phi, CHUNK), torch.split(onehot, CHUNK), strict=True):
        outputs = rows @ weights.T
        soft = outputs.softmax(dim=1)
        k = torch.stack([torch.einsum("bi,ijd,bd->bj", rows, block, rows) for block in inverse], dim=1)
        k = k / len(phi)
        w = torch.diag_embed(soft) - soft[:, :, None] * soft[:, None, :]
        left = torch.eye(classes).to(phi) - w @ k
        step = torch.linalg.solve(left, (soft - given)[:, :, None])
        parts.append((outputs + (k @ step)[:, :, 0]).log_softmax(dim=1).float())
    return torch.cat(parts)


def _newton(phi: Tensor, onehot: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the objective by damped Newton steps.

    Returns:
        W [C, q], and the Cholesky factor of H at it [C·q, C·q].
    """
    n, q, classes = len(phi), phi.shape[1], onehot.shape[1]
    weights = torch.zeros(classes, q).to(phi)
    value = _objective(phi, onehot, weights)
    for _ in range(STEPS):
        soft = (phi @ weights.T).softmax(dim=1)
        gradient = (soft - onehot).T @ phi / n + RIDGE * weights
        hessian = torch.empty(classes, q, classes, q).to(phi)
        for a in range(classes):
            for b in range(a, classes):
                curve = soft[:, a] * (float(a == b) - soft[:, b]) / n
                block = (phi * curve[:, None]).T @ phi
                hessian[a, :, b], hessian[b, :, a] = block, block
        square = hessian.view(classes * q, classes * q)
        square.diagonal().add_(RIDGE)
        factor = torch.linalg.cholesky(square)
        step = torch.cholesky_solve(gradient.reshape(-1, 1), factor).view(classes, q)
        decrement = float((gradient * step).sum()) / 2
        if decrement < DECREMENT:
            break
        size = 1.0
        while (following := _objective(phi, onehot, weights - size * step)) > value and size > 1e-6:
            size /= 2
        weights, value = weights - size * step, following
    return weights, factor


def _objective(phi: Tensor, onehot: Tensor, weights: Tensor) -> float:
    losses = functional.cross_entropy(phi @ weights.T, onehot)
    return float(losses + RIDGE / 2 * weights.square().sum())
