"""Data sets as the libraries write them, all of the same pictures in the same order."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.ecosystem.pictures import CLASSES, pictures, written


@dataclass(frozen=True, eq=False)
class Data:
    """A layout of training and test examples.

    Attributes:
        writer: the library or tool.
        layout: what lies on the disk.
        train: the section ``train`` in YAML, without a transform.
        test: likewise.
        make: writes it into a project that has ``train/CLASS`` and ``val/CLASS``.
        names: of the classes, in the order of the pictures' labels; none where they are not known.
        outputs: the model's output of each class of the pictures; a class that is not in it is left out.
    """

    writer: str
    layout: str
    train: str
    test: str
    make: Callable[[Path], None]
    names: Sequence[str] = CLASSES
    outputs: Mapping[int, int] = field(default_factory=lambda: {0: 0, 1: 1, 2: 2})


def _nothing(folder: Path) -> None:
    """The folders are there already."""


def _rows(part: str, root: str = "") -> list[tuple[str, str]]:
    return [(path.removeprefix(root), label) for path, label in written(part)]


def _csv(folder: Path) -> None:
    """One list with a column of splits, as pandas writes it."""
    import pandas

    rows = [(path, label, part) for part in ("train", "val") for path, label in _rows(part)]
    pandas.DataFrame(rows, columns=["file", "breed", "split"]).to_csv(folder / "list.csv", index=False)


def _kaggle(folder: Path) -> None:
    """Images in one folder; the list has names without a suffix."""
    for part in ("train", "val"):
        (folder / "images" / part).mkdir(parents=True)
        with (folder / f"{part}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "label"])
            for path, label in _rows(part):
                (folder / path).rename(folder / "images" / part / Path(path).name)
                table.writerow([Path(path).stem, label])


def _tsv(folder: Path) -> None:
    for part in ("train", "val"):
        lines = [f"{path}\t{CLASSES.index(label)}" for path, label in _rows(part)]
        (folder / f"{part}.tsv").write_text("\n".join(["path\tlabel", *lines]) + "\n")


def _jsonl(folder: Path) -> None:
    """As `datasets` calls it: metadata.jsonl in the folder of the images, paths relative to it."""
    for part in ("train", "val"):
        lines = [json.dumps({"file_name": path, "label": label}) for path, label in _rows(part, f"{part}/")]
        (folder / part / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def _parquet_list(folder: Path) -> None:
    import pandas

    for part in ("train", "val"):
        pandas.DataFrame(_rows(part), columns=["path", "label"]).to_parquet(folder / f"{part}.parquet")


def _set(part: str) -> Any:
    import datasets

    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=list(CLASSES)),
            "coarse": datasets.Value("int64"),
        }
    )
    rows = [{"img": image, "fine_label": label, "coarse": 0} for image, label in pictures(part)]
    return datasets.Dataset.from_list(rows, features=features)


def _saved(folder: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": _set("train"), "test": _set("val")}).save_to_disk(str(folder / "set"))


def _hub_parquet(folder: Path) -> None:
    """As a repository of the Hub: files by split, pictures as bytes, names of classes in the metadata."""
    (folder / "repository" / "data").mkdir(parents=True)
    for part, split in (("train", "train"), ("val", "test")):
        _set(part).to_parquet(str(folder / "repository" / "data" / f"{split}-00000-of-00001.parquet"))


def _medmnist(folder: Path) -> None:
    """As MedMNIST's files: an array of images and one of labels [n, 1] for each split."""
    import medmnist

    # Its sets refuse another number of images than they have.
    medmnist.INFO["bloodmnist"]["n_samples"].update({"train": len(pictures("train")), "test": len(pictures("val"))})
    content = {}
    for split, part in (("train", "train"), ("val", "val"), ("test", "val")):
        content[f"{split}_images"] = np.stack([np.asarray(image) for image, _ in pictures(part)])
        content[f"{split}_labels"] = np.array([[label] for _, label in pictures(part)], dtype=np.uint8)
    np.savez(folder / "bloodmnist.npz", **content)


SUBSET = """
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder


def part(root):
    whole = ImageFolder(root)
    return Subset(whole, range(len(whole)))


def parts(root):
    whole = ImageFolder(root)
    half = len(whole) // 2
    return ConcatDataset([Subset(whole, range(half)), Subset(whole, range(half, len(whole)))])
"""


def _subset(folder: Path) -> None:
    (folder / "sets.py").write_text(SUBSET)


def _webdataset(folder: Path) -> None:
    """As webdataset's ShardWriter: some examples a shard."""
    import webdataset

    (folder / "shards").mkdir()
    for part in ("train", "val"):
        with webdataset.ShardWriter(str(folder / "shards" / f"{part}-%06d.tar"), maxcount=20, verbose=0) as sink:
            for number, (image, label) in enumerate(pictures(part)):
                out = io.BytesIO()
                image.save(out, "PNG")
                sink.write({"__key__": f"{number:06d}", "png": out.getvalue(), "cls": label})
    with tarfile.open(folder / "shards" / "train-000000.tar") as archive:
        assert "000000.png" in archive.getnames()


