"""Turn arrays into 8-bit pictures: thumbnails, and pixel maps drawn over an image."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def thumbnail(image: Image.Image, size: int = 96) -> str:
    """Make a small picture of an image, as the model's loader sees it: no EXIF rotation, transparency dropped.

    Args:
        image: in any mode; 16-bit, integer and float images are stretched from their darkest to their lightest value.
        size: of the longer side in pixels; a smaller image stays as it is, and the page enlarges it.

    Returns:
        A data URI: JPEG where the image was shrunk, else PNG.
    """
    picture = eight_bit(image)
    # An ICC profile or a comment would travel into every thumbnail.
    picture.info.clear()
    buffer = io.BytesIO()
    if max(picture.size) > size:
        picture.thumbnail((size, size), reducing_gap=3.0)
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def stretched(values: np.ndarray) -> np.ndarray:
    """Stretch numbers from their smallest and largest finite one to 0 and 255, float64; NaN becomes 0.

    Equal ones are all 0; infinite ones become 0 or 255.
    """
    values = values.astype(np.float64)
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    spread: np.ndarray = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low or 1.0)
    return spread * 255


def eight_bit(image: Image.Image) -> Image.Image:
    """Copy an image of any mode into mode L or RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(stretched(np.asarray(image)).round().astype(np.uint8))
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("LA").convert("L") if image.mode == "La" else image.convert("L")
    if image.mode in ("P", "PA", "RGBa"):
        # On direct conversion to RGB Pillow warns about a palette with transparency, and it cannot convert RGBa.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


# Red and blue are told apart with every kind of colour vision.
_FOR, _AGAINST = (178, 24, 43), (33, 102, 172)


def scaled(values: np.ndarray) -> np.ndarray:
    """Scale attributions [H, W] into [−1, 1] by the largest absolute one; zeros stay zeros."""
    largest = float(np.abs(values).max(initial=0.0))
    return values / largest if largest > 0 and np.isfinite(largest) else np.zeros_like(values)


def overlay(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """Colour an image by attributions: red speaks for the class, blue against it, the image in grey underneath.

    Args:
        picture: in any size and mode; each attribution colours the same part of it.
        values: [H, W] in [−1, 1].

    Returns:
        An RGB image of the size of ``picture``.
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None]
    # Light grey, so that the colours show on black images as well.
    under = 150.0 + grey / 255.0 * 105.0
    fitted = Image.fromarray(values.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(fitted, dtype=np.float64), -1.0, 1.0)[..., None]
    colour = np.where(strength > 0, np.array(_FOR, dtype=np.float64), np.array(_AGAINST, dtype=np.float64))
    # The power makes weak values visible: only a few of 784 pixels are near 1.
    share = 0.9 * np.abs(strength) ** 0.75
    return Image.fromarray((share * colour + (1 - share) * under).round().astype(np.uint8))


def view(image: np.ndarray) -> Image.Image:
    """Show an input [C, H, W] in grey, from its darkest to its lightest value."""
    return Image.fromarray(stretched(image.astype(np.float64).mean(axis=0)).round().astype(np.uint8))
