"""Labels and class names of a data set are those that its items give, whatever its lists say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from influence_cli.config.load import load_config
from influence_cli.data import datasets
from influence_cli.data.batches import readable_batches
from influence_cli.data.datasets import load_split, load_splits, source_labels
from influence_cli.data.split import Split, spread
from influence_cli.errors import InfluenceError
from influence_cli.runtime.terminal import Terminal
from tests.conftest import Command, edit
from tests.data.test_split import split_of

PROJECT = """
import numpy as np


class Listed:
    '''Items whose label is not that of the list.'''

    def __init__(self, count=90, way="same", seldom=-1):
        self.targets = [number * 3 // count for number in range(count)]
        self.classes, self.class_to_idx = ["a", "b", "c"], {"a": 0, "b": 1, "c": 2}
        self.way, self.seldom, self.reads = way, seldom, 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.reads += 1
        y = self.targets[index]
        if index == self.seldom:
            y = (y + 1) % 3
        elif self.way == "plus":
            y = y + 1
        elif self.way == "merged":
            y = y // 2
        elif self.way == "third" and index % 3 == 0 or self.way == "most" and index % 3:
            y = (y + 1) % 3
        elif self.way == "each time":
            y = (y + self.reads // 100) % 3
        return np.zeros((1, 2, 2), dtype=np.float32), y
"""


def loaded(folder: Path, said: list[str] | None = None, more: str = "", **args: object) -> Split:
    """Load the training examples of a project with that data set."""
    (folder / "model.py").write_text(PROJECT)
    text = f"model: {{factory: ./model.py:Listed, checkpoint: none.pt}}\ntrain: {{dataset: ./model.py:Listed{more}, "
    (folder / "influence.yaml").write_text(text + f"args: {json.dumps(args)}}}\n")
    config = load_config(folder / "influence.yaml")

    class Heard(Terminal):
        def say(self, text: str) -> None:
            (said if said is not None else []).append(text)

    return load_split(config, "train", config.train, Heard(quiet=True))


def given(split: Split) -> list[int]:
    """Read the label of every item by hand."""
    return [int(split.source[index][1]) for index in range(len(split.source))]


@pytest.mark.parametrize(
    ("way", "classes", "words"),
    [
        ("same", ("a", "b", "c"), []),
        (
            "third",
            ("a", "b", "c"),
            ["training example 0 comes with the label 1 (b), but the data set says 0 (a)", "30 d"],
        ),
        ("plus", ("0", "a", "b", "c"), ["0 (a) is 1, 1 (b) is 2, 2 (c) is 3; the items count"]),
        ("merged", ("a / b", "c"), ["1 (b) is 0, 2 (c) is 1; the items count"]),
        ("most", None, ["60 differ), and classes are numbers here: their names are not known"]),
    ],
)
def test_labels_are_those_of_the_items_and_names_go_with_them(
    tmp_path: Path, way: str, classes: tuple[str, ...] | None, words: list[str]
) -> None:
    said: list[str] = []
    split = loaded(tmp_path, said, way=way)
    assert split.labels.tolist() == given(split)
    assert source_labels(split).tolist() == given(split)
    assert split.classes == classes
    assert len(said) == bool(words)
    for word in words:
        assert word in said[0]


def test_few_items_are_read_where_the_list_agrees(tmp_path: Path) -> None:
    assert loaded(tmp_path, count=900).source.reads <= datasets.PROBES + 2


def test_a_large_set_is_not_read_for_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "READABLE", 100)
    monkeypatch.setattr(datasets, "SAMPLED", 80)
    split = loaded(tmp_path, count=900, way="plus")
    assert split.source.reads < 200
    assert split.labels.tolist() == given(split)
    with pytest.raises(InfluenceError) as caught:
        loaded(tmp_path, count=900, way="third")
    assert "training example 0 comes with the label 1 (b), but the data set says 0 (a)" in caught.value.message
    assert "train.labels: FILE" in caught.value.hint
    np.save(tmp_path / "labels.npy", np.arange(900) % 3)
    split = loaded(tmp_path, count=900, way="third", more=", labels: labels.npy")
    assert split.labels.tolist() == (np.arange(900) % 3).tolist()
    assert sum(len(batch) for batch in readable_batches(split, split.indices, 64, skip=False)) == 900


def test_a_label_that_no_probe_saw_stops_the_pass_that_reads_it(tmp_path: Path) -> None:
    split = loaded(tmp_path, count=900, seldom=401)
    assert split.labels[401] == 1
    with pytest.raises(InfluenceError, match=r"training example 401 comes with the label 2 \(c\), but .* says 1 \(b\)"):
        list(readable_batches(split, split.indices, 64, skip=True))
    (tmp_path / "labels.csv").write_text("index,label\n401,c\n")
    split = loaded(tmp_path, count=900, seldom=401, more=", labels: labels.csv")
    assert [split.labels[401], split.labels[402]] == [2, 1]
    assert sum(len(batch) for batch in readable_batches(split, split.indices, 64, skip=False)) == 900


def test_labels_that_change_with_every_reading_are_refused(tmp_path: Path) -> None:
    split = loaded(tmp_path, way="each time")
    with pytest.raises(InfluenceError, match="comes with the label"):
        list(readable_batches(split, split.indices, 64, skip=False))


def test_rows_have_the_labels_of_the_items(influence: Command, tiny: Path) -> None:
    """One label in ten is changed after it is read from the folder, as data sets for experiments with noise do it."""
    with (tiny / "model.py").open("a") as file:
        file.write(
            "\n\nclass Noisy(__import__('torchvision').datasets.ImageFolder):\n"
            "    def __getitem__(self, i):\n        x, y = super().__getitem__(i)\n"
            "        return x, (y + 1) % 3 if i % 10 == 4 else y\n"
        )
    edit(tiny, "dataset: torchvision.datasets.ImageFolder", "dataset: ./model.py:Noisy")
    done = influence("mislabels", "--all", "--format", "json", cwd=tiny)
    names = {row["index"]: row["label"] for row in json.loads(done.out)}
    folders = sorted(path.parent.name for path in (tiny / "train").glob("*/*"))
    after = {"a": "b", "b": "c", "c": "a"}
    assert names == {i: after[name] if i % 10 == 4 else name for i, name in enumerate(folders)}
    assert "training example 4 (" in done.err
    assert "but the data set says 0 (a); the labels of the items count (2 differ)" in done.err


def test_chosen_examples_are_spread_over_the_classes_and_the_set() -> None:
    labels = np.repeat([0, 1, 2, 3], [500, 2, 100, 40])
    split = split_of([None] * len(labels), labels=labels)
    chosen = spread(split, 64)
    assert Counter(labels[chosen].tolist()) == {0: 21, 1: 2, 2: 21, 3: 20}
    for label in range(4):
        mine = np.flatnonzero(labels == label)
        assert {mine[0], mine[-1]} <= set(chosen.tolist())
    few = spread(split, 2)
    assert labels[few].tolist() == [0, 3]
    assert spread(split, 700).tolist() == list(range(642))
    part = split_of([None] * 10, labels=np.zeros(10, np.int64), indices=np.array([3, 5, 9]))
    assert spread(part, 2).tolist() == [3, 9]


NAMED = """
import numpy as np


class Named:
    '''Items whose pixels say of which class they are, by the place of its name in the alphabet.'''

    def __init__(self, names, mapping=None, labels=None):
        self.classes, self.targets = names, labels or list(range(len(names)))
        if mapping:
            self.class_to_idx = mapping

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        letter = ord(self.classes[self.targets[index]][0])
        return np.full((1, 2, 2), letter, dtype=np.float32), self.targets[index]
"""


def both(folder: Path, train: dict[str, object], test: dict[str, object], said: list[str]) -> tuple[Split, Split]:
    (folder / "data.py").write_text(NAMED)
    text = "model: {factory: ./data.py:Named, checkpoint: none.pt}\n" + "".join(
        f"{part}: {{dataset: ./data.py:Named, args: {json.dumps(args)}}}\n"
        for part, args in (("train", train), ("test", test))
    )
    (folder / "influence.yaml").write_text(text)

    class Heard(Terminal):
        def say(self, text: str) -> None:
            said.append(text)

    splits = load_splits(load_config(folder / "influence.yaml"), Heard(quiet=True))
    assert splits[1] is not None
    return splits[0], splits[1]


def shown(split: Split) -> set[tuple[int, str]]:
    """Pair the class that the pixels show with the name of the label that the split has."""
    return {(int(split.source[index][0].max()), (split.classes or ())[split.labels[index]]) for index in split.indices}


@pytest.mark.parametrize("names", [["c", "b", "a"], ["a", "c"], ["b", "c", "a"]])
def test_classes_of_the_test_set_are_those_of_the_same_name(tmp_path: Path, names: list[str]) -> None:
    for mapping in (None, {name: number for number, name in enumerate(names)}):
        said: list[str] = []
        train, test = both(tmp_path, {"names": ["a", "b", "c"]}, {"names": names, "mapping": mapping}, said)
        assert train.classes == ("a", "b", "c")
        assert shown(test) == {(ord(name), name) for name in names}
        assert test.labels.tolist() == ["abc".index(name) for name in names]
        assert len(said) == 1
        assert "they are mapped by their names" in said[0]


def test_fewer_classes_in_the_same_order_say_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    one, two = {"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}
    _, test = both(tmp_path, {"names": ["a", "b", "c"], "mapping": one}, {"names": ["a", "b"], "mapping": two}, said)
    assert (test.labels.tolist(), said) == ([0, 1], [])


def test_a_set_that_contradicts_itself_has_numbers(tmp_path: Path) -> None:
    said: list[str] = []
    contradicting = {"names": ["b", "a"], "mapping": {"a": 0, "b": 1}}
    train, _ = both(tmp_path, contradicting, contradicting, said)
    assert (train.classes, train.mapping) == (None, None)
    assert "a is 1 in classes of the data set and 0 in its class_to_idx: classes are numbers here" in said[0]


def test_folders_called_by_numbers_keep_their_names(influence: Command, tmp_path: Path) -> None:
    """Folders 0 to 11 are sorted as words: 0, 1, 10, 11, 2, …; a row names the folder that its file is in."""
    folder = numbered_folders(tmp_path)
    rows = json.loads(influence("rank", "0:12", "--top", 2, "--format", "json", cwd=folder).out)
    assert len({row["test_label"] for row in rows}) == 12
    for row in rows:
        assert row["label"] == Path(row["path"]).parent.name
        assert row["test_label"] == Path(row["test_path"]).parent.name
    (folder / "labels.csv").write_text("index,label\n0,10\n")
    done = influence("mislabels", "--all", "--format", "json", "-s", "train.labels=labels.csv", cwd=folder)
    for row in json.loads(done.out):
        assert row["label"] == ("10" if row["index"] == 0 else Path(row["path"]).parent.name)
    assert "labels.csv gives class names: 10 is the class of that name, number 2" in done.err


def numbered_folders(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        for name in range(12):
            (folder / part / str(name)).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (4, 4)) + 15 * name
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / str(name) / f"{number}.png")
    torch.manual_seed(0)
    (folder / "model.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12))\n"
    )
    torch.save({"1.weight": torch.randn(12, 16), "1.bias": torch.zeros(12)}, folder / "model.pt")
    transform = "[{Grayscale: {num_output_channels: 1}}, ToImage, {ToDtype: {dtype: float32, scale: true}}]"
    (folder / "influence.yaml").write_text(
        "model: {factory: ./model.py:build, checkpoint: model.pt}\n"
        f"train: {{folder: train, transform: {transform}}}\ntest: {{folder: test}}\n"
    )
    return folder
