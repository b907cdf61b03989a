"""Where a parameter is used, if its module's input and output do not tell: the functions that take the parameter.

A batch norm followed by an activation in one module, a convolution that pads its input first, a layer norm over the
channels of images: each calls the plain function with its weight, and that call has the input and output that the rule
needs. A parameter that is added to, multiplied with or repeated for every example (class token, position embedding,
layer scale) is a ``term``: the example gradient is the slope there, times the other factor, summed to the parameter's
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from influence_cli.model.network import Network

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# The kind of layer that a function is, and the names of its arguments.
FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    functional.linear: ("linear", ("input", "weight", "bias")),
    functional.conv1d: ("conv", _CONVOLUTION),
    functional.conv2d: ("conv", _CONVOLUTION),
    functional.conv3d: ("conv", _CONVOLUTION),
    functional.layer_norm: ("norm", ("input", "normalized_shape", "weight")),
    functional.rms_norm: ("norm", ("input", "normalized_shape", "weight")),
    functional.group_norm: ("norm", ("input", "num_groups", "weight")),
    functional.batch_norm: ("norm", ("input", "running_mean", "running_var", "weight")),
    functional.embedding: ("embedding", ("input", "weight")),
}
_ADDS = (torch.add, Tensor.add, Tensor.add_)
_SUBTRACTS = (torch.sub, Tensor.sub, Tensor.sub_)
_MULTIPLIES = (torch.mul, Tensor.mul, Tensor.mul_)
_REPEATS = (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to)
TERMS = {*_ADDS, *_SUBTRACTS, *_MULTIPLIES, *_REPEATS}
# They keep the order of the numbers, so that the slope of the result is the parameter's.
RESHAPES = {Tensor.reshape, Tensor.view, Tensor.unsqueeze, Tensor.flatten, torch.reshape, torch.unsqueeze}


@dataclass(frozen=True)
class Windows:
    """How a convolution reads its input, as it was called; the names are those of torch's modules."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"

    @property
    def pads(self) -> bool:
        """Say whether zeros are added around the input."""
        return any(self.padding)


# (layer's number, input a, output, how a convolution read or the shape of a term) to the output.
Record = Callable[[int, Tensor, Tensor, Any], Tensor]


class Uses(TorchFunctionMode):
    """While active, hand each use of the watched parameters to ``record``."""

    def __init__(self, network: Network, record: Record) -> None:
        """Watch the layers of a network that are ``inside``."""
        super().__init__()
        self._record = record
        self._numbers: dict[int, int] = {}
        self._kinds = [layer.kind for layer in network.layers]
        # Reshaped parameters; kept, so that no other tensor gets their identity.
        self._kept: list[Tensor] = []
        for number, layer in enumerate(network.layers):
            if layer.inside:
                # Not module.weight, which a parametrisation makes anew at each look.
                owned = network.model.get_submodule(layer.name)._parameters
                parameter = owned.get(layer.weight.rpartition(".")[2] if layer.kind == "term" else "weight")
                if parameter is not None:
                    self._numbers[id(parameter)] = number

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and record it if it takes a watched parameter."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)  # the model itself needs no gradient of this call
        if func in FUNCTIONS:
            return self._layer(func, args, kwargs)
        if func in TERMS and not kwargs:
            return self._term(func, args)
        output = func(*args, **kwargs)
        if args and func in RESHAPES and self._kind(args[0]) == "term":
            self._kept.append(output)
            self._numbers[id(output)] = self._numbers[id(args[0])]
        return output

    def _kind(self, value: Any) -> str:
        number = self._numbers.get(id(value))
        return "" if number is None else self._kinds[number]

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind, names = FUNCTIONS[func]
        given = dict(zip(names, args, strict=False)) | kwargs
        output = func(*args, **kwargs)
        if self._kind(given.get("weight")) != kind:
            return output
        windows = _windows(given) if kind == "conv" else None
        return self._record(self._numbers[id(given["weight"])], given["input"], output, windows)

    def _term(self, func: Any, args: tuple[Any, ...]) -> Any:
        place = next((place for place in (0, 1) if len(args) > place and self._kind(args[place]) == "term"), None)
        if place is None or (place == 1 and func in _REPEATS):
            return func(*args)
        parameter = args[place]
        factor: Any = 1.0
        if func in _MULTIPLIES:
            factor = args[1 - place]
            if func is Tensor.mul_ and isinstance(factor, Tensor):
                factor = factor.detach().clone()
        elif func in _SUBTRACTS and place == 1:
            factor = -1.0
        output = func(*args)
        if func in _REPEATS:
            output = output.clone()  # no graph can start at a view of the parameter
        factor = factor if isinstance(factor, Tensor) else torch.tensor(factor, device=output.device)
        return self._record(self._numbers[id(parameter)], factor, output, tuple(parameter.shape))


def _windows(given: Mapping[str, Any]) -> Windows | None:
    """Read how a convolution was called; None for a padding by name, which its module describes."""
    kernel = tuple(given["weight"].shape[2:])
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        return None
    stride, padding, dilation = (
        (value,) * len(kernel) if isinstance(value, int) else tuple(value) * (len(kernel) if len(value) == 1 else 1)
        for value in (given.get("stride", 1), padding, given.get("dilation", 1))
    )
    return Windows(kernel, stride, padding, dilation)
