"""BatchNorms in training: their running averages follow the batches, and so they depend on the parameters.

torch.func cannot change the averages in place, and torch has no derivative in them. So the passes here leave them
alone, what a batch adds to them is computed from the inputs of the BatchNorms, and their derivative in eval mode comes
from the formula written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm: TypeAlias = _BatchNorm


def averaging_norms(model: nn.Module) -> dict[str, Norm]:
    """Give the BatchNorms that keep running averages in training, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    }


def momentum_of(norm: Norm) -> float:
    """Give the share of a batch in the new average."""
    return float(norm.momentum or 0.0)


@contextmanager
def without_averages(norms: Iterable[Norm]) -> Iterator[None]:
    """Let BatchNorms normalise by the batch, and leave their averages alone."""
    changed = list(norms)
    try:
        for norm in changed:
            norm.track_running_stats = False
        yield
    finally:
        for norm in changed:
            norm.track_running_stats = True


@contextmanager
def inputs_of(norms: Iterable[Norm]) -> Iterator[dict[nn.Module, Tensor]]:
    """Note what goes into each BatchNorm."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [norm.register_forward_pre_hook(lambda module, given: seen.__setitem__(module, given[0])) for norm in norms]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def plain_norms(model: nn.Module) -> Iterator[None]:
    """Let the BatchNorms of a model in eval mode have a derivative in their averages."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    try:
        for norm in norms:
            norm.forward = partial(_normalised, norm)  # type: ignore[method-assign]
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normalised(norm: Norm, inputs: Tensor) -> Tensor:
    def channels(vector: Tensor) -> Tensor:
        return vector.reshape(1, -1, *[1] * (inputs.ndim - 2))

    assert norm.running_mean is not None and norm.running_var is not None  # noqa: PT018 (told to mypy)
    scaled = (inputs - channels(norm.running_mean)) * channels((norm.running_var + norm.eps).rsqrt())
    return scaled if norm.weight is None else scaled * channels(norm.weight) + channels(norm.bias)
