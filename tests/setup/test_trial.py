"""Drawing images across classes, and choosing between transforms."""

from __future__ import annotations

import numpy as np
import pytest

from influence_cli.data.split import Split
from influence_cli.setup.guesses import TransformGuess
from influence_cli.setup.trial import Outcome, choose, drawn


def split_of(labels: list[int]) -> Split:
    numbers = np.array(labels, dtype=np.int64)
    return Split("train", list(labels), None, numbers, np.arange(len(labels)), None, None, None, "influence.yaml:1")


def test_any_first_part_of_the_drawn_images_has_all_classes() -> None:
    split = split_of([0] * 500 + [1] * 40 + [2] * 300)
    chosen = drawn(split, 60, seed=0)
    assert len(set(chosen.tolist())) == 60
    for count in (3, 30, 60):
        assert np.bincount(split.labels[chosen[:count]]).tolist() == [count // 3] * 3
    assert drawn(split, 60, seed=0).tolist() == chosen.tolist()
    assert drawn(split, 60, seed=1).tolist() != chosen.tolist()


def test_a_small_class_gives_what_it_has() -> None:
    split = split_of([0] * 50 + [1] * 2)
    assert np.bincount(split.labels[drawn(split, 20, seed=0)]).tolist() == [18, 2]
    assert len(drawn(split, 256, seed=0)) == 52


def outcome(name: str, right: int, loss: float = 1.0, why: str = "", of: int = 100) -> Outcome:
    labels = np.zeros(of, dtype=np.int64)
    predicted = (np.arange(of) >= right).astype(np.int64)
    noise = np.random.default_rng(len(name)).normal(0, 0.05, of)
    return Outcome(TransformGuess([], name, why), predicted, labels, loss + noise)


@pytest.mark.parametrize(
    ("outcomes", "chosen"),
    [
        ([outcome("a", 90), outcome("bb", 60)], "a"),
        ([outcome("a", 60), outcome("bb", 90)], "bb"),
        ([outcome("a", 90), outcome("bb", 91)], "a"),  # one image is chance
        ([outcome("a", 90), outcome("bb", 90, loss=0.5)], "bb"),
        ([outcome("a", 90, why="a file"), outcome("bb", 90, loss=0.5)], "a"),  # a file outweighs the loss alone
        ([outcome("a", 50, why="a file"), outcome("bb", 90)], "bb"),
        ([outcome("a", 100), outcome("bb", 60, loss=0.2)], "a"),
    ],
)
def test_the_first_is_chosen_unless_another_is_clearly_better(outcomes: list[Outcome], chosen: str) -> None:
    assert choose(outcomes).transform.name == chosen
