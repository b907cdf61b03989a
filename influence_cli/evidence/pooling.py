"""Several opinions on labels to one: a log-linear pool, p ∝ Π pₖ^wₖ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from influence_cli.evidence.mapped import large, picked, row_parts

# The weight of each opinion, with the model and without: three make up a mean, which is calibrated; of two a little
# more ranks better. Fixed on label noise of Fashion-MNIST (bench/results/mislabels.md).
WITH_MODEL, WITHOUT = 1 / 3, 2 / 3
# The sum of the weights of several networks, each with the opinion that it would have alone: what makes wrong labels
# likeliest is as unsure as they are, and ranks worse. Fixed on six cases (bench/results/labels_features.md).
OF_NETWORKS = 4 / 3
# The largest share of a network that has memorised the labels: its layers know them, so their likelihood is too good.
# Fixed on two cases (the same page): a network that knows something then adds .01, one that knows nothing costs .005.
OF_MEMORISED = 0.8


def combined(weights: Tensor, heard: Sequence[Tensor]) -> Tensor:
    """Give log p ∝ Σ wₖ log pₖ, [n, C]."""
    total = large(*heard[0].shape)
    for rows in row_parts(*heard[0].shape):
        total[rows] = torch.einsum("k,knc->nc", weights, torch.stack([each[rows] for each in heard])).log_softmax(dim=1)
    return total


def pool(log_probabilities: Sequence[Tensor] | Tensor, targets: Tensor) -> Tensor:
    """Find the weights of a log-linear pool, p ∝ Π pₖ^wₖ, that make the targets likeliest, w ≥ 0.

    The negative log-likelihood is convex in w: its slope is the mean of E_p[log pₖ] − log pₖ(target), its curvature
    the mean covariance under p. Newton steps; an opinion whose weight would be negative is left out, and comes back
    where the others have settled and the likelihood rises with its weight.

    Args:
        log_probabilities: [n, C] of each of k sources.
        targets: int64 [n].

    Returns:
        w [k].
    """
    count, sources = len(targets), len(log_probabilities)
    heard = torch.ones(sources, dtype=torch.bool)
    weights = torch.full((sources,), 1 / sources, dtype=torch.float64)
    given = torch.stack([picked(each, targets) for each in log_probabilities]).double().mean(dim=1)
    for _ in range(50):
        slope, curve = -given, torch.zeros(sources, sources, dtype=torch.float64)
        for rows in row_parts(*log_probabilities[0].shape):
            logs = torch.stack([each[rows] for each in log_probabilities]).double()
            soft = torch.einsum("k,knc->nc", weights, logs).softmax(dim=1)
            mean = (soft * logs).sum(dim=2)
            slope = slope + mean.sum(dim=1) / count
            curve += (torch.einsum("nc,knc,lnc->kl", soft, logs, logs) - mean @ mean.T) / count
        step = torch.zeros_like(weights)
        curve = curve[heard][:, heard] + 1e-9 * torch.eye(int(heard.sum()), dtype=torch.float64)
        step[heard] = torch.linalg.solve(curve, slope[heard])
        following = weights - step
        if bool((following < 0).any()) and int(heard.sum()) > 1:
            heard[int(following.argmin())] = False
            weights = torch.where(heard, weights, 0)
            continue
        weights = following.clamp_min(0)
        if float(step.abs().max()) < 1e-6:
            wanted = torch.where(heard, 0, slope)
            if float(wanted.min()) > -1e-6:
                break
            heard[int(wanted.argmin())] = True
    return weights.float()


def of_two(log_probabilities: Mapping[str, Tensor]) -> Tensor:
    """Combine readout and neighbours of one network with fixed weights; a single opinion stays as it is, [n, C]."""
    heard = [
        log_probabilities[name] for name in ("readout", "neighbours", "probabilities") if name in log_probabilities
    ]
    return heard[0] if len(heard) == 1 else combined(torch.full((len(heard),), WITHOUT), heard)


def among_networks(
    own: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]], targets: Tensor, *, memorised: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Combine the opinions of the model's network with those of networks that have not seen the labels.

    Their shares in the sum of the weights are fitted by likelihood to opinions that are out of sample: the model's own
    output, which has seen the label, takes no part in the fit, and then counts with its network. The sum is fixed; so
    is the largest share of a network that has memorised the labels.

    Args:
        own: log-probabilities [n, C] of ``readout``, ``neighbours`` and ``combined``.
        others: those of the other networks, by name.
        targets: int64 [n].
        memorised: whether the model's network has memorised them.

    Returns:
        log p [n, C] of all networks; the share of each in the weights, the model's under an empty name.
    """
    honest = of_two({name: own[name] for name in ("readout", "neighbours")})
    groups = [of_two(each) for each in others.values()]
    shares = _shares([honest, *groups], targets)
    if memorised and float(shares[0]) > OF_MEMORISED:
        shares = torch.cat([torch.tensor([OF_MEMORISED]), (1 - OF_MEMORISED) * _shares(groups, targets)])
    total = combined(OF_NETWORKS * shares, [own["combined"], *groups])
    return total, dict(zip(("", *others), shares.tolist(), strict=True))


def _shares(heard: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Give the shares in the weights that make the targets likeliest; equal ones if all weights are 0."""
    weights = pool(heard, targets)
    return weights / weights.sum() if float(weights.sum()) else torch.full_like(weights, 1 / len(weights))
