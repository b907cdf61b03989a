"""Which output is which class: names, numbers, lists and files, and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from influence_cli.data.class_outputs import in_outputs, read_class_outputs
from tests.conftest import Command
from tests.support.loading import load, refused

TRANSFORM = "[{Grayscale: {num_output_channels: 1}}, ToImage, {ToDtype: {dtype: float32, scale: true}}]"
CODE = """
import torch
from torch import nn


def build(outputs=6):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, outputs))


class Numbers(torch.utils.data.Dataset):
    def __init__(self, first=0, count=4, names=()):
        self.targets = [first + i % count for i in range(12)]
        if names:
            self.classes = list(names)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.full((1, 8, 8), self.targets[i] / 10), self.targets[i]
"""
CONFIG = f"""
model: {{factory: ./code.py:build, checkpoint: model.pt}}
train: {{dataset: torchvision.datasets.ImageFolder, args: {{root: train}}, transform: {TRANSFORM}}}
test: {{dataset: torchvision.datasets.ImageFolder, args: {{root: test}}}}
"""
NUMBERS = "train={{dataset: ./code.py:Numbers, args: {args}, classes: {classes}}}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Folders cat, dog, tench of a model with six outputs; the test set has two of them."""
    torch.manual_seed(0)
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "influence.yaml").write_text(CONFIG)
    torch.save(nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(4, 6)).state_dict(), tmp_path / "model.pt")
    for part, names in (("train", ("cat", "dog", "tench")), ("test", ("dog", "tench"))):
        for number, name in enumerate(names):
            for k in range(4):
                path = tmp_path / part / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 20 * k + 70 * number, dtype=np.uint8)).save(path)
    return tmp_path


