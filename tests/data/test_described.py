"""What a data set says of itself: labels, classes and files, through Subset and ConcatDataset, without an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_split
from influence_cli.data.described import described, in_order, innermost
from influence_cli.data.file_sets import DataFiles
from influence_cli.data.split import Split
from influence_cli.model.data_fingerprint import files_hash
from tests.support.data_file_projects import refused

HERE = Path("/here")
# A project file whose data set counts the items that are read.
PROJECT = """
import numpy as np

READ = []


class Many:
    def __init__(self, labels):
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        READ.append(index)
        return np.zeros((1, 2, 2), dtype=np.float32), self.labels[index]


def subset():
    from torch.utils.data import Subset

    return Subset(Many([[0], [1], [2]] * 200), range(0, 600, 2))


def several():
    return Many([[0, 1, 1], [1, 0, 0]])
"""


class Folder(Dataset[Any]):
    """A data set as torchvision's folders are; reading an item is an error."""

    def __init__(self, labels: Sequence[int], classes: Sequence[str] = ("a", "b", "c"), name: str = "x") -> None:
        self.samples = [(f"{name}/{number}.png", label) for number, label in enumerate(labels)]
        self.targets = list(labels)
        self.classes = list(classes)
        self.class_to_idx = {word: number for number, word in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        raise OSError("an item was read")


def test_a_subset_has_labels_files_and_classes_of_what_it_takes() -> None:
    whole = Folder([0, 1, 2, 0, 1, 2])
    for indices in ([5, 0, 0], range(5, -1, -5), torch.tensor([5, 0]), np.array([-1, 0])):
        some = described(Subset(whole, indices), HERE)  # type: ignore[arg-type]  # what torch takes as well
        assert some.labels is not None
        assert some.labels[:2].tolist() == [2, 0]
        assert some.paths is not None
        assert list(some.paths[:2]) == ["/here/x/5.png", "/here/x/0.png"]
        assert some.classes == ("a", "b", "c")
        assert some.mapping == {"a": 0, "b": 1, "c": 2}
    first, second = random_split(whole, [4, 2], torch.Generator().manual_seed(0))
    both = described(ConcatDataset([first, second]), HERE)
    order = [*first.indices, *second.indices]
    assert both.labels is not None
    assert both.labels.tolist() == [whole.targets[index] for index in order]
    assert both.paths == tuple(f"/here/x/{index}.png" for index in order)


def test_nested_wrappers_are_followed() -> None:
    nested = Subset(ConcatDataset([Subset(Folder([0, 1, 2], name="x"), [2, 1]), Folder([1, 0], name="y")]), [3, 0])
    one = described(nested, HERE)
    assert one.labels is not None
    assert one.labels.tolist() == [0, 2]
    assert one.paths == ("/here/y/1.png", "/here/x/2.png")
    assert [type(part) for part in innermost(nested)] == [Folder, Folder]


def test_a_subset_class_of_ones_own_is_one() -> None:
    class Mine:
        def __init__(self) -> None:
            self.dataset, self.indices = Folder([0, 1, 2]), [2, 0]

        def __len__(self) -> int:
            return 2

    labels = described(Mine(), HERE).labels
    assert labels is not None
    assert labels.tolist() == [2, 0]
    mine = Mine()
    mine.indices = [2, 7]  # means something else
    assert described(mine, HERE).labels is None


def test_joined_classes_have_names_where_their_numbers_agree() -> None:
    longer, shorter = Folder([0, 2]), Folder([1], ("a", "b"))
    joined = described(ConcatDataset([shorter, longer]), HERE)
    assert (joined.classes, joined.mapping, joined.remarks) == (("a", "b", "c"), longer.class_to_idx, ())
    other = described(ConcatDataset([longer, Folder([0], ("b", "c"))]), HERE)
    assert (other.classes, other.mapping) == (None, None)
    assert other.labels is not None
    assert other.remarks == ("data sets with different classes are joined (a, b, c | b, c): classes are numbers here",)
    plain = TensorDataset(torch.zeros(2, 1), torch.tensor([1, 0]))
    mixed = described(ConcatDataset([longer, plain]), HERE)
    assert mixed.labels is not None
    assert (mixed.labels.tolist(), mixed.paths, mixed.classes) == ([0, 2, 1, 0], None, None)


def test_examples_of_large_files_keep_the_files_that_hold_them(tmp_path: Path) -> None:
    class Rows:
        def __init__(self, names: Sequence[str], starts: Sequence[int]) -> None:
            self.files = DataFiles(tuple(names), np.array(starts))
            self.paths = [f"{name}#{row}" for name in names for row in range(2)]
            self.targets = np.arange(len(self.paths))

        def __len__(self) -> int:
            return len(self.paths)

    for name in "abc":
        (tmp_path / name).write_text(name)
    first = Rows([str(tmp_path / "a"), str(tmp_path / "b")], [0, 2, 4])
    both = ConcatDataset([Subset(first, [3, 0]), Rows([str(tmp_path / "c")], [0, 2])])  # type: ignore[list-item,arg-type]
    one = described(Subset(both, [0, 3]), HERE)
    assert one.paths == (f"{tmp_path}/b#1", f"{tmp_path}/c#1")
    assert one.files is not None
    assert one.files.used(np.arange(2)) == [str(tmp_path / "b"), str(tmp_path / "c")]
    split = Split("train", both, None, np.zeros(2, np.int64), np.arange(2), one.paths, None, None, "x", files=one.files)
    before = files_hash(split)
    (tmp_path / "a").write_text("other")  # holds none of them
    assert files_hash(split) == before
    (tmp_path / "c").write_text("other")
    assert files_hash(split) != before


def test_other_libraries_keep_them_elsewhere() -> None:
    class Photos:  # as torchvision's Flowers102
        _image_files = (Path("a.jpg"), Path("b.jpg"))
        _labels = (1, 0)

        def __len__(self) -> int:
            return 2

    photos = described(Photos(), HERE)
    assert photos.labels is not None
    assert (photos.labels.tolist(), photos.paths) == ([1, 0], ("/here/a.jpg", "/here/b.jpg"))

    class Reader:
        samples = (("a.png", 1), ("b.png", 0))
        class_to_idx = {"x": 0, "y": 1}  # noqa: RUF012 (as timm has it)

    class Images:  # as timm's ImageDataset
        reader = Reader()

        def __len__(self) -> int:
            return 2

    images = described(Images(), HERE)
    assert images.labels is not None
    assert (images.labels.tolist(), images.classes) == ([1, 0], ("x", "y"))
    assert images.paths == ("/here/a.png", "/here/b.png")

    class Cells:  # as MedMNIST's
        info = {"label": {"1": "b", "0": "a", "10": "k"}, "task": "multi-class"}  # noqa: RUF012
        labels = np.array([[1], [0]])
        imgs = np.zeros((2, 3, 3))

        def __len__(self) -> int:
            return 2

    cells = described(Cells(), HERE)
    assert cells.labels is not None
    assert (cells.labels.tolist(), cells.classes, cells.paths) == ([1, 0], None, None)
    Cells.info = {"label": {"1": "b", "0": "a"}}
    assert described(Cells(), HERE).classes == ("a", "b")


def test_names_are_in_the_order_of_numbers_that_count_from_0() -> None:
    assert in_order({"b": 1, "a": 0}) == ("a", "b")
    assert in_order({"b": 2, "a": 1}) is None
    assert in_order({"b": "x"}) is None
    assert in_order({}) is None


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project.py").write_text(PROJECT)
    return tmp_path / "influence.yaml"


def load(config: Path, name: str) -> Split:
    config.write_text(f"model: {{factory: a.b, checkpoint: m.pt}}\ntrain: {{dataset: ./project.py:{name}}}\n")
    loaded = load_config(config)
    return load_split(loaded, "train", loaded.train)


def test_labels_in_a_column_are_numbers_and_few_items_are_read(project: Path) -> None:
    split = load(project, "subset")
    assert split.labels.tolist() == [0, 2, 1] * 100
    read = split.source.dataset.__getitem__.__globals__["READ"]
    assert 3 < len(read) <= 66


def test_several_labels_an_example_are_refused_in_these_words(project: Path) -> None:
    error = refused(lambda: load(project, "several"))
    assert error.message.endswith("training example 0 has 3 labels at once")
    assert error.hint.startswith("influence explains classifiers with one class an example")
