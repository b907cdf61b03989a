"""Where a library has its own way to load weights: torch's hooks, transformers' conversions, adapters of peft."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.checkpoints.weights import Fit, belongs
from influence_cli.errors import InfluenceError, describe


def by_library(model: nn.Module, option: Fit) -> Fit | None:
    """Let the model's own library load weights whose names do not fit: names may change while it loads.

    torch calls the hooks of the model's modules (its newer weight norm takes the names of the older one), transformers
    has a table of conversions per model. Both load into another model; this one is left as it is.

    Args:
        model: the model.
        option: weights of which not every name fits.

    Returns:
        The same weights with the names of the model; None if the library cannot place every one either.
    """
    if option.misshapen or not (option.unexpected or option.left_out):
        return None  # no name is without a place, or it is not about names
    state = OrderedDict((new, option.candidate.tensors[name]) for name, new in option.names.items() if new is not None)
    for load in (_by_hooks, _by_transformers):
        loaded = load(model, state, option)
        if loaded is not None:
            values, stray = loaded
            modules = {name for name, _ in model.named_modules()}
            if not any(belongs(name, modules) for name in stray):
                return replace(option, values=values, missing=(), unexpected=(), misshapen=(), left_out=tuple(stray))
    return None


def _by_hooks(
    model: nn.Module, state: OrderedDict[str, Tensor], option: Fit
) -> tuple[Mapping[str, Tensor], list[str]] | None:
    metadata = option.candidate.metadata
    if isinstance(metadata, Mapping):
        prefix = option.prefix
        versions = {str(key).removeprefix(prefix): value for key, value in metadata.items()}
        state._metadata = versions  # type: ignore[attr-defined]
    # Into the model itself, which then gets its numbers back: not every model can be copied.
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        result = model.load_state_dict(state, strict=False)
        loaded = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in model.state_dict().items()
        }
    except Exception:  # shapes that differ: the names are reported as they are
        return None
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in before:
                    value.copy_(before[name])
    if any(not name.endswith("num_batches_tracked") for name in result.missing_keys):
        return None
    return loaded, list(result.unexpected_keys)


def _by_transformers(
    model: nn.Module, state: OrderedDict[str, Tensor], _option: Fit
) -> tuple[Mapping[str, Tensor], list[str]] | None:
    # A model of transformers has been imported from it; nothing is imported here.
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None or not isinstance(model, base):
        return None
    kind: Any = type(model)
    bars: Any = sys.modules["transformers.utils.logging"]
    shown = bars.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bars.disable_progress_bar()
            other, told = kind.from_pretrained(
                None, config=copy.deepcopy(model.config), state_dict=dict(state), output_loading_info=True
            )
    except Exception:  # the names are reported as they are
        return None
    finally:
        if shown:
            bars.enable_progress_bar()
    if told.get("missing_keys") or told.get("mismatched_keys") or told.get("error_msgs"):
        return None
    return other.state_dict(), list(told.get("unexpected_keys") or ())


def is_adapter(path: Path) -> bool:
    """Say whether a folder holds an adapter of peft, without the model that it adapts."""
    return (path / "adapter_config.json").is_file()


def with_adapter(model: nn.Module, folder: Path, where: str) -> nn.Module:
    """Put an adapter of peft on its base model. What the adapter trained is tracked, the base is not.

    Args:
        model: the base model, with its weights.
        folder: with ``adapter_config.json``.
        where: the start of errors.

    Raises:
        InfluenceError: peft is not installed, or the adapter does not fit.
    """
    if importlib.util.find_spec("peft") is None:
        raise InfluenceError(f"{where}: the adapter {folder} needs peft, which is not installed", "pip install peft")
    peft: Any = importlib.import_module("peft")

    try:
        # From files that are here, and never from pickles: peft reads safetensors where they are there.
        adapted: nn.Module = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:
        raise InfluenceError(
            f"{where}: peft cannot put the adapter {folder} on the model: {describe(error)}",
            "model.factory returns the base model that the adapter was trained on",
        ) from error
    return adapted
