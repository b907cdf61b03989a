"""Networks weighed against each other: by what they say of labels that they have not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from influence_cli.evidence.pooling import OF_NETWORKS, among_networks, of_two, pool
from influence_cli.metrics import average_precision

COUNT, CLASSES = 4_000, 6


def opinion(true: Tensor, strength: float, seed: int) -> Tensor:
    """Make log-probabilities that know the true class more or less."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(COUNT, CLASSES, generator=generator)
    return (noise + strength * functional.one_hot(true, CLASSES)).log_softmax(dim=1)


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    """True classes, and labels of which a tenth is wrong."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    wrong = torch.rand(COUNT, generator=generator) < 0.1
    other = (true + torch.randint(1, CLASSES, (COUNT,), generator=generator)) % CLASSES
    return true, torch.where(wrong, other, true)


def own(true: Tensor) -> dict[str, Tensor]:
    readout, neighbours = opinion(true, 1.5, 1), opinion(true, 1.2, 2)
    return {
        "readout": readout,
        "neighbours": neighbours,
        "combined": of_two({"readout": readout, "neighbours": neighbours}),
    }


def precision(log_p: Tensor, truth: tuple[Tensor, Tensor]) -> float:
    true, given = truth
    return average_precision(-log_p[torch.arange(COUNT), given].numpy(), (given != true).numpy())


def test_a_network_that_knows_nothing_has_no_weight(truth: tuple[Tensor, Tensor]) -> None:
    true, given = truth
    ours = own(true)
    useless = {"readout": opinion(true, 0, 3), "neighbours": opinion(true, 0, 4)}
    total, shares = among_networks(ours, {"useless": useless}, given)
    assert shares["useless"] < 0.05
    assert precision(total, truth) > precision(ours["combined"], truth) - 0.01


def test_two_that_know_different_things_know_more(truth: tuple[Tensor, Tensor]) -> None:
    true, given = truth
    ours, other = own(true), {"readout": opinion(true, 1.5, 5), "neighbours": opinion(true, 1.2, 6)}
    total, shares = among_networks(ours, {"other": other}, given)
    assert min(shares.values()) > 0.3
    assert sum(shares.values()) == pytest.approx(1)
    assert precision(total, truth) > max(precision(ours["combined"], truth), precision(of_two(other), truth)) + 0.02


def test_the_shares_make_the_labels_likeliest(truth: tuple[Tensor, Tensor]) -> None:
    """No other shares do better, whatever the sum of the weights; the result is their sum, normalised."""
    true, given = truth
    ours, other = own(true), {"readout": opinion(true, 2, 7), "neighbours": opinion(true, 1, 8)}
    total, shares = among_networks(ours, {"other": other}, given)
    heard = [ours["combined"], of_two(other)]

    def loss(a: float, b: float) -> float:
        return float(functional.cross_entropy(a * heard[0] + b * heard[1], given))

    share = shares[""]
    assert 0 < share < 1
    sums = np.linspace(0.2, 2, 91)
    least = min(loss(each * share, each * (1 - share)) for each in sums)
    assert least <= min(loss(each * a, each * (1 - a)) for each in sums for a in np.linspace(0, 1, 11)) + 1e-5
    expected = OF_NETWORKS * (share * heard[0] + (1 - share) * heard[1])
    assert total.numpy() == pytest.approx(expected.log_softmax(dim=1).numpy(), abs=1e-4)
    assert total.exp().sum(dim=1).numpy() == pytest.approx(1, abs=1e-5)


def test_probabilities_of_a_model_are_an_opinion_as_they_stand(truth: tuple[Tensor, Tensor]) -> None:
    true, given = truth
    ours = own(true)
    sharp = {"probabilities": (3 * opinion(true, 1.5, 9)).log_softmax(dim=1)}  # too sure of itself
    total, shares = among_networks(ours, {"text": sharp}, given)
    assert 0.05 < shares["text"] < 0.5
    assert precision(total, truth) > precision(ours["combined"], truth) + 0.01


def test_a_network_that_has_memorised_the_labels_leaves_a_fifth_to_the_others(truth: tuple[Tensor, Tensor]) -> None:
    """What it knows of the labels is no evidence; the others share by what they know."""
    true, given = truth
    knows = {"readout": opinion(given, 8, 1), "neighbours": opinion(given, 6, 2)}
    ours = {**knows, "combined": of_two(knows)}
    others = {
        "good": {"readout": opinion(true, 1.5, 5), "neighbours": opinion(true, 1.2, 6)},
        "useless": {"readout": opinion(true, 0, 3), "neighbours": opinion(true, 0, 4)},
    }
    assert among_networks(ours, others, given)[1][""] > 0.81
    total, shares = among_networks(ours, others, given, memorised=True)
    assert shares[""] == pytest.approx(0.8)
    assert shares["good"] > 0.19
    assert sum(shares.values()) == pytest.approx(1)
    assert precision(total, truth) > precision(ours["combined"], truth)
    modest = own(true)
    both = [among_networks(modest, others, given, memorised=memorised)[1] for memorised in (False, True)]
    assert both[0] == both[1]


def test_an_opinion_that_is_too_sure_of_itself_may_come_back(truth: tuple[Tensor, Tensor]) -> None:
    """The first step from equal weights leaves it out; what makes the labels likeliest has it."""
    true, given = truth
    modest = of_two({"readout": opinion(true, 3, 1), "neighbours": opinion(true, 2, 2)})
    sure = (3 * opinion(true, 3, 9)).log_softmax(dim=1)
    weights = pool([modest, sure], given)

    def loss(a: float, b: float) -> float:
        return float(functional.cross_entropy(a * modest + b * sure, given))

    least = min(loss(a, b) for a in np.linspace(0, 1, 21) for b in np.linspace(0, 1, 21))
    assert loss(*weights.tolist()) <= least + 1e-6
    assert float(weights.min()) > 0.02


def test_what_the_model_says_having_seen_the_labels_does_not_weigh_it(truth: tuple[Tensor, Tensor]) -> None:
    true, given = truth
    ours, other = own(true), {"readout": opinion(true, 1.5, 5), "neighbours": opinion(true, 1.2, 6)}
    learned = {**ours, "combined": (ours["combined"] + opinion(given, 3, 10)).log_softmax(dim=1)}
    assert among_networks(learned, {"other": other}, given)[1] == among_networks(ours, {"other": other}, given)[1]
