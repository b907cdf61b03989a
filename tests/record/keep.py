"""Describe the files that a command has written, in text that can be compared line by line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Values of an array up to this many are written out; its hash covers all of them.
SHOWN = 20_000

Stamp = tuple[int, int, int]


def stamps(folder: Path) -> dict[str, Stamp]:
    """Say for every file below a folder what changes when it is written: inode, time and size."""
    found: dict[str, Stamp] = {}
    _stamp(str(folder), "", found)
    return found


def _stamp(folder: str, prefix: str, found: dict[str, Stamp]) -> None:
    # Not pathlib: this looks at some thousand files after every command.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    _stamp(entry.path, f"{prefix}{entry.name}/", found)
            else:
                status = entry.stat(follow_symlinks=False)
                found[prefix + entry.name] = (status.st_ino, status.st_mtime_ns, status.st_size)


def changes(before: dict[str, Stamp], after: dict[str, Stamp]) -> tuple[list[str], list[str]]:
    """Name the files that were written, and those that are gone."""
    written = sorted(name for name, stamp in after.items() if before.get(name) != stamp)
    return written, sorted(before.keys() - after.keys())


def describe(path: Path) -> str:
    """Write a file as text: text as it is, anything else by its contents."""
    if path.is_symlink():
        return f"link to {path.readlink()}\n"
    describer = _DESCRIBERS.get(path.suffix.lower())
    if describer is not None:
        try:
            return describer(path)
        except Exception as error:  # a file that a command left unreadable is a result too
            return f"{type(error).__name__}: cannot be read as {path.suffix}, {_digest(path.read_bytes())}\n"
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"{len(data)} bytes {_digest(data)}\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _array(values: Any) -> str:
    """Write an array: its kind, its hash, and its values where they are few."""
    import numpy as np

    values = np.asarray(values)
    if values.dtype.hasobject:
        content = json.dumps(values.tolist(), default=_plain, ensure_ascii=False)
        return f"{values.shape} objects {content}"
    head = f"{values.dtype.str} {values.shape} {_digest(np.ascontiguousarray(values).tobytes())}"
    if values.size > SHOWN or values.dtype.names:
        return head
    return head + " " + json.dumps(values.tolist(), default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


def _hdf5(path: Path) -> str:
    """Write every data set by its hash and every attribute as it is."""
    import h5py

    lines = []

    def attributes(name: str, node: Any) -> None:
        lines.extend(f"{name} @{key} = {_array(node.attrs[key])}" for key in sorted(node.attrs))

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            layout = f"chunks={node.chunks} compression={node.compression} virtual={node.is_virtual}"
            values = node[()]
            few = node.size is None or node.size <= 64
            text = _array(values) if few or node.dtype.hasobject else _array(values).partition(" [")[0]
            lines.append(f"{name} {layout} {text}")
        else:
            lines.append(f"{name}/")
        attributes(name, node)

    with h5py.File(path, "r") as file:
        attributes("/", file)
        file.visititems(visit)
    return "\n".join(lines) + "\n"


def _npy(path: Path) -> str:
    import numpy as np

    return _array(np.load(path)) + "\n"


def _npz(path: Path) -> str:
    import numpy as np

    with np.load(path) as archive:
        return "".join(f"{name}: {_array(archive[name])}\n" for name in sorted(archive.files))


def _parquet(path: Path) -> str:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    head = [f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in table.schema]
    head.append(f"metadata: {sorted((table.schema.metadata or {}).items())}")
    rows = [json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist()]
    return "\n".join([*head, *rows]) + "\n"


def _picture(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return f"{image.format} {image.mode} {image.size} {_digest(image.tobytes())} {sorted(image.info.items())}\n"


def _tensors(path: Path) -> str:
    import torch

    state = torch.load(path, weights_only=True, map_location="cpu")
    return "".join(f"{name}: {_array(value.detach().numpy())}\n" for name, value in state.items())


_DESCRIBERS: dict[str, Callable[[Path], str]] = {
    ".h5": _hdf5,
    ".npy": _npy,
    ".npz": _npz,
    ".parquet": _parquet,
    ".png": _picture,
    ".jpg": _picture,
    ".pt": _tensors,
}
