"""The derivative of a run's end in the weight of every training example, backwards through its steps.

With a step θ' = s(θ, m, G(θ, w)) and a measure φ of the end, reverse mode carries the derivatives of φ in the state
from after a step to before it, and takes those in w on the way (Hara et al., NeurIPS 2019, "Data cleansing for models
trained with SGD"; Engstrom et al. 2025, "Optimizing ML training with metagradient descent", arXiv 2503.13751, and
MAGIC, arXiv 2504.16430). For plain SGD with rate η and batch B:

    c_t = −η a_{t+1},   ∂φ/∂w_i += gᵢ(θ_t)ᵀc_t / |B|,   a_t = a_{t+1} + H_t c_t

Nothing is approximated but numbers in finite precision: momentum, Adam, clipping and the running averages of BatchNorms
are differentiated. States between the kept ones are rebuilt, one stretch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.steps.forward import Advance, ignore, moments
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import Run, State, Taken


@dataclass(frozen=True)
class Pulled:
    """A step on the way back.

    Attributes:
        step: its number.
        state: before it.
        taken: what it took.
        vectors: c [K, p], the derivatives of the measures in the gradient of the batch's mean loss.
        averages: the derivatives in the buffers after the step [K, q].
    """

    step: int
    state: State
    taken: Taken
    vectors: Tensor
    averages: Tensor


def replay(network: TrainedNetwork, run: Run, end: State, advance: Advance = ignore) -> np.ndarray:
    """Give the derivative of measures of the end in the weight of every training example.

    Args:
        network: that was trained.
        run: the steps.
        end: the derivatives of the measures in the last state: parameters [K, p], slots [K, p] each, buffers [K, q].
        advance: called with the steps done since the last call.

    Returns:
        float64 [K, n]: how much each measure would rise per unit of weight. Leaving an example out takes a whole unit
        of weight from it: to first order the measure then rises by *minus* this.
    """
    slopes = torch.zeros(len(end.parameters), run.examples, dtype=torch.float64)
    for pulled, inner in _backwards(network, run, end):
        rows = pulled.taken.rows
        slopes.index_add_(1, torch.from_numpy(rows), (inner / len(rows)).double().cpu())
        advance(1)
    return slopes.numpy()


def replay_inputs(
    network: TrainedNetwork, run: Run, end: State, row: int, advance: Advance = ignore
) -> tuple[np.ndarray, np.ndarray]:
    """Give the derivatives of measures of the end in the weight of one training image, and in its numbers.

    The image is changed wherever the run takes it. Its inputs must not be augmented.

    Returns:
        float64 [K], and float64 [K, …].
    """
    total: Tensor | None = None
    weight = np.zeros(len(end.parameters))
    for pulled, inner in _backwards(network, run, end):
        places = np.flatnonzero(pulled.taken.rows == row)
        if len(places):
            weight += inner[:, places].double().sum(dim=1).cpu().numpy() / len(pulled.taken.rows)
            with run.randomness(pulled.step):
                slopes = network.input_slopes(
                    pulled.state, pulled.taken, pulled.vectors, pulled.averages, torch.from_numpy(places)
                )
            total = slopes if total is None else total + slopes
        advance(1)
    if total is None:
        raise ValueError("the run never takes this image")
    return weight, total.double().cpu().numpy()


def _backwards(network: TrainedNetwork, run: Run, end: State) -> Iterator[tuple[Pulled, Tensor]]:
    """Carry derivatives from the last step to the first: each step, with the products gᵢᵀc [K, b] of its examples."""
    kept_share = network.kept_share.to(end.buffers)
    for start, stop in reversed(list(zip(run.kept, run.kept[1:], strict=False))):
        stretch = list(moments(network, run, start, stop))
        for step in range(stop - 1, start - 1, -1):
            moment = stretch.pop()
            taken, state = run.taken(step), moment.state
            parameters, slots, vectors = taken.rule.pull(
                state.parameters, state.slots, moment.gradient, (end.parameters, end.slots)
            )
            with run.randomness(step):
                curved, inner = network.products(state, taken, vectors)
            parameters = parameters + curved
            if network.mixes_examples:
                with run.randomness(step):
                    parameters = parameters + network.pull_averages(state, taken, end.buffers)
            yield Pulled(step, state, taken, vectors, end.buffers), inner
            end = State(parameters, slots, kept_share * end.buffers)
