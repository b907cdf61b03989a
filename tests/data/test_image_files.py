"""Folders of classes: hidden ones and notes of macOS are left out, pictures that are skipped are counted, said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import DatasetFolder, EuroSAT, ImageFolder

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_splits
from influence_cli.data.image_files import look_through, refuse_no_classes, without_strays
from influence_cli.data.split import Split
from influence_cli.runtime.terminal import Terminal
from tests.support.data_file_projects import refused

IMAGES = ["a/0.png", "a/1.png", "b/0.png", "b/deep/1.png"]
STRAYS = [".ipynb_checkpoints/0-checkpoint.png", "a/.ipynb_checkpoints/0-checkpoint.png", "a/._0.png", "b/._0.png"]
OWN = """
from torchvision.datasets import ImageFolder


def make():
    return ImageFolder("data")


def wide():
    return ImageFolder("data", is_valid_file=lambda path: "/._" not in path and ".ipynb" not in path, allow_empty=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``data`` with four pictures in two classes; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data", IMAGES)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def fill(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / name, "png")


def load(here: Path, section: str) -> tuple[Split, list[str]]:
    (here / "influence.yaml").write_text(f"model: {{factory: a.b, checkpoint: m.pt}}\ntrain: {{{section}}}\n")
    terminal = Terminal(silent=True)
    return load_splits(load_config(here / "influence.yaml"), terminal)[0], terminal.warnings


@pytest.mark.parametrize("section", ["folder: data", "dataset: torchvision.datasets.ImageFolder, args: {root: data}"])
def test_hidden_folders_and_notes_are_no_classes_and_no_images(here: Path, section: str) -> None:
    plain, nothing = load(here, section)
    assert nothing == []
    fill(here / "data", STRAYS)
    split, warnings = load(here, section)
    assert split.classes == plain.classes == ("a", "b")
    assert split.paths == plain.paths == tuple(str(here / "data" / name) for name in IMAGES)
    assert split.labels.tolist() == [0, 0, 1, 1]
    assert isinstance(split.source, ImageFolder)
    assert len(warnings) == 3
    assert all(line.startswith("influence.yaml:2: data has ") for line in warnings)
    assert "the hidden folder .ipynb_checkpoints, which is no class and is left out: delete it" in warnings[0]
    assert "1 file in hidden folders of classes, which are left out" in warnings[1]
    assert "2 files that begin with ._, which are left out" in warnings[2]


def test_an_empty_hidden_folder_stops_nothing(here: Path) -> None:
    (here / "data/.git").mkdir()
    split, warnings = load(here, "folder: data")
    assert (split.classes, len(warnings)) == (("a", "b"), 1)


def test_pictures_that_a_folder_skips_are_counted_by_suffix(here: Path) -> None:
    for name in ("a/2.jfif", "a/3.JFIF", "b/2.avif", "b/photo", "b/.DS_Store", "b/notes.txt", "b/Thumbs.db"):
        (here / "data" / name).touch()
    for section in ("folder: data", "dataset: ./own.py:make"):
        split, warnings = load(here, section)
        assert len(split) == 4
        assert len(warnings) == 1
        assert "data has 4 files that a folder data set does not list, by suffix" in warnings[0]
        assert ": no suffix 1, .avif 1, .jfif 2; if the checkpoint was trained on them too" in warnings[0]


def test_code_of_ones_own_keeps_what_it_lists_and_is_told(here: Path) -> None:
    fill(here / "data", STRAYS)
    split, warnings = load(here, "dataset: ./own.py:make")
    assert split.classes == (".ipynb_checkpoints", "a", "b")
    assert "data has the hidden folder .ipynb_checkpoints, which counts as a class: delete it" in warnings[0]
    assert "2 files that begin with ._, which count as images: delete them" in warnings[2]


def test_what_code_of_ones_own_lists_is_not_called_skipped(here: Path) -> None:
    fill(here / "data", ["a/2.jfif", "b/photo", *STRAYS[1:]])
    split, warnings = load(here, "dataset: ./own.py:wide")
    assert len(split) == 6
    assert len(warnings) == 2
    assert "1 file in hidden folders of classes, which are left out" in warnings[0]
    assert "2 files that begin with ._, which are left out" in warnings[1]


def test_only_a_folder_data_set_that_looks_as_torchvision_does_is_changed() -> None:
    class Chosen(ImageFolder):
        def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
            return [".b"], {".b": 0}

    assert without_strays(Chosen, DatasetFolder) is Chosen
    for kind in (ImageFolder, EuroSAT):
        made = without_strays(kind, DatasetFolder)
        assert made is not kind
        assert issubclass(made, kind)
        assert made.__name__ == kind.__name__


def test_a_class_without_an_image_is_named_with_the_suffixes(here: Path) -> None:
    (here / "data/c").mkdir()
    fill(here / "data", ["c/._0.png"])
    error = refused(lambda: load(here, "folder: data"))
    assert "Found no valid file for the classes c. Supported extensions are: .jpg" in error.message


def test_what_lies_in_folders_is_counted(here: Path) -> None:
    fill(here / "data", STRAYS)
    (here / "data/b/x.heic").touch()
    strays = look_through(here / "data", "x")
    assert (strays.hidden, strays.copies, strays.notes) == ([".ipynb_checkpoints"], 1, 2)
    assert strays.skipped == Counter({".heic": 1})


NO_CLASSES: list[tuple[Callable[[Path], Path], str, str]] = [
    (lambda here: here / "dota", "there is no folder {here}/dota", "did you mean 'data'? known: data"),
    (lambda here: here / "x/y", "there is no folder {here}/x/y", "a path is relative to the folder of the YAML file"),
    (lambda here: here / "data/a", "data/a has no folders of classes", "images that are not in a folder for each"),
]


@pytest.mark.parametrize(("folder", "message", "hint"), NO_CLASSES)
def test_a_folder_without_classes_is_refused(
    here: Path, folder: Callable[[Path], Path], message: str, hint: str
) -> None:
    error = refused(lambda: refuse_no_classes(folder(here), "influence.yaml:2"))
    assert error.message == f"influence.yaml:2: {message.format(here=here)}"
    assert error.hint.startswith(hint)


def test_folders_of_splits_are_not_taken_for_classes(here: Path) -> None:
    fill(here / "all", ["train/a/0.png", "val/a/0.png"])
    error = refused(lambda: load(here, "folder: all"))
    assert error.message == "influence.yaml:2: all has the folders train, val, which are splits and no classes"
    assert error.hint == "name one of them: folder: all/train"
    assert load(here, "folder: all/train")[0].classes == ("a",)
