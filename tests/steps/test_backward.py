"""Replay: the derivative of a run's end in the examples' weights."""

from typing import Any

import numpy as np
import pytest
import torch

from influence_cli.errors import InfluenceError
from influence_cli.steps.backward import replay
from influence_cli.steps.forward import follow_weights, run_again
from tests.support.small_run import SmallRun, end_of, measure, small_network

RULES: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd"},
    "momentum": {"kind": "sgd", "momentum": 0.9, "decay": 0.01},
    "nesterov": {"kind": "sgd", "momentum": 0.9, "nesterov": True, "clip": 0.5},
    "adam": {"kind": "adam", "momentum": 0.9, "decay": 0.01, "eps_root": 1e-8},
    "adamw": {"kind": "adamw", "momentum": 0.9, "second": 0.99, "decay": 0.1, "eps": 1e-3},
    "clipped adam": {"kind": "adam", "momentum": 0.8, "eps_root": 1e-8, "clip": 0.4},
}


def differences(run: SmallRun, rows: list[int], size: float = 1e-5) -> np.ndarray:
    """Differentiate whole trainings by central differences in the weights of some examples: [K, rows]."""
    columns = []
    for row in rows:
        ends = []
        for sign in (1, -1):
            weights = np.ones(run.examples)
            weights[row] += sign * size
            ends.append(measure(run.network, run, run_again(run.network, run, weights)))
        columns.append(((ends[0] - ends[1]) / (2 * size)).detach().numpy())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", RULES)
def test_replay_is_the_derivative_of_whole_trainings(name: str) -> None:
    run = SmallRun(small_network(), RULES[name])

    slopes = replay(run.network, run, end_of(run.network, run))

    expected = differences(run, [0, 3, 7, 11])
    assert np.abs(slopes[:, [0, 3, 7, 11]] - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["norm", "dropout", "augmented"])
def test_batch_norm_dropout_and_augmentation_are_part_of_it(kind: str) -> None:
    network = small_network(norm=kind == "norm", dropout=0.3 if kind == "dropout" else 0.0)
    run = SmallRun(network, RULES["momentum"], augmented=kind == "augmented")

    slopes = replay(network, run, end_of(network, run))

    expected = differences(run, [1, 5])
    assert np.abs(slopes[:, [1, 5]] - expected).max() < 1e-6 * np.abs(expected).max()


def test_few_kept_states_give_the_same_as_all() -> None:
    every, some = (SmallRun(small_network(norm=True), RULES["adam"], kept=kept) for kept in ((), (0, 4, 8, 9)))

    whole, rebuilt = (replay(run.network, run, end_of(run.network, run)) for run in (every, some))

    assert np.array_equal(whole, rebuilt)


@pytest.mark.parametrize("name", RULES)
def test_forwards_and_backwards_agree(name: str) -> None:
    run = SmallRun(small_network(norm=True), RULES[name])
    end = end_of(run.network, run)
    directions = np.random.default_rng(0).normal(size=(2, run.examples))

    _, moved = follow_weights(run.network, run, directions)

    forwards = end.parameters @ moved.parameters.T + end.buffers @ moved.buffers.T
    assert torch.allclose(forwards, torch.from_numpy(replay(run.network, run, end) @ directions.T), rtol=1e-9)


def test_a_layer_without_forward_mode_is_differentiated_backwards() -> None:
    class Doubled(torch.autograd.Function):
        """Twice differentiable in reverse mode alone."""

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.square()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
            return 2 * ctx.saved_tensors[0] * slope

    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = Doubled.apply(x)
            return result

    network = small_network()
    network.model[1] = Square()
    run = SmallRun(network, RULES["momentum"])

    slopes = replay(network, run, end_of(network, run))

    expected = differences(run, [1, 5])
    assert np.abs(slopes[:, [1, 5]] - expected).max() < 1e-6 * np.abs(expected).max()


def test_a_layer_without_a_second_derivative_is_named() -> None:
    network = small_network()
    network.model[1] = torch.nn.Hardsigmoid()
    run = SmallRun(network, RULES["sgd"])

    with pytest.raises(InfluenceError, match=r"no derivative of .*hardsigmoid"):
        replay(network, run, end_of(network, run))
