"""Image files that nobody meant well with, among the training images, the test images and as TEST."""

from __future__ import annotations

import functools
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Command
from tests.support import fork_server
from tests.support.small_project import growth, refusal

COMMANDS = (("gradients",), ("check", "--full"), ("rank", 0), ("mislabels",))
PIXELS = np.random.default_rng(1).integers(0, 256, (8, 8)).astype(np.uint8)


@functools.cache
def png(width: int, height: int, depth: int = 1) -> bytes:
    """Make a black PNG of any size in a few kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def place(project: Path, part: str, suffix: str) -> Path:
    """Name a file in the place of the first image of class b."""
    old = min((project / part / "b").iterdir())
    old.unlink()
    return old.with_suffix(suffix)


def truncated(path: Path) -> None:
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[:80])


def postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")


def sixteen(path: Path) -> None:
    Image.fromarray(PIXELS.astype(np.uint16) * 257).save(path)


def real(path: Path) -> None:
    Image.fromarray((PIXELS / 255).astype(np.float32)).save(path)


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "bomb": (lambda path: path.write_bytes(png(10_500, 10_000)), ".png", "105000000 pixels"),
    "larger bomb": (lambda path: path.write_bytes(png(20_000, 20_000)), ".png", "400000000 pixels"),
    "size alone": (lambda path: path.write_bytes(png(2**31 - 1, 0)), ".png", ""),
    "truncated": (truncated, ".png", "truncated"),
    "zero bytes": (lambda path: path.write_bytes(b""), ".png", "cannot identify image file"),
    "text": (lambda path: path.write_text("hello"), ".jpg", "cannot identify image file"),
    "postscript": (postscript, ".png", "Ghostscript"),
    "16 bits": (sixteen, ".png", "would be clipped to 0 to 255: save it with 8 bits"),
    "16 bits, TIFF": (sixteen, ".tif", "would be clipped to 0 to 255: save it with 8 bits"),
    "real numbers": (real, ".tif", "do not fit in 8 bits and would be clipped"),
    "link to itself": (lambda path: path.symlink_to(path.name), ".png", "Too many levels of symbolic links"),
    "link to nothing": (lambda path: path.symlink_to("nothing.png"), ".png", "No such file"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.quick("truncated*", "bomb*")
def test_a_training_image_that_cannot_be_read_is_named_and_can_be_skipped(
    influence: Command, tiny: Path, name: str
) -> None:
    write, suffix, reason = BAD[name]
    path = place(tiny, "train", suffix)
    write(path)
    for words in COMMANDS:
        said = refusal(influence, tiny, *words)
        assert f"training example 8 ({path}) cannot be read: " in said
        assert reason in said
        assert "--skip-unreadable" in said
    done = influence("rank", 0, "--all", "--skip-unreadable", cwd=tiny)
    assert f"skipped: training example 8 ({path})" in done.err
    assert len(done.out.splitlines()) == 23
    done = influence("mislabels", "--all", "--skip-unreadable", cwd=tiny)
    assert len(done.out.splitlines()) == 23


@pytest.mark.parametrize("name", BAD)
@pytest.mark.quick("zero*")
def test_a_test_image_that_cannot_be_read_is_named_and_can_be_skipped(
    influence: Command, tiny: Path, name: str
) -> None:
    write, suffix, reason = BAD[name]
    path = place(tiny, "test", suffix)
    write(path)
    for words in (("0:6",), (2,), ("misclassified",), ("0:6", "--aggregate")):
        said = refusal(influence, tiny, "rank", *words)
        assert f"test example 2 ({path}) cannot be read: " in said
        assert reason in said
    done = influence("rank", "0:6", "--top", 1, "--skip-unreadable", cwd=tiny)
    assert f"skipped: test example 2 ({path})" in done.err
    assert {json.loads(line)["test"] for line in done.out.splitlines()} == {0, 1, 3, 4, 5}
    # Whether there is one or not.
    influence("rank", "5", "misclassified", "--top", 1, "--skip-unreadable", cwd=tiny)


@pytest.mark.quick("size alone", "text", "postscript", "16 bits, TIFF", "link to nothing")
@pytest.mark.parametrize("name", BAD)
def test_an_image_file_that_cannot_be_read_is_named_and_can_be_skipped(
    influence: Command, tiny: Path, name: str
) -> None:
    write, suffix, reason = BAD[name]
    path = tiny / f"odd{suffix}"
    write(path)
    said = refusal(influence, tiny, "rank", path.name)
    assert path.name in said
    if path.is_file():
        assert reason in said
        done = influence("rank", path.name, 0, "--top", 1, "--skip-unreadable", cwd=tiny)
        assert f"skipped: {path.name} cannot be" in done.err
        assert len(done.out.splitlines()) == 2
    else:
        assert ": no such file or index" in said


@pytest.mark.slow
def test_a_bomb_takes_no_more_memory_than_any_image(tiny: Path) -> None:
    for path in (place(tiny, "train", ".png"), place(tiny, "test", ".png"), tiny / "odd.png"):
        path.write_bytes(png(13_000, 13_000))  # 169 million pixels: Pillow would read it, and warn
    first = ["rank", "0", "-q", "--top", "1", "--skip-unreadable", "--report", "a.html", "-o", "a.csv"]
    both = ["2", "odd.png", "0"]
    codes, grown = growth(
        tiny,
        first,
        ["gradients", "-s", "gradients.store=b.h5"],
        ["rank", *both, "--top", "1", "--skip-unreadable", "--report", "b.html", "-o", "b.csv"],
        ["mislabels", "--skip-unreadable", "--report", "c.html", "-o", "c.csv"],
    )
    assert codes == [2, 0, 0]
    assert grown < 100
    assert (tiny / "b.html").stat().st_size < 1_000_000


def test_postscript_is_not_run_whatever_the_file_is_called(tiny: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    postscript(place(tiny, "train", ".png"))
    postscript(tiny / "odd.png")
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    for words in (["gradients"], ["rank", "odd.png", "--skip-unreadable"]):
        command = [sys.executable, "-m", "influence_cli", *words]
        done = fork_server.run(command, cwd=tiny, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Ghostscript" in done.stderr
    assert not (tmp_path / "ran").exists()


# --- what is read


def palette(path: Path) -> None:
    Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE).save(path, transparency=3)


def animated(path: Path) -> None:
    Image.fromarray(PIXELS).save(path, save_all=True, append_images=[Image.fromarray(255 - PIXELS)] * 2)


def animated_in_colour(path: Path) -> None:
    grey = [Image.fromarray(pixels).convert("RGB") for pixels in (PIXELS, 255 - PIXELS)]
    grey[0].save(path, save_all=True, append_images=grey[1:], lossless=True)


def few_bits(path: Path) -> None:
    Image.fromarray(PIXELS.astype(np.uint16)).save(path)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "animated PNG": (animated, ".png"),
    "animated WebP": (animated_in_colour, ".webp"),
    "16 bits that fit into 8": (few_bits, ".png"),
    "16 bits in colour": (lambda path: path.write_bytes(colour_16()), ".png"),
    "CMYK": (lambda path: Image.fromarray(np.stack([PIXELS] * 4, axis=2), "CMYK").save(path), ".jpg"),
    "palette": (palette, ".png"),
    "transparent": (lambda path: Image.fromarray(np.stack([PIXELS] * 4, axis=2)).save(path), ".png"),
    "grey and transparent": (lambda path: Image.fromarray(PIXELS).convert("LA").save(path), ".png"),
    "two colours": (lambda path: Image.fromarray(PIXELS > 99).save(path), ".png"),
    "JPEG called PNG": (lambda path: Image.fromarray(PIXELS).save(path, "JPEG"), ".png"),
    "GIF called PNG": (lambda path: Image.fromarray(PIXELS).save(path, "GIF"), ".png"),
}  # fmt: skip


def colour_16() -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in PIXELS.astype(np.uint16) * 257)
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


@pytest.mark.quick("16 bits in colour", "CMYK", "palette", "GIF called PNG")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_read_alike_in_a_folder_and_as_test(influence: Command, tiny: Path, name: str) -> None:
    write, suffix = ODD[name]
    path = place(tiny, "test", suffix)
    write(path)
    (tiny / f"odd{suffix}").write_bytes(path.read_bytes())
    done = influence("rank", 2, f"odd{suffix}", "--target", "b", "--all", "-q", cwd=tiny)
    assert done.err == ""
    rows = [json.loads(line) for line in done.out.splitlines()]
    as_position, as_file = rows[:24], rows[24:]
    assert [row["test"] for row in as_file] == [None] * 24
    for one, other in zip(as_position, as_file, strict=True):
        assert one["index"] == other["index"]
        assert one["influence"] == pytest.approx(other["influence"], rel=1e-6, abs=1e-12)
    assert any(abs(row["influence"]) > 1e-6 for row in rows)
    # It is a training image as well as any other.
    write(place(tiny, "train", suffix))
    influence("gradients", "-q", "-s", "gradients.store=other.h5", cwd=tiny)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_of_an_animation_the_first_frame_is_taken(influence: Command, tiny: Path, suffix: str) -> None:
    (animated if suffix == ".png" else animated_in_colour)(tiny / f"moving{suffix}")
    Image.fromarray(PIXELS).save(tiny / "still.png")
    words = ("--target", "b", "--all", "-q", "--format", "csv")
    moving = influence("rank", f"moving{suffix}", *words, cwd=tiny).out
    still = influence("rank", "still.png", *words, cwd=tiny).out
    assert moving.replace(f"moving{suffix}", "still.png") == still


def test_a_data_set_that_scales_16_bits_is_not_told_to(influence: Command, tiny: Path) -> None:
    sixteen(place(tiny, "train", ".png"))
    (tiny / "scaled.py").write_text(
        "import numpy as np\nfrom PIL import Image\nfrom torchvision.datasets import ImageFolder\n\n\n"
        "def load(path):\n"
        "    image = Image.open(path)\n"
        "    if image.mode == 'I;16':\n"
        "        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))\n"
        "    return image.convert('RGB')\n\n\n"
        "def make(root):\n    return ImageFolder(root, loader=load)\n"
    )
    influence("gradients", "-q", "-s", "train.dataset=./scaled.py:make", cwd=tiny)
