"""Parquet files of images are the data set that the same images are as an ImageFolder: indices, labels, scores."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from influence_cli.config.schema import Config
from influence_cli.data import parquet_images
from influence_cli.data.batches import Loading, read_batches
from influence_cli.data.datasets import load_split
from influence_cli.data.parquet_images import ParquetImages
from influence_cli.data.split import take
from influence_cli.model.data_fingerprint import files_hash
from tests.conftest import Command
from tests.support.data_file_projects import as_data_files, assert_same_results, encoded, refused

CLASSES = ["ankle boot", "bag", "coat"]


def write(path: Path, images: Sequence[Any], labels: Sequence[Any], rows: int = 4, **more: Any) -> Path:
    """Write a file of images and labels, so many rows a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images), "label": pa.array(labels), **more}), path, row_group_size=rows)
    return path


def hub(path: Path, folder: ImageFolder, indices: Sequence[int], rows: int) -> None:
    """Write some images as the Hugging Face Hub keeps them: a struct, and class names in the metadata."""
    names = {"info": {"features": {"label": {"names": folder.classes, "_type": "ClassLabel"}}}}
    table = pa.table(
        {
            "label": pa.array([folder.targets[i] for i in indices], pa.int64()),
            "image": [
                {"bytes": Path(folder.samples[i][0]).read_bytes(), "path": Path(folder.samples[i][0]).name}
                for i in indices
            ],
        }
    ).replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, path, row_group_size=rows)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """10 images in three files, one of them without a row."""
    for name, numbers in (("a", range(6)), ("b", ()), ("c", range(6, 10))):
        labels = pa.array([number % 3 for number in numbers], pa.int8())
        images = pa.array([encoded(number) for number in numbers], pa.binary())
        write(tmp_path / f"{name}.parquet", images, labels, rows=4)
    return tmp_path


# Rows by number


def test_an_index_is_the_position_over_all_files_sorted_by_name(three: Path) -> None:
    data = ParquetImages([str(three / "c.parquet"), str(three / "[ab].parquet"), str(three / "a*")])
    assert len(data) == 10
    assert data.targets.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert data.classes is None
    for index in (9, 0, 5, 6, 3, 4, 9):
        image, label = data[index]
        expected = Image.open(io.BytesIO(encoded(index))).convert("RGB")
        assert (image.mode, label) == ("RGB", index % 3)
        assert np.array_equal(image, expected)
    assert list(data.paths) == [f"{three}/a.parquet#{row}" for row in range(6)] + [
        f"{three}/c.parquet#{row}" for row in range(4)
    ]
    assert data.paths[-1] == f"{three}/c.parquet#3"
    with pytest.raises(IndexError):
        data[10]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_labels_that_are_names_are_numbered_in_sorted_order_over_all_files(tmp_path: Path, kind: pa.DataType) -> None:
    for name, labels in (("1", ["coat", "bag"]), ("2", ["bag", "ankle boot"])):
        write(tmp_path / f"{name}.parquet", [encoded(0)] * 2, pa.array(labels).cast(kind))
    data = ParquetImages(str(tmp_path / "{1,2}.parquet"))
    assert data.classes == CLASSES
    assert data.class_to_idx == {"ankle boot": 0, "bag": 1, "coat": 2}
    assert data.targets.tolist() == [2, 1, 1, 0]


