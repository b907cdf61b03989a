"""Images in tar shards laid out for WebDataset, as a data set that a YAML file names: examples by number.

    train:
      dataset: influence_cli.data.tar_images.TarImages
      args: {files: "data/shard-{000..009}.tar", image: "jpg;png", label: cls}

Members that share a name up to its first dot are one example; its index is its position over all shards, sorted by
name, in the order of their members. WebDataset itself only streams, so its examples have no numbers. Here the headers
of each shard are read once, by the standard library's tarfile, and images are read in place.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from influence_cli.data.file_sets import DataFiles, find_files, near
from influence_cli.data.image_files import decode_rgb
from influence_cli.errors import InfluenceError, describe, quoted

# WebDataset's rule for what is one example (webdataset/tariterators.py), and for members that are about the shard.
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")
# A label is a number or a name; anything longer is another kind of file.
LONGEST_LABEL = 4096


@dataclass(slots=True)
class _Example:
    """One example of a shard: the place of its image, if it has one."""

    key: str
    name: str = ""
    offset: int = -1
    size: int = 0
    label: str | None = None


class TarImages:
    """Images and labels of tar shards; item i is (RGB image, class number), as torchvision's ImageFolder gives it.

    Args:
        files: a pattern such as ``data/shard-{000..009}.tar``, or a list of them.
        image: the suffixes of images; the first one that an example has is used.
        label: the suffix of labels: whole numbers, or names, whose sorted order numbers the classes.

    Attributes:
        files: where the examples lie.
        paths: a stand-in for the path of each: the shard and the member, ``shard-000.tar#cat/17.jpg``.
        targets: int64 [n].
        classes: class names by number, or None where labels are numbers.
        class_to_idx: numbers by class name, or None.

    Raises:
        InfluenceError: naming the shard, and the example where there is one.
    """

    def __init__(self, files: str | Sequence[str], image: str = "jpg;jpeg;png;webp", label: str = "cls") -> None:
        names = find_files(files)
        suffixes = [word for word in image.lower().split(";") if word]
        examples: list[_Example] = []
        starts, seen = [0], Counter[str]()
        for name in names:
            examples += _index(name, suffixes, label.lower(), seen)
            starts.append(len(examples))
        if examples and not any(example.name for example in examples):
            there = ", ".join(f".{suffix} ({count:,})" for suffix, count in seen.most_common(6))
            raise InfluenceError(
                f"no member of {near(names[0])} ends in .{', .'.join(suffixes)}", f"its members end in: {there}"
            )
        self.files = DataFiles(names, np.array(starts, dtype=np.int64))
        self.paths = [
            f"{names[number]}#{example.name or example.key}"
            for number, (start, stop) in enumerate(itertools.pairwise(starts))
            for example in examples[start:stop]
        ]
        self._offsets = np.array([example.offset for example in examples], dtype=np.int64)
        self._sizes = np.array([example.size for example in examples], dtype=np.int64)
        self.targets, self.classes = _numbered([str(example.label) for example in examples], self.paths)
        self.class_to_idx = None if self.classes is None else {word: i for i, word in enumerate(self.classes)}

    def __len__(self) -> int:
        """Count the examples of all shards."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Read an example; any failure is the image's."""
        number, _ = self.files.place(index)
        if self._offsets[index] < 0:
            raise ValueError("the example has no image")
        size = int(self._sizes[index])
        # Opened per example, like the images of an ImageFolder: nothing is shared with loader processes.
        with open(self.files.names[number], "rb") as file:  # noqa: PTH123 (for every example of every pass)
            file.seek(int(self._offsets[index]))
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"the shard ends after {len(content):,} of its {size:,} bytes")
        return decode_rgb(content), int(self.targets[index])


