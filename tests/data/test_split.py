"""Batches come in the order asked for, whatever cannot be read is named, and a file is read as the data set's own."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from influence_cli.data.batches import Batch, Loading, labelled_inputs, read_batches, refuse_unreadable
from influence_cli.data.image_files import open_image
from influence_cli.data.images import as_picture, file_input, raw_image
from influence_cli.data.split import Split, raw_item, row_of, rows_of, spread, take, to_input
from influence_cli.errors import InfluenceError
from influence_cli.model.data_fingerprint import files_hash
from tests.conftest import shared

WHERE = "influence.yaml:3"


def split_of(source: Any, **changes: Any) -> Split:
    """Make a split of anything with items by number; labels are 0, 1, 2, 0, 1, …"""
    count = len(source)
    facts: dict[str, Any] = {
        "name": "train",
        "source": source,
        "transform": None,
        "labels": np.arange(count) % 3,
        "indices": np.arange(count),
        "paths": None,
        "classes": None,
        "mapping": None,
        "where": WHERE,
    }
    return Split(**(facts | changes))


def numbered(count: int) -> list[tuple[Tensor, int]]:
    """Give examples in which every number is the example's own position."""
    return [(torch.full((2, 3), float(i)), i % 3) for i in range(count)]


def pixels(image: Image.Image) -> Tensor:
    """Transform a picture to a float tensor, as a model takes it."""
    return torch.tensor(np.asarray(image)).float()


def refused(action: Callable[[], object]) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        action()
    assert "\n" not in caught.value.message
    return caught.value


# Batches


ORDERS = [
    (range(10), 4, [4, 4, 2]),
    (range(8), 4, [4, 4]),
    (range(3), 100, [3]),
    ([9, 0, 5, 5, 2], 2, [2, 2, 1]),
    ([7], 1, [1]),
    ([], 4, []),
]


@pytest.mark.parametrize(("order", "size", "sizes"), ORDERS)
def test_batches_come_in_the_given_order_and_the_last_one_is_shorter(
    order: Sequence[int], size: int, sizes: list[int]
) -> None:
    indices = np.array(list(order), dtype=np.int64)
    batches = list(read_batches(split_of(numbered(10)), indices, size))
    assert [len(batch) for batch in batches] == sizes
    assert [index for batch in batches for index in batch.indices] == list(order)
    for batch in batches:
        assert batch.inputs.shape == (len(batch), 2, 3)
        assert batch.inputs.dtype == torch.float32
        assert batch.inputs[:, 0, 0].tolist() == batch.indices.tolist()
        assert batch.targets.tolist() == [index % 3 for index in batch.indices]
        assert batch.targets.dtype == torch.int64
        assert batch.unreadable == ()


def test_targets_are_the_labels_of_the_split_not_of_the_source() -> None:
    split = split_of([(torch.zeros(1), 99)] * 3, labels=np.array([7, 8, 9]))
    (batch,) = read_batches(split, np.array([2, 0]), 8)
    assert batch.targets.tolist() == [9, 7]


