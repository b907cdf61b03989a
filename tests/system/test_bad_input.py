"""Every mistake that a user can make gets one line, the next step, exit 2, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.curvature.choice import SOLVERS
from tests.conftest import Command, edit


def error_of(influence: Command, cwd: Path, *words: object, stdin: str = "") -> tuple[str, str]:
    """Run a command that must fail, and give its error line and its hint."""
    before = {path for path in cwd.rglob("*") if "__pycache__" not in path.parts}
    done = influence(*words, cwd=cwd, code=2, stdin=stdin)
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "  "))]
    assert sum(line.startswith("error: ") for line in lines) == 1, done.err
    start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    left = {path for path in cwd.rglob("*") if "__pycache__" not in path.parts} - before
    assert not [path for path in left if path.suffix == ".part"]
    return lines[start], lines[start + 1] if len(lines) > start + 1 else ""


YAML = [
    ("l2: 0.01", "l2: lots", "influence.yaml:5: l2 is 'lots'", ""),
    ("l2: 0.01", "l3: 0.01", "influence.yaml:5: unknown key 'l3'", "did you mean 'l2'?"),
    ("model.pt", "modle.pt", "influence.yaml:4: the checkpoint", "relative to"),
    ("./model.py:build", "./mdoel.py:build", "influence.yaml:3: there is no file", ""),
    ("./model.py:build", "./model.py:biuld", "influence.yaml:3: ./model.py has no 'biuld'", "did you mean 'build'?"),
    (
        "datasets.ImageFolder",
        "datasets.ImagFolder",
        "influence.yaml:7: torchvision.datasets has no",
        "did you mean 'ImageFolder'?",
    ),
    (
        "{root: train}",
        "{rooot: train}",
        "influence.yaml:8: torchvision.datasets.ImageFolder takes no argument 'rooot'",
        "did you mean 'root'?",
    ),
    (
        "{root: train}",
        "{root: nowhere}",
        "influence.yaml:7: torchvision.datasets.ImageFolder failed: FileNotFoundError",
        "project/nowhere",
    ),
    ("ToImage", "ToImgae", "influence.yaml:9: torchvision.transforms.v2 has no 'ToImgae'", "did you mean 'ToImage'?"),
    (
        "ToImage",
        "RandomHorizontalFlip, ToImage",
        "influence.yaml:9: RandomHorizontalFlip is random",
        "without augmentation",
    ),
    (
        "[{Grayscale: {num_output_channels: 1}}, ToImage, {ToDtype: {dtype: float32, scale: true}}]",
        "[ToImage]",
        "tensor of torch.uint8",
        "ToDtype",
    ),
    ("{block: 64}", "{layers: [1.5]}", "influence.yaml:13: gradients.layers", ""),
    ("{block: 64}", "{layers: ['7']}", "influence.yaml:13: no layer matches '7'", "known: 2"),
    (
        "{block: 64}",
        "{budget: 1kB}\ncurvature: {method: identity}",
        "influence.yaml:13: the gradients of 320 examples",
        "gradients.layers",
    ),
]


@pytest.mark.parametrize(("old", "new", "message", "hint"), YAML)
def test_mistakes_in_the_config(influence: Command, project: Path, old: str, new: str, message: str, hint: str) -> None:
    path = project / "influence.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    line, next_step = error_of(influence, project, "rank", 0)
    assert message in line
    assert hint in next_step
    assert not (project / "influence.h5").exists()


def test_no_config(influence: Command, tmp_path: Path) -> None:
    line, hint = error_of(influence, tmp_path, "check")
    assert "there is no config influence.yaml" in line
    assert "influence init" in hint


def test_a_checkpoint_that_does_not_fit(influence: Command, project: Path) -> None:
    state = torch.load(project / "model.pt")
    torch.save({"2.weight": state["2.weight"][:5], "2.bais": state["2.bias"]}, project / "model.pt")
    line, hint = error_of(influence, project, "check")
    assert "1 missing (2.bias); 1 unexpected (2.bais); 1 misshapen (2.weight is [5, 49] in the file" in line
    assert "model.factory" in hint


def test_a_checkpoint_that_is_damaged_or_no_checkpoint(influence: Command, project: Path) -> None:
    for content in (b"", b"hello", (project / "model.pt").read_bytes()[:500]):
        (project / "model.pt").write_bytes(content)
        assert "not a readable checkpoint" in error_of(influence, project, "check")[0]
    torch.save({"epoch": 3}, project / "model.pt")
    assert "holds a mapping with the keys 'epoch', not a state dict" in error_of(influence, project, "check")[0]


def test_a_checkpoint_that_carries_code_is_not_run(influence: Command, project: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {project}/owned",)

    (project / "model.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    error_of(influence, project, "check")
    torch.save({"state_dict": Evil()}, project / "model.pt")
    line, _ = error_of(influence, project, "check")
    assert "holds a mapping with the keys 'state_dict' (posix.system, not run), not a state dict" in line
    assert not (project / "owned").exists()


SELECTION = [
    (("80",), "there is no test example 80; valid indices are 0 to 79"),
    (("70:90",), "the slice 70:90 is empty or out of range"),
    (("nothing.png",), "'nothing.png': no such file or index"),
    (("test",), "'test' is a folder"),
    (("0", "--target", "Shoe"), "--target: there is no class 'Shoe'"),
    ((), "say which test images to explain"),
    (("0", "--train", "1"), "not both"),
    (("--train", "320"), "there is no such training example"),
    (("0", "--format", "xml"), "xml"),
    (("0", "-o", "nowhere/out.csv"), "nowhere"),
    (("0", "--report", "nowhere/out.html"), "nowhere"),
    (("influence.yaml",), "cannot be decoded as an image"),
]


@pytest.mark.parametrize(("words", "message"), SELECTION)
def test_mistakes_on_the_command_line(influence: Command, project: Path, words: tuple[str, ...], message: str) -> None:
    done = influence("rank", *words, cwd=project, code=2)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_mistakes_on_stdin_name_their_line(influence: Command, project: Path) -> None:
    assert "stdin:2: there is no test example 99" in error_of(influence, project, "rank", "-", stdin="1\n99\n")[0]
    assert "stdin:1: there is no class 'Shoe'" in error_of(influence, project, "rank", "-", stdin="1\tShoe\n")[0]
    assert "no test example is selected" in error_of(influence, project, "rank", "-", stdin="")[0]


def test_an_empty_data_set(influence: Command, project: Path) -> None:
    (project / "empty.py").write_text("def make():\n    return []\n")
    edit(project, "dataset: torchvision.datasets.ImageFolder\n  args: {root: train}", "dataset: ./empty.py:make")
    assert "the train data set is empty" in error_of(influence, project, "check")[0]


def test_an_image_that_cannot_be_decoded(influence: Command, project: Path) -> None:
    bad = sorted((project / "train" / "Bag").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:90])
    for command in (("gradients",), ("check", "--full"), ("rank", 0), ("mislabels",)):
        line, hint = error_of(influence, project, *command)
        assert str(bad) in line
        assert "--skip-unreadable" in hint
    done = influence("rank", 0, "--all", "--skip-unreadable", cwd=project)
    assert f"skipped: training example 32 ({bad}) cannot be read" in done.err
    assert len(done.out.splitlines()) == 319
    assert str(bad) not in done.out
    again = influence("mislabels", "--all", "--skip-unreadable", cwd=project)
    assert "1 unreadable training example is left out" in again.err
    assert str(bad) not in again.out


def test_an_unreadable_test_image(influence: Command, project: Path) -> None:
    bad = sorted((project / "test" / "Bag").iterdir())[0]
    bad.write_bytes(b"not an image")
    assert str(bad) in error_of(influence, project, "rank", "0:80")[0]
    done = influence("rank", "0:80", "--top", 1, "--skip-unreadable", cwd=project)
    assert len(done.out.splitlines()) == 2 * 79
    assert "skipped: test example" in done.err


def test_a_loss_that_is_nan_names_the_example(influence: Command, project: Path) -> None:
    (project / "losses.py").write_text(
        "import torch\n\n"
        "def mine(outputs, targets):\n"
        "    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction='none')\n"
        "    return torch.where(targets == 7, losses / 0, losses)\n"
    )
    edit(project, "l2: 0.01", "l2: 0.01\nloss: {factory: ./losses.py:mine}")
    line, hint = error_of(influence, project, "gradients")
    assert "the loss of training example" in line
    assert "Sneaker" in line
    assert "exclude" in hint


def test_a_loss_that_returns_one_number(influence: Command, project: Path) -> None:
    (project / "losses.py").write_text(
        "from torch.nn.functional import cross_entropy as mine\nmean = lambda o, t: mine(o, t)"
    )
    edit(project, "l2: 0.01", "l2: 0.01\nloss: ./losses.py:mean")
    for command in (["check"], ["mislabels"]):
        line, hint = error_of(influence, project, *command)
        assert "returns one number for a batch of 2" in line
        assert "reduction" in hint


@pytest.mark.slow
def test_a_store_of_another_model(influence: Command, project: Path) -> None:
    influence("gradients", "-q", cwd=project)
    state = torch.load(project / "model.pt")
    torch.save({name: value * 1.01 for name, value in state.items()}, project / "model.pt")
    line, hint = error_of(influence, project, "rank", 0)
    assert "what differs: the checkpoint's weights" in line
    assert "--overwrite" in hint
    influence("gradients", "--overwrite", "-q", cwd=project)
    influence("rank", 0, cwd=project)


def test_model_code_that_changed_under_the_store(influence: Command, project: Path) -> None:
    influence("gradients", "-q", cwd=project)
    (project / "other.py").write_text((project / "model.py").read_text().replace("nn.AvgPool2d", "nn.MaxPool2d"))
    edit(project, "./model.py:build", "./other.py:build")
    assert "belongs to another model" in error_of(influence, project, "rank", 0)[0]


def test_a_random_transform_inside_the_data_set(influence: Command, project: Path) -> None:
    (project / "noisy.py").write_text(
        "import random\nfrom torchvision.datasets import ImageFolder\n\n"
        "class Noisy(ImageFolder):\n"
        "    def __getitem__(self, index):\n"
        "        image, label = super().__getitem__(index)\n"
        "        return image.rotate(random.random() * 90), label\n"
    )
    edit(project, "torchvision.datasets.ImageFolder\n  args: {root: train}", "./noisy.py:Noisy\n  args: {root: train}")
    line, hint = error_of(influence, project, "check")
    assert "two readings of" in line
    assert "augmentation" in hint


def test_classes_that_differ_between_train_and_test(influence: Command, project: Path) -> None:
    (project / "test" / "Bag").rename(project / "test" / "Zebra")
    line, _ = error_of(influence, project, "check")
    assert "class_to_idx differs between train and test: " in line
    assert "Bag" in line
    assert "Zebra" in line


def test_a_number_of_outputs_that_is_not_the_number_of_classes(influence: Command, project: Path) -> None:
    (project / "model.py").write_text((project / "model.py").read_text().replace("10)", "7)"))
    torch.save({"2.weight": torch.zeros(7, 49), "2.bias": torch.zeros(7)}, project / "model.pt")
    line, hint = error_of(influence, project, "check")
    assert "10 names, 7 outputs, labels 0 to 9: name the classes yourself" in line
    assert "train.classes: {" in hint


def test_accuracy_near_chance_is_a_warning(influence: Command, project: Path) -> None:
    state = torch.load(project / "model.pt")
    torch.save({name: value.roll(1, 0) for name, value in state.items()}, project / "model.pt")
    for command in (("check",), ("rank", 0)):
        done = influence(*command, cwd=project)
        assert "is near chance: check the transform, the class order and the checkpoint" in " ".join(done.err.split())
        assert "training stopped early" in done.err


def test_a_minimum_gives_no_warning(influence: Command, project: Path) -> None:
    assert "warning" not in influence("check", cwd=project).err
    assert "warning" not in influence("rank", 0, cwd=project).err


def test_probabilities_where_logits_are_expected(influence: Command, project: Path) -> None:
    (project / "model.py").write_text((project / "model.py").read_text().replace("10))", "10), nn.Softmax(1))"))
    line, hint = error_of(influence, project, "check")
    assert "the outputs are probabilities" in line
    assert "before the softmax" in hint


def test_outputs_that_depend_on_the_batch(influence: Command, project: Path) -> None:
    (project / "model.py").write_text(
        (project / "model.py")
        .read_text()
        .replace("nn.Linear(49, 10)", "nn.Linear(49, 10), nn.BatchNorm1d(10, affine=False, track_running_stats=False)")
    )
    # One example alone has no batch statistics at all: either way it is said before any work.
    line, _ = error_of(influence, project, "check")
    assert "model" in line


def test_outputs_that_are_random(influence: Command, project: Path) -> None:
    (project / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return nn.functional.dropout(super().forward(x))\n\n\n"
        "def build():\n    return Net(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))\n"
    )
    assert "random in eval mode" in error_of(influence, project, "check")[0]


def test_labels_outside_the_outputs(influence: Command, project: Path) -> None:
    np.save(project / "labels.npy", np.full(320, 11))
    line, _ = error_of(influence, project, "check", "-s", "train.labels=labels.npy")
    assert "has the label 11, but there are 10 classes" in line


def test_mislabels_needs_a_method_with_a_spectrum(influence: Command, project: Path) -> None:
    for method in SOLVERS:
        words = ("--signal", "self-influence", "-s", f"curvature.method={method}")
        line, _ = error_of(influence, project, "mislabels", *words)
        assert "--signal self-influence: it would need one solve per example" in line
        assert "use -s curvature.method=auto" in line
    assert "there is no such signal" in error_of(influence, project, "mislabels", "--signal", "luck")[0]
    assert "--on dev" in error_of(influence, project, "mislabels", "--on", "dev")[0]
    assert "there is no file" in error_of(influence, project, "mislabels", "--truth", "nope.csv")[0]


def test_a_singular_curvature_names_the_pole(influence: Command, project: Path) -> None:
    line, hint = error_of(influence, project, "rank", 0, "-s", "l2=0", "-s", "curvature.damping=0")
    assert "−min Λ" in line
    assert "curvature.damping" in hint


def test_explicit_over_too_many_parameters(influence: Command, project: Path) -> None:
    (project / "model.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))\n"
    )
    exec_model: dict[str, object] = {}
    exec((project / "model.py").read_text(), exec_model)
    torch.save(exec_model["build"]().state_dict(), project / "model.pt")  # type: ignore[operator]
    line, hint = error_of(influence, project, "gradients", "-s", "curvature.method=explicit")
    assert "curvature explicit over 50,890 parameters is too large" in line
    assert "gradients.layers" in hint


def test_two_shapes_in_one_data_set(influence: Command, project: Path) -> None:
    from PIL import Image

    path = sorted((project / "train" / "Bag").iterdir())[0]
    Image.open(path).resize((20, 28)).save(path)
    line, hint = error_of(influence, project, "gradients")
    assert str(path) in line
    assert "Resize" in hint


def test_wrong_type_of_item(influence: Command, project: Path) -> None:
    (project / "odd.py").write_text("def make():\n    return [1, 2, 3]\n")
    edit(project, "torchvision.datasets.ImageFolder\n  args: {root: train}", "./odd.py:make")
    assert "not (image, label)" in error_of(influence, project, "check")[0]
