"""Measure what the checks of the gradients cost: the rows of each block that autograd computes again, and the probe.

    .venv/bin/python bench/checks.py [--examples 256] [--seconds 8] [MODEL ...]

For the demo's CNN and for models of torchvision with random weights and random images, in the processor's seconds of
one thread:

- block: the norms and the coordinates of a block of examples in a basis per layer, as a store is filled
- check: the comparison of its rows with autograd (precompute/row_check.py), and its share of the block
- probe: the decision how each parameter's gradients are computed, on a sample of a hundred (passes/coverage.py), as a
  number of examples that the pass would have computed in that time
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from influence_cli.curvature.blocks import keep
from influence_cli.curvature.coordinates import Blocks, coordinates
from influence_cli.curvature.ekfac import Thinning, Watch, fit
from influence_cli.curvature.fisher_draws import SAMPLED
from influence_cli.curvature.progress import Progress
from influence_cli.data.batches import Batch
from influence_cli.demo.project_model import build
from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.precompute.row_check import checked_rows, make_row_check, rows_or_autograd

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "demo": (build, (1, 28, 28)),
    "resnet18": (partial(torchvision.models.resnet18, num_classes=10), (3, 64, 64)),
    "mobilenet_v3_small": (partial(torchvision.models.mobilenet_v3_small, num_classes=10), (3, 64, 64)),
}
loss = partial(nn.functional.cross_entropy, reduction="none")


def seconds(run: Callable[[], Any], budget: float) -> float:
    """Give the median of the processor's seconds."""
    run()
    taken: list[float] = []
    while sum(taken) < budget and len(taken) < 9:
        before = time.process_time()
        run()
        taken.append(time.process_time() - before)
    return float(np.median(taken))


def line(name: str, count: int, budget: float) -> str:
    """Measure one model."""
    torch.manual_seed(0)
    factory, shape = MODELS[name]
    batch = Batch(torch.randn(count, *shape), torch.arange(count) % 10, np.arange(count))
    tracked = track(factory().eval(), loss, ("*",), "layers")
    network = make_network(tracked, batch.inputs[:100])
    progress = Progress("covariances", arrays={"seed": torch.tensor(0), "batch": torch.tensor(64)})
    few = [Batch(batch.inputs[:64], batch.targets[:64], batch.indices[:64])]
    watch = Watch(lambda *_: None, lambda *_: None)
    order = Thinning(order=batch.indices[:64])
    blocks = fit(
        network, lambda _stage, start: few[start:], how=SAMPLED, seed=0, corrected=True,
        thinning=order, progress=progress, watch=watch,
    )  # fmt: skip
    basis = Blocks(tuple(keep(blocks, np.arange(0, sum(b.count for b in blocks), 7), torch.device("cpu"))))
    values = coordinates(network, basis, batch.inputs, batch.targets)[0]
    row_check = make_row_check(network, basis)
    whole = seconds(lambda: coordinates(network, basis, batch.inputs, batch.targets), budget)
    check = seconds(lambda: rows_or_autograd(row_check, batch, values, checked_rows(count)), budget / 4)
    probe = seconds(lambda: make_network(tracked, batch.inputs[:100]), budget / 4)
    cells = [name, f"{network.size:,}", f"{whole:.2f}", f"{check:.3f}", f"{check / whole:.1%}"]
    return f"| {' | '.join([*cells, f'{probe:.2f}', f'{probe / whole * count:.0f}'])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="some of them")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | parameters | block, s | check, s | share | probe, s | probe, examples |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models or MODELS:
        print(line(name, options.examples, options.seconds), flush=True)


if __name__ == "__main__":
    main()