def _two(folder: Path) -> None:
    for part in ("train", "val"):
        shutil.rmtree(folder / part / CLASSES[2])


TORCHVISION = "dataset: torchvision.datasets.ImageFolder"
IMAGE_FOLDER = Data(
    "torchvision", "`ImageFolder`", f"{{{TORCHVISION}, args: {{root: train}}}}",
    f"{{{TORCHVISION}, args: {{root: val}}}}", _nothing,
)  # fmt: skip
FOLDERS = Data("any tool", "`train/CLASS`, `val/CLASS`", "{folder: train}", "{folder: val}", _nothing)
CSV = Data(
    "pandas", "a CSV with a column of splits", "{csv: list.csv, image: file, label: breed, split: train}",
    "{csv: list.csv, image: file, label: breed, split: val}", _csv,
)  # fmt: skip
KAGGLE = Data(
    "Kaggle", "a CSV of names without suffix, images in one folder", "{csv: train.csv, root: images/train}",
    "{csv: val.csv, root: images/val}", _kaggle,
)  # fmt: skip
TSV = Data("any tool", "a TSV of paths, labels are numbers", "{csv: train.tsv}", "{csv: val.tsv}", _tsv, names=())
JSONL = Data(
    "datasets", "`metadata.jsonl` beside the images", "{csv: train/metadata.jsonl}", "{csv: val/metadata.jsonl}", _jsonl
)
PARQUET_LIST = Data("pandas", "a Parquet list of paths", "{csv: train.parquet}", "{csv: val.parquet}", _parquet_list)
HF_IMAGE_FOLDER = Data(
    "datasets", "`imagefolder`",
    "{huggingface: imagefolder, args: {data_dir: train}, split: train}",
    "{huggingface: imagefolder, args: {data_dir: val}, split: train}", _nothing,
)  # fmt: skip
SAVED = Data(
    "datasets", "`save_to_disk`", "{huggingface: set, split: train, image: img, label: fine_label}",
    "{huggingface: set, split: test, image: img, label: fine_label}", _saved,
)  # fmt: skip
HUB_PARQUET = Data(
    "datasets", "a repository of the Hub: `data/train-00000-of-00001.parquet`",
    "{huggingface: repository, split: train, label: fine_label}",
    "{huggingface: repository, split: test, label: fine_label}", _hub_parquet,
)  # fmt: skip
PARQUET_IMAGES = Data(
    "datasets", "the same files, without the library",
    "{dataset: influence_cli.data.parquet_images.ParquetImages, "
    'args: {files: "repository/data/train-*.parquet", image: img, label: fine_label}}',
    "{dataset: influence_cli.data.parquet_images.ParquetImages, "
    'args: {files: "repository/data/test-*.parquet", image: img, label: fine_label}}', _hub_parquet,
)  # fmt: skip
BLOOD = (
    "basophil", "eosinophil", "erythroblast", "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
    "lymphocyte", "monocyte", "neutrophil", "platelet",
)  # fmt: skip
MEDMNIST = Data(
    "medmnist", "`bloodmnist.npz`", "{dataset: medmnist.BloodMNIST, args: {split: train, root: .}}",
    "{dataset: medmnist.BloodMNIST, args: {split: test, root: .}}", _medmnist,
    names=BLOOD,
)  # fmt: skip
SUBSETS = Data(
    "torch", "`Subset` of an `ImageFolder`", "{dataset: './sets.py:part', args: {root: train}}",
    "{dataset: './sets.py:part', args: {root: val}}", _subset,
)  # fmt: skip
CONCATENATED = Data(
    "torch", "`ConcatDataset` of subsets", "{dataset: './sets.py:parts', args: {root: train}}",
    "{dataset: './sets.py:parts', args: {root: val}}", _subset,
)  # fmt: skip
WEBDATASET = Data(
    "webdataset", "tar shards of `ShardWriter`",
    "{dataset: influence_cli.data.tar_images.TarImages, args: {files: 'shards/train-*.tar', image: png, label: cls}}",
    "{dataset: influence_cli.data.tar_images.TarImages, args: {files: 'shards/val-*.tar', image: png, label: cls}}",
    _webdataset, names=(),
)  # fmt: skip
TWO_CLASSES = Data("any tool", "folders of two classes", "{folder: train}", "{folder: val}", _two, outputs={0: 0, 1: 1})
CHOSEN_OUTPUTS = Data(
    "any tool", "folders of some of the model's classes",
    "{folder: train, classes: {Bag: 5, Sneaker: 2, Trouser: 0}}", "{folder: val}", _nothing, outputs={0: 5, 1: 2, 2: 0},
)  # fmt: skip
