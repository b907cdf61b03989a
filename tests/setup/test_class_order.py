"""Which output is which class."""

from __future__ import annotations

import numpy as np
import pytest

from influence_cli.errors import InfluenceError
from influence_cli.passes.probe import by_predictions
from influence_cli.setup.class_order import by_number, guess_order, match
from influence_cli.setup.guesses import ModelGuess


def model(outputs: int, *names: str) -> ModelGuess:
    return ModelGuess("a.b", "", {}, "", outputs, "m.pt", names=names or None, names_why="id2label in config.json")


def test_names_in_the_same_order_need_no_line() -> None:
    assert guess_order(model(3, "ants", "bees", "cats"), ("ants", "bees", "cats"), 3).outputs is None


def test_names_in_another_order_are_mapped() -> None:
    order = guess_order(model(3, "Cats", "ants", "sea bees"), ("ants", "cats", "sea_bees"), 3)
    assert order.outputs == {"ants": 1, "cats": 0, "sea_bees": 2}
    assert order.why == "id2label in config.json"


def test_a_wider_head_is_mapped_by_imagenets_names() -> None:
    pytest.importorskip("torchvision")
    order = guess_order(model(1000), ("goldfish", "tench"), 2)
    assert order.outputs == {"goldfish": 1, "tench": 0}
    assert order.why == "the 1,000 classes of ImageNet"


def test_names_that_do_not_match_are_said_and_the_order_stays_open() -> None:
    order = guess_order(model(2, "cat", "dog"), ("x", "y"), 2)
    assert order.open
    assert order.outputs is None
    assert "the checkpoint (cat, dog) are not those of the data (x, y)" in order.remark
    assert guess_order(model(5), ("x", "y"), 2).outputs == {"x": 0, "y": 1}


def test_more_classes_than_outputs_are_refused() -> None:
    with pytest.raises(InfluenceError, match="the model has 2 outputs, but the data have 3 classes"):
        guess_order(model(2), ("x", "y", "z"), 3)
    assert guess_order(model(1), ("x", "y"), 2).outputs is None  # one logit is two classes


def test_one_of_two_names_is_enough_but_not_an_ambiguous_one() -> None:
    assert match(("goldfish",), ("tench, Tinca tinca", "goldfish, Carassius auratus")) == {"goldfish": 1}
    assert match(("crane",), ("crane", "crane")) is None
    assert match(("c", "C++"), ("C++", "c")) == {"c": 1, "C++": 0}


def test_folders_that_are_numbers() -> None:
    assert by_number(("1", "10", "2")) == {"1": 0, "2": 1, "10": 2}
    assert by_number(("1", "2", "3")) is None
    assert by_number(("a", "1")) is None


def test_predictions_tell_the_order_where_they_agree() -> None:
    labels = np.repeat([0, 1, 2], 5)
    swapped = np.array([2, 0, 1])[labels]
    assert by_predictions(("a", "b", "c"), labels, swapped) == {"a": 2, "b": 0, "c": 1}
    assert by_predictions(("a", "b", "c"), labels, np.zeros(15, dtype=np.int64)) is None
    assert by_predictions(("a", "b", "c"), labels[:-3], swapped[:-3]) is None
