"""Where a fit of factors has come to, on disk: one safetensors file beside the store, replaced whole.

A kill loses what was done since the last save; a file that is cut short or changed is not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from influence_cli import disk
from influence_cli.curvature.ekfac import Progress
from influence_cli.errors import InfluenceError


def fit_path(store: Path) -> Path:
    """Name the file of a store's unfinished fit."""
    return store.with_name(store.name + ".fit")


def save_progress(path: Path, progress: Progress, fingerprint: Mapping[str, str]) -> None:
    """Write a fit's progress and what it belongs to, replacing what was there.

    Raises:
        InfluenceError: the disk is full or gone; what was there stays.
    """
    part = path.with_name(path.name + ".part")
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in progress.arrays.items()}
    facts = {
        "stage": progress.stage,
        "done": progress.done,
        "examples": progress.examples,
        "fingerprint": dict(fingerprint),
        "checksums": {name: _digest(tensor) for name, tensor in arrays.items()},
    }
    text = json.dumps(facts)
    try:
        save_file(arrays, part, metadata={"progress": text, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())})
        with part.open("r+b") as file:
            disk.flush(file)
        disk.replace(part, path)
    except (OSError, SafetensorError) as error:
        disk.remove(part)
        need = sum(tensor.nbytes for tensor in arrays.values()) + len(text)
        raise InfluenceError(
            f"{path} cannot be written: {disk.failure(error, part, need)}",
            "a kill loses what is fitted since it was last written; make room",
        ) from error
    except BaseException:
        disk.remove(part)
        raise


def load_progress(path: Path, fingerprint: Mapping[str, str]) -> Progress | None:
    """Read a fit's progress back; None where there is none, or it is damaged or belongs to something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text = metadata["progress"]
            if metadata["xxh3"] != xxhash.xxh3_64_hexdigest(text.encode()):
                return None
            facts = json.loads(text)
            # Copies lie where torch aligns them: matrix products of the same bytes then give the same bytes.
            arrays = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if facts["fingerprint"] != dict(fingerprint) or facts["checksums"].keys() != arrays.keys():
        return None
    if any(_digest(tensor) != facts["checksums"][name] for name, tensor in arrays.items()):
        return None
    return Progress(facts["stage"], facts["done"], facts["examples"], arrays)


def _digest(tensor: Tensor) -> str:
    state = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(tensor.reshape(-1).numpy().data if tensor.numel() else b"")
    return state.hexdigest()
