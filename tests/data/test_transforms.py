"""A transform by name, from a file, of a factory, a processor's folder or albumentations (stand-ins)."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from influence_cli.config.load import load_config
from influence_cli.data.batches import read_batches
from influence_cli.data.datasets import load_split
from influence_cli.data.images import file_input, raw_image
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from tests.conftest import Command, edit

DATA = """
import numpy as np
from PIL import Image

def pictures(mode="RGB"):
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    return [(Image.fromarray(image).convert(mode), label) for label, image in enumerate(pixels)]
"""
CODE = """
import functools
import numpy as np
import torch

def evaluation(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

def scaled(image, by=2):
    return evaluation(image) * by

def make(scale=1.0):
    return functools.partial(scaled, by=scale)

def create_transform(input_size, is_training=False, scale=1.0):
    assert not is_training
    return make(scale)

def needs(size):
    return evaluation

def two(size, scale):
    return evaluation

def nothing():
    return None

class Centred:
    def __init__(self, mean=0.5):
        self.mean = mean

    def __call__(self, image):
        return evaluation(image) - self.mean

    def __repr__(self):
        return f"Centred({self.mean})"

made = Centred(0.25)
number = 5
halved = functools.partial(scaled, by=0.5)
later = functools.partial(make, scale=3.0)
"""

Load = Callable[..., Split]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the training split of two pictures with a transform as YAML has it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "steps.py").write_text(CODE)

    def made(transform: str, args: str = "{}", overrides: tuple[str, ...] = ()) -> Split:
        config = tmp_path / "influence.yaml"
        config.write_text(
            f"model: {{factory: ./model.py:build, checkpoint: model.pt}}\n"
            f"train:\n  dataset: ./data.py:pictures\n  args: {args}\n  transform: {transform}\n"
        )
        loaded = load_config(config, overrides)
        return load_split(loaded, "train", loaded.train)

    return made


def first(split: Split) -> Tensor:
    (batch,) = read_batches(split, np.array([0]), 1)
    assert not batch.unreadable
    return batch.inputs[0]


def plain() -> Tensor:
    """Give what ``evaluation`` makes of the first picture."""
    return torch.arange(8 * 8 * 3).reshape(8, 8, 3).permute(2, 0, 1) / 255


def refused(action: Callable[[], object]) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        action()
    assert "\n" not in caught.value.message
    return caught.value


NAMED = [
    ("./steps.py:evaluation", 1.0, 0.0),
    ("[./steps.py:evaluation]", 1.0, 0.0),
    ("./steps.py:scaled", 2.0, 0.0),  # one required argument: the image
    ("{factory: ./steps.py:make, args: {scale: 3}}", 3.0, 0.0),
    ("[{./steps.py:make: {scale: 3}}]", 3.0, 0.0),
    ("./steps.py:make", 1.0, 0.0),  # no required argument: called first
    ("./steps.py:make()", 1.0, 0.0),
    ("{factory: ./steps.py:make}", 1.0, 0.0),
    ("{factory: ./steps.py:create_transform, args: {input_size: [3, 8, 8], is_training: false}}", 1.0, 0.0),
    ("./steps.py:Centred", 1.0, -0.5),  # a class: called first
    ("{factory: ./steps.py:Centred, args: {mean: 0.75}}", 1.0, -0.75),
    ("./steps.py:made", 1.0, -0.25),  # an instance: used as it is
    ("./steps.py:halved", 0.5, 0.0),
    ("./steps.py:later", 3.0, 0.0),
    ("[ToImage, {ToDtype: {dtype: float32, scale: true}}, {torchvision.transforms.v2.Pad: {padding: 0}}]", 1.0, 0.0),
    ("[{Grayscale: {num_output_channels: 3}}, RGB, ./steps.py:Centred]", None, None),
]


@pytest.mark.parametrize(("transform", "scale", "shift"), NAMED)
def test_an_object_is_the_transform_or_makes_it(load: Load, transform: str, scale: float | None, shift: float) -> None:
    split = load(transform)
    given = first(split)
    assert given.shape == (3, 8, 8)
    if scale is not None:
        torch.testing.assert_close(given, plain() * scale + shift)
    picture = raw_image(split, 0)
    assert picture is not None
    assert (picture.mode, picture.size) == ("RGB", (8, 8))


def test_the_transforms_of_torchvisions_weights_are_found_through_the_enum(load: Load, tmp_path: Path) -> None:
    from torchvision.models import ResNet18_Weights

    split = load("torchvision.models.ResNet18_Weights.DEFAULT.transforms")
    assert torch.equal(first(split), ResNet18_Weights.DEFAULT.transforms()(split.source[0][0]))
    assert first(split).shape == (3, 224, 224)
    small = load("{factory: torchvision.models.ResNet18_Weights.DEFAULT.transforms, args: {crop_size: 32}}")
    assert first(small).shape == (3, 32, 32)
    image = tmp_path / "one.png"
    split.source[0][0].save(image)
    assert torch.equal(file_input(split, image)[0], first(split))


def test_words_for_interpolation_are_understood_for_torchvision_by_dotted_name(load: Load) -> None:
    resize = "{torchvision.transforms.v2.Resize: {size: [4, 4], interpolation: nearest}}"
    assert first(load(f"[{resize}, ./steps.py:evaluation]")).shape == (3, 4, 4)


MISTAKES = [
    ("./steps.py:evalution", "steps.py has no 'evalution'", "did you mean 'evaluation'?"),
    ("./stops.py:evaluation", "there is no file", "relative to the folder"),
    ("missing_package.create_transform", "no module named 'missing_package'", "install it"),
    ("Resiez", "torchvision.transforms.v2 has no 'Resiez'", "did you mean 'Resize'?"),
    ("./steps.py:number", "./steps.py:number is of type int, not a transform", "function of one image"),
    (
        "./steps.py:nothing",
        "./steps.py:nothing returned an object of type NoneType, not a transform",
        "function of one image",
    ),
    ("./steps.py:two", "needs the arguments size, scale", "{factory: ./steps.py:two, args: {size: …}}"),
    ("{factory: ./steps.py:make, args: {scael: 2}}", "./steps.py:make takes no argument 'scael'", "'scale'"),
    ("{factory: ./steps.py:two, args: {size: 2}}", "./steps.py:two needs the argument 'scale'", ""),
    (
        "torchvision.models.ResNet18_Weights.DEFAULT",
        "is of type ResNet18_Weights, not a transform",
        "DEFAULT.transforms",
    ),
    ("{factory: ./steps.py:make, arguments: {}}", "expected a name, or one name with its arguments", ""),
    ("{processor: [a]}", "expected the folder of an image processor", ""),
    ("{processor: nowhere}", "there is no folder", "save_pretrained"),
    ("{processor: .}", "has no preprocessor_config.json", "save_pretrained"),
    ("5", "train.transform is 5: expected a list of steps, a name", ""),
]


@pytest.mark.parametrize(("transform", "message", "hint"), MISTAKES)
def test_a_mistake_is_told_in_one_line(load: Load, transform: str, message: str, hint: str) -> None:
    error = refused(lambda: load(transform))
    assert error.message.startswith("influence.yaml:5: ")
    assert message in error.message
    assert hint in error.hint


def unreadable(split: Split) -> InfluenceError:
    from influence_cli.data.split import to_input

    return refused(lambda: to_input(split, split.source[0][0], "training example 0"))


def test_a_function_that_makes_a_transform_of_the_image_is_explained(load: Load) -> None:
    error = unreadable(load("./steps.py:needs"))
    assert "makes a function of training example 0, which is a transform itself" in error.message
    assert "{factory: NAME, args: {…}}" in error.hint


def test_a_grey_image_is_named_where_the_transform_fails(load: Load) -> None:
    error = unreadable(load("./steps.py:evaluation", "{mode: L}"))
    assert "the transform fails on training example 0" in error.message
    assert "mode L" in error.hint
    assert "[RGB, …]" in error.hint
    assert first(load("[RGB, ./steps.py:evaluation]", "{mode: L}")).shape == (3, 8, 8)


class Compose:
    """Stands in for the class of albumentations."""

    __module__ = "albumentations.core.composition"

    def __init__(self, *, tensor: bool) -> None:
        self.tensor = tensor

    def __call__(self, *args: Any, image: np.ndarray) -> dict[str, Any]:
        assert not args
        image += 1  # in place, as some of its transforms do
        return {"image": torch.from_numpy(image).permute(2, 0, 1) / 255 if self.tensor else image}


def test_albumentations_takes_an_array_and_must_give_a_tensor(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("stand_in_albumentations")
    module.good, module.bad = Compose(tensor=True), Compose(tensor=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    split = load("stand_in_albumentations.good")
    torch.testing.assert_close(first(split), plain() + 1 / 255)
    torch.testing.assert_close(first(split), plain() + 1 / 255)
    error = unreadable(load("stand_in_albumentations.bad"))
    assert "ToTensorV2()" in error.message


class Processing:
    """Stands in for an image processor of transformers."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.from_numpy(np.array(images)).permute(2, 0, 1)[None] * self.scale}


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    class AutoImageProcessor:
        @staticmethod
        def from_pretrained(folder: str, *, local_files_only: bool, trust_remote_code: bool) -> Processing:
            assert local_files_only
            assert not trust_remote_code
            return Processing(json.loads((Path(folder) / "preprocessor_config.json").read_text())["rescale_factor"])

    module = ModuleType("transformers")
    module.AutoImageProcessor = AutoImageProcessor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    return module


def test_a_processor_is_read_from_its_folder(
    load: Load, tmp_path: Path, transformers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "checkpoint-500"
    folder.mkdir(parents=True)
    (folder / "preprocessor_config.json").write_text('{"rescale_factor": 0.5}')
    split = load("{processor: runs/checkpoint-500}")
    torch.testing.assert_close(first(split), plain() * 255 / 2)
    monkeypatch.chdir(tmp_path / "runs")
    same = load("[]", overrides=("train.transform={processor: checkpoint-500}",))
    assert torch.equal(first(same), first(split))
    assert torch.equal(first(load("[RGB, {processor: runs/checkpoint-500}]")), first(split))
    assert pickle.loads(pickle.dumps(split.transform))(split.source[0][0]).shape == (3, 8, 8)
    (folder / "preprocessor_config.json").write_text("not JSON")
    error = refused(lambda: load("{processor: runs/checkpoint-500}"))
    assert "transformers cannot read the processor in" in error.message


def test_a_checkpoint_without_processor_below_a_folder_that_has_one(load: Load, tmp_path: Path) -> None:
    (tmp_path / "runs" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "runs" / "preprocessor_config.json").write_text("{}")
    error = refused(lambda: load("{processor: runs/checkpoint-500}"))
    assert "has no preprocessor_config.json" in error.message
    assert "the folder above has one" in error.hint
    error = refused(lambda: load("{processor: runs/preprocessor_config.json}"))
    assert "is a file" in error.message


def test_without_transformers_it_says_what_to_install(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refused(lambda: load("{processor: .}"))
    assert "a processor needs transformers" in error.message
    assert error.hint == "pip install transformers"


def test_the_text_of_a_transform_changes_when_what_it_names_does(
    load: Load, tmp_path: Path, transformers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = tmp_path / "steps.py"
    text = load("./steps.py:evaluation").transform_text
    assert load("./steps.py:evaluation").transform_text == text
    assert " at 0x" not in text
    (tmp_path / "named_here.py").write_text("from defined_there import evaluation\n")
    (tmp_path / "defined_there.py").write_text("def evaluation(image):\n    return image\n")
    monkeypatch.syspath_prepend(tmp_path)
    elsewhere = load("named_here.evaluation").transform_text
    (tmp_path / "defined_there.py").write_text("def evaluation(image):\n    return 2 * image\n")
    assert load("named_here.evaluation").transform_text != elsewhere
    steps.write_text(CODE + "\n# a comment\n")
    assert load("./steps.py:evaluation").transform_text == text
    steps.write_text(CODE + "\nCHANGED = 1\n")
    assert load("./steps.py:evaluation").transform_text != text
    made = "{factory: ./steps.py:Centred, args: {mean: %s}}"
    assert load(made % 0.5).transform_text != load(made % 0.25).transform_text
    assert "Centred(0.5)" in load("./steps.py:Centred").transform_text
    assert load("torchvision.models.ResNet18_Weights.DEFAULT.transforms").transform_text.count("torchvision") >= 2
    (tmp_path / "preprocessor_config.json").write_text('{"rescale_factor": 0.5}')
    before = load("{processor: .}").transform_text
    (tmp_path / "preprocessor_config.json").write_text('{"rescale_factor": 0.25}')
    assert load("{processor: .}").transform_text != before
    assert load("[ToImage, {ToDtype: {dtype: float32}}]").transform_text == "ToImage {}; ToDtype {'dtype': 'float32'}"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loader_processes_give_the_same_inputs(load: Load) -> None:
    from influence_cli.data.batches import Loading

    split = load("./steps.py:halved")
    here, there = (list(read_batches(split, split.indices, 2, Loading(workers))) for workers in (0, 1))
    assert torch.equal(here[0].inputs, there[0].inputs)


def test_an_image_file_and_the_thumbnails_go_with_a_transform_by_name(influence: Command, tiny: Path) -> None:
    (tiny / "steps.py").write_text(
        "from torchvision.transforms import v2\n\n"
        "def evaluation(image):\n"
        "    return v2.functional.to_dtype(v2.functional.to_image(image.convert('L')), scale=True)\n"
    )
    given = re.search(r"  transform: (\[.*\])\n", (tiny / "influence.yaml").read_text())
    assert given is not None
    edit(tiny, given[1], "./steps.py:evaluation")
    image = next(path for path in (tiny / "test").rglob("*.*") if path.is_file())
    found = influence("rank", image, "--report", "why.html", "--format", "jsonl", "--top", 1, cwd=tiny)
    assert str(image) in found.out
    assert "data:image/" in (tiny / "why.html").read_text()