def test_a_grey_or_16_bit_image_is_what_an_image_folder_makes_of_it_or_refused(tmp_path: Path) -> None:
    deep, out = Image.fromarray(np.full((4, 4), 999, dtype=np.uint16)), io.BytesIO()
    deep.save(out, "PNG")
    write(tmp_path / "a.parquet", [encoded(1, mode="L"), encoded(1, mode="P", kind="GIF"), out.getvalue()], [0, 0, 1])
    data = ParquetImages(str(tmp_path / "a.parquet"))
    for index in (0, 1):
        (tmp_path / "one").write_bytes(pq.read_table(tmp_path / "a.parquet")["image"][index].as_py())
        assert np.array_equal(data[index][0], default_loader(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"its values \(999 to 999\) do not fit in 8 bits"):
        data[2]


def test_few_row_groups_are_held_and_a_copy_in_another_process_holds_none(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ParquetImages(str(three / "*.parquet"))
    for index in range(10):
        data[index]
    assert len(data._held) == 3  # 4 and 2 rows, then 4
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._held
    assert np.array_equal(copy[7][0], data[7][0])
    monkeypatch.setattr(parquet_images, "KEPT_BYTES", 1)
    copy[0], copy[5], copy[9]
    assert list(copy._held) == [(2, 0)]
    # In a fork, where the file's place is shared.
    monkeypatch.setattr(os, "getpid", lambda: -1)
    data[8]
    assert (list(data._held), data._owner) == ([(2, 0)], -1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loader_processes_read_the_same_in_any_order(project: Path) -> None:
    folder = ImageFolder(project / "train")
    for number, part in enumerate(np.array_split(np.arange(320), 3)):
        hub(project / f"train-{number}.parquet", folder, part.tolist(), rows=17)
    config = as_parquet(project)
    split = load_split(config, "train", config.train)
    order = np.random.default_rng(0).permutation(320)[:60]
    split.source[0]  # the file is open here before the fork
    here, there = (list(read_batches(split, order, 8, Loading(workers))) for workers in (0, 2))
    for mine, other in zip(here, there, strict=True):
        assert mine.unreadable == ()
        assert torch.equal(mine.inputs, other.inputs)
        assert mine.indices.tolist() == other.indices.tolist()


# The same as an ImageFolder


def as_parquet(project: Path) -> Config:
    return as_data_files(project, "influence_cli.data.parquet_images.ParquetImages", "{0}-*.parquet")


@pytest.mark.slow
def test_every_command_says_the_same_as_of_the_image_folder(influence: Command, tmp_path: Path) -> None:
    def convert(project: Path) -> None:
        train, test = (ImageFolder(project / part) for part in ("train", "test"))
        for number, part in enumerate(np.array_split(np.arange(len(train)), 3)):
            hub(project / f"train-{number:02d}.parquet", train, part.tolist(), rows=(7, 1000, 50)[number])
        hub(project / "test-0.parquet", test, range(len(test)), rows=30)
        as_parquet(project)

    assert_same_results(influence, tmp_path, convert, re.compile(r".*/(train|test)-\d+\.parquet#\d+"))


@pytest.fixture
def small(tiny: Path) -> Path:
    """The smallest project there is, in a Parquet file."""
    for part, count in (("train", 24), ("test", 6)):
        hub(tiny / f"{part}-0.parquet", ImageFolder(tiny / part), range(count), rows=5)
    as_parquet(tiny)
    return tiny


def test_decisions_on_the_page_are_about_rows_that_are_there(influence: Command, small: Path) -> None:
    decisions = small / "decisions.csv"
    decisions.write_text(f"index,path,label,decision\n0,{small}/train-0.parquet#5,a,drop\n")
    stale = influence("relabel", decisions, cwd=small, code=2).err
    assert "index 0 is train-0.parquet#0 now, but was train-0.parquet#5 when reviewed" in stale
    assert "gone" not in stale
    decisions.write_text(f"index,path,label,decision\n0,{small}/train-0.parquet#0,a,drop\n")
    influence("relabel", decisions, cwd=small)
    assert f"0,{small}/train-0.parquet#0" in (small / "exclude.csv").read_text()


def test_tools_that_open_files_are_not_given_rows(influence: Command, small: Path) -> None:
    done = influence("mislabels", "--format", "fiftyone", "-o", "x.csv", cwd=small, code=2)
    assert "the train examples are not image files" in done.err
    for name, signal in (("a", "loss"), ("b", "margin")):
        influence("mislabels", "--signal", signal, "-o", f"{name}.csv", cwd=small)
    influence("compare", "a.csv", "b.csv", "--report", "page.html", cwd=small)
    assert (small / "page.html").read_text().count("<img") >= 10


def test_the_fingerprint_is_of_the_files_that_are_used(project: Path) -> None:
    folder = ImageFolder(project / "train")
    hub(project / "train-0.parquet", folder, range(200), rows=100)
    hub(project / "train-1.parquet", folder, range(200, 320), rows=100)
    config = as_parquet(project)
    split = load_split(config, "train", config.train)
    whole, first = files_hash(split), files_hash(take(split, np.arange(200)))
    assert whole != first
    os.utime(project / "train-1.parquet", ns=(1, 1))
    assert files_hash(split) != whole
    assert files_hash(take(split, np.arange(200))) == first
    (project / "train-1.parquet").unlink()
    assert refused(lambda: files_hash(split)).message.startswith(
        f"{project}/train-1.parquet cannot be read: FileNotFound"
    )


# Bad input


def test_what_is_wrong_with_files_is_told_in_a_line(tmp_path: Path) -> None:
    def made(name: str, *arguments: Any, **more: Any) -> Callable[[], object]:
        path = write(tmp_path / f"{name}.parquet", *arguments, **more)
        return lambda: ParquetImages(str(path))

    image = encoded(0)
    error = refused(made("nulls", [image] * 6, [0, 1, 0, None, 2, None]))
    assert error.message == f"{tmp_path}/nulls.parquet: row 3 has no 'label', and 1 more"
    error = refused(made("floats", [image], [0.5]))
    assert error.message == f"{tmp_path}/floats.parquet: the column 'label' is double"
    error = refused(made("texts", ["a.png"], [0]))
    assert error.message == f"{tmp_path}/texts.parquet: the column 'image' is string, not encoded images"
    error = refused(made("structs", [{"path": "a.png"}], [0]))
    assert "the column 'image' is struct<path: string>, not encoded images" in error.message
    made("good", [image], [0])
    error = refused(lambda: ParquetImages(str(tmp_path / "good.parquet"), image="img"))
    assert error.message == f"{tmp_path}/good.parquet has no column 'img'"
    assert "did you mean 'image'" in error.hint
    error = refused(lambda: ParquetImages(str(tmp_path / "good.parquet"), label="labels"))
    assert "did you mean 'label'" in error.hint
    made("names", [image], ["coat"])
    error = refused(lambda: ParquetImages(str(tmp_path / "{good,names}.parquet")))
    assert (
        error.message
        == f"{tmp_path}/names.parquet: the column 'label' is large_string, but int64 in {tmp_path}/good.parquet"
    )
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-20])
    error = refused(lambda: ParquetImages(str(tmp_path / "cut.parquet")))
    assert error.message.startswith(f"{tmp_path}/cut.parquet cannot be read as a Parquet file: ArrowInvalid: ")
    error = refused(lambda: ParquetImages(str(tmp_path / "train-*.parquet")))
    assert error.message == f"no file matches {tmp_path}/train-*.parquet"
    error = refused(lambda: ParquetImages(str(tmp_path / "goode.parquet")))
    assert "did you mean 'good.parquet'" in error.hint
    error = refused(lambda: ParquetImages([]))
    assert error.message == "files is []: expected a pattern or a list of them"


def test_a_row_without_an_image_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(0), "path": "a"}, {"bytes": None, "path": "b.png"}, None, {"bytes": b"no", "path": ""}]
    write(tmp_path / "a.parquet", cells, [0, 0, 1, 1])
    data = ParquetImages(str(tmp_path / "a.parquet"))
    assert data[0][1] == 0
    for index, said in (
        (1, "only the path b.png"),
        (2, "the row holds no image"),
        (3, "these 2 bytes are not an image"),
    ):
        with pytest.raises(Exception, match=said):
            data[index]


