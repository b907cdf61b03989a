"""A state of a training run on disk: one HDF5 file of named vectors with a checksum, complete or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

import h5py
import torch
import xxhash
from torch import Tensor

from influence_cli.runtime import disk

STATE = re.compile(r"state-(\d{6,})\.h5")


def state_path(folder: Path, step: int) -> Path:
    """Name the file of the state before a step."""
    return folder / f"state-{step:06d}.h5"


def kept_states(folder: Path) -> list[int]:
    """Give the numbers of the steps before which a state is kept, rising."""
    if not folder.is_dir():
        return []
    matches = (STATE.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def stride_after(step: int) -> int:
    """Choose every how many steps states are kept, while the number of steps to come is unknown.

    After t steps it is the largest power of two whose square is at most t. It doubles when t has grown fourfold, and
    every other state then goes: what is left is always between √t and 2√t states, evenly spaced.
    """
    return 1 << max(0, step.bit_length() - 1) // 2


def write_state(folder: Path, step: int, vectors: Mapping[str, Tensor]) -> None:
    """Keep the state before a step: its vectors by name."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, vector in vectors.items():
            file.create_dataset(name, data=vector.detach().cpu().numpy())
        file.attrs["step"] = step
        file.attrs["checksum"] = checksum(vectors)
    disk.write_whole(state_path(folder, step), content.getvalue())


def read_state(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Read the vectors of a state, on the CPU, and say whether their checksum is right.

    Raises:
        OSError, KeyError, TypeError or RuntimeError: the file is missing or is no state.
    """
    with h5py.File(path, "r") as file:
        slots = sorted(name for name in file if name.startswith("slot"))
        vectors = {name: torch.from_numpy(file[name][()]) for name in ("parameters", *slots, "buffers")}
        return vectors, bool(file.attrs["checksum"] == checksum(vectors))


def checksum(vectors: Mapping[str, Tensor]) -> str:
    """Hash named vectors, with their types and lengths."""
    state = xxhash.xxh3_128()
    for name, vector in vectors.items():
        state.update(f"{name} {vector.dtype} {len(vector)}".encode())
        state.update(vector.detach().contiguous().cpu().numpy().tobytes())
    return state.hexdigest()
