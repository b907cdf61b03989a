"""Tar shards are the data set that the same images are as an ImageFolder, and what WebDataset streams from them."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from webdataset.tariterators import group_by_keys, tar_file_expander

from influence_cli.config.schema import Config
from influence_cli.data.batches import Loading, read_batches
from influence_cli.data.datasets import load_split
from influence_cli.data.split import take
from influence_cli.data.tar_images import TarImages
from influence_cli.model.data_fingerprint import files_hash
from tests.conftest import Command
from tests.support.data_file_projects import as_data_files, assert_same_results, encoded, refused

Members = Iterable[tuple[str, bytes]]


def write(path: Path, members: Members, kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def example(number: int, label: str | None = None) -> Members:
    return [
        (f"{number:03d}.png", encoded(number)),
        (f"{number:03d}.cls", (str(number % 3) if label is None else label).encode()),
    ]


def whole(numbers: Sequence[int]) -> Members:
    return [member for number in numbers for member in example(number)]


# Examples by number


def test_an_index_is_the_position_over_all_shards_in_the_order_of_members(tmp_path: Path) -> None:
    write(tmp_path / "s-02.tar", whole([4, 3]))
    write(tmp_path / "s-01.tar", ())
    write(tmp_path / "s-00.tar", whole([7, 1, 2]))
    data = TarImages(str(tmp_path / "s-{00..02}.tar"))
    numbers = [7, 1, 2, 4, 3]
    assert data.targets.tolist() == [number % 3 for number in numbers]
    assert (len(data), data.classes) == (5, None)
    for index in (4, 0, 3, 2, 1):
        image, label = data[index]
        assert np.array_equal(image, Image.open(io.BytesIO(encoded(numbers[index]))))
        assert (image.mode, label) == ("RGB", numbers[index] % 3)
    shards = ("00", "00", "00", "02", "02")
    assert data.paths == [f"{tmp_path}/s-{s}.tar#{n:03d}.png" for s, n in zip(shards, numbers, strict=True)]
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(copy[3][0], data[3][0])
    with pytest.raises(IndexError):
        data[5]


# One header of each kind: old, of POSIX with a long name and a prefix, of GNU and of pax with a name too long for both.
KINDS = [
    (tarfile.USTAR_FORMAT, "cat/"),
    (tarfile.USTAR_FORMAT, "a" * 90 + "/" + "b" * 80),
    (tarfile.GNU_FORMAT, "cat/"),
    (tarfile.GNU_FORMAT, "ä" * 150 + "/"),
    (tarfile.PAX_FORMAT, "ä" * 150 + "/"),
]


@pytest.mark.parametrize(("kind", "before"), KINDS)
def test_examples_are_those_that_webdataset_streams(tmp_path: Path, kind: int, before: str) -> None:
    members = [
        ("__meta__/about.txt", b"no example"),
        ("__about__", b"no example either"),
        (before + "1.JPG", encoded(1, kind="JPEG")),
        (before + "1.cls", b"5\n"),
        (before + "1.seg.png", encoded(2)),
        (before + "no suffix", b""),
        (before + "2.b.cls", b"0"),
        (before + "2.cls", b"1"),
        (before + "2.png", encoded(3)),
        (before + "1.cls", b"2"),
        (before + "1.png", encoded(4)),
        (before + "1.jpg", encoded(5, kind="JPEG")),
    ]
    path = write(tmp_path / "s.tar", members, kind)
    with tarfile.open(path, "a", format=kind) as tar:
        folder = tarfile.TarInfo("folder.cls")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    data = TarImages(str(path), image="jpg;png")
    with path.open("rb") as file:
        streamed = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))
    assert len(data) == len(streamed) == 3
    for index, sample in enumerate(streamed):
        image, label = data[index]
        content = sample.get("jpg", sample.get("png"))
        with Image.open(io.BytesIO(content)) as expected:
            assert np.array_equal(image, expected.convert("RGB"))
        assert label == int(sample["cls"])
        assert data.paths[index].lower().startswith(f"{path}#{sample['__key__']}.".lower())


def test_labels_that_are_names_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    labels = ["coat", "bag", "ankle boot", "bag"]
    write(tmp_path / "s.tar", [member for i, label in enumerate(labels) for member in example(i, label)])
    data = TarImages(str(tmp_path / "*.tar"))
    assert data.classes == ["ankle boot", "bag", "coat"]
    assert data.class_to_idx == {"ankle boot": 0, "bag": 1, "coat": 2}
    assert data.targets.tolist() == [2, 1, 0, 1]


# The same as an ImageFolder


def as_shards(project: Path) -> Config:
    """Write a project's images to shards, in order, and let the config name them."""
    for part, shards in (("train", 3), ("test", 1)):
        data = ImageFolder(project / part)
        for number, indices in enumerate(np.array_split(np.arange(len(data)), shards)):
            members: list[tuple[str, bytes]] = []
            for index in indices.tolist():
                path, label = data.samples[index]
                key = f"{data.classes[label]}/{index:05d}"
                members += [(f"{key}.png", Path(path).read_bytes()), (f"{key}.cls", data.classes[label].encode())]
            write(project / f"{part}-{number:03d}.tar", members)
    return as_data_files(project, "influence_cli.data.tar_images.TarImages", "{0}-*.tar")


