"""Rows as they are stored: float32, or float16 or int8 with a scale each, and the checksum of a block of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xxhash

# The largest number of a float16 or int8 row after scaling, which keeps large and small gradients in range.
LARGEST = {"float16": 1.0, "int8": 127.0}


def encode(rows: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Encode float32 rows as they are stored: divided by one scale per row; int8 is rounded to the nearest integer.

    Args:
        rows: float32 [b, k], k > 0.
        dtype: ``float32``, ``float16`` or ``int8``.

    Returns:
        ``coordinates`` [b, k], and of float16 and int8 rows ``scales``, float32 [b]; NaN for a row with a number that
        is not finite.
    """
    rows = rows.astype(np.float32, copy=False)
    if dtype == "float32":
        return {"coordinates": rows}
    scales = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / np.float32(LARGEST[dtype])
    scales[scales == 0] = 1
    scales[~np.isfinite(scales)] = np.nan
    encoded = np.empty(rows.shape, dtype=dtype)
    step = max(1, 2**18 // rows.shape[1])  # intermediate values stay in the cache
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = rows[part] / scales[part, None]
        if dtype == "int8":
            # The scale of a row of tiny numbers is rounded, so its largest could fall out of range.
            values = np.clip(np.rint(np.nan_to_num(values)), -127, 127)
        encoded[part] = values
    return {"coordinates": encoded, "scales": scales}


def decode(encoded: np.ndarray, scales: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Give float16 or int8 rows as float32, in ``room``, float32 [b, k]."""
    # Two passes through the cache; torch, because NumPy converts float16 at a tenth of the speed.
    torch.from_numpy(room).copy_(torch.from_numpy(encoded)).mul_(torch.tensor(scales)[:, None])
    return room


def room_for(count: int, width: int) -> np.ndarray:
    """Allocate float32 rows with a fixed alignment: the last bit of a product can depend on it."""
    size = count * width
    room = np.empty(size + 16, dtype=np.float32)
    skip = -room.ctypes.data % 64 // 4
    return room[skip : skip + size].reshape(count, width)


def checksum(block: int, columns: Mapping[str, np.ndarray], digest: int) -> int:
    """Compute the checksum of a block: of its number, the model's inputs, and everything stored of its rows."""
    state = xxhash.xxh3_64(f"{block}:{digest}".encode())
    for name in sorted(columns):
        state.update(columns[name].data)
    return state.intdigest()
