"""One pass over the images as the data set yields them: small pictures, hashes of the pixels, what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from influence_cli.data.batches import ALONE, Loading, read_batches
from influence_cli.data.images import as_picture
from influence_cli.data.split import Split
from influence_cli.inspection.appearance import LOOKS, looks_of
from influence_cli.pictures import eight_bit
from influence_cli.precompute.overlap import pixel_hash

# The side of a small picture; images at a time.
SIDE, BATCH = 32, 256
_PIXELS, _HASH = 3 * SIDE * SIDE, 5


@dataclass(frozen=True)
class Pictures:
    """The images of a split that can be read.

    Attributes:
        indices: int64 [n], positions in the data set, rising.
        small: uint8 [n, 3, 32, 32].
        pictured: bool [n], False where the data set yields something that is no picture; ``small`` is black there.
        hashes: uint64 [n], of the decoded pixels; 0 where they cannot be hashed.
        looks: float32 [n, len(LOOKS)], what is measured of an image, by the columns ``LOOKS``; NaN where it is not.
        unreadable: position and reason of the others.
    """

    indices: np.ndarray
    small: Tensor
    pictured: np.ndarray
    hashes: np.ndarray
    looks: np.ndarray
    unreadable: tuple[tuple[int, str], ...]


def read_pictures(
    split: Split, loading: Loading = ALONE, on_examples: Callable[[int], None] = lambda _: None, *, looks: bool = False
) -> Pictures:
    """Read every image of a split once.

    Args:
        split: the examples.
        loading: loader processes.
        on_examples: called with the number of finished examples.
        looks: measure brightness, sharpness and the like too.

    Raises:
        InfluenceError: an example comes with another label than the work counts on, a loader process has died.
    """
    described = replace(split, transform=_Describe(looks=looks))
    indices, small, rest = [], [], []
    unreadable: list[tuple[int, str]] = []
    for batch in read_batches(described, split.indices, BATCH, loading):
        unreadable += batch.unreadable
        if len(batch):
            indices.append(batch.indices)
            small.append(batch.inputs[:, :_PIXELS].to(torch.uint8).view(-1, 3, SIDE, SIDE))
            rest.append(batch.inputs[:, _PIXELS:].numpy())
        on_examples(len(batch) + len(batch.unreadable))
    if not indices:
        empty = torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8)
        none = np.empty(0, dtype=np.int64)
        looks_of_none = np.empty((0, len(LOOKS)), dtype=np.float32)
        return Pictures(none, empty, none > 0, none.astype(np.uint64), looks_of_none, tuple(unreadable))
    numbers = np.concatenate(rest)
    hashes = np.zeros(len(numbers), dtype=np.uint64)
    for column in range(1, _HASH):
        hashes = (hashes << np.uint64(16)) | numbers[:, column].astype(np.uint64)
    return Pictures(
        np.concatenate(indices),
        torch.cat(small),
        numbers[:, 0] > 0,
        hashes,
        numbers[:, _HASH:],
        tuple(unreadable),
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Put small pictures one after another: one channel if all of them are grey, as tests of pixels are dear."""
    every = torch.cat(list(parts))
    if all(bool((chunk[:, :1] == chunk).all()) for chunk in torch.split(every, 8_192)):
        return every[:, :1].contiguous()
    return every


class _Describe:
    """Takes the place of a split's transform: pixels of the small picture, whether it is one, the hash, the looks.

    All of them are float32 numbers in one tensor, so that they travel as inputs of a model do; 16 bits of a hash, and
    a byte, are exact in float32.
    """

    def __init__(self, *, looks: bool) -> None:
        self.looks = looks

    def __call__(self, image: Any) -> Tensor:
        name = pixel_hash(image)
        number = 0 if name is None else int(name[:16], 16)
        picture, exact = picture_of(image)
        out = torch.full((_PIXELS + _HASH + len(LOOKS),), torch.nan)
        out[:_PIXELS] = 0
        out[_PIXELS] = float(picture is not None)
        out[_PIXELS + 1 : _PIXELS + _HASH] = torch.tensor([float(number >> bits & 0xFFFF) for bits in (48, 32, 16, 0)])
        if picture is not None:
            resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
            out[:_PIXELS] = torch.from_numpy(np.array(resized)).permute(2, 0, 1).flatten()
            if self.looks:
                out[_PIXELS + _HASH :] = torch.tensor(looks_of(picture, exact=exact))
        return out


def picture_of(image: Any) -> tuple[Image.Image | None, bool]:
    """Give a raw image as a picture of mode L or RGB, and whether its brightness is that of the image.

    Numbers that are neither bytes nor in [0, 1] are stretched to the whole range: of them the brightness is not known.
    """
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) and image.dtype != torch.bfloat16 else image
    exact = True
    if isinstance(array, np.ndarray) and array.dtype != np.uint8:
        exact = array.dtype.kind == "f" and array.size > 0 and array.min() >= 0 and array.max() <= 1
        array = (array * 255).round().astype(np.uint8) if exact else array
    elif isinstance(array, Image.Image):
        exact = not array.mode.startswith(("I", "F"))
    picture = as_picture(array)
    if picture is None or not all(picture.size):
        return None, False
    return eight_bit(picture), exact
