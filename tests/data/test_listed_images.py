"""A table of image files is the data set that the same files are in class folders; a wrong row is named by its line."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_splits
from influence_cli.data.listed_images import ListedImages, read_list
from influence_cli.data.split import raw_item
from influence_cli.model.data_fingerprint import files_hash
from influence_cli.runtime.terminal import Terminal
from tests.conftest import Command
from tests.support.data_file_projects import refused
from tests.support.small_project import refusal

ROWS = [("photos/a.png", "cat"), ("photos/b.png", "dog"), ("photos/c.png", "cat"), ("photos/d.png", "ant")]
CONFIG = """
model: {factory: a.b, checkpoint: m.pt}
train:
  csv: list.csv
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four pictures below ``photos``; it is the current one."""
    (tmp_path / "photos").mkdir()
    for number, (name, _) in enumerate(ROWS):
        Image.new("L", (3, 2), 50 * number).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path: Path, rows: Sequence[Sequence[str]], *header: str) -> Path:
    """Write a table of the kind that the suffix says."""
    names = header or ("file", "label")
    cells = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, cells)) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(cells), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *rows])
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_of_any_kind_gives_files_labels_and_sorted_names(here: Path, kind: str) -> None:
    data = ListedImages(table(here / f"list{kind}", ROWS))
    assert [path for path, _ in data.samples] == [str(here / name) for name, _ in ROWS]
    assert data.classes == ["ant", "cat", "dog"]
    assert data.class_to_idx == {"ant": 0, "cat": 1, "dog": 2}
    assert data.targets.tolist() == [1, 2, 1, 0]
    assert len(data) == 4
    image, label = data[1]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (50, 50, 50), 2)
    assert data.remarks == ()


def test_whole_numbers_stay_also_as_pandas_writes_them_beside_gaps(here: Path) -> None:
    data = ListedImages(table(here / "list.csv", [(name, text) for (name, _), text in zip(ROWS, "3003", strict=True)]))
    assert (data.targets.tolist(), data.classes, data.class_to_idx) == ([3, 0, 0, 3], None, None)
    cells = [{"path": name, "target": value} for (name, _), value in zip(ROWS, (2.0, 0.0, 1.0, 10.0), strict=True)]
    pq.write_table(pa.Table.from_pylist(cells), here / "list.parquet")
    assert ListedImages(here / "list.parquet").targets.tolist() == [2, 0, 1, 10]


def test_paths_are_relative_to_the_table_or_to_root_and_columns_go_by_name(here: Path) -> None:
    (here / "lists").mkdir()
    path = table(here / "lists/l.csv", [("1", "a.png", "x"), ("0", "b.png", "y")], "set_id", "where", "breed")
    data = ListedImages(path, image="where", label="breed", root="photos")
    assert [sample[0] for sample in data.samples] == [str(here / "photos/a.png"), str(here / "photos/b.png")]
    table(path, [("../photos/a.png", "x")])
    assert ListedImages(path).samples == [(str(here / "photos/a.png"), 0)]
    table(path, [(str(here / "photos/b.png"), "x")], "FilePath", "Class")
    assert ListedImages(path).samples == [(str(here / "photos/b.png"), 0)]


def test_a_split_takes_its_rows_and_has_to_be_named(here: Path) -> None:
    rows = [(*row, part) for row, part in zip(ROWS, ("train", "val", "train", "val"), strict=True)]
    path = table(here / "list.csv", rows, "file", "label", "Subset")
    data = ListedImages(path, split="train")
    assert (data.targets.tolist(), data.classes) == ([0, 0], ["cat"])
    error = refused(lambda: ListedImages(path))
    assert error.message == "list.csv has rows of several splits: column 'Subset' has 'train', 'val'"
    assert error.hint == "say which are meant: split: train"
    error = refused(lambda: ListedImages(path, split="trian"))
    assert error.message == "list.csv has no rows of the split 'trian'"
    assert error.hint.startswith("did you mean 'train'?")
    # A column of that name with other words says nothing about splits.
    table(path, [(*row, part) for row, part in zip(ROWS, "1122", strict=True)], "file", "label", "set")
    assert len(ListedImages(path)) == 4


def test_names_without_suffix_get_the_one_that_their_files_have(here: Path) -> None:
    path = table(here / "list.csv", [("a", "x"), ("d", "y")], "id", "label")
    data = ListedImages(path, root="photos")
    assert [sample[0] for sample in data.samples] == [str(here / "photos/a.png"), str(here / "photos/d.png")]
    assert data.remarks == ("list.csv: column 'id' has no suffixes; the images are taken to end in .png",)
    shutil.copy("photos/a.png", "photos/a.jpg")  # two fit
    error = refused(lambda: ListedImages(path, root="photos"))
    assert error.message.startswith(f"list.csv:2: there is no file {here}/photos/a, nor those of 1 more of 2 rows")


WRONG: list[tuple[list[tuple[str, str]], dict[str, Any], str, str]] = [
    (ROWS[:1], {"label": "lable"}, "list.csv has no column 'lable'", "did you mean 'label'? known: file, label"),
    (ROWS[:1], {"image": "fiel"}, "list.csv has no column 'fiel'", "did you mean 'file'? known: file"),
    (
        [ROWS[0], ("photos/x.png", "dog")],
        {},
        "list.csv:3: there is no file {here}/photos/x.png",
        "paths are relative to {here}; root: names another folder; remove rows without an image",
    ),
    (
        ROWS,
        {"root": "photos"},
        "list.csv:2: there is no file {here}/photos/photos/a.png, nor those of 3 more of 4 rows",
        "that path is right from the folder of the YAML file: root: .",
    ),
    ([("photos\\a.png", "x")], {}, "list.csv:2: there is no file {here}/photos\\a.png", "a path has / between"),
    ([("s3://b/a.png", "x")], {}, "list.csv:2: there is no file {here}/s3:/b/a.png", "addresses are not read"),
    ([(" photos/a.png", "x")], {}, "list.csv:2: there is no file {here}/ photos/a.png", "remove the spaces"),
    ([("", "x")], {}, "list.csv:2: there is no path in the column 'file'", "paths are relative to"),
    (
        [ROWS[0], ("photos/b.png", "1")],
        {},
        "list.csv:2: the label is 'cat', but list.csv:3 has the number 1",
        "labels are all class numbers, or all names",
    ),
    ([ROWS[0], ("photos/b.png", " ")], {}, "list.csv:3: there is no label", "give it one, or remove the row"),
    ([("photos/b.png", "0.5")], {}, "list.csv:2: the label 0.5 is not a whole number", ""),
    ([], {}, "list.csv has no rows", ""),
]


@pytest.mark.parametrize(("rows", "args", "message", "hint"), WRONG)
def test_what_does_not_fit_is_named_with_its_line(
    here: Path, rows: list[tuple[str, str]], args: dict[str, Any], message: str, hint: str
) -> None:
    path = table(here / "list.csv", rows)
    error = refused(lambda: ListedImages(path, **args))
    assert error.message == message.format(here=here)
    assert error.hint.startswith(hint.format(here=here))


def test_columns_without_a_usual_name_or_with_two_have_to_be_named(here: Path) -> None:
    path = table(here / "list.csv", [("photos/a.png", "x", "y")], "file", "breed", "colour")
    error = refused(lambda: ListedImages(path))
    assert error.message == "list.csv has no column with a usual name of the label"
    assert error.hint == "name it: label: COLUMN; the columns are file, breed, colour"
    table(path, [("photos/a.png", "x", "y")], "file", "fine_label", "coarse_label")
    error = refused(lambda: ListedImages(path))
    assert error.message == "list.csv has the columns 'fine_label' and 'coarse_label', and each could be the label"
    assert error.hint == "name one: label: fine_label, or label: coarse_label"
    assert ListedImages(path, label="coarse_label").classes == ["y"]


UNREADABLE: list[tuple[str, str, str]] = [
    ("l.jsonl", '{"file": "a.png", "label": 1}\n[1]\n', "l.jsonl:2: a line is '[1]'"),
    ("l.jsonl", '{"file": "a.png"}\n\n{"file": ', "l.jsonl:3 is not readable as JSON lines"),
    ("l.jsonl", '{"file": "photos/a.png", "label": ["x", "y"]}', "l.jsonl: the column 'label' has lists"),
    ("l.parquet", "PAR1", "l.parquet cannot be read as a Parquet file"),
    ("l.tsv", "file\tlabel\na\n", "l.tsv:2: 1 fields, but the header has 2"),
    ("l.txt", "a", "l.txt is not a table of examples"),
]


@pytest.mark.parametrize(("name", "text", "message"), UNREADABLE)
def test_a_file_that_is_no_table_is_refused(here: Path, name: str, text: str, message: str) -> None:
    (here / name).write_text(text)
    assert message in refused(lambda: ListedImages(Path(name))).message


def test_a_table_that_is_missing_is_named_with_the_nearest(here: Path) -> None:
    table(here / "list.csv", ROWS)
    error = refused(lambda: read_list(here / "lists.csv"))
    assert error.message == f"there is no file {here / 'lists.csv'}"
    assert error.hint == "did you mean 'list.csv'? known: list.csv"


def test_images_inside_a_parquet_file_have_a_data_set_of_their_own(here: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), here / "l.parquet")
    error = refused(lambda: ListedImages(here / "l.parquet"))
    assert error.message.startswith("l.parquet: the column 'image' has lists, objects or bytes")
    assert error.hint.endswith("influence_cli.data.parquet_images.ParquetImages")


# Through the config


def test_a_test_table_takes_the_class_numbers_of_the_training_table(here: Path) -> None:
    table(here / "list.csv", ROWS)
    table(here / "few.csv", [("photos/b.png", "dog")])
    (here / "influence.yaml").write_text(CONFIG + "test: {csv: few.csv}\n")
    train, test = load_splits(load_config(here / "influence.yaml"))
    assert test is not None
    assert (train.classes, test.classes) == (("ant", "cat", "dog"),) * 2
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 2, 1, 0], [2])
    assert test.paths == (str(here / "photos/b.png"),)
    assert raw_item(test, 0)[1] == 2
    table(here / "few.csv", [("photos/b.png", "dig")])
    error = refused(lambda: load_splits(load_config(here / "influence.yaml")))
    assert error.message == "influence.yaml:5: few.csv:2: 'dig' is not a class of the training examples"
    assert error.hint == "did you mean 'dog'? known: ant, cat, dog"
    table(here / "list.csv", [(name, "0") for name, _ in ROWS])
    error = refused(lambda: load_splits(load_config(here / "influence.yaml")))
    assert "few.csv:2: the label is 'dig', but the training examples have class numbers without names" in error.message


def test_a_guess_is_told_and_the_current_folder_does_not_matter(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(here / "list.csv", [("a", "x"), ("b", "y")], "id", "label")
    (here / "influence.yaml").write_text(CONFIG + "  root: photos\n")
    told: list[str] = []
    terminal = Terminal()
    monkeypatch.setattr(terminal, "say", told.append)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    train, _ = load_splits(load_config(here / "influence.yaml"), terminal)
    assert train.paths == (str(here / "photos/a.png"), str(here / "photos/b.png"))
    assert len(told) == 1
    assert "the images are taken to end in .png" in told[0]
    assert terminal.warnings == []


def listed(project: Path) -> Callable[[], None]:
    """Let a small project read its training images from a table, in the order of the folder."""
    folder = ImageFolder(project / "train")
    rows = [(str(Path(path).relative_to(project)), folder.classes[label]) for path, label in folder.samples]
    table(project / "labels.csv", rows, "file", "breed")
    config = project / "influence.yaml"
    old = "  dataset: torchvision.datasets.ImageFolder\n  args: {root: train}\n"

    def change() -> None:
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, "  csv: labels.csv\n  label: breed\n"))

    return change


def test_a_table_gives_the_results_of_the_folder(influence: Command, small_made: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(small_made, tmp_path / "p"))
    commands = (("rank", "3", "test/a/000.png", "--top", "2"), ("mislabels", "--top", "3", "--format", "fiftyone"))
    change = listed(project)
    whole = load_splits(load_config(project / "influence.yaml"))[0]
    before = [influence(*command, cwd=project).out for command in commands]
    change()
    table_split = load_splits(load_config(project / "influence.yaml"))[0]
    assert files_hash(table_split) == files_hash(whole)
    assert np.array_equal(table_split.labels, whole.labels)
    assert [influence(*command, cwd=project).out for command in commands] == before


def test_relabel_changes_labels_of_a_table_beside_it_and_never_the_table(
    influence: Command, small_made: Path, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(small_made, tmp_path / "p"))
    listed(project)()
    text = (project / "labels.csv").read_text()
    (project / "d.csv").write_text("index,label,decision,new_label\n8,b,relabel,a\n")
    assert "labels.csv would be both the table of examples and the labels" in refusal(
        influence, project, "relabel", "d.csv", "--force"
    )
    influence("relabel", "d.csv", "--labels", "new.csv", cwd=project)
    assert (project / "labels.csv").read_text() == text
    train, _ = load_splits(load_config(project / "influence.yaml", ["train.labels=new.csv"]))
    assert train.labels.tolist() == [0] * 9 + [1] * 7 + [2] * 8