def _index(name: str, images: Sequence[str], label: str, seen: Counter[str]) -> list[_Example]:
    """List the examples of a shard, and count the suffixes of its members.

    Raises:
        InfluenceError: the shard is not a whole tar file, or an example has no label, or two members of one kind.
    """
    examples: list[_Example] = []
    suffixes: set[str] = set()
    rank, where = len(images), near(name)
    with open(name, "rb") as file:  # noqa: PTH123 (as elsewhere here)
        for member, offset, size in _members(file, name):
            match = None if _META.match(member) else _KEY.fullmatch(member)
            if match is None:
                continue
            key, suffix = match[1], match[2].lower()
            if not examples or key != examples[-1].key:
                _require_label(examples[-1:], where, label)
                examples.append(_Example(key))
                suffixes, rank = set(), len(images)
            if suffix in suffixes:
                raise InfluenceError(f"{where}: two members are {key}.{suffix}", "an example has one member per suffix")
            suffixes.add(suffix)
            seen[suffix] += 1
            example = examples[-1]
            if suffix in images[:rank]:
                rank = images.index(suffix)
                example.name, example.offset, example.size = member, offset, size
            if suffix == label:
                file.seek(offset)
                example.label = _label(file.read(min(size, LONGEST_LABEL + 1)), f"{where}: {member}")
    _require_label(examples[-1:], where, label)
    return examples


def _require_label(last: Sequence[_Example], where: str, label: str) -> None:
    if last and last[0].label is None:
        raise InfluenceError(
            f"{where}: {last[0].key} has no label (a member {last[0].key}.{label})",
            "args: {label: …} sets the suffix of labels; the members of an example must follow one another",
        )


def _label(content: bytes, where: str) -> str:
    text = content.decode(errors="replace").strip()
    if not text or "\n" in text or len(content) > LONGEST_LABEL:
        raise InfluenceError(f"{where} is {quoted(text, 40)}, not a label", "it must hold only a class number or name")
    return text


def _members(file: BinaryIO, name: str) -> Iterator[tuple[str, int, int]]:
    """Walk through the headers of a shard.

    Yields:
        Name, offset and size of each regular file.

    Raises:
        InfluenceError: it is not an uncompressed tar file, or it is truncated or damaged.
    """
    end, at, last, head = os.fstat(file.fileno()).st_size, 0, "", b""
    try:
        with tarfile.TarFile(fileobj=file) as tar:
            while True:
                file.seek(at)
                head = file.read(tarfile.BLOCKSIZE)
                plain = _plain(head)
                if plain is not None:
                    member, size, offset = *plain, at + tarfile.BLOCKSIZE
                    at = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                else:
                    file.seek(at)
                    info = tarfile.TarInfo.fromtarfile(tar)
                    member, size, offset, at = info.name, info.size, info.offset_data, tar.offset
                if offset + size > end:
                    raise tarfile.ReadError(f"{member} takes {size:,} bytes, but only {end - offset:,} are left")
                last = member
                if plain is not None or info.isreg():
                    yield member, offset, size
    except tarfile.TarError as error:
        if head == bytes(tarfile.BLOCKSIZE):  # the end marker
            return
        raise InfluenceError(
            f"{near(name)} is truncated or damaged after {last}: {describe(error)}"
            if last
            else f"{near(name)} is not a tar file: {describe(error)}",
            "copy or write it again" if last else "single images cannot be read from a compressed one: decompress it",
        ) from error


def _plain(head: bytes) -> tuple[str, int] | None:
    """Read name and size from the header of an ordinary file; None for all others, which tarfile can read.

    It does what tarfile does in a fifth of the time: a million images have two million headers.
    """
    if head[156:157] != b"0" or head[257:263] not in (b"ustar\0", b"ustar ") or head[345]:
        return None
    try:
        size, check = int(head[124:135], 8), int(head[148:154], 8)
    except ValueError:
        return None
    if check != sum(head) - sum(head[148:156]) + 8 * 32:
        return None
    return head[:100].partition(b"\0")[0].decode(errors="surrogateescape"), size


def _numbered(labels: Sequence[str], paths: Sequence[str]) -> tuple[np.ndarray, list[str] | None]:
    """Give labels as class numbers, and the class names if the labels are names."""
    whole = [re.fullmatch(r"-?\d+", label) is not None for label in labels]
    if all(whole):
        return np.array([int(label) for label in labels], dtype=np.int64), None
    if any(whole):
        odd = whole.index(not whole[0])
        raise InfluenceError(
            f"{paths[odd]} has the label {quoted(labels[odd], 40)}, but {paths[0]} has {quoted(labels[0], 40)}",
            "labels must be all numbers or all names",
        )
    names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[label] for label in labels], dtype=np.int64), names