@pytest.mark.slow
def test_every_command_says_the_same_as_of_the_image_folder(influence: Command, tmp_path: Path) -> None:
    path = re.compile(r".*/(train|test)-00\d\.tar#[\w -]+/\d{5}\.png")
    assert_same_results(influence, tmp_path, as_shards, path)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loader_processes_read_the_same_and_the_fingerprint_is_of_the_shards_in_use(project: Path) -> None:
    config = as_shards(project)
    split = load_split(config, "train", config.train)
    order = np.random.default_rng(0).permutation(320)[:60]
    here, there = (list(read_batches(split, order, 8, Loading(workers))) for workers in (0, 2))
    for mine, other in zip(here, there, strict=True):
        assert (mine.unreadable, mine.indices.tolist()) == ((), other.indices.tolist())
        assert torch.equal(mine.inputs, other.inputs)
    facts, first = files_hash(split), files_hash(take(split, np.arange(100)))
    with (project / "train-002.tar").open("ab") as file:
        file.write(bytes(512))
    assert files_hash(split) != facts
    assert files_hash(take(split, np.arange(100))) == first


# Bad input


def refusal(tmp_path: Path, members: Members, **more: str) -> str:
    """Write a shard that is to be refused; give the message without the folder, and the hint."""
    path = write(tmp_path / "s.tar", members)
    error = refused(lambda: TarImages(str(path), **more))
    return f"{error.message}; {error.hint}".replace(f"{tmp_path}/", "")


def test_what_is_wrong_with_an_example_is_told_by_shard_and_name(tmp_path: Path) -> None:
    png = encoded(0)
    assert refusal(tmp_path, [*example(1), ("002.png", png), *example(3)]).startswith(
        "s.tar: 002 has no label (a member 002.cls);"
    )
    assert "s.tar: 002 has no label" in refusal(tmp_path, [*example(1), ("002.png", png)])
    assert "s.tar: two members are 001.png" in refusal(tmp_path, [*example(1), ("001.PNG", png)])
    assert "s.tar: 001.cls is '', not a label" in refusal(tmp_path, example(1, " \n"))
    assert "s.tar: 001.cls is '{\\n}', not a label" in refusal(tmp_path, example(1, "{\n}"))
    assert "not a label" in refusal(tmp_path, example(1, "7" * 5000))
    mixed = refusal(tmp_path, [*example(1), *example(2, "cat")])
    assert mixed.startswith(
        "s.tar#002.png has the label 'cat', but s.tar#001.png has '1'; labels must be all numbers or all"
    )
    assert refusal(tmp_path, example(1), image="jpg;webp") == (
        "no member of s.tar ends in .jpg, .webp; its members end in: .png (1), .cls (1)"
    )


def test_an_example_without_an_image_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tar", [*example(1), ("002.cls", b"1"), ("003.png", b"no"), ("003.cls", b"0")])
    data = TarImages(str(path))
    assert data.targets.tolist() == [1, 1, 0]
    assert data.paths[1] == f"{path}#002"
    for index, said in ((1, "the example has no image"), (2, "these 2 bytes are not an image")):
        with pytest.raises(Exception, match=said):
            data[index]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="the shard ends after 88 of its"):
        data[0]


CUTS: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("in an image", lambda tar: tar[: 512 + 50], "001.png takes"),
    ("in a header", lambda tar: tar[: 2048 + 100], "truncated header"),
    ("between two members", lambda tar: tar[:2048], "empty header"),
    ("a damaged header", lambda tar: tar[:2048] + b"?" * 512 + tar[2560:], "header"),
    ("gzip", lambda tar: b"\x1f\x8b" + tar[2:], "s.tar is not a tar file"),
    ("nothing", lambda tar: b"", "s.tar is not a tar file"),
]


@pytest.mark.parametrize(("what", "cut", "said"), CUTS)
def test_a_shard_that_is_cut_off_or_damaged_is_refused(
    tmp_path: Path, what: str, cut: Callable[[bytes], bytes], said: str
) -> None:
    path = write(tmp_path / "s.tar", whole([1, 2, 3]))
    content = path.read_bytes()
    assert len(encoded(1)) < 512  # so that the second member begins at 1024, the third at 2048
    path.write_bytes(cut(content))
    message = refused(lambda: TarImages(str(path))).message
    assert said in message
    assert what in ("gzip", "nothing") or "is truncated or damaged after" in message or "takes" in message


def test_a_pattern_that_fits_nothing_is_told_with_the_config_s_line(influence: Command, project: Path) -> None:
    as_shards(project)
    (project / "train-001.tar").unlink()
    text = (project / "influence.yaml").read_text()
    (project / "influence.yaml").write_text(text.replace("train-*.tar", "train-{000..002}.tar"))
    done = influence("check", cwd=project, code=2)
    assert done.err.startswith("error: influence.yaml:7: no file matches train-001.tar\n"), done.err
    assert "did you mean 'train-00" in done.err
