"""Does the same example give the same numbers every time? The generators show who draws; repeating shows what changes.

Random changes may be seldom: a flip of one image in ten passes unseen in a few readings of one image. So two things are
looked at: whether anything drew from the generators of torch, numpy or random (then it is repeated many times), and
whether examples spread over the set are the same when read twice (for generators that nobody sees).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError

# A random flip with probability ½ goes unnoticed in this many readings of one example once in 128 times.
READINGS = 8
# Repetitions where something draws random numbers, until one differs.
REPETITIONS = 200


@contextmanager
def unchanged_generators(device: torch.device | None = None) -> Iterator[Callable[[], list[str]]]:
    """Put the global generators back at the end.

    Args:
        device: whose generator counts as well.

    Yields:
        A function that names the libraries whose generator has been drawn from so far.
    """
    before = _states(device)

    def drawn() -> list[str]:
        now = _states(device)
        return [name for name, state in before.items() if not _equal(state, now[name])]

    try:
        yield drawn
    finally:
        torch.set_rng_state(before["torch"])
        random.setstate(before["random"])
        np.random.set_state(before["numpy"])
        if device is not None and "CUDA" in before:
            torch.cuda.set_rng_state(before["CUDA"], device)


def _states(device: torch.device | None) -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    states["numpy"] = np.random.get_state()
    if device is not None and device.type == "cuda":
        states["CUDA"] = torch.cuda.get_rng_state(device)
    return states


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(np.array_equal(one, other))


def _same(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors have the same numbers; NaN is NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def refuse_random_items(split: Split, positions: np.ndarray) -> str:
    """Read some examples again, and refuse a split of which one has changed.

    Args:
        split: the examples.
        positions: which ones; those that cannot be read are left to the pass over the data, which names them.

    Returns:
        What draws random numbers though no reading differed; empty if nothing does.

    Raises:
        InfluenceError: two readings of an example differ; its position.
    """
    with unchanged_generators() as drawn:
        first: dict[int, Tensor] = {}
        for position in positions.tolist():
            tensor = _input(split, position)
            if tensor is not None:
                first[position] = tensor
        if not first:
            return ""
        again = [*first, *list(first)[:1] * (READINGS - 2)]
        if drawn():
            again += [list(first)[number % len(first)] for number in range(REPETITIONS)]
        for position in again:
            title = split.title(position)
            tensor = to_input(split, raw_item(split, position)[0], title)
            if not _same(tensor, first[position]):
                raise InfluenceError(
                    f"{split.where}: the {split.name} transform is random: two readings of {title} differ",
                    "give the evaluation transform, without augmentation: a gradient belongs to one fixed input",
                )
        return ", ".join(drawn())


def _input(split: Split, position: int) -> Tensor | None:
    title = split.title(position)
    try:
        return to_input(split, raw_item(split, position)[0], title)
    except InfluenceError:
        return None


def refuse_random_outputs(forward: Callable[[Tensor], Tensor], inputs: Tensor, where: str) -> tuple[Tensor, str]:
    """Run a model twice, and many times if it draws random numbers.

    Args:
        forward: inputs to logits.
        inputs: [b, …], on the model's device.
        where: start of the error.

    Returns:
        The outputs [b, C], and what draws random numbers though no output differed; empty if nothing does.

    Raises:
        InfluenceError: the outputs of two runs differ.
    """
    with unchanged_generators(inputs.device) as drawn:
        outputs = forward(inputs)
        for _ in range(REPETITIONS if drawn() else 1):
            if not _same(outputs, forward(inputs)):
                raise InfluenceError(
                    f"{where}: the outputs are random in eval mode",
                    "dropout outside nn.Dropout? F.dropout needs training=self.training",
                )
        return outputs, ", ".join(drawn())