class Broken(Sequence[Any]):
    """Cannot read the examples 1 and 4."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: Any) -> Any:
        if index in (1, 4):
            raise OSError(f"disk says no to {index}")
        return torch.full((2,), float(index)), 0


def test_an_example_that_cannot_be_read_is_named_and_the_others_are_kept() -> None:
    paths = tuple(f"data/{i}.png" for i in range(6))
    batches = list(read_batches(split_of(Broken(), paths=paths), np.arange(6), 4))
    assert [batch.indices.tolist() for batch in batches] == [[0, 2, 3], [5]]
    assert [batch.inputs[:, 0].tolist() for batch in batches] == [[0, 2, 3], [5]]
    assert [batch.targets.tolist() for batch in batches] == [[0, 2, 0], [2]]
    reason = "training example {0} (data/{0}.png) cannot be read: OSError: disk says no to {0}"
    assert [batch.unreadable for batch in batches] == [((1, reason.format(1)),), ((4, reason.format(4)),)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_loader_process_gives_the_same_batches() -> None:
    order = np.array([5, 0, 1, 3, 4, 2, 0])
    for source in (numbered(6), Broken()):
        here, there = (list(read_batches(split_of(source), order, 2, Loading(workers))) for workers in (0, 1))
        assert len(here) == len(there) == 4
        for mine, others in zip(here, there, strict=True):
            assert torch.equal(mine.inputs, others.inputs)
            assert torch.equal(mine.targets, others.targets)
            assert mine.indices.tolist() == others.indices.tolist()
            assert mine.unreadable == others.unreadable


def test_a_batch_in_which_nothing_can_be_read_is_empty() -> None:
    (batch,) = read_batches(split_of(Broken()), np.array([4, 1]), 4)
    assert len(batch) == 0
    assert (batch.inputs.numel(), batch.targets.numel()) == (0, 0)
    assert [index for index, _ in batch.unreadable] == [4, 1]
    assert isinstance(batch.digest(), int)


def test_an_example_that_cannot_be_read_is_refused_by_name_where_none_may_be_missing() -> None:
    split = split_of(Broken(), name="test")
    good, bad = read_batches(split, np.array([0, 2, 5, 4]), 2)
    refuse_unreadable(good)
    error = refused(lambda: refuse_unreadable(bad))
    assert error.message == "test example 4 cannot be read: OSError: disk says no to 4"
    assert "--skip-unreadable" in error.hint
    assert "exclude" in error.hint
    assert "disk says no to 1" in refused(lambda: list(labelled_inputs(split))).message


def test_labelled_inputs_are_the_examples_in_use_one_by_one() -> None:
    split = take(split_of(numbered(6)), np.array([1, 3, 5]))
    assert len(split) == 3
    found = list(labelled_inputs(split))
    assert [(float(tensor[0, 0]), label) for tensor, label in found] == [(1.0, 1), (3.0, 0), (5.0, 2)]


def test_two_shapes_are_refused_with_both_examples() -> None:
    items = [(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), 0), (torch.zeros(3, 5, 4), 0)]
    error = refused(lambda: list(read_batches(split_of(items), np.arange(3), 3)))
    assert error.message == (
        f"{WHERE}: training example 2 has the shape [3, 5, 4], but training example 0 has [3, 4, 4]"
    )
    assert "Resize" in error.hint


# Digests


def batch_of(inputs: Tensor, targets: Sequence[int], indices: Sequence[int]) -> Batch:
    return Batch(inputs, torch.tensor(targets), np.array(indices, dtype=np.int64))


def test_a_digest_is_of_inputs_labels_and_positions() -> None:
    inputs = torch.arange(6.0).reshape(2, 3)
    digest = batch_of(inputs, [0, 1], [4, 5]).digest()
    assert 0 <= digest < 2**64
    assert batch_of(inputs.clone(), [0, 1], [4, 5]).digest() == digest
    # The same numbers in another layout of memory.
    assert batch_of(inputs.t().contiguous().t(), [0, 1], [4, 5]).digest() == digest
    changed = inputs.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = {
        batch_of(changed, [0, 1], [4, 5]).digest(),
        batch_of(inputs, [1, 0], [4, 5]).digest(),
        batch_of(inputs, [0, 1], [4, 6]).digest(),
        batch_of(inputs.flip(0), [0, 1], [4, 5]).digest(),
        batch_of(inputs[:1], [0], [4]).digest(),
    }
    assert len(others) == 5
    assert digest not in others


# Items


IMAGE = torch.ones(2)


@pytest.mark.parametrize(
    "item",
    [
        (IMAGE, 2),
        [IMAGE, 2],
        (IMAGE, 2, "more", None),
        *({key: IMAGE, "label": 2} for key in ("image", "img", "pixel_values", "input", "x")),
        *({"image": IMAGE, key: 2} for key in ("label", "labels", "target", "y")),
        {"id": 7, "y": 2, "extra": None, "x": IMAGE},
    ],
)
def test_an_item_is_a_pair_or_a_dict_with_the_usual_keys(item: object) -> None:
    image, label = raw_item(split_of([item]), 0)
    assert image is IMAGE
    assert label == 2


@pytest.mark.parametrize(
    "item", [IMAGE, 3, None, "word", (IMAGE,), [], {"image": IMAGE}, {"label": 2}, {"a": IMAGE, "b": 2}, (None, 2)]
)
def test_an_item_of_another_kind_is_refused_with_the_config_line(item: object) -> None:
    error = refused(lambda: raw_item(split_of([item]), 0))
    kind = type(item).__name__
    assert error.message == f"{WHERE}: training example 0 is a {kind}, not (image, label)"
    assert "'image' and 'label'" in error.hint


def test_an_example_has_a_title_with_its_file() -> None:
    split = split_of(numbered(2), paths=("a/0.png", "a/1.png"))
    assert split.title(1) == "training example 1 (a/1.png)"
    assert split_of(numbered(2), name="test").title(1) == "test example 1"
    assert (split.path(0), split_of(numbered(2)).path(0)) == ("a/0.png", None)


# Inputs


FLOATS = [np.float64, np.float16, np.float32]


@pytest.mark.parametrize("dtype", FLOATS)
def test_arrays_and_tensors_of_any_float_become_float32(dtype: type) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    for given in (array, torch.tensor(array), tv_tensors.Image(torch.tensor(array)[None])):
        found = to_input(split_of([0]), given, "it")
        assert type(found) is Tensor
        assert found.dtype == torch.float32
        assert found.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert to_input(split_of([0]), torch.ones(2, dtype=torch.bfloat16), "it").dtype == torch.float32


def test_an_input_carries_no_graph() -> None:
    found = to_input(split_of([0]), torch.ones(2, requires_grad=True) * 2, "it")
    assert not found.requires_grad


def frozen() -> np.ndarray:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    return array


ODD_ARRAYS: dict[str, Callable[[], np.ndarray]] = {
    "mirrored rows": lambda: np.array([[3, 4, 5], [0, 1, 2]], dtype=np.float32)[::-1],
    "mirrored channels, as from BGR to RGB": lambda: np.array([[2, 1, 0], [5, 4, 3]], dtype=np.float32)[..., ::-1],
    "big-endian": lambda: np.arange(6, dtype=">f4").reshape(2, 3),
    "column by column": lambda: np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "read-only": frozen,
}


@pytest.mark.parametrize("layout", ODD_ARRAYS)
def test_arrays_of_any_memory_layout_are_read(layout: str) -> None:
    (batch,) = read_batches(split_of([(ODD_ARRAYS[layout](), 0)]), np.array([0]), 1)
    assert batch.unreadable == ()
    assert batch.inputs.tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (torch.zeros(2, dtype=torch.uint8), "a tensor of torch.uint8, not of float32"),
        (torch.zeros(2, dtype=torch.bool), "a tensor of torch.bool, not of float32"),
        (np.zeros(2, dtype=np.uint8), "a tensor of torch.uint8, not of float32"),
        (Image.new("L", (2, 2)), "a Image, not a tensor"),
        ("word", "a str, not a tensor"),
        ([1.0, 2.0], "a list, not a tensor"),
    ],
)
def test_what_no_model_takes_is_refused_with_the_transform_that_is_missing(image: object, what: str) -> None:
    error = refused(lambda: to_input(split_of([0]), image, "training example 0"))
    assert error.message == f"{WHERE}: training example 0 is {what}"
    assert "ToDtype" in error.hint


@pytest.mark.parametrize("array", [np.array([None, 1]), np.array(["a"])])
def test_arrays_that_hold_no_numbers_are_refused(array: np.ndarray) -> None:
    assert "training example 0" in refused(lambda: to_input(split_of([0]), array, "training example 0")).message


def test_a_transform_is_applied_and_its_failure_names_the_example() -> None:
    def odd(x: Tensor) -> Tensor:
        if x.sum() > 2:
            raise ValueError("too\nlarge")
        return x + 1

    split = split_of([(torch.ones(1), 0), (torch.full((1,), 5.0), 0)], transform=odd)
    (batch,) = read_batches(split, np.arange(2), 2)
    assert batch.inputs.tolist() == [[2.0]]
    assert batch.unreadable == ((1, f"{WHERE}: the transform fails on training example 1: ValueError: too large"),)


# Pictures


RAMP = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
GREY = RAMP[..., 0]


@pytest.mark.parametrize(
    ("image", "mode", "expected"),
    [
        (RAMP, "RGB", RAMP),
        (np.moveaxis(RAMP, -1, 0), "RGB", RAMP),
        (torch.tensor(RAMP), "RGB", RAMP),
        (torch.tensor(RAMP).permute(2, 0, 1), "RGB", RAMP),
        (tv_tensors.Image(torch.tensor(RAMP).permute(2, 0, 1)), "RGB", RAMP),
        (GREY, "L", GREY),
        (GREY[..., None], "L", GREY),
        (GREY[None], "L", GREY),
        (torch.tensor(GREY)[None], "L", GREY),
        (GREY[:, ::-1], "L", GREY[:, ::-1]),
    ],
)
def test_arrays_and_tensors_of_bytes_become_the_same_picture(image: object, mode: str, expected: np.ndarray) -> None:
    picture = as_picture(image)
    assert picture is not None
    assert picture.mode == mode
    assert np.array_equal(np.asarray(picture), expected)


def test_a_picture_stays_itself() -> None:
    image = Image.new("CMYK", (3, 2))
    assert as_picture(image) is image


NUMBERS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_other_numbers_are_stretched_to_the_range_of_bytes(dtype: torch.dtype) -> None:
    picture = as_picture(torch.tensor([[-2, 0], [1, 2]], dtype=dtype))
    assert picture is not None
    found = np.asarray(picture)
    assert (found[0, 0], found[1, 1]) == (0, 255)
    assert found[0, 1] == 127
    assert found[1, 0] == 191


def test_a_mask_and_a_flat_image_are_pictures() -> None:
    mask = as_picture(np.array([[True, False]]))
    assert mask is not None
    assert np.asarray(mask).tolist() == [[255, 0]]
    flat = as_picture(torch.full((1, 2, 2), 0.7, requires_grad=True))
    assert flat is not None
    assert np.asarray(flat).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_picture_with_numbers_that_are_not_finite_is_drawn_or_left_out_without_a_warning(bad: float) -> None:
    picture = as_picture(np.array([[0.0, 1.0], [2.0, bad]], dtype=np.float32))
    assert picture is None or picture.size == (2, 2)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros(5),
        np.zeros((2, 3, 4, 4)),
        np.zeros((7, 7, 2)),
        np.zeros((4, 7, 7)),
        torch.zeros(()),
        torch.zeros(10),
        np.array([[None, None]]),
        "word",
        3.0,
        None,
        [[1, 2], [3, 4]],
    ],
)
def test_what_is_no_picture_gives_none(image: object) -> None:
    assert as_picture(image) is None


def test_the_picture_of_an_example_is_the_raw_one() -> None:
    split = split_of([(Image.fromarray(RAMP), 0), {"image": torch.zeros(7), "label": 1}], transform=pixels)
    picture = raw_image(split, 0)
    assert picture is not None
    assert np.array_equal(np.asarray(picture), RAMP)
    assert raw_image(split, 1) is None


# Image files


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("own", ["L", "RGB"])
def test_a_file_is_converted_to_the_mode_of_the_data_sets_images(tmp_path: Path, mode: str, own: str) -> None:
    Image.fromarray(GREY * 4).convert(mode).save(tmp_path / "one.png")
    split = split_of([(Image.new(own, (5, 4)), 0)], transform=pixels)
    tensor, picture = file_input(split, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.mode == mode
        expected = image.convert(own)
    assert (picture.mode, picture.size) == (own, (5, 4))
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert torch.equal(tensor, torch.tensor(np.asarray(expected)).float())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff", ".ppm"])
def test_a_file_of_any_usual_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"one{suffix}"
    Image.fromarray(RAMP).save(path)
    tensor, picture = file_input(split_of([(Image.new("RGB", (5, 4)), 0)], transform=pixels), path)
    assert (picture.mode, tensor.shape) == ("RGB", (4, 5, 3))


def test_a_mode_that_has_no_way_to_the_data_sets_is_refused(tmp_path: Path) -> None:
    Image.new("LAB", (5, 4)).save(tmp_path / "one.tiff")
    split = split_of([(Image.new("L", (5, 4)), 0)], transform=pixels)
    assert str(tmp_path / "one.tiff") in refused(lambda: file_input(split, tmp_path / "one.tiff")).message


def test_the_first_example_in_use_gives_mode_and_shape(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "one.png")
    items = [(Image.new("RGB", (9, 9)), 0), (Image.new("L", (5, 4)), 0)]
    split = take(split_of(items, transform=pixels), np.array([1]))
    assert file_input(split, tmp_path / "one.png")[1].mode == "L"


def test_a_file_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    Image.new("L", (6, 7)).save(tmp_path / "one.png")
    split = split_of([(Image.new("L", (5, 4)), 0)], transform=pixels)
    error = refused(lambda: file_input(split, tmp_path / "one.png"))
    assert error.message.endswith("becomes an input of shape [7, 6], but the train examples have [4, 5]")
    assert "Resize" in error.hint


def test_a_file_has_no_way_into_a_data_set_of_tensors_without_a_transform(tmp_path: Path) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "one.png")
    error = refused(lambda: file_input(split_of([(torch.zeros(4, 5), 0)]), tmp_path / "one.png"))
    assert "an image file cannot become a model input" in error.message
    assert "train.transform" in error.hint


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    split = split_of([(Image.new("RGB", (5, 4)), 0)], transform=pixels)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for bad in (b"", b"hello", content[:20], content[: len(content) // 2], bytes(1000)):
        (tmp_path / "a.png").write_bytes(bad)
        error = refused(lambda: file_input(split, tmp_path / "a.png"))
        assert error.message.startswith(f"{tmp_path / 'a.png'} cannot be decoded as an image: ")
    assert "there is no such file" in refused(lambda: open_image(tmp_path / "missing.png")).message
    assert "there is no such file" in refused(lambda: open_image(tmp_path)).message


def test_a_real_photo_is_read_as_the_data_set_reads_it() -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    source = ImageFolder(shared("hymenoptera") / "val")
    transform = v2.Compose([v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    paths = tuple(path for path, _ in source.samples)
    split = split_of(source, transform=transform, paths=paths)
    (batch,) = read_batches(split, np.array([0, 140]), 2)
    for row, index in enumerate((0, 140)):
        assert torch.equal(file_input(split, Path(paths[index]))[0], batch.inputs[row])


# Facts about files


@pytest.fixture
def folder(tmp_path: Path) -> Split:
    """Give three small files as a split."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes(10 + number))
        os.utime(tmp_path / f"{number}.png", ns=(10**18, 10**18 + number))
    return split_of(numbered(3), paths=tuple(str(tmp_path / f"{number}.png") for number in range(3)))


