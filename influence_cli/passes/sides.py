"""The two sides of a layer's gradient per position: its input a and its output slope δ, in one layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.model.network import Layer
from influence_cli.passes.layers import Call
from influence_cli.passes.uses import Windows


def sides(layer: Layer, module: nn.Module, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """Give a and δ of a matrix layer per position; several calls add more positions.

    Returns:
        a [b, g, T, K] (K = 0 if the weight is not tracked; without the ones of a bias), δ [b, g, T, O];
        float32 or wider.
    """
    pairs = [_call_sides(layer, module, call) for call in calls]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs], dim=2), torch.cat([d for _, d in pairs], dim=2)


def _call_sides(layer: Layer, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
    if call.delta is None:
        raise ValueError("the call has no slope")
    delta = wide(call.delta)
    if layer.kind == "linear":
        d = delta.reshape(len(delta), 1, -1, layer.outputs)
    else:
        d = delta.reshape(len(delta), layer.groups, layer.outputs, -1).transpose(2, 3)
    if not layer.weight:
        return d.new_empty(*d.shape[:3], 0), d
    if layer.kind == "linear":
        return wide(call.a).reshape(len(delta), 1, -1, layer.inputs), d
    patches = _patches(call.how or module, wide(call.a))
    return patches.reshape(len(delta), layer.groups, layer.inputs, -1).transpose(2, 3), d


def _patches(module: Any, x: Tensor) -> Tensor:
    """Unfold what each output position of a convolution reads: [b, channels × kernel size, positions]."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if all(k == 1 for k in kernel) and all(s == 1 for s in stride) and not _pads(module):
        return x.flatten(2)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0,) * len(kernel)
    else:
        padding = module.padding
    if len(kernel) == 2:
        return functional.unfold(x, kernel, dilation, padding, stride)
    if any(padding):
        x = functional.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    # [b, channels, positions …, kernel …] to [b, channels · kernel, positions]
    order = (0, 1, *range(2 + len(kernel), 2 + 2 * len(kernel)), *range(2, 2 + len(kernel)))
    x = x.permute(order)
    width = x.shape[1] * int(torch.tensor(kernel).prod())
    return x.reshape(len(x), width, -1)


def _pads(module: Any) -> bool:
    return module.pads if isinstance(module, Windows) else any(module._reversed_padding_repeated_twice)


def normalised(module: Any, x: Tensor) -> Tensor:
    """Give the values that a norm multiplies with its weight."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, list(module.normalized_shape), eps=module.eps)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    scale: Tensor = (module.running_var + module.eps).rsqrt()
    mean: Tensor = module.running_mean
    return (x - mean.view(shape)) * scale.view(shape)


def over_positions(module: Any, x: Tensor) -> Tensor:
    """Sum over the positions that share a norm's weight: [b, numel]."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return x.reshape(len(x), -1, int(torch.tensor(module.normalized_shape).prod())).sum(dim=1)
    return x.reshape(len(x), x.shape[1], -1).sum(dim=2)


def over_examples(x: Tensor, shape: Sequence[int], examples: int) -> Tensor:
    """Sum what a term's slope gives over all axes that the parameter was spread over, but for the examples.

    Args:
        x: [b, …], or [b · m, …] with m windows of each example.
        shape: of the parameter, as it was used.
        examples: b.

    Returns:
        [b, numbers of the parameter].

    Raises:
        ValueError: the parameter's first axis is that of the examples, or x has another number of rows.
    """
    aligned = (1,) * (x.ndim - len(shape)) + tuple(shape)
    if not aligned or aligned[0] != 1 or len(x) % examples:
        raise ValueError("the parameter is not used once per example")
    x, aligned = x.reshape(examples, -1, *x.shape[1:]), (1, *aligned)
    spread = [axis for axis in range(1, x.ndim) if aligned[axis] == 1 and x.shape[axis] != 1]
    return (x.sum(dim=spread) if spread else x).reshape(examples, -1)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
