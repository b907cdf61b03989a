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

import numpy as np
import torch

from influence_cli.replay.forward import Advance, ignore, moments
from influence_cli.replay.network import TrainedNetwork
from influence_cli.replay.run import Run, State


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
    kept_share = network.kept_share.to(end.buffers)
    slopes = torch.zeros(len(end.parameters), run.examples, dtype=torch.float64)
    for start, stop in reversed(list(zip(run.kept, run.kept[1:], strict=False))):
        stretch = list(moments(network, run, start, stop))
        for step in range(stop - 1, start - 1, -1):
            moment = stretch.pop()
            taken, state = moment.taken, moment.state
            parameters, slots, pulled = taken.rule.pull(
                state.parameters, state.slots, moment.gradient, (end.parameters, end.slots)
            )
            with run.randomness(step):
                curved, inner = network.products(state, taken, pulled)
            parameters = parameters + curved
            if network.mixes_examples:
                with run.randomness(step):
                    parameters = parameters + network.pull_averages(state, taken, end.buffers)
            slopes.index_add_(1, torch.from_numpy(taken.rows), (inner / len(taken.rows)).double().cpu())
            end = State(parameters, slots, kept_share * end.buffers)
            advance(1)
    return slopes.numpy()
