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
from influence_cli.evidence.mapped import chosen, large, log_softmax_, parts_of, picked, row_parts
from influence_cli.runtime import distributed, exchange
from influence_cli.solvers.eigen import eigenpairs

# Ridges tried, as multiples of the mean eigenvalue of ΦᵀΦ/n.
RIDGES = tuple(10.0 ** (power / 2) for power in range(-12, 5))
# Lower limit of 1 − hᵢ: below it the readout interpolates, and its output without the example is only rounding.
FLOOR = 1e-4
# Columns per matrix product.
COLUMNS = 256
# Outputs [examples, C] that the ridge and the temperature are chosen by: with more, evenly spread examples.
TRIED = 2**23
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
    features: Tensor,
    targets: Tensor,
    classes: int,
    *,
    device: torch.device | None = None,
    shared: bool = False,
    kept: int = COMPONENTS,
    by_squares: bool = False,
) -> Readout:
    """Fit the ridge readout and give its leave-one-out outputs.

    Args:
        features: float32 [n, d], or float16 in a file.
        targets: int64 [n], on the same device.
        classes: C.
        device: that does the work, part by part; by default the features'.
        shared: these examples are this process's part of those of the job. All of them fit one readout together.
        kept: principal components that it gives at most.
        by_squares: choose the ridge by the mean of (ŷ₋ᵢ − yᵢ)², Allen's PRESS, not by likelihood; not in a job.

    Returns:
        The readout, on the features' device, of these examples.

    Raises:
        InfluenceError: fewer than three examples, or activations that are all constant.
    """
    device = device or features.device
    start, n = _place(len(features), shared=shared)
    if n < 3:
        raise InfluenceError(f"a leave-one-out readout needs at least 3 examples, but there are {n}")
    turned, values, weights, mean = _regression(features, targets, classes, n, device, shared=shared)
    ridges = [multiple * float(values.mean()) for multiple in RIDGES]
    every = -(-n * classes // TRIED)
    first = -start % every
    rows_tried = torch.arange(first, len(turned), every, device=turned.device)
    some, labels = turned if every == 1 else chosen(turned, rows_tried), targets[first::every].to(device)
    best: tuple[float, float, float] | None = None
    temperature, step = 1.0, max(1, COLUMNS // classes)
    for begin in range(0, len(ridges), step):  # one pass over the examples per group of ridges that fits
        tried = ridges[begin : begin + step]
        inverse = (1 / (values[:, None] + torch.tensor(tried, dtype=values.dtype, device=device))).to(weights)
        columns = (inverse[:, :, None] * weights[:, None, :]).flatten(1)
        outputs, leverages = _products(some, columns, device), _leverage(some, inverse, n)
        outputs += mean.repeat(len(tried))
        for number, ridge in enumerate(tried):
            without = _without(outputs[:, number * classes :][:, :classes], leverages[:, number], labels)
            temperature = fit_temperature(without, labels, temperature, shared=shared)
            loss = _mean_loss(temperature * without, labels, shared=shared)
            if by_squares:
                loss = float((without - functional.one_hot(labels, classes)).square().mean())
            if best is None or loss < best[0]:
                best = (loss, ridge, temperature)
    if best is None:
        raise ValueError("there are ridges")
    _, ridge, temperature = best
    inverse = (1 / (values[:, None] + ridge)).to(weights)
    leverage = _leverage(turned, inverse, n)[:, 0]
    outputs = large(len(features), classes, device=features.device)
    for rows in row_parts(len(features), classes):
        part = (turned[rows].to(device) @ (inverse * weights)).add_(mean)
        outputs[rows] = _without(part, leverage[rows], targets[rows].to(device)).to(outputs)
    leading = values[:kept].sqrt().to(weights)
    components = torch.empty(len(features), len(leading), device=features.device)
    for rows in parts_of(len(features)):
        components[rows] = (turned[rows, :kept].to(device) / leading).to(components)
    total = _sum if shared else _kept
    return Readout(
        outputs,
        ridge,
        temperature,
        leverage.to(features.device),
        float(total(leverage.sum())),
        int(total((1 - leverage < FLOOR).sum())),
        components,
    )


def _place(count: int, *, shared: bool) -> tuple[int, int]:
    """Give the number of examples in the processes before this one, and in all of them."""
    counts = distributed.gathered(count) if shared else [count]
    return (sum(counts[: distributed.rank()]) if shared else 0), sum(counts)


def _sum(tensor: Tensor) -> Tensor:
    return exchange.sum_tensor(tensor.contiguous())


def _kept(tensor: Tensor) -> Tensor:
    return tensor


def _products(turned: Tensor, columns: Tensor, device: torch.device) -> Tensor:
    """Give Z · columns, on the device that does the work."""
    parts = [turned[rows].to(device) @ columns for rows in parts_of(len(turned))]
    return torch.cat(parts) if parts else columns.new_empty(0, columns.shape[1])


def _leverage(turned: Tensor, inverse: Tensor, n: int) -> Tensor:
    """Give hᵢ for each ridge [rows, ridges]."""
    parts = [turned[rows].to(inverse.device).square() @ inverse for rows in parts_of(len(turned))]
    return 1 / n + (torch.cat(parts) if parts else inverse.new_empty(0, inverse.shape[1])) / n


def _mean_loss(outputs: Tensor, targets: Tensor, *, shared: bool) -> float:
    if not shared:
        return float(functional.cross_entropy(outputs, targets))
    count = torch.tensor(float(len(targets)), dtype=torch.float64)
    losses = functional.cross_entropy(outputs, targets, reduction="sum").cpu().double()
    total, count = _sum(torch.stack([losses, count]))
    return float(total / count)


def _without(outputs: Tensor, leverage: Tensor, targets: Tensor) -> Tensor:
    """Turn ŷᵢ into ŷ₋ᵢ, in its place: (ŷᵢ − hᵢyᵢ)/(1 − hᵢ)."""
    outputs[torch.arange(len(targets), device=targets.device), targets] -= leverage
    return outputs.div_((1 - leverage).clamp_min(FLOOR)[:, None])


def fit_temperature(outputs: Tensor, targets: Tensor, start: float = 1.0, *, shared: bool = False) -> float:
    """Find τ ≥ 0 that maximises the likelihood of the targets under softmax(τ · outputs), by Newton's method.

    The negative log-likelihood is convex in τ: its slope is the mean of E_p[f] − f_y, its curvature that of Var_p[f].

    Args:
        outputs: [n, C].
        targets: int64 [n].
        start: a guess of τ.
        shared: whether these are this process's part of the examples.
    """
    given, count = picked(outputs, targets), _place(len(outputs), shared=shared)[1]
    temperature = max(start, 1e-3)
    for _ in range(50):
        slope = curve = 0.0
        for rows in row_parts(*outputs.shape):
            some = outputs[rows]
            product = (temperature * some).softmax(dim=1).mul_(some)
            mean = product.sum(dim=1)
            slope += float((mean - given[rows]).sum()) / count
            curve += float((product.mul_(some).sum(dim=1) - mean.square()).sum()) / count
        if shared:
            slope, curve = _sum(torch.tensor([slope, curve], dtype=torch.float64)).tolist()
        step = slope / max(curve, 1e-12)
        # Far from the optimum a Newton step may overshoot; doubling or halving at most keeps it in range.
        following = min(2 * temperature, max(temperature / 2, temperature - step))
        if abs(following - temperature) <= 1e-4 * temperature or not 1e-6 < following < 1e6:
            return following
        temperature = following
    return temperature


def _regression(
    features: Tensor, targets: Tensor, classes: int, n: int, device: torch.device, *, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diagonalise the regression of n examples, of which these are a part.

    Returns:
        The standardised activations in the eigenvectors of their covariance, Z = ΦQ [rows, r], on the features' device;
        its eigenvalues [r], above rounding; Qᵀ ΦᵀY/n [r, C]; the mean of Y [C].
    """
    total = _sum if shared else _kept
    centre, spread = (each.to(device) for each in _moments(features, n, device, shared=shared))
    varies = spread > 1e-6 * spread.max().clamp_min(1e-30)
    if not bool(varies.any()):
        raise InfluenceError("the activations of all examples are the same", "is this the right checkpoint?")

    def standardised() -> Iterator[tuple[slice, Tensor]]:
        """Yield Φ in parts: with many examples a copy of it would take most of the memory."""
        for rows in parts_of(len(features)):
            yield rows, (features[rows].to(device).float()[:, varies] - centre[varies]) / spread[varies]

    wide = torch.float32 if device.type == "mps" else torch.float64
    width = int(varies.sum())
    moment = torch.zeros(width, width, dtype=wide, device=device)
    for _, part in standardised():
        moment += part.T @ part
    values, vectors = _eigenpairs(total(moment) / n, shared=shared)
    used = values > 1e-9 * values[0]
    values, vectors = values[used], vectors[:, used].float()
    mean = total(torch.bincount(targets, minlength=classes).float()).to(device) / n
    turned = large(len(features), len(values), device=features.device)
    for rows, part in standardised():
        turned[rows] = (part @ vectors).to(turned)
    weights = torch.zeros(len(values), classes, device=device)
    for rows in row_parts(len(features), classes):
        deviation = functional.one_hot(targets[rows].to(device), classes).float() - mean
        weights += turned[rows].to(device).T @ deviation
    return turned, values, total(weights) / n, mean


def _eigenpairs(matrix: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Give Λ [w], falling, and V [w, w]; the same of a job's processes, whose libraries may differ."""

    def decomposed() -> tuple[Tensor, Tensor]:
        values, vectors = eigenpairs(matrix[None])
        return values[0], vectors[0]

    if not shared or distributed.size() == 1:
        return decomposed()
    values, vectors = distributed.from_first(lambda: tuple(part.cpu() for part in decomposed()))
    return values.to(matrix), vectors.to(matrix)


def _moments(features: Tensor, n: int, device: torch.device, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Give the mean and the standard deviation of each column of n examples, of which these are a part, [d]."""
    if not shared and features.dtype == torch.float32:
        return features.mean(dim=0), features.std(dim=0)
    # In float64, relative to one example: a constant column then has the deviation 0.
    whose = distributed.gathered(features[0].tolist() if len(features) else None) if shared else [features[0].tolist()]
    wide = torch.float32 if device.type == "mps" else torch.float64
    near = torch.tensor(next(one for one in whose if one is not None), dtype=wide, device=device)
    sums = torch.zeros(2, features.shape[1], dtype=wide, device=device)
    for rows in parts_of(len(features)):
        part = features[rows].to(device).to(wide) - near
        sums += torch.stack([part.sum(dim=0), part.square().sum(dim=0)])
    mean, square = (_sum(sums) if shared else sums) / n
    deviation = ((square - mean.square()).clamp_min(0) * n / (n - 1)).sqrt()
    return (near + mean).float(), deviation.float()
