"""A PNG of 16 bits a channel, which Pillow reads but does not write in colour (PNG specification, 9 and 11)."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

import numpy as np

_COLOUR_TYPES = {1: 0, 3: 2}


def write_png16(file: BinaryIO, pixels: np.ndarray) -> None:
    """Write uint16 pixels [H, W, C], C = 1 (grey) or 3 (RGB), without loss."""
    height, width, channels = pixels.shape
    # A PNG is big-endian, and every line begins with its filter: 0 is none.
    lines = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), lines], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 6)), (b"IEND", b"")]
    file.write(b"\x89PNG\r\n\x1a\n")
    for kind, data in parts:
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