def test_the_error_has_the_line_of_the_config_and_the_row(influence: Command, project: Path) -> None:
    folder = ImageFolder(project / "train")
    hub(project / "train-0.parquet", folder, range(320), rows=100)
    as_parquet(project)
    done = influence("check", cwd=project, code=2)
    assert done.err.startswith("error: influence.yaml:11: no file matches test-*.parquet\n"), done.err
    hub(project / "test-0.parquet", ImageFolder(project / "test"), range(80), rows=100)
    table = pq.read_table(project / "train-0.parquet")
    images = table["image"].to_pylist()
    images[7] = None
    at = table.schema.get_field_index("image")
    pq.write_table(table.set_column(at, "image", pa.array(images)), project / "train-0.parquet")
    done = influence("gradients", cwd=project, code=2)
    assert (
        f"error: training example 7 ({project}/train-0.parquet#7) cannot be read: ValueError: the row holds no image\n"
        in done.err
    )
    assert "320" in influence("check", "--skip-unreadable", cwd=project).out


def test_a_row_group_that_fills_the_memory_is_refused(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "available_bytes", lambda _device: 1000)
    error = refused(lambda: ParquetImages(str(three / "*.parquet")))
    assert "a row group holds" in error.message
    assert "row_group_size=1000" in error.hint
