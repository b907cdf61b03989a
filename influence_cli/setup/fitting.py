"""Whether weights fit a model, by names and shapes, what their shapes say of its inputs, and where its logits are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.checkpoints import weights
from influence_cli.model.outputs import logits_of
from influence_cli.setup.torchvision_models import COUNTERS

# What wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DataParallel, torch.compile or a wrapping module puts before every name."""
    names = dict(state)
    while True:
        for wrapper in WRAPPERS:
            if names and all(key.startswith(wrapper) for key in names if not COUNTERS.search(key)):
                names = {key.removeprefix(wrapper): value for key, value in names.items()}
                break
        else:
            return names


def fits(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Say whether a state dict has everything of a model in its shape; it may have more, such as a loss's weights."""
    return not misfits(model, state)


def misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """List the names of a model that a state dict lacks or has in another shape, before or after wrappers."""
    expected = {key: value.shape for key, value in model.state_dict().items() if not COUNTERS.search(key)}
    best = list(expected)
    for candidate in (dict(state), without_wrapper(state), _without_first(state)):
        wrong = [key for key, shape in expected.items() if key not in candidate or candidate[key].shape != shape]
        best = min(best, wrong, key=len)
    if best:  # behind the name of a module around it, as the reader of the config takes it off
        modules = {name for name, _ in model.named_modules()}
        taken = weights.fits(weights.Candidate("", state), model.state_dict(), modules)[0]
        best = min(best, [*taken.missing, *(text.split(" ", 1)[0] for text in taken.misshapen)], key=len)
    return best


def _without_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the wrappers from the names that have them, and leave the others, such as ``criterion.weight``."""
    names = dict(state)
    for wrapper in WRAPPERS * 2:
        names = {key.removeprefix(wrapper): value for key, value in names.items()}
    return names


def in_order(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Put weights in the order of a model's layers, which safetensors does not keep; strange ones left out."""
    order, places = list(model.state_dict()), dict[str, str]()
    known = set(order)
    for key in state:
        parts = key.split(".")
        name = next((name for cut in range(len(parts)) if (name := ".".join(parts[cut:])) in known), None)
        if name is not None:
            places.setdefault(name, key)
    return {places[name]: state[places[name]] for name in order if name in places}


def head_rows(state: Mapping[str, Tensor], name: object) -> int | None:
    """Count the rows of a last layer of a known name (several: of the first)."""
    first = name[0] if isinstance(name, tuple | list) and name else name
    weight = state.get(f"{first}.weight")
    return int(weight.shape[0]) if weight is not None and weight.ndim >= 2 else None


def last_rows(state: Mapping[str, Tensor]) -> int | None:
    """Count the rows of the last matrix that has a bias as long: the last layer of most classifiers."""
    for key in reversed(list(state)):
        weight = state[key]
        bias = state.get(key.removesuffix("weight") + "bias")
        if key.endswith("weight") and weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1]):
            return int(weight.shape[0])
    return None


def input_channels(state: Mapping[str, Tensor]) -> int | None:
    """Read the colour channels of an input from the first convolution, or from a first layer that takes all pixels."""
    for value in state.values():
        if value.ndim == 4:
            return int(value.shape[1]) if value.shape[1] in (1, 3) else None
        if value.ndim == 2:
            sizes = square_sizes(state)
            return None if not sizes else 1 if value.shape[1] == sizes[0][0] * sizes[0][1] else 3
    return None


def square_sizes(state: Mapping[str, Tensor]) -> tuple[tuple[int, int], ...]:
    """Read the size of square images from a first layer that takes all their pixels; empty for a convolution."""
    first = next((value for value in state.values() if value.ndim in (2, 4)), None)
    if first is None or first.ndim == 4:
        return ()
    for channels in (1, 3):
        side = math.isqrt(first.shape[1] // channels)
        if side * side * channels == first.shape[1] and side >= 4:
            return ((side, side),)
    return ()


def logits_beside(returned: Any) -> int | str | None:
    """Find the logits among what a model returns first as probabilities: those whose softmax or sigmoid they are.

    Args:
        returned: a tuple or a dict, of several tensors.

    Returns:
        The number or the key of the logits, as ``model.output`` takes it; None where there are none.
    """
    items: Iterable[tuple[Any, Any]] = returned.items() if isinstance(returned, dict) else ()
    if isinstance(returned, tuple | list):
        items = enumerate(returned)
    probabilities = logits_of(returned)
    for key, value in items:
        if not isinstance(value, Tensor) or value.shape != probabilities.shape or value is probabilities:
            continue
        several = value.ndim > 1 and value.shape[1] > 1
        made = value.double().softmax(dim=1) if several else value.double().sigmoid()
        # A word with a dot or a colon would be the name of a function there.
        usable = isinstance(key, int) or (isinstance(key, str) and "." not in key and ":" not in key)
        if usable and torch.allclose(made, probabilities.double(), atol=1e-4):
            return key  # type: ignore[no-any-return]
    return None
