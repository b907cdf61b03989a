"""Read a checkpoint that is a folder: of Hugging Face, whole or in shards, or of torch.distributed.checkpoint."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_cli.checkpoints.restricted_pickle import Stand
from influence_cli.checkpoints.torch_file import read_torch_bytes, read_torch_file, unpickle
from influence_cli.errors import InfluenceError, describe
from influence_cli.runtime import disk

# What transformers and accelerate write, in the order in which they read it.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".th", ".bin", ".tar")


def read_folder(path: Path, where: str) -> object:
    """Read the weights of a folder.

    Raises:
        InfluenceError: it is not a folder of weights, naming the files in it that could be meant; or damaged.
    """
    if (path / ".metadata").is_file():
        return read_distributed(path, where)
    for name in _WHOLE:
        if (path / name).is_file():
            return read_part(path / name, where)
    for name in _SHARDED:
        if (path / name).is_file():
            return read_index(path / name, where)
    inside = sorted(path.iterdir())
    near = [item.name for item in inside if item.suffix in _SUFFIXES] or [
        f"{item.name}/" for item in inside if item.is_dir() and any((item / name).is_file() for name in _WHOLE)
    ]
    raise InfluenceError(
        f"{where}: the checkpoint {path} is a folder without {', '.join((*_WHOLE, _SHARDED[0]))} or .metadata",
        f"name one of what is in it: {', '.join(near[:6])}" if near else "name the file of the weights",
    )


def read_part(path: Path, where: str) -> object:
    """Read one file of a folder."""
    if path.suffix != ".safetensors":
        return read_torch_file(path, where)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            left = disk.stand_in(file.read(64))
        if left is not None:
            raise InfluenceError(f"{where}: {path} is {left[0]}", left[1]) from error
        raise InfluenceError(f"{where}: {path} cannot be read: {describe(error)}") from error


def read_index(path: Path, where: str) -> dict[str, Tensor]:
    """Read all shards that an index names: ``{"weight_map": {parameter: file}}``.

    Raises:
        InfluenceError: the index is damaged, names files elsewhere, or a shard or one of its tensors is missing.
    """
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({Path(name).name for name in shards.values() if Path(name).name == name})
        if not files or {*files} != {*shards.values()}:
            raise ValueError("its weight_map does not name files beside it")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InfluenceError(f"{where}: {path} is not an index of shards: {describe(error)}") from error
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise InfluenceError(
            f"{where}: {path} names {len(files)} files, but {', '.join(missing[:4])} is not beside it",
            "copy all shards into one folder",
        )
    state: dict[str, Tensor] = {}
    for file in files:
        part = read_part(path.parent / file, where)
        named = part.items() if isinstance(part, Mapping) else ()
        state |= {name: value for name, value in named if shards.get(name) == file and isinstance(value, Tensor)}
    lost = [name for name in shards if name not in state]
    if lost:
        raise InfluenceError(f"{where}: {path}: {lost[0]} is not in {shards[lost[0]]}", "copy the shards again")
    return state


def read_distributed(path: Path, where: str) -> dict[str, Any]:
    """Read a folder of torch.distributed.checkpoint: the tensors, put together and nested as they were saved.

    ``.metadata`` is a pickle of torch's classes, read as stand-ins; each part of a tensor is a range of a file, written
    by torch.save. What is saved as other objects, and the optimiser, is not read.

    Raises:
        InfluenceError: it is damaged, or parts are missing.
    """
    try:
        facts = unpickle(io.BytesIO((path / ".metadata").read_bytes())).state
        places = {
            (_state(at)["fqn"], tuple(_state(at).get("offset") or ())): _state(at_file)
            for at, at_file in (facts["storage_data"].items())
        }
        content: dict[str, Any] = {}
        for name, about in facts["state_dict_metadata"].items():
            if not about.name.endswith(".TensorStorageMetadata"):
                continue
            keys = (facts.get("planner_data") or {}).get(name) or (name,)
            if "optim" in str(keys[0]):
                continue
            holder = content
            if len(keys) > 1:
                holder = content.setdefault(str(keys[0]), {})
            holder[".".join(map(str, keys[1:] or keys))] = _assembled(path, name, _state(about), places, where)
    except InfluenceError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere
        raise InfluenceError(f"{where}: {path} cannot be read: {describe(error)}", "copy the folder again") from error
    return content


def _state(value: Any) -> dict[str, Any]:
    """Give the attributes of a stand-in."""
    if not isinstance(value, Stand) or not isinstance(value.state, dict):
        raise ValueError("its .metadata has another form")
    return value.state


def _assembled(
    path: Path, name: str, about: Mapping[str, Any], places: Mapping[tuple[str, tuple[int, ...]], Any], where: str
) -> Tensor:
    """Put a tensor together from its parts."""
    parts = []
    for chunk in about["chunks"]:
        offsets = tuple(_state(chunk)["offsets"])
        place = places[name, offsets]
        if place.get("transform_descriptors"):
            raise ValueError(f"{name} is stored transformed ({place['transform_descriptors']})")
        parts.append((offsets, _part(path, place, where)))
    whole = tuple(about["size"])
    # Every number is in one part, so that no size is only claimed.
    if sum(part.numel() for _, part in parts) != math.prod(whole):
        raise ValueError(f"parts of {name} are missing")
    if len(parts) == 1:
        return parts[0][1].reshape(whole)
    made = torch.empty(whole, dtype=parts[0][1].dtype)
    for offsets, part in parts:
        region = made[tuple(slice(start, start + length) for start, length in zip(offsets, part.shape, strict=True))]
        region.copy_(part)
    return made


def _part(path: Path, place: Mapping[str, Any], where: str) -> Tensor:
    file, offset, length = place["relative_path"], place["offset"], place["length"]
    if Path(file).name != file:
        raise ValueError(f"its .metadata names a file elsewhere: {file}")
    with (path / file).open("rb") as stream:
        size = (path / file).stat().st_size
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"{file} is shorter than .metadata says")
        stream.seek(offset)
        content = bytearray(stream.read(length))
    tensor = read_torch_bytes(content, path / file, where)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{file} holds something else than a tensor")
    return tensor
