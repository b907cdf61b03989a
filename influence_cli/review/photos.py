"""Pictures of a data set by number: thumbnails made on demand and kept, photos at full size."""

from __future__ import annotations

import io
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from influence_cli.data.images import raw_image
from influence_cli.errors import InfluenceError
from influence_cli.pictures import eight_bit
from influence_cli.runtime import disk

if TYPE_CHECKING:
    from PIL import Image

    from influence_cli.data.split import Split

# Of the longer side of a thumbnail, in pixels.
THUMBNAIL = 320


@dataclass(frozen=True)
class Photos:
    """The images of a data set.

    Attributes:
        split: the examples.
        folder: where thumbnails are kept; it can be deleted at any time.
        key: of the data set, for examples that are no files of their own.
    """

    split: Split
    folder: Path
    key: str
    # A data set need not be able to read two examples at once.
    _reading: threading.Lock = field(default_factory=threading.Lock)

    def thumbnail(self, index: int) -> tuple[bytes, str]:
        """Give a picture of at most 320 pixels and its media type, from the folder if it was made before.

        Raises:
            InfluenceError: there is no such example, its image cannot be read, or it is no image.
        """
        name = self._name(index)
        file = self.folder / name[:2] / name
        with suppress(OSError):
            data = file.read_bytes()
            return data, _kind(data)
        picture = self._read(index)
        if max(picture.size) > THUMBNAIL:
            picture.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=3.0)
        data = _encoded(picture)
        with suppress(OSError):  # a full disk or a folder that cannot be written: the picture is made anew next time
            file.parent.mkdir(parents=True, exist_ok=True)
            disk.write_whole(file, data)
        return data, _kind(data)

    def photo(self, index: int) -> tuple[bytes, str]:
        """Give the whole picture and its media type.

        It is drawn anew from the pixels, so that nothing else in the file, a comment or a script, is sent.

        Raises:
            InfluenceError: as for `thumbnail`.
        """
        data = _encoded(self._read(index))
        return data, _kind(data)

    def _read(self, index: int) -> Image.Image:
        if not 0 <= index < len(self.split.labels):
            raise InfluenceError(f"there is no example {index}")
        with self._reading:
            image = raw_image(self.split, index)
        if image is None:
            raise InfluenceError(f"{self.split.title(index)} is not an image")
        picture = eight_bit(image)
        picture.info.clear()
        return picture

    def _name(self, index: int) -> str:
        """Name a thumbnail by what it shows: the file with its size and time, or else the data set and the position."""
        if not 0 <= index < len(self.split.labels):
            raise InfluenceError(f"there is no example {index}")
        path = self.split.path(index)
        with suppress(OSError, ValueError):
            if path is not None:
                known = os.stat(path)  # noqa: PTH116
                return xxhash.xxh3_128_hexdigest(
                    f"{path}\0{known.st_size}\0{known.st_mtime_ns}".encode(errors="surrogatepass")
                )
        if path is not None and os.path.isabs(path) and self.split.files is None:  # noqa: PTH117
            raise InfluenceError(f"{self.split.title(index)} is gone")
        return xxhash.xxh3_128_hexdigest(f"{self.key}\0{index}".encode())


def _encoded(picture: Image.Image) -> bytes:
    """Encode small pictures without loss and others as JPEG."""
    buffer = io.BytesIO()
    if max(picture.size) <= 128:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _kind(data: bytes) -> str:
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
