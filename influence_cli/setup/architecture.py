"""Which model a checkpoint is of: what the file says, what its names and shapes show, or what ``--model`` names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence_cli.checkpoints.libraries import is_adapter
from influence_cli.checkpoints.weights import NESTS, Candidate
from influence_cli.errors import InfluenceError, counted
from influence_cli.setup.guesses import ModelGuess, TransformGuess
from influence_cli.setup.hugging_face import CONFIG, folder_of, guess_adapter, guess_hugging_face, processor, read_json
from influence_cli.setup.inside import Inside, beside, look_inside
from influence_cli.setup.named_model import guess_named
from influence_cli.setup.timm_models import guess_timm, is_timm_name
from influence_cli.setup.torchvision_models import Recognised, crops, recognise
from influence_cli.setup.transforms import IMAGENET, Geometry, transform_of

NAMED_BY = "name the function or class that builds yours: --model ./model.py:build"
# Where scripts note timm's name of a model.
ARCHES = ("arch", "model_name", "model", "architecture", "backbone", "timm_model")


def guess_model(checkpoint: Path, named: str | None) -> tuple[ModelGuess, Inside]:
    """Find out which model a checkpoint is of.

    Args:
        checkpoint: a file, or a folder as transformers, timm or torch write them.
        named: of ``--model``, or None.

    Returns:
        The model, and what else the checkpoint holds.

    Raises:
        InfluenceError: it cannot be read, or its architecture is not recognised; the hint names ``--model``.
    """
    if is_adapter(checkpoint):
        return guess_adapter(checkpoint, named), beside(checkpoint)
    folder = folder_of(checkpoint)
    if named is None and folder is not None:
        config = read_json(folder / CONFIG)
        if "architectures" in config or "architecture" not in config:
            return guess_hugging_face(folder), beside(folder)
        return _from_timm_folder(folder, config)
    inside = look_inside(checkpoint)
    guess = guess_named(named, inside) if named is not None else _recognised(inside)
    if folder is not None:  # beside the weights of a model that --model names
        guess = replace(guess, transform=processor(folder))
    names = inside.class_names()
    if names is not None and guess.outputs in (len(names[0]), 1, None):
        guess = replace(guess, names=names[0], names_why=f"{names[1]} in {checkpoint.name}")
    return guess, inside


def _recognised(inside: Inside) -> ModelGuess:
    arch, key = _arch(inside)
    by_timm = "version" in inside.top and "arch" in inside.top
    where = f"{key} in {inside.path.name}"
    if by_timm and arch and importlib.util.find_spec("timm") is not None:
        return guess_timm(arch, inside.settings, inside, where)
    nearest = ""
    for candidate in inside.candidates:
        model, nearly = recognise(candidate.tensors)
        if model is not None:
            return _torchvision(model, inside, candidate)
        nearest = nearest or nearly
    if arch and (by_timm or _is_timms(arch)):
        return guess_timm(arch, inside.settings, inside, where)
    raise _unknown(inside, nearest, f"{key}: {arch}" if arch else "")


def _torchvision(model: Recognised, inside: Inside, candidate: Candidate) -> ModelGuess:
    file = inside.path.name
    checkpoint, remark = inside.checkpoint(candidate)
    if not all(part in ("", "_orig_mod", *NESTS) for part in model.prefix.split(".")):
        checkpoint = (checkpoint if isinstance(checkpoint, dict) else {"file": checkpoint}) | {"strip": model.prefix}
    return ModelGuess(
        factory=f"torchvision.models.{model.name}",
        factory_why=f"the names and shapes in {file} are those of {model.name}",
        args=model.args,
        args_why=f"{model.head} in {file} has {model.outputs} rows",
        outputs=model.outputs,
        checkpoint=checkpoint,
        checkpoint_why=remark,
        channels=3,
        sizes=((model.args["image_size"],) * 2,) if "image_size" in model.args else (),
        crops=crops(model.name),
        transform=_reference(inside),
    )


def _reference(inside: Inside) -> TransformGuess | None:
    """Give the transform that torchvision's training script evaluates with, from its options."""
    settings = inside.settings
    size, resized = settings.get("val_crop_size"), settings.get("val_resize_size")
    if type(size) is not int or type(resized) is not int or not 0 < size < 10_000 or not 0 < resized < 10_000:
        return None
    mode = settings.get("interpolation")
    geometry = Geometry(resized, size, mode if isinstance(mode, str) and mode != "bilinear" else "")
    return transform_of(geometry, IMAGENET, 3, f"val_resize_size and val_crop_size in {inside.path.name}")


def _from_timm_folder(folder: Path, config: Mapping[str, Any]) -> tuple[ModelGuess, Inside]:
    """Read a folder that timm wrote for the Hub: the architecture in config.json, the weights beside it."""
    weights = next(
        (folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None
    )
    if weights is None:
        raise InfluenceError(f"{folder} has a config.json but no model.safetensors", "name the file of the weights")
    inside = look_inside(weights)
    described = config.get("pretrained_cfg")
    settings = {**(described if isinstance(described, Mapping) else {}), **config}
    settings["model_kwargs"] = config.get("model_args")
    where = f"architecture in {folder / CONFIG}"
    arch = str(config["architecture"])
    if not is_timm_name(arch):
        raise InfluenceError(f"{where} is {arch!r}, which is no model of timm", NAMED_BY)
    guess = guess_timm(arch, settings, inside, where)
    names = config.get("label_names")
    if isinstance(names, list) and len(names) == guess.outputs and all(isinstance(name, str) for name in names):
        guess = replace(guess, names=tuple(names), names_why=f"label_names in {folder / CONFIG}")
    return guess, inside


def _arch(inside: Inside) -> tuple[str, str]:
    """Give the architecture that a file names, and where; empty where it names none."""
    for place, title in ((inside.top, ""), (inside.settings, "the options' ")):
        for key in ARCHES:
            if is_timm_name(place.get(key)):
                return place[key], title + key
    return "", ""


def _is_timms(arch: str) -> bool:
    if importlib.util.find_spec("timm") is None:
        return False
    import timm

    return arch.partition(".")[0] in timm.list_models()


def _unknown(inside: Inside, nearest: str, said: str) -> InfluenceError:
    names = list(inside.state)
    listed = names if len(names) < 4 else [*names[:2], "…", names[-1]]
    shown = f"{counted(len(names), 'tensor')} ({', '.join(listed)})"
    wrote = "a Lightning module's file" if "pytorch-lightning_version" in inside.top else "the file"
    says = f"{wrote} says {said}" if said else f"{wrote} names no architecture"
    hint = NAMED_BY
    if "pytorch-lightning_version" in inside.top:
        hint = "name your LightningModule: --model module:Class; it gets the hyper-parameters of the file"
    elif any(".attn.qkv." in name or ".conv_dw." in name for name in names):
        hint = f"{NAMED_BY}, or --model timm.models:NAME for one of timm's"
    return InfluenceError(
        f"{inside.path}: the model is not recognised: {shown} are " + (nearest or f"no model of torchvision, {says}"),
        hint,
    )
