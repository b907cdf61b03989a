"""guess_data: folders and files by their form."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from influence_cli.errors import InfluenceError
from influence_cli.setup.data_form import guess_data
from tests.support.brightness import write_images


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def folder_section(path: Path) -> dict[str, object]:
    return {"dataset": "torchvision.datasets.ImageFolder", "args": {"root": str(path)}}


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    (tmp_path / "data" / ".ipynb_checkpoints").mkdir()
    guess = guess_data(tmp_path / "data", None)
    assert guess.train == folder_section(tmp_path / "data")
    assert guess.train_why == f"3 folders of images in {tmp_path / 'data'}"
    assert guess.test is None


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation", "Val"])
def test_train_and_test_below_one_folder(tmp_path: Path, test: str) -> None:
    write_images(tmp_path / "train", count=1)
    write_images(tmp_path / test, count=1)
    guess = guess_data(tmp_path, None)
    assert guess.train == folder_section(tmp_path / "train")
    assert guess.test == folder_section(tmp_path / test)


def test_of_test_and_val_the_other_one_is_named_and_a_flat_test_folder_is_passed_over(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        write_images(tmp_path / part, count=1)
    assert "val is there too" in guess_data(tmp_path, None).test_why
    for path in sorted((tmp_path / "test").rglob("*.png")):
        path.rename(tmp_path / "test" / f"{path.parent.name}{path.name}")
    assert guess_data(tmp_path, None).test == folder_section(tmp_path / "val")


def test_test_data_may_be_named(tmp_path: Path) -> None:
    write_images(tmp_path / "a", count=1)
    write_images(tmp_path / "b" / "train", count=1)
    write_images(tmp_path / "b" / "val", count=1)
    guess = guess_data(tmp_path / "a", tmp_path / "b")
    assert guess.test == folder_section(tmp_path / "b" / "val")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "state.json", tmp_path / "one" / "dataset_info.json")
    assert guess_data(tmp_path / "one", None).train == {"huggingface": str(tmp_path / "one")}
    kinds = {"img": "Image", "coarse_label": "ClassLabel", "fine_label": "ClassLabel"}
    features = {"features": {name: {"_type": kind} for name, kind in kinds.items()}}
    (tmp_path / "one" / "dataset_info.json").write_text(json.dumps(features))
    assert guess_data(tmp_path / "one", None).train["label"] == "fine_label"
    both = tmp_path / "both"
    touch(both / "dataset_dict.json", both / "train" / "state.json", both / "validation" / "state.json")
    guess = guess_data(both, None)
    assert guess.train == {"huggingface": str(both), "split": "train"}
    assert guess.test == {"huggingface": str(both), "split": "validation"}
    (both / "train").rename(both / "everything")
    with pytest.raises(InfluenceError, match="none is called train"):
        guess_data(both, None)


def test_what_torchvision_downloaded(tmp_path: Path) -> None:
    touch(tmp_path / "cifar-10-batches-py" / "data_batch_1")
    guess = guess_data(tmp_path, None)
    assert guess.train == {"dataset": "torchvision.datasets.CIFAR10", "args": {"root": str(tmp_path), "train": True}}
    assert guess.test == {"dataset": "torchvision.datasets.CIFAR10", "args": {"root": str(tmp_path), "train": False}}


def test_parquet_files_of_the_hub(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"img": [{"bytes": b"x", "path": "a"}], "fine_label": [3]})
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    guess = guess_data(tmp_path, None)
    args = {"files": str(tmp_path / "data" / "train*.parquet"), "image": "img", "label": "fine_label"}
    assert guess.train == {"dataset": "influence_cli.data.parquet_images.ParquetImages", "args": args}
    assert guess.test is not None
    assert guess.test["args"]["files"].endswith("test*.parquet")


def test_a_parquet_list_of_paths(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    list_ = tmp_path / "train.parquet"
    parquet.write_table(arrow.table({"path": ["cat/0.png", "dog/0.png"], "label": ["cat", "dog"]}), list_)
    assert guess_data(list_, None).train == {"csv": str(list_), "image": "path", "label": "label"}


def test_tar_shards(tmp_path: Path) -> None:
    touch(tmp_path / "shard-000.tar", tmp_path / "shard-001.tar")
    assert guess_data(tmp_path, None).train == {
        "dataset": "influence_cli.data.tar_images.TarImages",
        "args": {"files": str(tmp_path / "*.tar")},
    }


def listed(folder: Path, header: str, *rows: str, name: str = "list.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder / name


def test_a_list_of_images_beside_them(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "b.jpg")
    path = listed(tmp_path, "file,breed", "a.jpg,pug", "b.jpg,boxer")
    assert guess_data(path, None).train == {"csv": str(path), "image": "file", "label": "breed"}
    assert guess_data(tmp_path, None).train == {"csv": str(path), "image": "file", "label": "breed"}


def test_a_contest_has_names_without_suffix_in_a_folder_and_a_test_list_without_labels(tmp_path: Path) -> None:
    touch(tmp_path / "train" / "x1.jpg", tmp_path / "train" / "x2.jpg", tmp_path / "test" / "x3.jpg")
    path = listed(tmp_path, "id,label", "x1,pug", "x2,boxer", name="train.csv")
    listed(tmp_path, "id", "x3", name="test.csv")
    guess = guess_data(tmp_path, None)
    assert guess.train == {"csv": str(path), "image": "id", "label": "label", "root": str(tmp_path / "train")}
    assert guess.test is None
    assert "test.csv has no labels" in guess.train_why


def test_a_list_may_name_images_two_folders_below(tmp_path: Path) -> None:
    for part in ("train", "val"):
        touch(tmp_path / "images" / part / f"{part}1.jpg", tmp_path / "images" / part / f"{part}2.jpg")
        listed(tmp_path, "id,label", f"{part}1,pug", f"{part}2,boxer", name=f"{part}.csv")
    guess = guess_data(tmp_path / "train.csv", tmp_path / "val.csv")
    assert guess.train["root"] == str(tmp_path / "images" / "train")
    assert guess.test is not None
    assert guess.test["root"] == str(tmp_path / "images" / "val")


@pytest.mark.parametrize(("name", "size"), [("bloodmnist", {}), ("bloodmnist_64", {"size": 64})])
def test_a_file_of_medmnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: dict[str, int]) -> None:
    library = types.ModuleType("medmnist")
    library.__spec__ = importlib.machinery.ModuleSpec("medmnist", None)
    library.INFO = {  # type: ignore[attr-defined]
        "bloodmnist": {"python_class": "BloodMNIST", "task": "multi-class"},
        "chestmnist": {"python_class": "ChestMNIST", "task": "multi-label, binary-class"},
    }
    monkeypatch.setitem(sys.modules, "medmnist", library)
    touch(tmp_path / f"{name}.npz", tmp_path / "chestmnist.npz")
    guess = guess_data(tmp_path / f"{name}.npz", None)
    args = {"root": str(tmp_path), **size}
    assert guess.train == {"dataset": "medmnist.BloodMNIST", "args": {"split": "train", **args}}
    assert guess.test == {"dataset": "medmnist.BloodMNIST", "args": {"split": "test", **args}}
    with pytest.raises(InfluenceError, match="no form of data that is known"):
        guess_data(tmp_path / "chestmnist.npz", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InfluenceError, match="medmnist is not installed"):
        guess_data(tmp_path / f"{name}.npz", None)


def test_a_column_of_splits(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    rows = ["a.jpg,1,train"] * 6000 + ["a.jpg,2,valid"]
    path = listed(tmp_path, "path,label,split", *rows)
    guess = guess_data(path, None)
    assert guess.train["split"] == "train"
    assert guess.test == {"csv": str(path), "image": "path", "label": "label", "split": "valid"}


def test_json_lines(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a.png")
    rows = [json.dumps({"file_name": "images/a.png", "label": label}) for label in ("x", "y")]
    path = listed(tmp_path, rows[0], rows[1], name="metadata.jsonl")
    assert guess_data(tmp_path, None).train == {"csv": str(path), "image": "file_name", "label": "label"}


def test_a_list_whose_images_or_labels_are_not_known(tmp_path: Path) -> None:
    path = listed(tmp_path, "file,label", "gone.jpg,a")
    with pytest.raises(InfluenceError, match=r"no column names images that exist; the first row is file: gone.jpg"):
        guess_data(path, None)
    touch(tmp_path / "a.jpg")
    path = listed(tmp_path, "file,x,z", "a.jpg,1,4", "a.jpg,2,5")
    with pytest.raises(InfluenceError, match="no column is known to hold labels; the columns are file, x, z"):
        guess_data(path, None)
    with pytest.raises(InfluenceError, match="has no rows"):
        guess_data(listed(tmp_path, "file,label", name="empty.csv"), None)


def test_what_has_no_known_form_is_described(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "flat" / "a.jpg", tmp_path / "flat" / "b.jpg", tmp_path / "notes.txt")
    touch(tmp_path / "one" / "cats" / "a.jpg")
    for path, seen in (
        ("empty", "an empty folder"),
        ("flat", "a folder of 2 images without classes"),
        ("notes.txt", "a .txt file"),
        ("one", "a folder with images in cats/ alone, which would be a single class"),
    ):
        with pytest.raises(InfluenceError) as raised:
            guess_data(tmp_path / path, None)
        assert seen in raised.value.message
        assert "known: a folder of a folder for each class" in raised.value.hint
    with pytest.raises(InfluenceError, match="there is no"):
        guess_data(tmp_path / "gone", None)
