"""Leave-one-out readout: what a linear readout of a network's activations says about an example it has not seen.

For ridge regression with intercept from standardised, centred activations Φ [n, d] to one-hot labels Y, the output
without example i follows from the output with it (the PRESS identity, Allen 1974), without solving a regression again:

    ŷ₋ᵢ = (ŷᵢ − hᵢyᵢ)/(1 − hᵢ),  hᵢ = 1/n + φᵢᵀ(ΦᵀΦ + n·ridge·I)⁻¹φᵢ

It is exact for the readout. The network itself has seen the label, which is why all layers vote and not only the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.errors import InfluenceError
from influence_cli.solvers.eigen import eigenpairs

# Ridges tried, as multiples of the mean eigenvalue of ΦᵀΦ/n.
RIDGES = tuple(10.0 ** (power / 2) for power in range(-12, 5))
# Lower limit of 1 − hᵢ: below it the readout interpolates, and its output without the example is only rounding.
FLOOR = 1e-4
# Examples, and columns, per matrix product.
CHUNK, COLUMNS = 8_192, 256
# Leading principal components for the neighbours and the logistic readout.
COMPONENTS = 64


@dataclass(frozen=True)
class Readout:
    """Leave-one-out outputs of a ridge readout.

    Attributes:
        outputs: ŷ₋ᵢ, float32 [n, C].
        log_probabilities: log softmax(temperature · ŷ₋ᵢ), float32 [n, C].
        ridge: chosen among ``RIDGES`` by the likelihood of the labels.
        temperature: fitted by the same likelihood.
        leverage: hᵢ, float32 [n].
        dimension: Σhᵢ, the effective number of parameters per class.
        floored: examples whose 1 − hᵢ was below ``FLOOR``.
        components: the standardised activations in their leading principal components, each of unit variance,
            float32 [n, q], q ≤ ``COMPONENTS``.
    """

    outputs: Tensor
    log_probabilities: Tensor
    ridge: float
    temperature: float
    leverage: Tensor
    dimension: float
    floored: int
    components: Tensor


def leave_one_out(features: Tensor, targets: Tensor, classes: int) -> Readout:
    """Fit the ridge readout and give its leave-one-out outputs.

    Args:
        features: float32 [n, d], on the device that does the work.
        targets: int64 [n].
        classes: C.

    Returns:
        The readout, on the features' device.

    Raises:
        InfluenceError: fewer than three examples, or activations that are all constant.
    """
    n = len(features)
    if n < 3:
        raise InfluenceError(f"a leave-one-out readout needs at least 3 examples, but there are {n}")
    turned, values, weights, mean = _regression(features, targets, classes)
    onehot = functional.one_hot(targets, classes).to(features)
    ridges = [multiple * float(values.mean()) for multiple in RIDGES]
    best: tuple[float, float, float, Tensor, Tensor] | None = None
    temperature, step = 1.0, max(1, COLUMNS // classes)
    for start in range(0, len(ridges), step):  # one pass over the examples per group of ridges that fits
        tried = ridges[start : start + step]
        inverse = (1 / (values[:, None] + torch.tensor(tried, dtype=values.dtype, device=values.device))).to(features)
        columns = (inverse[:, :, None] * weights[:, None, :]).flatten(1)
        outputs = mean + torch.cat([part @ columns for part in torch.split(turned, CHUNK)]).view(n, -1, classes)
        leverages = 1 / n + torch.cat([part.square() @ inverse for part in torch.split(turned, CHUNK)]) / n
        for number, ridge in enumerate(tried):
            leverage = leverages[:, number]
            left = (1 - leverage).clamp_min(FLOOR)[:, None]
            without = (outputs[:, number] - leverage[:, None] * onehot) / left
            temperature = fit_temperature(without, targets, temperature)
            loss = float(functional.cross_entropy(temperature * without, targets))
            if best is None or loss < best[0]:
                best = (loss, ridge, temperature, without, leverage)
    if best is None:
        raise ValueError("there are ridges")
    _, ridge, temperature, without, leverage = best
    return Readout(
        without,
        (temperature * without).log_softmax(dim=1),
        ridge,
        temperature,
        leverage,
        float(leverage.sum()),
        int((1 - leverage < FLOOR).sum()),
        turned[:, :COMPONENTS] / values[:COMPONENTS].sqrt().to(features),
    )


def fit_temperature(outputs: Tensor, targets: Tensor, start: float = 1.0) -> float:
    """Find τ ≥ 0 that maximises the likelihood of the targets under softmax(τ · outputs), by Newton's method.

    The negative log-likelihood is convex in τ: its slope is the mean of E_p[f] − f_y, its curvature that of Var_p[f].
    """
    given = outputs.gather(1, targets[:, None])[:, 0]
    temperature = max(start, 1e-3)
    for _ in range(50):
        soft = (temperature * outputs).softmax(dim=1)
        mean = (soft * outputs).sum(dim=1)
        variance = (soft * outputs.square()).sum(dim=1) - mean.square()
        step = float((mean - given).mean()) / max(float(variance.mean()), 1e-12)
        # Far from the optimum a Newton step may overshoot; doubling or halving at most keeps it in range.
        following = min(2 * temperature, max(temperature / 2, temperature - step))
        if abs(following - temperature) <= 1e-4 * temperature or not 1e-6 < following < 1e6:
            return following
        temperature = following
    return temperature


def _regression(features: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diagonalise the regression.

    Returns:
        The standardised activations in the eigenvectors of their covariance, Z = ΦQ [n, r]; its eigenvalues [r], above
        rounding; Qᵀ ΦᵀY/n [r, C]; the mean of Y [C].
    """
    n = len(features)
    centre, spread = features.mean(dim=0), features.std(dim=0)
    varies = spread > 1e-6 * spread.max().clamp_min(1e-30)
    if not bool(varies.any()):
        raise InfluenceError("the activations of all examples are the same", "is this the right checkpoint?")

    def standardised() -> Iterator[Tensor]:
        """Yield Φ in parts: with many examples a copy of it would take most of the memory."""
        for part in torch.split(features, CHUNK):
            yield (part[:, varies] - centre[varies]) / spread[varies]

    wide = torch.float32 if features.device.type == "mps" else torch.float64
    width = int(varies.sum())
    moment = torch.zeros(width, width, dtype=wide, device=features.device)
    for part in standardised():
        moment += part.T @ part
    values, vectors = (part[0] for part in eigenpairs((moment / n)[None]))
    used = values > 1e-9 * values[0]
    values, vectors = values[used], vectors[:, used].to(features)
    onehot = functional.one_hot(targets, classes).to(features)
    mean = onehot.mean(dim=0)
    turned = torch.empty(n, len(values), dtype=features.dtype, device=features.device)
    for part, rows in zip(standardised(), torch.split(turned, CHUNK), strict=True):
        torch.mm(part, vectors, out=rows)
    return turned, values, turned.T @ (onehot - mean) / n, mean