def test_facts_stay_while_the_files_do_whatever_their_content(folder: Split, tmp_path: Path) -> None:
    before = files_hash(folder)
    assert before == files_hash(folder)
    (tmp_path / "1.png").write_bytes(b"x" * 11)
    os.utime(tmp_path / "1.png", ns=(2 * 10**18, 10**18 + 1))
    # Neither the content nor the time of the last reading is looked at.
    assert files_hash(folder) == before


CHANGES: dict[str, Callable[[Path], object]] = {
    "a nanosecond later": lambda path: os.utime(path / "1.png", ns=(10**18, 10**18 + 2)),
    "a nanosecond earlier": lambda path: os.utime(path / "1.png", ns=(10**18, 10**18)),
    "a byte longer": lambda path: (
        (path / "1.png").write_bytes(bytes(12)),
        os.utime(path / "1.png", ns=(10**18, 10**18 + 1)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_facts_change_with_the_time_or_the_size_of_a_file(folder: Split, tmp_path: Path, change: str) -> None:
    before = files_hash(folder)
    CHANGES[change](tmp_path)
    assert files_hash(folder) != before


def test_facts_are_of_the_paths_and_the_examples_in_use(folder: Split, tmp_path: Path) -> None:
    before = files_hash(folder)
    part = files_hash(take(folder, np.array([0, 1])))
    assert part != before
    os.utime(tmp_path / "2.png", ns=(10**18, 5))
    assert files_hash(take(folder, np.array([0, 1]))) == part
    (tmp_path / "0.png").rename(tmp_path / "other.png")
    renamed = (str(tmp_path / "other.png"), *(folder.paths or ())[1:])
    assert files_hash(take(split_of(numbered(3), paths=renamed), np.array([0, 1]))) != part


def test_facts_name_a_file_that_is_gone(folder: Split, tmp_path: Path) -> None:
    (tmp_path / "1.png").unlink()
    error = refused(lambda: files_hash(folder))
    assert error.message.startswith(f"training example 1 ({tmp_path / '1.png'}) cannot be read: FileNotFoundError")
    assert files_hash(take(folder, np.array([0, 2]))) is not None


def test_examples_that_are_no_files_have_no_facts() -> None:
    assert files_hash(split_of(numbered(3))) is None


class Deadly:
    """A reader that takes its process with it."""

    def __init__(self, at: int) -> None:
        self.at, self.reader = at, os.getpid()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.at and os.getpid() != self.reader:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_loader_process_that_dies_is_named_and_not_waited_for() -> None:
    split = split_of(Deadly(17))
    found = []
    with pytest.raises(InfluenceError) as raised:
        found += list(read_batches(split, np.arange(40), 4, Loading(2)))
    message = raised.value.message
    assert re.search(r": the loader process \d+ (is killed by signal: Killed|exited unexpectedly)", message), message
    assert "the 4 examples from training example" in message
    assert "finished work is kept" in raised.value.hint


def test_the_row_of_a_position_is_found_among_those_in_use() -> None:
    indices = np.array([2, 3, 7])
    assert rows_of(indices, [7, 2]).tolist() == [2, 0]
    assert rows_of(indices, np.array([], dtype=np.int64)).tolist() == []
    assert [row_of(indices, position) for position in (-1, 2, 4, 7, 8)] == [None, 0, None, 2, None]
    assert row_of(indices[:0], 0) is None


@pytest.mark.parametrize("count", [1, 2, 5, 12, 30, 40])
def test_spread_takes_each_class_and_both_of_its_ends(count: int) -> None:
    labels = np.repeat([3, 0, 7, 1], [20, 2, 15, 3])
    split = split_of(range(40), labels=labels)
    chosen = spread(split, count)
    assert len(chosen) == count
    assert sorted(set(chosen)) == list(chosen)
    counts = np.bincount(labels[chosen], minlength=8)[[0, 1, 3, 7]]
    if count >= 12:  # the small classes whole, and as many of the two large ones
        assert list(counts[:2]) == [2, 3]
        assert counts[2] in (counts[3], counts[3] + 1) or counts[3] == 15
        assert {0, 19, 22, 36} <= set(chosen)
    else:
        assert counts.max() <= 2
        assert (counts > 0).sum() == min(count, 4)


def test_spread_leaves_out_what_is_not_in_use() -> None:
    split = split_of(range(50), labels=np.zeros(50, dtype=np.int64), indices=np.arange(0, 50, 2))
    assert set(spread(split, 10)) <= set(range(0, 50, 2))
