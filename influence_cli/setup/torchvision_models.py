"""Recognise a state dict of a torchvision model by its names and shapes; nothing is downloaded or computed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Of each family: a weight that only this family has, the weight of the last layer, and how its builders are called.
FAMILIES = (
    ("layer1.0.conv1.weight", "fc.weight", ("resnet", "resnext", "wide_resnet")),
    ("features.denseblock1.denselayer1.conv1.weight", "classifier.weight", ("densenet",)),
    ("features.1.0.block.0.0.weight", "classifier.1.weight", ("efficientnet",)),
    ("features.1.block.0.0.weight", "classifier.3.weight", ("mobilenet_v3",)),
    ("features.1.conv.0.0.weight", "classifier.1.weight", ("mobilenet_v2",)),
    ("features.1.0.layer_scale", "classifier.2.weight", ("convnext",)),
    ("features.1.0.attn.qkv.weight", "head.weight", ("swin",)),
    ("conv_proj.weight", "heads.head.weight", ("vit",)),
    ("trunk_output.block1.block1-0.f.a.0.weight", "fc.weight", ("regnet",)),
    ("stage2.0.branch1.0.weight", "fc.weight", ("shufflenet",)),
    ("features.3.squeeze.weight", "classifier.1.weight", ("squeezenet",)),
    ("layers.8.0.layers.0.weight", "classifier.1.weight", ("mnasnet",)),
    ("inception3a.branch1.conv.weight", "fc.weight", ("googlenet",)),
    ("Mixed_5b.branch1x1.conv.weight", "fc.weight", ("inception",)),
    ("blocks.0.layers.0.layers.MBconv.proj.1.weight", "classifier.5.weight", ("maxvit",)),
    ("features.0.weight", "classifier.6.weight", ("vgg", "alexnet")),
)
# Counters that wrappers and profilers leave in a state dict.
COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged|total_ops|total_params)$")
# What initialises parameters.
_FILLING = {
    getattr(Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")
}
# From this share of equal names and shapes on, a model counts as nearly this one.
NEAR = 0.8


@dataclass(frozen=True)
class Recognised:
    """A torchvision model.

    Attributes:
        name: of its builder in torchvision.models.
        args: of the builder.
        outputs: rows of the last layer.
        head: the weight of the last layer, as the file names it.
        prefix: what stands before torchvision's names in the file.
    """

    name: str
    args: dict[str, Any]
    outputs: int
    head: str
    prefix: str


def recognise(state: Mapping[str, Tensor]) -> tuple[Recognised | None, str]:
    """Find the builder whose model has exactly these names and shapes.

    Args:
        state: the state dict; names outside of the model's prefix (``criterion.weight``) are not looked at.

    Returns:
        The model, or None; and for None, which model nearly fits and where it differs, or an empty text.
    """
    import torchvision

    nearest, best = "", NEAR
    for marker, head, beginnings in FAMILIES:
        for prefix in _prefixes(state, marker):
            shapes = _shapes(state, prefix)
            if len(shapes.get(head, ())) < 2:
                outputs, args = 1000, _extra_args(beginnings[0], shapes)
            else:
                outputs = shapes[head][0]
                args = {"num_classes": outputs, **_extra_args(beginnings[0], shapes)}
            for name in torchvision.models.list_models(module=torchvision.models):
                if not name.startswith(beginnings):
                    continue
                expected = _build_shapes(name, args)
                if expected == shapes and head in shapes:
                    return Recognised(name, args, outputs, prefix + head, prefix), ""
                share = sum(shapes.get(key) == shape for key, shape in expected.items()) / max(1, len(expected))
                if share > best:
                    nearest, best = _difference(name, expected, shapes), share
    return None, nearest


def crops(name: str) -> tuple[tuple[int, int], ...]:
    """Give (resize, crop) with which torchvision evaluates its own weights of a model, the newest weights last."""
    import torchvision

    pairs = []
    for weights in torchvision.models.get_model_weights(name):
        preset = getattr(weights.transforms, "keywords", {})
        crop = preset.get("crop_size")
        if type(crop) is int:
            pairs.append((int(preset.get("resize_size", 256)), crop))
    return tuple(dict.fromkeys(pairs))


def _prefixes(state: Mapping[str, Tensor], marker: str) -> list[str]:
    ending = f".{marker}"
    return [key.removesuffix(marker) for key in state if key == marker or key.endswith(ending)]


def _shapes(state: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        key.removeprefix(prefix): tuple(value.shape)
        for key, value in state.items()
        if key.startswith(prefix) and not COUNTERS.search(key)
    }


def _extra_args(family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Give what else a builder must be told, read from the shapes."""
    if family == "vit" and len(shapes.get("encoder.pos_embedding", ())) == 3:
        side = math.isqrt(shapes["encoder.pos_embedding"][1] - 1) * shapes["conv_proj.weight"][-1]
        return {} if side == 224 else {"image_size": side}
    if family == "googlenet":
        return {"aux_logits": "aux1.fc1.weight" in shapes, "init_weights": False}
    if family == "inception":
        return {"aux_logits": "AuxLogits.fc.weight" in shapes, "init_weights": False}
    return {}


def _build_shapes(name: str, args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Build a model without its weights and give its names and shapes; none where it cannot be built so."""
    import torchvision

    try:
        with _WithoutWeights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torchvision.models.get_model(name, weights=None, **args)
    except (TypeError, ValueError, RuntimeError):  # an image size that is no multiple of the patch
        return {}
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if not COUNTERS.search(key)}


class _WithoutWeights(TorchFunctionMode):
    """Give no memory to what is made empty, as parameters are, and leave it uninitialised; compute everything else.

    ``torch.device("meta")`` alone would not do: some models compute their widths with tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        words = kwargs or {}
        if func in (torch.empty, torch.ones, torch.zeros):
            return func(*args, **{**words, "device": "meta"})
        if func in _FILLING and args[0].is_meta:
            return args[0]
        return func(*args, **words)


def _difference(name: str, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    missing = [key for key in expected if key not in shapes]
    other = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    added = [key for key in shapes if key not in expected]
    parts = [f"it has no {_few(missing)}"] if missing else []
    parts += [f"{key} is {list(shapes[key])} instead of {list(expected[key])}" for key in other[:2]]
    parts += [f"it has {_few(added)} besides"] if added else []
    return f"nearly torchvision's {name}, but {', '.join(parts)}"


def _few(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
