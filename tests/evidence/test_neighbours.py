"""Nearest neighbours and their vote against loops."""

from __future__ import annotations

import pytest
import torch

from influence_cli.evidence import neighbours
from influence_cli.evidence.neighbours import distance, nearest, vote


@pytest.mark.parametrize("held", [2**25, 64])
def test_nearest_are_those_of_a_loop(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "HELD", held)
    features = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    rows, similarity = nearest(features, 5)
    for i in range(25):
        cosines = [
            -2.0 if j == i else float(torch.cosine_similarity(features[i], features[j], dim=0)) for j in range(25)
        ]
        wanted = sorted(range(25), key=lambda j: -cosines[j])[:5]
        assert rows[i].tolist() == wanted
        assert similarity[i].tolist() == pytest.approx([cosines[j] for j in wanted], abs=1e-5)


def test_there_are_no_more_neighbours_than_others() -> None:
    rows, _ = nearest(torch.eye(4), 30)
    assert rows.shape == (4, 3)
    assert all(i not in rows[i].tolist() for i in range(4))


def test_a_copy_is_nearest_but_an_example_is_not_its_own() -> None:
    features = torch.randn(6, 3)
    rows, similarity = nearest(torch.cat([features, features]), 1)
    assert rows[:, 0].tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]
    assert float(similarity.min()) == pytest.approx(1, abs=1e-5)


def test_votes_weigh_as_the_square_of_the_similarity() -> None:
    rows, targets = torch.tensor([[0, 1, 2], [2, 2, 3]]), torch.tensor([0, 0, 1, 2])
    equal = vote(rows, torch.full((2, 3), 0.5), targets, 3)
    torch.testing.assert_close(equal.exp(), torch.tensor([[3.0, 2, 1], [1, 3, 2]]) / 6)
    # Weights 1, 1/4 and 0, scaled to a sum of three, for a class each.
    found = vote(torch.tensor([[0, 2, 3]]), torch.tensor([[0.8, 0.4, -0.3]]), targets, 3)
    torch.testing.assert_close(found.exp(), torch.tensor([[1 + 2.4, 1 + 0.6, 1]]) / 6)


def test_neighbours_that_are_all_opposite_say_nothing() -> None:
    found = vote(torch.tensor([[0, 1]]), torch.tensor([[-0.5, -0.7]]), torch.tensor([0, 1]), 2)
    torch.testing.assert_close(found.exp(), torch.tensor([[0.5, 0.5]]))


def test_distance_is_that_to_the_nearest() -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    rows, _ = nearest(features, 20)
    wanted = [float(torch.stack([(features[i] - features[j]).norm() for j in rows[i, :10]]).mean()) for i in range(30)]
    assert distance(features, rows).tolist() == pytest.approx(wanted, rel=1e-5)
