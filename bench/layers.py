"""Measure what the layer pass covers of the models that people train, and what example gradients cost there.

    .venv/bin/python bench/layers.py [MODEL ...] [--examples 8] [--seconds 1]

The models have random weights: timm's by name, with small images, and Hugging Face's from small configurations. A line
has, for each:

- layers: modules and single parameters that the layer pass covers, and how many of them are read inside their module,
  at the function that takes the weight
- fallback: parameters that it does not cover, and how their gradients are computed
- error: of the gradients of all parameters against a loop of autograd, relative, on ``--examples`` examples
- plain: milliseconds per example of one forward and backward pass of the whole batch, which is what training takes
- norms, gradients: the time of the norms of the example gradients, and of the gradients themselves, over plain
- modules only: the time of the gradients over plain if layers were recognised at modules alone

Times are medians of the processor's seconds in runs that take turns, in one process on one core.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.model.network import Network, track
from influence_cli.model.outputs import logits_of
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradient_products import squared_norms
from influence_cli.passes.gradients import example_gradients, summed_gradient

CLASSES = 10
loss = partial(nn.functional.cross_entropy, reduction="none")
# timm's name, side of the image, further arguments.
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "efficientnet_b0": (64, {}),
    "tf_efficientnet_b0": (64, {}),
    "convnext_atto": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
HUGGING_FACE: dict[str, tuple[int, dict[str, Any]]] = {
    "ViT": (64, SMALL | {"image_size": 64, "patch_size": 8}),
    "Dinov2": (56, SMALL | {"image_size": 56, "patch_size": 7}),
    "ResNet": (64, {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2]}),
    "ConvNext": (64, {"hidden_sizes": [32, 48, 64, 96], "depths": [2, 2, 4, 2]}),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Make a model with random weights, and images for it."""
    if name in TIMM:
        import timm

        side, args = TIMM[name]
        model = timm.create_model(name, num_classes=CLASSES, **args)
    else:
        import transformers

        side, args = HUGGING_FACE[name.removeprefix("HF ")]
        kind = name.removeprefix("HF ")
        config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **args)
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
    return shaken(model).eval(), torch.randn(16, 3, side, side)


def shaken(model: nn.Module) -> nn.Module:
    """Move scales and statistics away from 0 and 1, as training does: a layer scale of 1e-6 would hide its block."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "scale" in name or "gamma" in name:
                parameter.add_(0.1 * torch.rand_like(parameter) + (0.5 if float(parameter.abs().max()) < 0.1 else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def error(network: Network, inputs: Tensor, targets: Tensor) -> float:
    """Compare with one backward pass per example."""
    got = example_gradients(network, inputs, targets)[0]
    rows = torch.cat(
        [summed_gradient(network, x[None], y[None])[0][None] for x, y in zip(inputs, targets, strict=True)]
    )
    return float((got - rows).norm() / rows.norm())


def modules_only(network: Network) -> Network:
    """Give the network as it would be if no layer were read inside its module."""
    layers = tuple(layer for layer in network.layers if not layer.inside)
    done = {name for layer in layers for name in layer.names} | set(network.unused)
    rest = tuple(name for name in network.names if name not in done)
    return replace(network, layers=layers, rest=rest)


def times(runs: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Give the median seconds of each, run in turns for some seconds each."""
    taken: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    while sum(map(sum, taken)) < seconds * len(runs) and len(taken[0]) < 30:
        for run, into in zip(runs, taken, strict=True):
            before = time.process_time()
            run()
            into.append(time.process_time() - before)
    return [statistics.median(into) for into in taken]


def plain(network: Network, inputs: Tensor, targets: Tensor) -> None:
    """Run a training step's forward and backward pass."""
    loss(logits_of(network.model(inputs)), targets).mean().backward()
    network.model.zero_grad(set_to_none=True)


def line(name: str, examples: int, seconds: float) -> str:
    """Measure one model."""
    model, inputs = build(name)
    inputs = inputs[:examples]
    targets = torch.arange(len(inputs)) % CLASSES
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    runs: list[Callable[[], Any]] = [
        partial(plain, network, inputs, targets),
        partial(squared_norms, network, inputs, targets),
        partial(example_gradients, network, inputs, targets),
    ]
    before = modules_only(network)
    if before.rest != network.rest:
        runs.append(partial(example_gradients, before, inputs, targets))
    base, norms, gradients, *modules = times(runs, seconds)
    inside = sum(layer.inside for layer in network.layers)
    rest = sum(model.get_parameter(parameter).numel() for parameter in network.rest)
    way = "vmap" if network.vectorised else f"loop: {network.obstacle}"
    fallback = f"{len(network.rest)} of {rest:,} numbers ({way})" if network.rest else "none"
    cells = [
        name,
        f"{network.size:,}",
        f"{len(network.layers)} ({inside} inside)",
        fallback,
        f"{error(network, inputs, targets):.0e}",
        f"{1e3 * base / len(inputs):.1f}",
        f"{norms / base:.1f}",
        f"{gradients / base:.1f}",
        f"{modules[0] / base:.1f}" if modules else "the same",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="some of them")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| model | parameters | layers | fallback | error | plain, ms | norms | gradients | modules only |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models or [*TIMM, *(f"HF {kind}" for kind in HUGGING_FACE)]:
        torch.manual_seed(0)
        print(line(name, options.examples, options.seconds), flush=True)


if __name__ == "__main__":
    main()
