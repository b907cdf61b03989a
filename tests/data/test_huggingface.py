"""Sets of the datasets library, by a stand-in with its methods: columns, class names, splits, nothing decoded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image as Pictures
from torch.utils.data import ConcatDataset, Subset

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_split
from influence_cli.data.huggingface import HubImages, is_hub_set, load_hub_set
from influence_cli.data.split import Split, raw_item
from tests.support.data_file_projects import refused
from tests.support.hub_stand_in import ClassLabel, Dataset, DatasetDict, Image, Value

ABC = ClassLabel(["ant", "bee", "cat"])
CONFIG = "model: {factory: a.b, checkpoint: m.pt}\ntrain:\n"


def pictures(count: int) -> list[Any]:
    return [Pictures.new("L", (3, 2), 40 * number) for number in range(count)]


def a_set(labels: Sequence[Any], kind: Any = ABC, label: str = "label", **more: Any) -> Dataset:
    """Make a set of pictures in a column ``img``."""
    columns = {"img": (pictures(len(labels)), Image()), label: (list(labels), kind), **more}
    return Dataset(columns)


@pytest.fixture
def split_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Split]:
    """Load the training set of a config whose library, or whose own file, gives a set."""

    def load(made: Any, section: str, known: Sequence[str] | None = None) -> Split:
        library = ModuleType("datasets")
        library.__dict__.update(load_dataset=lambda *_, **__: made, load_from_disk=lambda *_, **__: made)
        monkeypatch.setitem(sys.modules, "datasets", library)
        mine = ModuleType("mine")
        mine.__dict__["make"] = lambda: made
        monkeypatch.setitem(sys.modules, "mine", mine)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "influence.yaml").write_text(CONFIG + f"  {section}\n")
        config = load_config(tmp_path / "influence.yaml")
        return load_split(config, "train", config.train, known=known)

    return load


def test_labels_and_names_come_from_the_column_without_decoding_an_image(split_of: Callable[..., Split]) -> None:
    made = a_set([2, 0, 1, 0])
    for section in ("huggingface: owner/name", "dataset: mine.make"):
        split = split_of(made, section)
        assert split.labels.tolist() == [2, 0, 1, 0]
        assert split.classes == ("ant", "bee", "cat")
        assert split.mapping == {"ant": 0, "bee": 1, "cat": 2}
        assert split.paths is None
    assert made.decoded == []
    assert raw_item(split_of(made, "huggingface: owner/name"), 3)[1] == 0
    assert made.decoded == [3]


def test_images_become_rgb_as_those_of_a_folder_but_items_of_own_code_stay(split_of: Callable[..., Split]) -> None:
    made = a_set([0, 1])
    assert raw_item(split_of(made, "huggingface: owner/name"), 1)[0].mode == "RGB"
    assert raw_item(split_of(made, "dataset: mine.make"), 1)[0].mode == "L"
    deep = Dataset({"image": ([Pictures.new("I;16", (2, 2), 3000)], Image()), "label": ([0], ABC)})
    with pytest.raises(ValueError, match="do not fit in 8 bits"):
        HubImages(deep)[0]


def test_one_of_several_label_columns_has_to_be_named(split_of: Callable[..., Split]) -> None:
    made = a_set([0, 1], label="fine_label", coarse_label=([1, 0], ClassLabel(["x", "y"])))
    error = refused(lambda: split_of(made, "huggingface: owner/name"))
    assert "has the columns 'fine_label' and 'coarse_label', and each could be the label" in error.message
    assert error.message.startswith("influence.yaml:3: ")
    assert error.hint == "name one: label: fine_label, or label: coarse_label"
    for source in ("huggingface: owner/name", "dataset: mine.make"):
        assert split_of(made, f"{source}\n  label: coarse_label").classes == ("x", "y")
    error = refused(lambda: split_of(made, "huggingface: owner/name\n  label: fine_lable"))
    assert error.message.endswith("has no column 'fine_lable'")
    assert error.hint.startswith("did you mean 'fine_label'?")


def test_labels_that_are_names_or_plain_numbers(split_of: Callable[..., Split]) -> None:
    split = split_of(a_set(["z", "x", "z"], Value(), "species"), "huggingface: a/b")
    assert (split.labels.tolist(), split.classes) == ([1, 0, 1], ("x", "z"))
    split = split_of(a_set(["z", "z"], Value(), "species"), "huggingface: a/b", known=("x", "y", "z"))
    assert (split.labels.tolist(), split.classes) == ([2, 2], ("x", "y", "z"))
    split = split_of(a_set([4, 7], Value(), "cls"), "huggingface: a/b")
    assert (split.labels.tolist(), split.classes) == ([4, 7], None)
    assert split_of(a_set([2, 0], ABC, "kind"), "huggingface: a/b").labels.tolist() == [2, 0]


WRONG: list[tuple[list[Any], str]] = [
    ([0, None], "row 1: there is no 'label'"),
    ([[0, 1], [1]], "row 0: 'label' holds several labels, not one class an example"),
    ([{"a": 1}], "row 0: 'label' holds a dict, not one class an example"),
    ([0.5], "row 0: the label 0.5 is not a whole number"),
]


@pytest.mark.parametrize(("labels", "message"), WRONG)
def test_a_column_that_holds_no_class_is_refused_by_row(labels: list[Any], message: str) -> None:
    assert refused(lambda: HubImages(a_set(labels, Value()))).message == message


def test_several_splits_need_a_name(split_of: Callable[..., Split]) -> None:
    made = DatasetDict(train=a_set([0, 1]), test=a_set([2]))
    for source, name in (("huggingface: owner/name", "owner/name"), ("dataset: mine.make", "mine.make")):
        error = refused(lambda source=source: split_of(made, source))
        assert error.message == f"influence.yaml:3: {name} has the splits train, test"
        assert error.hint == "say which: split: train"
        error = refused(lambda source=source: split_of(made, f"{source}\n  split: tset"))
        assert error.message == f"influence.yaml:3: {name} has no split 'tset'"
        assert error.hint.startswith("did you mean 'test'?")
        assert split_of(made, f"{source}\n  split: test").labels.tolist() == [2]
    assert len(split_of(DatasetDict(train=a_set([0, 1])), "huggingface: owner/name")) == 2
    error = refused(lambda: split_of(a_set([0]), "dataset: mine.make\n  split: test"))
    assert "is one data set without splits, so split: test has no meaning" in error.message


def test_a_subset_or_a_concatenation_of_such_sets_is_one(split_of: Callable[..., Split]) -> None:
    made = a_set([2, 0, 1], label="fine_label")
    split = split_of(ConcatDataset([Subset(made, [2, 0]), made]), "dataset: mine.make\n  label: fine_label")
    assert split.labels.tolist() == [1, 2, 2, 0, 1]
    assert split.classes == ("ant", "bee", "cat")
    assert raw_item(split, 1)[0].getpixel((0, 0)) == 0


def test_a_transform_of_the_user_gives_the_input_and_the_column_the_label(split_of: Callable[..., Split]) -> None:
    made = a_set([2, 0])
    made.transform = lambda row: {"pixel_values": row["img"].getpixel((0, 0)), "labels": 9}
    split = split_of(made, "dataset: mine.make")
    assert split.labels.tolist() == [2, 0]
    assert raw_item(split, 1) == (40, 0)
    made.transform = lambda row: {"other": 1}
    assert "the row has no image: its columns are other" in refused(lambda: raw_item(split, 1)).message


def test_a_set_of_files_has_their_paths(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture, file in zip(pictures(2), files, strict=True):
        picture.save(file)
    made = Dataset({"image": ([str(file) for file in files], Image()), "label": ([1, 0], ABC)})
    assert HubImages(made).samples == [(str(files[0]), 1), (str(files[1]), 0)]
    files[1].unlink()
    assert HubImages(made).samples is None


def test_only_the_library_has_such_sets() -> None:
    class Mine:
        column_names = ("image",)

    assert not is_hub_set(Mine())
    assert is_hub_set(a_set([0]))


def test_a_set_that_streams_is_refused(split_of: Callable[..., Split]) -> None:
    class IterableDataset:
        column_names = ("image", "label")

    IterableDataset.__module__ = "datasets.iterable_dataset"
    error = refused(lambda: split_of(IterableDataset(), "huggingface: a/b"))
    assert "streams" in error.message


def test_what_the_library_says_is_told_with_the_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    library = ModuleType("datasets")
    library.__dict__["load_dataset"] = fail
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.chdir(tmp_path)
    message = refused(lambda: load_hub_set("owner/name", None, {})).message
    folder = tmp_path / "owner/name"
    assert message == (
        f"datasets cannot load 'owner/name' (there is no folder {folder} either): ConnectionError: no network"
    )
    (tmp_path / "x.csv").touch()
    assert refused(lambda: load_hub_set("x.csv", None, {})).hint.startswith("a table of paths or of images: csv:")


def test_a_missing_library_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))  # a folder of that name in the project
    error = refused(lambda: load_hub_set("owner/name", None, {}))
    assert error.message == "huggingface needs the package datasets, which is not installed"
    assert error.hint == "pip install datasets"


def test_split_and_arguments_reach_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    library = ModuleType("datasets")

    def load(name: str, **args: Any) -> Dataset:
        calls.append((name, args))
        return a_set([0])

    library.__dict__.update(load_dataset=load, load_from_disk=load)
    monkeypatch.setitem(sys.modules, "datasets", library)
    load_hub_set("a/b", "train[:9]", {"revision": "x"})
    (tmp_path / "state.json").touch()
    load_hub_set(str(tmp_path), None, {})
    assert calls == [("a/b", {"split": "train[:9]", "revision": "x"}), (str(tmp_path), {})]
