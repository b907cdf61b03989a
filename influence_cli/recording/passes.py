"""What a forward pass of the user's loop is given: random state, inputs, running averages, modes of the modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError


@dataclass(frozen=True)
class Pass:
    """A forward pass that autograd follows.

    Attributes:
        random: the CPU generator's state before it.
        cuda: that of the model's CUDA device; None elsewhere.
        still: names of the modules in eval mode, of a model that is in training mode or not.
        trace: from ``trace_of``, [2].
        batch: b.
        buffers: the model's floating-point buffers before it, end to end [q]; None where nobody asked.
    """

    random: Tensor
    cuda: Tensor | None
    still: tuple[str, ...]
    trace: Tensor
    batch: int
    buffers: Tensor | None


@dataclass
class Passes:
    """The passes of a model since the last step.

    Attributes:
        model: the module that the loop calls.
        wanted: whether the buffers before the next pass are to be noted.
        last: the last pass.
        counts: how many there were, by the modules in eval mode.
        draws: whether the last pass drew random numbers.
    """

    model: nn.Module
    wanted: bool = True
    last: Pass | None = None
    draws: bool = False
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def forget(self) -> None:
        """Begin a new step."""
        self.last = None
        self.counts.clear()

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a pass begins with. A pass that autograd does not follow is an evaluation, and left alone."""
        if not torch.is_grad_enabled():
            return
        first = next(self.model.parameters())
        if torch.is_autocast_enabled(first.device.type):
            raise InfluenceError(
                "the model runs under autocast, and a replay follows float32 or float64 only", "record without autocast"
            )
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if given is None:
            raise InfluenceError("the model was called without a tensor", "a recorded model takes model(inputs)")
        still = tuple(name for name, module in self.model.named_modules() if not module.training)
        self.counts[still] += 1
        self.last = Pass(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(first.device) if first.is_cuda else None,
            still,
            trace_of(given.detach()),
            len(given),
            flat(floating_buffers(self.model).values(), first) if self.wanted else None,
        )

    def after(self, _module: nn.Module, _args: Any, _outputs: Any) -> None:
        """Note whether the pass drew random numbers."""
        if self.last is None or not torch.is_grad_enabled():
            return
        self.draws = not torch.equal(self.last.random, torch.get_rng_state())
        if self.last.cuda is not None:
            device = next(self.model.parameters()).device
            self.draws |= not torch.equal(self.last.cuda, torch.cuda.get_rng_state(device))


def floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Give the buffers of a state, by name."""
    return {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def flat(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Copy tensors end to end; of none, an empty vector of the type and device of another."""
    parts = [each.detach().reshape(-1) for each in tensors]
    return torch.cat(parts) if parts else like.new_zeros(0)


def trace_of(inputs: Tensor) -> Tensor:
    """Recognise a batch by two numbers: its root mean square, and a sum in which every number has a weight of its own.

    The sum is divided so that batches that have nothing in common differ by about their root mean square.
    """
    with torch.no_grad():
        rows = inputs.reshape(len(inputs), -1).float()
        along, down = _waves(rows.shape[1], rows.device), _waves(len(rows), rows.device)
        total = 2 * (down @ (rows @ along)) / max(1, rows.numel()) ** 0.5
        return torch.stack([rows.square().mean().sqrt(), total])


@lru_cache(maxsize=8)
def _waves(count: int, device: torch.device) -> Tensor:
    # Not a multiple of any period of an image.
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7320508).float().to(device)
