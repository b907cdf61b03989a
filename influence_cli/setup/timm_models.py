"""The model and transform of a checkpoint that names one of timm's architectures.

timm's training script writes ``arch`` and ``args`` beside the weights; a folder of the Hub has ``config.json`` with
``architecture``. Only names that timm itself lists are taken: others could point to files or to the network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError, describe, did_you_mean
from influence_cli.setup.fitting import fits, head_rows, without_wrapper
from influence_cli.setup.guesses import ModelGuess, TransformGuess
from influence_cli.setup.inside import Inside

# Options of timm's script that change the model, and what the factory calls them.
MODEL_OPTIONS = {"gp": "global_pool", "bn_eps": "bn_eps"}


def is_timm_name(name: object) -> bool:
    """Say whether this can be one of timm's architectures: a word, without the source of weights behind a dot."""
    return isinstance(name, str) and name.replace("_", "").replace(".", "").isalnum()


def guess_timm(arch: str, settings: Mapping[str, Any], inside: Inside, where: str) -> ModelGuess:
    """Build the architecture that a file names without memory for its weights, and read what it must be told.

    Args:
        arch: timm's name of the model.
        settings: options of the run: num_classes, img_size, in_chans, mean, std, interpolation, crop_pct, …
        inside: the weights.
        where: what names the architecture, such as ``arch in model_best.pth.tar``.

    Raises:
        InfluenceError: timm is not installed, has no such model, or the weights do not fit it.
    """
    if importlib.util.find_spec("timm") is None:
        raise InfluenceError(f"{where} is timm's {arch}, but timm is not installed", "pip install timm")
    import timm

    arch = arch.partition(".")[0]
    known = timm.list_models()
    if arch not in known:
        raise InfluenceError(
            f"{where} is {arch!r}, which is no model of timm {timm.__version__}", did_you_mean(arch, known, listed=0)
        )
    for candidate in inside.candidates:
        args, channels = _arguments(arch, settings, without_wrapper(candidate.tensors), where)
        image_size = _whole(settings.get("img_size")) or _whole(_last(settings.get("input_size")))
        for attempt in [args, *([args | {"img_size": image_size}] if image_size else [])]:
            try:
                model = _build(attempt, where)
            except InfluenceError:
                if attempt is args:
                    raise
                continue  # not every architecture takes a size
            if fits(model, candidate.tensors):
                break
        else:
            continue
        break
    else:
        raise InfluenceError(
            f"{where} is {arch}, but the weights do not fit that model with {args.get('num_classes')} classes",
            "name the function that builds yours: --model ./model.py:build",
        )
    checkpoint, remark = inside.checkpoint(candidate)
    return ModelGuess(
        factory="timm.create_model",
        factory_why=where,
        args=attempt,
        args_why="sizes as the weights have them",
        outputs=args.get("num_classes"),
        checkpoint=checkpoint,
        checkpoint_why=remark,
        channels=channels,
        transform=_transform(model, settings, channels, where),
    )


def _arguments(
    arch: str, settings: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], int]:
    """Read what timm must be told to build a model for some weights, and the channels of its input."""
    args: dict[str, Any] = {"model_name": arch}
    args |= {ours: settings[theirs] for theirs, ours in MODEL_OPTIONS.items() if _is_plain(settings.get(theirs))}
    extra = _mapping(settings.get("model_kwargs"))
    args |= {
        key: list(value) if isinstance(value, tuple) else value for key, value in extra.items() if _fits_yaml(value)
    }
    config = dict(getattr(_build(args, where), "default_cfg", {}))
    outputs = head_rows(state, config.get("classifier")) or _whole(settings.get("num_classes"))
    if outputs is not None:
        args["num_classes"] = outputs
    channels = _columns(state, config.get("first_conv")) or 3
    if channels != 3:
        args["in_chans"] = channels
    return args, channels


def _build(args: Mapping[str, Any], where: str) -> nn.Module:
    import timm

    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(pretrained=False, **args)
    except Exception as error:  # options of another version, or a model that computes while it is built
        try:
            model = timm.create_model(pretrained=False, **args)
        except Exception:
            raise InfluenceError(
                f"{where} is {args['model_name']}, which timm cannot build: {describe(error)}",
                "name the function that builds yours: --model ./model.py:build",
            ) from error
    return model


def _transform(model: nn.Module, settings: Mapping[str, Any], channels: int, where: str) -> TransformGuess:
    """Give the transform of timm's evaluation, as its script resolves the options."""
    from timm.data import resolve_data_config

    keys = ("input_size", "img_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {key: settings[key] for key in keys if settings.get(key) is not None}
    resolved = resolve_data_config(options | {"in_chans": channels}, model=model)
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in resolved.items()}
    size, share = args["input_size"][-1], args["crop_pct"]
    return TransformGuess(
        {"factory": "timm.data.create_transform", "args": {**args, "is_training": False}},
        f"timm's for {size} pixels, crop {share:g}, mean {_short(args['mean'])}, std {_short(args['std'])}",
        f"timm's evaluation, {where}" if not options else f"timm's evaluation, with the options beside {where}",
    )


def _short(values: list[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _columns(state: Mapping[str, Tensor], name: object) -> int | None:
    first = name[0] if isinstance(name, tuple | list) and name else name
    weight = state.get(f"{first}.weight")
    return int(weight.shape[1]) if weight is not None and weight.ndim == 4 else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _last(value: object) -> object:
    return value[-1] if isinstance(value, list | tuple) and value else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _fits_yaml(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else _is_plain(value)
