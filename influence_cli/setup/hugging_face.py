"""The model of a folder that transformers or timm wrote for the Hugging Face Hub; nothing is downloaded.

``config.json`` names the architecture and the classes, ``preprocessor_config.json`` the transform. The weights are left
to the library: it renames them while it loads.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence_cli.errors import InfluenceError, describe
from influence_cli.setup.guesses import ModelGuess, TransformGuess
from influence_cli.setup.inside import look_inside, names_by_output
from influence_cli.setup.named_model import factory_name

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# The last layer of a classifier, among the weights of an adapter.
HEAD = re.compile(r"(classifier|score|head)[^/]*\.(weight|bias)$")
MAX_BYTES = 50_000_000


def folder_of(checkpoint: Path) -> Path | None:
    """Give the folder with ``config.json`` that a checkpoint is, or lies in; None where there is none."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    beside = checkpoint.is_dir() or checkpoint.name.startswith(("model.safetensors", "model-", "pytorch_model"))
    return folder if beside and (folder / CONFIG).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a mapping.

    Raises:
        InfluenceError: it cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InfluenceError(f"{path} is not readable JSON: {describe(error)}", "is this the right folder?") from error
    if not isinstance(content, dict):
        raise InfluenceError(f"{path} holds a {type(content).__name__}, not a mapping", "is this the right folder?")
    return content


def guess_hugging_face(folder: Path) -> ModelGuess:
    """Read what transformers needs to load an image classifier from a folder.

    Raises:
        InfluenceError: it is no image classifier or needs code of its own, or transformers is not installed.
    """
    config = read_json(folder / CONFIG)
    path = folder / CONFIG
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if not architecture:
        raise InfluenceError(
            f"{path} names no architecture", "name the function that builds the model: --model ./model.py:build"
        )
    if not architecture.endswith("ForImageClassification"):
        raise InfluenceError(
            f"{path} says {architecture}, which is no image classifier",
            "give a model …ForImageClassification, or the function that builds yours: --model ./model.py:build",
        )
    if config.get("auto_map"):
        raise InfluenceError(
            f"{path} needs code of its own (auto_map), which is not run",
            "name a function that builds the model: --model ./model.py:build",
        )
    if importlib.util.find_spec("transformers") is None:
        raise InfluenceError(
            f"{path} says {architecture}, but transformers is not installed", "pip install transformers"
        )
    names = names_by_output(config.get("id2label"))
    count = len(names) if names else config.get("num_labels", 2)
    size = config.get("image_size")
    known = names and not all(name == f"LABEL_{number}" for number, name in enumerate(names))
    channels = config.get("num_channels", 3)
    return ModelGuess(
        factory="transformers.AutoModelForImageClassification.from_pretrained",
        factory_why=f"{architecture} in {path}; it loads the weights too",
        args={"pretrained_model_name_or_path": str(folder)},
        args_why="",
        outputs=count if isinstance(count, int) else None,
        checkpoint=None,
        names=names if known else None,
        names_why=f"id2label in {path}",
        channels=channels if channels in (1, 3) else None,
        sizes=((size, size),) if isinstance(size, int) and size > 0 else (),
        transform=processor(folder),
    )


def guess_adapter(folder: Path, named: str | None) -> ModelGuess:
    """Take an adapter of peft with the base model that its ``adapter_config.json`` or ``--model`` names.

    Raises:
        InfluenceError: the base model is no folder here, or no image classifier.
    """
    path = folder / "adapter_config.json"
    base = read_json(path).get("base_model_name_or_path")
    if named is not None:
        return ModelGuess(factory_name(named), "--model", {}, "", None, str(folder), f"the adapter of {path}")
    if not isinstance(base, str) or not (Path(base) / CONFIG).is_file():
        raise InfluenceError(
            f"{path} names the base model {base!r}, which is no folder with a config.json here",
            "name a function that returns the trained base model: --model ./model.py:base",
        )
    guess = guess_hugging_face(Path(base))
    weights = look_inside(folder / "adapter_model.safetensors").state
    heads = [value for name, value in weights.items() if HEAD.search(name) and "lora" not in name and value.ndim]
    rows = {int(value.shape[0]) for value in heads}
    outputs = rows.pop() if len(rows) == 1 else guess.outputs
    args = dict(guess.args)
    if outputs != guess.outputs:
        args |= {"num_labels": outputs, "ignore_mismatched_sizes": True}
    return replace(
        guess,
        factory_why=f"the base model of {path}",
        args=args,
        args_why=f"the last layer in {folder} has {outputs} rows" if heads else "",
        outputs=outputs,
        checkpoint=str(folder),
        names=guess.names if outputs == guess.outputs else None,
        transform=processor(folder) or guess.transform,
    )


def processor(folder: Path) -> TransformGuess | None:
    """Give the transform of a folder's ``preprocessor_config.json``, if it has one."""
    path = folder / PROCESSOR
    if not path.is_file():
        return None
    config = read_json(path)
    size = config.get("crop_size") or config.get("size")
    words = " × ".join(f"{value}" for value in size.values()) if isinstance(size, Mapping) else f"{size}"
    return TransformGuess({"processor": str(folder)}, f"the processor of {folder} ({words})", f"{path}")
