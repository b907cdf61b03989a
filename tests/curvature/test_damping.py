"""The one rule for λ, and poles."""

from __future__ import annotations

import pytest

from influence_cli.curvature.damping import TrainingTime, adam_time, check_poles, choose_damping, training_damping
from influence_cli.errors import InfluenceError

FACTS = {"convex": False, "l2": 0.0, "matrix": "ggn", "smallest": 0.0, "means": [0.02], "largest": 5.0}


@pytest.mark.parametrize(
    ("given", "changes", "value"),
    [
        (0.5, {}, 0.5),
        ("auto", {}, 0.002),
        ("auto", {"convex": True, "l2": 0.01}, 0.0),
        ("auto", {"convex": True, "l2": 0.0}, 0.002),
        ("auto", {"convex": False, "l2": 0.01}, 0.002),
        ("auto", {"matrix": "hessian", "smallest": -0.3}, 0.6),
        ("auto", {"matrix": "hessian", "smallest": -1e-9}, 0.002),
    ],
)
def test_rule(given: float | str, changes: dict[str, object], value: float) -> None:
    assert choose_damping(given, **(FACTS | changes)).value == pytest.approx(value)  # type: ignore[arg-type]


def test_an_exact_matrix_of_a_whole_network_takes_more() -> None:
    facts = FACTS | {"means": [0.02], "convex": False}
    assert choose_damping("auto", **(facts | {"layered": False})).values == pytest.approx((0.2,))  # type: ignore[arg-type]
    assert choose_damping("auto", **facts).values == pytest.approx((0.002,))  # type: ignore[arg-type]
    convex = facts | {"convex": True, "l2": 0.0, "layered": False}
    assert choose_damping("auto", **convex).values == pytest.approx((0.002,))  # type: ignore[arg-type]


def test_a_negative_eigenvalue_comes_with_advice() -> None:
    damping = choose_damping("auto", **(FACTS | {"matrix": "hessian", "smallest": -0.3}))  # type: ignore[arg-type]
    assert "ggn" in damping.advice
    assert "-0.3" in damping.reason


def test_each_layer_has_its_own() -> None:
    damping = choose_damping("auto", **(FACTS | {"means": [0.02, 0.5, 0.0]}))  # type: ignore[arg-type]
    assert damping.values == pytest.approx((0.002, 0.05, 0.0))
    assert damping.value is None
    assert "of each layer" in damping.reason
    assert damping.text() == "0 to 0.05 by layer"
    assert choose_damping(0.3, **(FACTS | {"means": [0.02, 0.5]})).values == (0.3, 0.3)  # type: ignore[arg-type]


def test_poles_are_named() -> None:
    check_poles(-0.1, 0.11)
    with pytest.raises(InfluenceError, match=r"−min Λ = 0\.1"):
        check_poles(-0.1, 0.1)
    with pytest.raises(InfluenceError, match="singular"):
        check_poles(0.0, 0.0)


@pytest.mark.parametrize(
    ("rate", "momentum", "steps", "value"), [(0.03, 0.9, 1920, 0.0052), (0.01, 0.9, 288, 0.104), (0.4, 0.0, 30, 0.25)]
)
def test_training_gives_three_over_rate_times_steps(rate: float, momentum: float, steps: int, value: float) -> None:
    assert training_damping(rate / (1 - momentum) * steps) == pytest.approx(value, rel=0.01)


def test_training_is_the_same_for_all_layers_under_sgd_and_differs_under_adam() -> None:
    facts = FACTS | {"means": [0.02, 0.5]}
    one = choose_damping(TrainingTime(30.0).damping(["a", "b"]), **facts)  # type: ignore[arg-type]
    assert one.values == (0.1, 0.1)
    assert one.reason == "training: 3/(η·K), η·K = 30; auto: 0.002 to 0.05 by layer"
    time = adam_time(2.0, {"a": 0.1, "b": 0.001}, 0.01)
    several = choose_damping(time.damping(["a", "b", "c"]), **facts)  # type: ignore[arg-type]
    assert several.values == pytest.approx((0.15, 0.0015, 0.015))
    assert "Adam's η·K = 20 to 2e+03 by layer; auto" in several.reason