def write(project: Path, name: str, content: Any) -> str:
    (project / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return f"train.classes={project / name}"


ID2LABEL = {"0": "wolf", "1": "tench, Tinca tinca", "2": "fox", "3": "dog", "4": "bear", "5": "cat"}
LINES = ["wolf", "tench", "fox", "dog", "bear", "cat"]
WAYS = [
    ("", None),
    ("names.txt", "\n".join(LINES) + "\n"),
    ("names.json", LINES),
    ("names.yaml", json.dumps(LINES)),
    ("config.json", {"model_type": "vit", "id2label": ID2LABEL}),
    ("label2id.json", {"label2id": {"cat": 5, "dog": 3, "tench": 1}}),
    ("index.json", {number: [f"n{number}", name] for number, name in enumerate(LINES)}),
]


@pytest.mark.parametrize(("name", "content"), WAYS)
def test_names_are_mapped_to_outputs(project: Path, name: str, content: Any) -> None:
    value = write(project, name, content) if name else "train.classes={tench: 1, cat: 5, dog: 3}"
    task = load(project, value)
    assert task.train.labels.tolist() == [5] * 4 + [3] * 4 + [1] * 4
    assert task.test is not None
    assert task.test.labels.tolist() == [3] * 4 + [1] * 4
    assert [task.classes[number] for number in (1, 3, 5)] == ["tench", "dog", "cat"]
    known = content is not None and name != "label2id.json"
    others = [task.classes[number] for number in (0, 2, 4)]
    if name == "index.json":
        assert others == ["n0 / wolf", "n2 / fox", "n4 / bear"]
    else:
        assert others == (["wolf", "fox", "bear"] if known else ["0", "2", "4"])
    assert task.train.mapping == {"cat": 5, "dog": 3, "tench": 1}


def test_a_path_is_relative_to_the_config(project: Path) -> None:
    write(project, "names.txt", "\n".join(LINES))
    path = project / "influence.yaml"
    path.write_text(path.read_text().replace("transform:", "classes: names.txt, transform:"))
    assert load(project).classes == tuple(LINES)


def test_an_output_without_a_name_has_a_number_that_no_class_has(project: Path) -> None:
    task = load(
        project, NUMBERS.format(args="{names: ['5', b, c, d]}", classes="{'5': 0, b: 1, c: 2, d: 3}"), "test=null"
    )
    assert task.classes == ("5", "b", "c", "d", "4", "output 5")


@pytest.mark.parametrize(
    ("args", "classes", "labels", "names"),
    [
        # Labels of a set without names.
        ("{first: 1}", "{1: 0, 2: 1, 3: 2, 4: 5}", [0, 1, 2, 5], ("0", "1", "2", "3", "4", "5")),
        ("{}", "[a, b, c, d, e, f]", [0, 1, 2, 3], ("a", "b", "c", "d", "e", "f")),
        # Labels from 1 with a name that stands for no class, as of EMNIST.
        ("{first: 1, names: [N/A, a, b, c, d]}", "[a, b, c, d, e, f]", [0, 1, 2, 3], ("a", "b", "c", "d", "e", "f")),
        ("{first: 1, names: [N/A, a, b, c, d]}", "{1: 3, 2: 2, 3: 1, 4: 0}", [3, 2, 1, 0],
         ("d", "c", "b", "a", "4", "5")),
        # Names that are numbers are names.
        ("{names: ['3', '2', '1', '0']}", "{3: 3, 2: 2, 1: 1, 0: 0}", [3, 2, 1, 0], ("0", "1", "2", "3", "4", "5")),
    ],
)  # fmt: skip
def test_numbers_are_mapped_to_outputs(
    project: Path, args: str, classes: str, labels: list[int], names: tuple[str, ...]
) -> None:
    task = load(project, NUMBERS.format(args=args, classes=classes), "test=null")
    assert task.train.labels[:4].tolist() == labels
    assert task.classes == names


def test_a_list_replaces_names_that_are_not_those_of_the_labels(project: Path) -> None:
    args = "{count: 6, names: [N/A, a, b, c, d, e, f]}"
    error = refused(project, f"train={{dataset: ./code.py:Numbers, args: {args}}}", "test=null")
    assert "7 names, 6 outputs, labels 0 to 5: name the classes yourself" in error.message
    assert error.hint == "train.classes: a list of 6 names, one per output in order"
    task = load(project, NUMBERS.format(args=args, classes="[a, b, c, d, e, f]"), "test=null")
    assert task.train.labels[:6].tolist() == list(range(6))
    assert task.classes == ("a", "b", "c", "d", "e", "f")


def test_the_training_examples_decide_how_names_are_read(project: Path) -> None:
    """A test set with few classes is numbered as the training set is, by name or not."""
    for args, few, expected in (
        ("{first: 1, count: 6, names: [N/A, a, b, c, d, e, f]}", "{first: 1, count: 5", [0, 1, 2, 3, 4]),
        ("{count: 6, names: [N/A, a, b, c, d, e, f]}", "{first: 1, count: 5", [1, 2, 3, 4, 5]),
    ):
        train = NUMBERS.format(args=args, classes="[a, b, c, d, e, f]")
        test = f"test={{dataset: ./code.py:Numbers, args: {few}, names: [N/A, a, b, c, d, e, f]}}}}"
        task = load(project, train, test)
        assert task.test is not None
        assert task.test.labels[:5].tolist() == expected


def test_labels_in_files_are_names_or_numbers_of_outputs(project: Path) -> None:
    (project / "labels.csv").write_text("index,label\n0,dog\n1,1\n")
    task = load(project, "train.classes={tench: 1, cat: 5, dog: 3}", f"train.labels={project / 'labels.csv'}")
    assert task.train.labels.tolist() == [3, 1, 5, 5] + [3] * 4 + [1] * 4


def test_a_class_whose_examples_are_excluded_needs_no_output(project: Path) -> None:
    np.save(project / "cats.npy", np.arange(4))
    task = load(project, "train.classes={tench: 1, dog: 3}", f"train.exclude={project / 'cats.npy'}")
    assert task.train.labels[task.train.indices].tolist() == [3] * 4 + [1] * 4


def test_every_command_uses_the_mapped_names(influence: Command, project: Path) -> None:
    path = project / "influence.yaml"
    path.write_text(path.read_text().replace("transform:", "classes: {tench: 1, cat: 5, dog: 3}, transform:"))
    rows = [json.loads(line) for line in influence("rank", "0", cwd=project).out.splitlines()]
    assert {row["test_label"] for row in rows} == {"dog"}
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows)
    rows = [json.loads(line) for line in influence("mislabels", "--all", cwd=project).out.splitlines()]
    assert len(rows) == 12
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows)
    (project / "decisions.csv").write_text("index,label,decision,new_label\n0,cat,relabel,dog\n")
    influence("relabel", "decisions.csv", "--labels", "new.csv", "--exclude", "out.csv", cwd=project)
    assert (project / "new.csv").read_text().splitlines()[1].endswith(",dog")


