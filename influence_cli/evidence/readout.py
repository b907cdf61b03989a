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
# Outputs [examples, C] that the ridge and the temperature are chosen by: with more, evenly spread examples; and outputs
# held at once besides those that are kept.
TRIED, HELD = 2**23, 2**21
# Leading principal components for the neighbours and the logistic readout.
COMPONENTS = 64


@dataclass(frozen=True)
class Readout:
    """Leave-one-out outputs of a ridge readout.

    Attributes:
        outputs: ŷ₋ᵢ, float32 [n, C].
        ridge: chosen among ``RIDGES`` by the likelihood of the labels, or by squares.
        temperature: fitted by the likelihood.
        leverage: hᵢ, float32 [n].
        dimension: Σhᵢ, the effective number of parameters per class.
        floored: examples whose 1 − hᵢ was below ``FLOOR``.
        components: the standardised activations in their leading principal components, each of unit variance,
            float32 [n, q].
    """

    outputs: Tensor
    ridge: float
    temperature: float
    leverage: Tensor
    dimension: float
    floored: int
    components: Tensor

    @property
    def log_probabilities(self) -> Tensor:
        """Give log softmax(temperature · ŷ₋ᵢ), float32 [n, C]."""
        return log_softmax_(self.outputs.clone(), self.temperature)


def leave_one_out(
    features: Tensor, targets: Tensor, classes: int, *, components: int = COMPONENTS, by_squares: bool = False
) -> Readout:
    """Fit the ridge readout and give its leave-one-out outputs.

    Args:
        features: float32 [n, d], on the device that does the work.
        targets: int64 [n].
        classes: C.
        components: how many of them to give at most.
        by_squares: choose the ridge by the mean of (ŷ₋ᵢ − yᵢ)², Allen's PRESS, in place of the likelihood.

    Returns:
        The readout, on the features' device.

    Raises:
        InfluenceError: fewer than three examples, or activations that are all constant.
    """
    n = len(features)
    if n < 3:
        raise InfluenceError(f"a leave-one-out readout needs at least 3 examples, but there are {n}")
    turned, values, weights, mean = _regression(features, targets, classes)
    ridges = [multiple * float(values.mean()) for multiple in RIDGES]
    every = -(-n * classes // TRIED)
    some, labels = turned[::every], targets[::every]
    best: tuple[float, float, float] | None = None
    temperature, step = 1.0, max(1, COLUMNS // classes)
    for start in range(0, len(ridges), step):  # one pass over the examples per group of ridges that fits
        tried = ridges[start : start + step]
        inverse = (1 / (values[:, None] + torch.tensor(tried, dtype=values.dtype, device=values.device))).to(features)
        columns = (inverse[:, :, None] * weights[:, None, :]).flatten(1)
        outputs = mean.repeat(len(tried)) + torch.cat([part @ columns for part in torch.split(some, CHUNK)])
        leverages = _leverage(some, inverse, n)
        for number, ridge in enumerate(tried):
            without = _without(outputs[:, number * classes :][:, :classes], leverages[:, number], labels)
            temperature = fit_temperature(without, labels, temperature)
            loss = float(functional.cross_entropy(temperature * without, labels))
            if by_squares:
                loss = float((without - functional.one_hot(labels, classes)).square().mean())
            if best is None or loss < best[0]:
                best = (loss, ridge, temperature)
    if best is None:
        raise ValueError("there are ridges")
    _, ridge, temperature = best
    inverse = (1 / (values[:, None] + ridge)).to(features)
    leverage = _leverage(turned, inverse, n)[:, 0]
    outputs = torch.empty(n, classes, dtype=features.dtype, device=features.device)
    for rows in row_parts(n, classes):
        torch.mm(turned[rows], inverse * weights, out=outputs[rows])
        _without(outputs[rows].add_(mean), leverage[rows], targets[rows])
    return Readout(
        outputs,
        ridge,
        temperature,
        leverage,
        float(leverage.sum()),
        int((1 - leverage < FLOOR).sum()),
        turned[:, :components] / values[:components].sqrt().to(features),
    )


def row_parts(n: int, classes: int) -> Iterator[slice]:
    """Divide n rows of C numbers into parts of at most ``HELD`` numbers, or of a row."""
    step = max(1, HELD // classes)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def log_softmax_(outputs: Tensor, temperature: float = 1.0) -> Tensor:
    """Turn outputs [n, C] into log softmax(temperature · outputs), in their place."""
    for rows in row_parts(*outputs.shape):
        outputs[rows] = (temperature * outputs[rows]).log_softmax(dim=1)
    return outputs


def _leverage(turned: Tensor, inverse: Tensor, n: int) -> Tensor:
    """Give hᵢ for each ridge [rows, ridges]."""
    return 1 / n + torch.cat([part.square() @ inverse for part in torch.split(turned, CHUNK)]) / n


def _without(outputs: Tensor, leverage: Tensor, targets: Tensor) -> Tensor:
    """Turn ŷᵢ into ŷ₋ᵢ, in its place: (ŷᵢ − hᵢyᵢ)/(1 − hᵢ)."""
    outputs[torch.arange(len(targets), device=targets.device), targets] -= leverage
    return outputs.div_((1 - leverage).clamp_min(FLOOR)[:, None])


def fit_temperature(outputs: Tensor, targets: Tensor, start: float = 1.0) -> float:
    """Find τ ≥ 0 that maximises the likelihood of the targets under softmax(τ · outputs), by Newton's method.

    The negative log-likelihood is convex in τ: its slope is the mean of E_p[f] − f_y, its curvature that of Var_p[f].
    """
    given = outputs.gather(1, targets[:, None])[:, 0]
    temperature = max(start, 1e-3)
    for _ in range(50):
        slope = curve = 0.0
        for rows in row_parts(*outputs.shape):
            some = outputs[rows]
            product = (temperature * some).softmax(dim=1).mul_(some)
            mean = product.sum(dim=1)
            slope += float((mean - given[rows]).sum()) / len(outputs)
            curve += float((product.mul_(some).sum(dim=1) - mean.square()).sum()) / len(outputs)
        step = slope / max(curve, 1e-12)
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
    mean = torch.bincount(targets, minlength=classes).to(features) / n
    turned = torch.empty(n, len(values), dtype=features.dtype, device=features.device)
    for part, rows in zip(standardised(), torch.split(turned, CHUNK), strict=True):
        torch.mm(part, vectors, out=rows)
    weights = torch.zeros(len(values), classes, dtype=features.dtype, device=features.device)
    for rows_ in row_parts(n, classes):
        weights += turned[rows_].T @ (functional.one_hot(targets[rows_], classes).to(features) - mean)
    return turned, values, weights / n, mean