BAD = [
    ("{tench: 1, dog: 3}", "class cat of the train data set has no output", "known: "),
    ("{tench: 1, dog: 3, cta: 5}", "class cat of the train data set has no output", "did you mean 'cta'?"),
    ("{tench: 1, dog: 3, cat: 3}", "dog and cat have the same output 3", "an output is one class"),
    ("{tench: 1, dog: 3, cat: 6}", "cat is output 6, but the model has 6 outputs, 0 to 5", ""),
    ("{tench: 1, dog: 3, cat: x}", "classes are neither all names nor all numbers", "write {cat: 0, dog: 1}"),
    ("{tench: 1, dog: 3, cat: -1}", "classes are neither all names nor all numbers", "write {cat: 0, dog: 1}"),
    ("{tench: 1, dog: 3, cat: 99999999999}", "classes are neither all names", ""),
    ("[wolf, tench, fox, dog, bear, bear]", "class cat of the train data set has no output", ""),
    ("[cat, tench, fox, dog, bear, cat]", "cat is the name of the outputs 0 and 5", "write {cat: 0, …}"),
    ("{0: 1, 1: 2}", "label 2 of the train data set has no output", "leave its examples out"),
    ("{}", "no classes in it", "write {cat: 0, dog: 1}"),
    ("[]", "no classes in it", ""),
    ("3", "train.classes is 3: expected names with outputs", ""),
    ("missing.txt", "missing.txt cannot be read", ""),
    ("[cat, [dog], null]", "None is no class name", ""),
]


@pytest.mark.parametrize(("classes", "message", "hint"), BAD)
def test_a_mapping_that_does_not_fit_is_told(project: Path, classes: str, message: str, hint: str) -> None:
    error = refused(project, f"train.classes={classes}")
    assert message in error.message
    assert error.message.startswith("--set train.classes=")
    assert hint in error.hint


def test_names_for_a_set_without_names_are_told(project: Path) -> None:
    error = refused(project, NUMBERS.format(args="{}", classes="{cat: 0, dog: 1}"), "test=null")
    assert "the train data set has no class names" in error.message


def test_a_head_wider_than_the_folders_asks_for_the_mapping(project: Path) -> None:
    error = refused(project, "test=null")
    assert "3 names, 6 outputs, labels 0 to 2: name the classes yourself" in error.message
    assert error.hint.startswith("train.classes: {cat: 0, …}, each class with its output number, or a file")


def test_classes_of_the_test_section_are_refused(project: Path) -> None:
    error = refused(project, "test.classes={cat: 0}")
    assert error.message == "--set test.classes={cat: 0}: test.classes has no meaning"


def test_a_damaged_file_is_told(project: Path) -> None:
    assert "cannot be read" in refused(project, write(project, "names.json", "{")).message
    assert "cannot be read" in refused(project, write(project, "names.yaml", "[")).message
    (project / "names.txt").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(project, f"train.classes={project / 'names.txt'}").message


def test_labels_without_an_output_become_minus_one() -> None:
    assert in_outputs(np.array([2, 0, 1, 2]), {0: 7, 2: 3}).tolist() == [3, 7, -1, 3]
    assert in_outputs(np.empty(0, np.int64), {}).tolist() == []
    assert read_class_outputs(["a", "b"], "here").names == {0: ("a",), 1: ("b",)}
