"""A config becomes a model in eval mode, a loss and two splits; whatever does not fit is told at its line."""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_cli.config.load import load_config
from influence_cli.data.batches import read_batches
from influence_cli.errors import InfluenceError
from influence_cli.model.data_fingerprint import files_hash
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task, choose_device, load_tasks
from tests.conftest import shared, unpack

# Line 1 is the model, line 2 the training set, line 3 the test set, line 4 whatever a test adds.
CONFIG = """\
model: {{factory: {model}, checkpoint: model.pt{model_extra}}}
train: {{dataset: {train}{train_extra}}}
{test}
{extra}
"""
# The label of example i is i mod 3, its inputs are all i.
DATA = """
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset


def inputs(count=8):
    return torch.arange(float(count))[:, None].expand(count, 4).clone()


def tensors(count=8):
    return TensorDataset(inputs(count), torch.arange(count) % 3)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tensors())


class Items:
    def __init__(self, count=8, **attributes):
        self.count = count
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return torch.full((4,), float(index)), index % 3
"""
MODEL = """
import torch
from torch import nn


class Linear(nn.Linear):
    def __init__(self, classes=3):
        super().__init__(4, classes)


def build():
    return Linear()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with a model of 3 classes, its checkpoint, and a file of data sets."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "model.py").write_text(MODEL)
    torch.manual_seed(1)
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "model.pt")
    return tmp_path


def load(
    project: Path,
    *overrides: str,
    data: str = "",
    model_code: str = "",
    model: str = "./model.py:build",
    model_extra: str = "",
    train: str = "./data.py:tensors",
    train_extra: str = "",
    test: str = "",
    extra: str = "",
) -> Task:
    """Write the config, with more code in its files where given, and load its only task."""
    for name, code in (("data.py", data), ("model.py", model_code)):
        if code:
            path = project / name
            path.write_text(path.read_text() + "\n\n" + textwrap.dedent(code))
    text = CONFIG.format(
        model=model, model_extra=model_extra, train=train, train_extra=train_extra, test=test, extra=extra
    )
    (project / "influence.yaml").write_text(text)
    (task,) = load_tasks(load_config(project / "influence.yaml", overrides))
    return task


def refused(project: Path, *overrides: str, line: int | None, **parts: str) -> InfluenceError:
    """Load a config that is wrong, and give the error, which names the line."""
    with pytest.raises(InfluenceError) as caught:
        load(project, *overrides, **parts)
    assert "\n" not in caught.value.message
    if line is not None:
        assert caught.value.message.startswith(f"{project / 'influence.yaml'}:{line}: ")
    return caught.value


# The whole


def test_a_task_holds_what_the_config_says(project: Path) -> None:
    task = load(
        project, extra="l2: 0.25\nseed: 5\ndevice: cpu", test="test: {dataset: ./data.py:tensors, args: {count: 5}}"
    )
    state = torch.load(project / "model.pt")
    assert torch.equal(task.model.weight, state["weight"])
    assert not task.model.training
    assert (task.objective.l2_of("weight"), task.seed, task.n) == (0.25, 5, 8)
    assert (len(task.train), len(task.test_split())) == (8, 5)
    assert (task.train.name, task.test_split().name) == ("train", "test")
    assert task.classes == ("0", "1", "2")
    assert task.checkpoint == project / "model.pt"
    assert task.device == torch.device("cpu")
    assert (task.loss_name, task.convex_loss) == ("cross_entropy", True)


def test_every_layer_is_in_eval_mode(project: Path) -> None:
    torch.save({f"0.{key}": value for key, value in torch.load(project / "model.pt").items()}, project / "model.pt")
    task = load(
        project,
        model_code="def nested():\n    return nn.Sequential(Linear(), nn.Dropout(0.5))\n",
        model="./model.py:nested",
    )
    assert not any(module.training for module in task.model.modules())


def test_each_checkpoint_is_a_task_over_the_same_data(project: Path) -> None:
    torch.save({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, project / "other.pt")
    load(project)
    tasks = load_tasks(
        load_config(project / "influence.yaml", [f"model.checkpoint=[{project}/model.pt, {project}/other.pt]"])
    )
    assert [task.checkpoint.name for task in tasks] == ["model.pt", "other.pt"]
    assert torch.equal(tasks[1].model.weight, torch.ones(3, 4))
    assert not torch.equal(tasks[0].model.weight, torch.ones(3, 4))
    assert tasks[0].train is tasks[1].train


def test_the_second_of_two_checkpoints_is_told_at_its_place(project: Path) -> None:
    load(project)
    text = (project / "influence.yaml").read_text().replace("model.pt", "[model.pt,\n  missing.pt]")
    (project / "influence.yaml").write_text(text)
    with pytest.raises(InfluenceError, match=r"influence\.yaml:2: the checkpoint .*missing\.pt does not exist"):
        load_tasks(load_config(project / "influence.yaml"))


def test_without_test_examples_asking_for_them_is_an_error(project: Path) -> None:
    task = load(project)
    assert task.test is None
    with pytest.raises(InfluenceError, match="the config has no test data set"):
        task.test_split()


def test_data_made_at_random_is_the_same_for_the_same_seed(project: Path) -> None:
    code = "def noise():\n    return TensorDataset(torch.rand(4, 4), torch.arange(4) % 3)\n"
    first = load(project, data=code, train="./data.py:noise").train.source.tensors[0]
    again = load(project, train="./data.py:noise").train.source.tensors[0]
    other = load(project, train="./data.py:noise", extra="seed: 1").train.source.tensors[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_attention_of_a_loaded_model_has_derivatives(project: Path) -> None:
    # Torch's fused path of eval mode has none of forward mode.
    code = """
    class Attending(Linear):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):
            return super().forward(self.layer(x[:, None])[:, 0])
    """
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(True)
    layer = {f"layer.{key}": value for key, value in nn.TransformerEncoderLayer(4, 2, 8).state_dict().items()}
    torch.save(torch.load(project / "model.pt") | layer, project / "model.pt")
    task = load(project, model_code=code, model="./model.py:Attending")
    x, direction = torch.randn(2, 4), torch.randn(2, 4)
    step = 1e-2
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        slope = (task.model(x + step * direction) - task.model(x - step * direction)) / (2 * step)
        _, found = torch.func.jvp(task.model, (x,), (direction,))
    assert torch.allclose(found, slope, atol=1e-2)


def test_a_seed_that_is_too_large_is_refused(project: Path) -> None:
    assert "seed" in refused(project, line=4, extra="seed: 99999999999999999999").message


# Factories of torchvision, and real data


GREY_TO_RGB = "{Grayscale: {num_output_channels: 3}}, "
TRANSFORM = f", transform: [{GREY_TO_RGB}ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}]"


def idx_labels(root: Path, part: str) -> np.ndarray:
    """Read the original label file: 8 bytes of header, then a byte a label."""
    (path,) = root.rglob(f"{part}-labels-idx1-ubyte")
    return np.frombuffer(path.read_bytes(), dtype=np.uint8, offset=8)


def idx_images(root: Path, part: str, count: int) -> Tensor:
    """Read the first images of the original file: 16 bytes of header, then 28×28 bytes each."""
    (path,) = root.rglob(f"{part}-images-idx3-ubyte")
    pixels = np.frombuffer(path.read_bytes(), dtype=np.uint8, offset=16, count=count * 784)
    return torch.tensor(pixels.reshape(count, 1, 28, 28)).float() / 255


def test_a_model_and_a_data_set_of_torchvision_work_by_name(project: Path, mnist: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(3)
    net = resnet18(num_classes=10).eval()
    torch.save({"model": {f"module.{key}": value for key, value in net.state_dict().items()}}, project / "model.pt")
    task = load(
        project,
        model="torchvision.models.resnet18",
        model_extra=", args: {num_classes: 10}",
        train="torchvision.datasets.MNIST",
        train_extra=f", args: {{root: {mnist}, train: false}}" + TRANSFORM,
        test=f"test: {{dataset: torchvision.datasets.MNIST, args: {{root: {mnist}}}}}",
    )
    assert (len(task.train), len(task.test_split())) == (10_000, 60_000)
    assert np.array_equal(task.train.labels, idx_labels(mnist, "t10k"))
    assert np.array_equal(task.test_split().labels, idx_labels(mnist, "train"))
    assert task.classes[:2] == ("0 - zero", "1 - one")
    assert task.train.paths is None
    (batch,) = read_batches(task.train, np.arange(3), 3)
    images = idx_images(mnist, "t10k", 3)
    assert torch.allclose(batch.inputs, images.expand(3, 3, 28, 28), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(task.model(batch.inputs), net(images.expand(3, 3, 28, 28)), atol=1e-5)


def test_fashion_mnist_works_by_name(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from torchvision.datasets import FashionMNIST

    root = unpack(tmp_path_factory.mktemp("fashion"), shared("fashion-mnist") / "FashionMNIST", FashionMNIST)
    code = "def flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    torch.save({"1.weight": torch.zeros(10, 784), "1.bias": torch.arange(10.0)}, project / "model.pt")
    task = load(
        project,
        model_code=code,
        model="./model.py:flat",
        train="torchvision.datasets.FashionMNIST",
        train_extra=f", args: {{root: {root}, train: false}}" + TRANSFORM.replace(GREY_TO_RGB, ""),
    )
    assert np.array_equal(task.train.labels, idx_labels(root, "t10k"))
    assert task.classes[0] == "T-shirt/top"
    assert task.classes[9] == "Ankle boot"
    assert task.train.mapping is not None
    assert task.train.mapping["Ankle boot"] == 9
    (batch,) = read_batches(task.train, np.arange(2), 2)
    assert torch.allclose(batch.inputs, idx_images(root, "t10k", 2), atol=1e-6)


@pytest.fixture
def folders(project: Path) -> Path:
    """Add an ImageFolder of 2 × 3 grey pictures for training, 2 × 1 for testing, and a model that takes them."""
    for part, count in (("train", 3), ("test", 1)):
        for number, name in enumerate(("ant", "bee")):
            (project / part / name).mkdir(parents=True)
            for position in range(count):
                Image.new("L", (2, 2), 100 * number + position).save(project / part / name / f"{position}.png")
    path = project / "model.py"
    path.write_text(
        path.read_text() + "\n\ndef pictures():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
    )
    torch.save({"1.weight": torch.zeros(2, 12), "1.bias": torch.zeros(2)}, project / "model.pt")
    return project


PICTURES = {
    "model": "./model.py:pictures",
    "train": "torchvision.datasets.ImageFolder",
    "train_extra": ", args: {root: train}, transform: [ToImage, {ToDtype: {dtype: float32}}]",
    "test": "test: {dataset: torchvision.datasets.ImageFolder, args: {root: test}}",
}


def test_an_image_folder_gives_paths_classes_and_labels(folders: Path) -> None:
    task = load(folders, **PICTURES)
    assert task.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert task.train.paths == tuple(str(folders / "train" / c / f"{i}.png") for c in ("ant", "bee") for i in range(3))
    assert task.classes == task.train.classes == ("ant", "bee")
    assert task.train.mapping == {"ant": 0, "bee": 1}
    (batch,) = read_batches(task.train, np.array([4, 0]), 2)
    assert batch.inputs[:, 0, 0, 0].tolist() == [101.0, 0.0]
    # The test set takes the transform of the training set.
    (batch,) = read_batches(task.test_split(), np.array([1]), 2)
    assert batch.inputs.shape == (1, 3, 2, 2)
    assert batch.inputs.unique().tolist() == [100.0]


def test_an_image_folder_without_an_image_is_told(folders: Path) -> None:
    for path in (folders / "train" / "ant").iterdir():
        path.unlink()
    message = refused(folders, line=2, **PICTURES).message
    assert "torchvision.datasets.ImageFolder failed: FileNotFoundError" in message
    assert "ant" in message


def test_class_folders_that_differ_between_train_and_test_are_told(folders: Path) -> None:
    (folders / "test" / "bee").rename(folders / "test" / "wasp")
    error = refused(folders, line=3, **PICTURES)
    assert "class_to_idx differs between train and test: " in error.message
    assert "bee" in error.message
    assert "wasp" in error.message
    assert "ant" not in error.message.split("test: ")[1]


def test_test_classes_that_are_not_known_are_told(project: Path) -> None:
    code = """
    def train():
        return Items(class_to_idx={"a": 0, "b": 1, "c": 2})

    def test():
        return Items(class_to_idx={"a": 0, "c": 1, "b": 2, "z": 3})
    """
    message = refused(
        project, line=3, data=code, train="./data.py:train", test="test: {dataset: ./data.py:test}"
    ).message
    assert "class_to_idx differs between train and test: " in message
    assert "only in test z" in message


def test_a_relative_folder_inside_a_users_factory_is_read_from_any_current_folder(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The factory runs in the folder of the config, so that its relative paths work; so must the images behind them.
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    code = "def images():\n    from torchvision.datasets import ImageFolder\n\n    return ImageFolder('train')\n"
    parts = PICTURES | {
        "train": "./data.py:images",
        "train_extra": ", transform: [ToImage, {ToDtype: {dtype: float32}}]",
    }
    task = load(folders, data=code, **parts)
    (batch,) = read_batches(task.train, np.array([4]), 1)
    assert batch.inputs.unique().tolist() == [101.0]
    assert files_hash(task.train) is not None


# Any data set


ANY = [
    "tensors()",
    "Items()",
    "Items(targets=[0, 1, 2, 0, 1, 2, 0, 1])",
    "Items(targets=torch.arange(8) % 3)",
    "Items(labels=np.arange(8) % 3)",
    "Items(_labels=tuple(i % 3 for i in range(8)))",
    "Items(targets=None)",
    "Items(targets=['a', 'b', 'c', 'a', 'b', 'c', 'a', 'b'])",
    "Items(targets=[0, 1])",
    "Items(targets=[5] * 8)",
    "Items(targets=[1, 1, 2, 0, 1, 2, 0, 1])",
    "Items(targets=[0, 1, 2, 0, 2, 2, 0, 1])",
    "Items(targets=[0, 1, 2, 0, 1, 2, 0, 2])",
    "Items(labels=lambda: None)",
    "ConcatDataset([Subset(tensors(), range(4)), Subset(Items(), range(4, 8))])",
    "[(x, i % 3) for i, x in enumerate(inputs())]",
    "[{'image': x, 'label': i % 3} for i, x in enumerate(inputs())]",
    "[(x, torch.tensor(i % 3)) for i, x in enumerate(inputs())]",
    "[(x.numpy(), np.int64(i % 3)) for i, x in enumerate(inputs())]",
    "tuple([x.double(), float(i % 3), 'more'] for i, x in enumerate(inputs()))",
]


@pytest.mark.parametrize("made", ANY)
def test_any_object_with_items_and_a_length_is_a_data_set(project: Path, made: str) -> None:
    task = load(project, data=f"def make():\n    return {made}\n", train="./data.py:make")
    assert task.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert task.train.labels.dtype == np.int64
    assert task.train.indices.tolist() == list(range(8))
    assert task.train.paths is None
    (batch,) = read_batches(task.train, np.array([6, 1]), 4)
    assert batch.inputs.tolist() == [[6.0] * 4, [1.0] * 4]
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.tolist() == [0, 1]


def test_a_target_transform_that_the_targets_do_not_show_is_respected(folders: Path) -> None:
    code = """
    def swapped(root):
        from torchvision.datasets import ImageFolder

        return ImageFolder(root, target_transform=lambda label: 1 - label)
    """
    task = load(folders, data=code, **(PICTURES | {"train": "./data.py:swapped"}))
    assert task.train.labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_subset_keeps_its_own_order_of_labels(project: Path) -> None:
    code = "def make():\n    return Subset(tensors(), [7, 2, 0, 5])\n"
    assert load(project, data=code, train="./data.py:make").train.labels.tolist() == [1, 2, 0, 2]


def test_examples_kept_in_memory_are_no_files(project: Path) -> None:
    code = "def make():\n    return Items(samples=[(x, i % 3) for i, x in enumerate(inputs())])\n"
    task = load(project, data=code, train="./data.py:make")
    assert task.train.paths is None
    assert files_hash(task.train) is None


@pytest.mark.parametrize("kind", ["str", "Path"])
def test_paths_are_found_under_samples(project: Path, kind: str) -> None:
    code = f"""
    from pathlib import Path

    def make():
        return Items(3, samples=[({kind}(f"/data/{{i}}.png"), i) for i in range(3)])
    """
    assert load(project, data=code, train="./data.py:make").train.paths == ("/data/0.png", "/data/1.png", "/data/2.png")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ("['cat', 'dog', 'owl']", ("cat", "dog", "owl")),
        ("('cat', 'dog', 'owl')", ("cat", "dog", "owl")),
        ("[('tench', 'Tinca tinca'), ('shark',), 'ray']", ("tench / Tinca tinca", "shark", "ray")),
        ("[10, 20, 30]", ("10", "20", "30")),
        ("None", ("0", "1", "2")),
        ("[]", ("0", "1", "2")),
    ],
)
def test_class_names_are_the_data_sets_else_numbers(project: Path, classes: str, expected: tuple[str, ...]) -> None:
    task = load(project, data=f"def make():\n    return Items(classes={classes})\n", train="./data.py:make")
    assert task.classes == expected


BAD_DATA = [
    ("3", "returned a int, without a length or items by index"),
    ("None", "returned a NoneType, without a length or items by index"),
    ("DataLoader(tensors())", "returned a DataLoader, without a length or items by index"),
    ("iter([1])", "returned a list_iterator, without a length or items by index"),
    ("Stream()", "returned a Stream, without a length or items by index"),
    ("[]", "the train data set is empty"),
    ("[1, 2]", "training example 0 is a int, not (image, label)"),
    ("TensorDataset(inputs())", "training example 0 is a tuple, not (image, label)"),
    ("1 / 0", "./data.py:make failed: ZeroDivisionError"),
    ("[(x, 'cat') for x in inputs()]", "training example 0 has the label 'cat', not a class number"),
    ("[(x, [0, 1]) for x in inputs()]", "training example 0 has the label [0, 1], not a class number"),
    ("TensorDataset(inputs(), torch.eye(8))", "training example 0 has 8 labels at once"),
    ("[(x, i - 1) for i, x in enumerate(inputs())]", "training example 0 has the label -1, "
     "but the model has 3 outputs"),
    ("[(x, i) for i, x in enumerate(inputs())]", "training example 3 has the label 3, but the model has 3 outputs"),
    ("[(x, 0.5) for x in inputs()]", "training example 0 has the label 0.5"),
    ("TensorDataset(inputs(), torch.arange(8) / 4)", "training example 1 has the label"),
    ("TensorDataset(inputs(), torch.full((8,), float('nan')))", "training example 0 has the label"),
    ("[(x, float('inf')) for x in inputs()]", "training example 0 has the label inf"),
    ("[(x, 2**70) for x in inputs()]", "training example 0 has the label"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "message"), BAD_DATA)
def test_what_is_no_data_set_of_images_and_labels_is_told(project: Path, made: str, message: str) -> None:
    error = refused(project, line=2, data=f"def make():\n    return {made}\n", train="./data.py:make")
    assert message in error.message


def test_a_mistake_in_the_data_sets_arguments_is_told_before_the_call(project: Path) -> None:
    error = refused(project, line=2, train_extra=", args: {cuont: 3}")
    assert error.message.endswith("./data.py:tensors takes no argument 'cuont'")
    assert "did you mean 'count'?" in error.hint
    (project / "influence.yaml").unlink()
    error = refused(project, line=3, test="test: {dataset: ./data.py:tensers}")
    assert "did you mean 'tensors'?" in error.hint


# Labels, exclusions, n


def test_labels_are_replaced_and_examples_left_out(project: Path) -> None:
    np.save(project / "labels.npy", np.array([2, 2, 2, 2, 1, 1, 1, 1]))
    (project / "out.csv").write_text("index\n6\n1\n")
    (project / "few.csv").write_text("index,label\n4,2\n")
    np.save(project / "drop.npy", np.array([0]))
    task = load(
        project,
        train_extra=", labels: labels.npy, exclude: out.csv",
        test="test: {dataset: ./data.py:tensors, args: {count: 5}, labels: few.csv, exclude: drop.npy}",
    )
    assert task.train.labels.tolist() == [2, 2, 2, 2, 1, 1, 1, 1]
    assert task.train.indices.tolist() == [0, 2, 3, 4, 5, 7]
    assert task.n == len(task.train) == 6
    assert task.test_split().labels.tolist() == [0, 1, 2, 0, 2]
    assert task.test_split().indices.tolist() == [1, 2, 3, 4]


def test_labels_of_a_file_may_be_class_names(folders: Path) -> None:
    (folders / "labels.csv").write_text("index,label\n0,bee\n5,ant\n")
    extra = PICTURES["train_extra"] + ", labels: labels.csv"
    assert load(folders, **(PICTURES | {"train_extra": extra})).train.labels.tolist() == [1, 0, 0, 1, 1, 0]


def test_an_example_that_is_left_out_may_have_an_impossible_label(project: Path) -> None:
    code = "def make():\n    return [(x, 9 if i == 2 else 0) for i, x in enumerate(inputs())]\n"
    assert "training example 2 has the label 9" in refused(project, line=2, data=code, train="./data.py:make").message
    (project / "out.csv").write_text("index\n2\n")
    assert len(load(project, train="./data.py:make", train_extra=", exclude: out.csv").train) == 7


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("labels", "label\n0\n", "has 1 labels, but the data set has 8 examples"),
        ("labels", "index,label\n0,cat\n", "'cat' is not a class number"),
        ("exclude", "index\n8\n", "names the index 8; valid indices are 0 to 7"),
        ("exclude", "index\n" + "".join(f"{i}\n" for i in range(8)), "leaves no train example"),
    ],
)
def test_a_mistake_in_a_file_of_labels_names_both_files(project: Path, key: str, content: str, message: str) -> None:
    (project / "file.csv").write_text(content)
    error = refused(project, line=2, train_extra=f", {key}: file.csv")
    assert str(project / "file.csv") in error.message
    assert message in error.message


def test_n_is_the_number_of_examples_in_use_unless_it_was_larger(project: Path) -> None:
    assert load(project).n == 8
    assert load(project, train_extra=", n: 8").n == 8
    assert load(project, train_extra=", n: 60000").n == 60_000
    error = refused(project, line=2, train_extra=", n: 7")
    assert "train.n is 7, but the data set has 8 examples in use" in error.message
    (project / "out.csv").write_text("index\n0\n3\n")
    assert load(project, train_extra=", n: 7, exclude: out.csv").n == 7


# Models


OUTPUTS = {
    "a tensor": "logits",
    "a tuple": "(logits, torch.zeros(1))",
    "a list": "[logits, None]",
    "a dict with logits": "{'loss': None, 'logits': logits}",
    "a dict with out": "{'aux': torch.zeros(1), 'out': logits}",
    "an object with logits": "types.SimpleNamespace(loss=None, logits=logits)",
    "a named tuple with logits": "collections.namedtuple('Out', 'aux logits')(torch.zeros(7), logits)",
    "a named tuple without": "collections.namedtuple('Out', 'first aux')(logits, torch.zeros(7))",
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_model_may_return(project: Path, kind: str) -> None:
    code = f"""
    import collections
    import types

    class Wrapped(Linear):
        def forward(self, x):
            logits = super().forward(x)
            return {OUTPUTS[kind]}
    """
    task = load(project, model_code=code, model="./model.py:Wrapped")
    state, x = torch.load(project / "model.pt"), torch.randn(5, 4)
    with torch.no_grad():
        assert torch.allclose(logits_of(task.model(x)), x @ state["weight"].T + state["bias"], atol=1e-6)
    assert task.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (None, "the model returns a NoneType"),
        ((), "the model returns a tuple"),
        (("a", torch.zeros(1)), "the model returns a tuple"),
        ({"features": torch.zeros(1), "loss": 0}, "the model returns a dict with the keys 'features', 'loss'"),
        ({}, "the model returns a dict"),
        (3.0, "the model returns a float"),
    ],
)
def test_outputs_without_logits_are_refused(outputs: object, message: str) -> None:
    with pytest.raises(InfluenceError) as caught:
        logits_of(outputs)
    assert caught.value.message.startswith(message)
    assert caught.value.message.endswith("which has no logits")
    assert "'logits'" in caught.value.hint


BAD_MODELS = [
    ("return None", "./model.py:made returned a NoneType, not a torch module"),
    ("return Linear", "./model.py:made returned a type, not a torch module"),
    ("raise OSError('no weights')", "./model.py:made failed: OSError: no weights"),
    ("return Linear(5)", "does not fit the model: 2 misshapen (weight is [3, 4] in the file and [5, 4] in the model"),
    ("return nn.Sequential(Linear())", "does not fit the model: 2 missing (0.weight, 0.bias); 2 unexpected (weight"),
    ("return nn.Linear(4, 3, dtype=torch.complex64)", "the model fails on training example 0 of shape [4]: Runtime"),
    ("m = Linear(); m.forward = lambda x: {'a': x}; return m", "the model returns a dict with the keys 'a'"),
    ("m = Linear(); m.forward = lambda x: x.sum(); return m", "the model returns [] for two examples"),
    ("m = Linear(); m.forward = lambda x: x[0]; return m", "the model returns [4] for one example"),
    ("m = Linear(); m.forward = lambda x: x[..., None]; return m", "the model returns [1, 4, 1] for one example"),
    ("m = Linear(); m.forward = lambda x: x[:, :2]; return m",
     "training example 2 has the label 2, but the model has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), BAD_MODELS)
def test_a_model_that_does_not_work_is_told(project: Path, body: str, message: str) -> None:
    at = 2 if "example 2" in message else 1
    error = refused(project, line=at, model_code=f"def made():\n    {body}\n", model="./model.py:made")
    assert message in error.message


def test_a_mistake_in_the_models_arguments_is_told_before_the_call(project: Path) -> None:
    error = refused(project, line=1, model="./model.py:Linear", model_extra=", args: {clases: 3}")
    assert error.message.endswith("./model.py:Linear takes no argument 'clases'")
    assert "did you mean 'classes'?" in error.hint
    error = refused(project, line=1, model="torch.nn.Linear", model_extra=", args: {in_features: 4}")
    assert error.message.endswith("torch.nn.Linear needs the argument 'out_features'")


def test_an_input_that_does_not_fit_the_model_is_told_with_its_shape(project: Path) -> None:
    error = refused(project, line=1, data="def make():\n    return [(torch.zeros(3, 7), 0)]\n", train="./data.py:make")
    assert "the model fails on training example 0 of shape [3, 7]: RuntimeError" in error.message
    assert "train.transform" in error.hint


def test_the_number_of_outputs_must_be_that_of_the_class_names(project: Path) -> None:
    code = "def make():\n    return Items(classes=['a', 'b', 'c', 'd'])\n"
    error = refused(project, line=2, data=code, train="./data.py:make")
    assert "4 names, 3 outputs, labels 0 to 2: name the classes yourself" in error.message
    assert error.hint == "train.classes: a list of 3 names, one per output in order"


def test_a_first_example_that_cannot_be_read_does_not_hide_the_outputs(project: Path) -> None:
    code = """
    class Holes(Items):
        def __getitem__(self, index):
            if index < self.holes:
                raise OSError("unreadable")
            return super().__getitem__(index)

    def few():
        return Holes(holes=5, targets=np.arange(8) % 3)

    def all():
        return Holes(holes=8, targets=np.arange(8) % 3)
    """
    assert load(project, data=code, train="./data.py:few").classes == ("0", "1", "2")
    error = refused(project, line=None, train="./data.py:all")
    assert error.message == "training example 0 cannot be read: OSError: unreadable"


# Losses


LOSSES = """
import torch
from torch import nn


def squares(outputs, targets, alpha=1.0):
    return alpha * (outputs - nn.functional.one_hot(targets, outputs.shape[1])).square().sum(1)


class Scaled:
    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def __call__(self, outputs, targets):
        return squares(outputs, targets, self.alpha)


class Weighted(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))

    def forward(self, outputs, targets):
        return self.weights[targets] * squares(outputs, targets)


number = 3
"""
OUT, TARGETS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]), torch.tensor([2, 0])
# By hand: the log of the sum of exponentials, less the logit of the target.
ENTROPY = [math.log(3), math.log(math.e + 1 + 1 / math.e) - 1]
SMOOTH = [math.log(3), 0.7 * ENTROPY[1] + 0.3 * (ENTROPY[1] + 1)]
HINGE = [math.log(1 + 2 * math.e), math.log(2 + 1 / math.e)]
GOOD_LOSSES = [
    ("", "cross_entropy", ENTROPY, True),
    ("loss: cross_entropy", "cross_entropy", ENTROPY, True),
    ("loss: {factory: torch.nn.CrossEntropyLoss, args: {reduction: none}}", "torch.nn.CrossEntropyLoss", ENTROPY, True),
    ("loss: {factory: torch.nn.CrossEntropyLoss, args: {reduction: none, label_smoothing: 0.3}}", "{", SMOOTH, True),
    ("loss: {factory: torch.nn.functional.cross_entropy, args: {reduction: none}}", "{", ENTROPY, None),
    ("loss: hinge", "hinge", [1.0, 0.0], True),
    ("loss: smooth_hinge", "smooth_hinge", [1 + 0.001 * math.log(2), 0.001 * math.log(2)], True),
    ("loss: {factory: smooth_hinge, args: {temperature: 1}}", "{'temperature': 1}", HINGE, True),
    ("loss: ./losses.py:squares", "./losses.py:squares", [1.0, 1.0], True),
    ("loss: {factory: ./losses.py:squares, args: {alpha: 3}}", "./losses.py:squares {'alpha': 3}", [3.0, 3.0], True),
    ("loss: ./losses.py:Scaled", "./losses.py:Scaled", [1.0, 1.0], True),
    ("loss: {factory: ./losses.py:Scaled, args: {alpha: 0.5}}", "{'alpha': 0.5}", [0.5, 0.5], True),
    ("loss: {factory: ./losses.py:Weighted, args: {weights: [2.0, 1.0, 4.0]}}", "{", [4.0, 2.0], True),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "name", "expected", "convex"), GOOD_LOSSES)
def test_a_loss_by_name_by_class_or_from_a_file_gives_one_number_an_example(
    project: Path, extra: str, name: str, expected: list[float], convex: bool | None
) -> None:
    (project / "losses.py").write_text(LOSSES)
    task = load(project, extra=extra)
    assert task.loss(OUT, TARGETS).tolist() == pytest.approx(expected, abs=1e-6)
    assert name in task.loss_name
    # Measured where the loss is the user's own: squares are convex. None stands for either.
    assert convex is None or task.convex_loss is convex


BAD_LOSSES = [
    ("loss: mse", "unknown loss 'mse'"),
    ("loss: {factory: cross_entropy, args: {label_smoothing: 0.1}}", "loss cross_entropy takes no args"),
    ("loss: smooth_hing", "unknown loss 'smooth_hing'"),
    ("loss: {factory: hinge, args: {temperature: 0.1}}", "loss hinge takes no args"),
    ("loss: {factory: smooth_hinge, args: {temprature: 0.1}}", "loss smooth_hinge takes no argument 'temprature'"),
    ("loss: {factory: smooth_hinge, args: {temperature: 0}}", "temperature is 0: expected a finite number ≥ 1e-06"),
    ("loss: {factory: smooth_hinge, args: {temperature: -1.0}}", "temperature is -1: expected a finite number"),
    ("loss: {factory: smooth_hinge, args: {temperature: 1e-9}}", "temperature is 1e-09: expected a finite number"),
    ("loss: {factory: smooth_hinge, args: {temperature: .inf}}", ".inf is not a finite number"),
    ("loss: {factory: smooth_hinge, args: {temperature: .nan}}", ".nan is not a finite number"),
    ("loss: {factory: smooth_hinge, args: {temperature: cold}}", "temperature is 'cold': expected a number"),
    ("loss: {factory: smooth_hinge, args: {temperature: true}}", "temperature is True: expected a number"),
    ("loss: torch.nn.CrosEntropyLoss", "torch.nn has no 'CrosEntropyLoss'"),
    ("loss: {factory: torch.nn.CrossEntropyLoss, args: {reducton: none}}", "takes no argument 'reducton'"),
    ("loss: ./losses.py:number", "./losses.py:number is a int, not a function or a class"),
    ("loss: ./losses.py:missing", "./losses.py has no 'missing'"),
    ("loss: ./losses.py:Weighted", "./losses.py:Weighted needs the argument 'weights'"),
    ("loss: {factory: ./losses.py:Scaled, args: {alhpa: 2}}", "./losses.py:Scaled takes no argument 'alhpa'"),
    ("loss: {factory: ./losses.py:squares, args: {alhpa: 2}}", "./losses.py:squares takes no argument 'alhpa'"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "message"), BAD_LOSSES)
def test_a_loss_that_does_not_exist_or_fit_is_told(project: Path, extra: str, message: str) -> None:
    (project / "losses.py").write_text(LOSSES)
    assert message in refused(project, line=4, extra=extra).message


# Transforms


def images(project: Path, transform: str, **parts: Any) -> dict[str, Any]:
    """Name a data set of one picture of 2×2, four pixels for the linear model."""
    code = """
    from PIL import Image

    def pictures():
        return [(Image.fromarray(np.array([[0, 255], [51, 102]], dtype=np.uint8)), 1)]
    """
    return {"data": code, "train": "./data.py:pictures", "train_extra": f", transform: {transform}"} | parts


FLATTEN = """
def flat():
    class Flat(Linear):
        def forward(self, x):
            return super().forward(x.flatten(1))

    return Flat()
"""
SCALED = "ToImage, {ToDtype: {dtype: float32, scale: true}}"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (f"[{SCALED}]", [0.0, 1.0, 0.2, 0.4]),
        ("[ToImage, {ToDtype: {dtype: torch.float32, scale: true}}]", [0.0, 1.0, 0.2, 0.4]),
        ("[ToImage, {ToDtype: {dtype: float64}}]", [0.0, 255.0, 51.0, 102.0]),
        (f"[{SCALED}, {{Normalize: {{mean: [0.5], std: [0.25]}}}}]", [-2.0, 2.0, -1.2, -0.4]),
        (f"[{{Resize: {{size: [2, 2], interpolation: nearest}}}}, {SCALED}]", [0.0, 1.0, 0.2, 0.4]),
        (f"[{{Pad: {{padding: 1}}}}, {{CenterCrop: {{size: 2}}}}, {SCALED}]", [0.0, 1.0, 0.2, 0.4]),
    ],
)
def test_a_transform_is_built_step_by_step(project: Path, steps: str, expected: list[float]) -> None:
    task = load(project, model_code=FLATTEN, model="./model.py:flat", **images(project, steps))
    (batch,) = read_batches(task.train, np.array([0]), 1)
    assert batch.inputs.shape == (1, 1, 2, 2)
    assert batch.inputs.flatten().tolist() == pytest.approx(expected, abs=1e-6)


BAD_TRANSFORMS = [
    ("[ToImgae]", "torchvision.transforms.v2 has no 'ToImgae'", "did you mean 'ToImage'?"),
    ("[functional]", "torchvision.transforms.v2 has no 'functional'", "known: "),
    ("[{Resize: {siez: 3}}]", "Resize takes no argument 'siez'", "did you mean 'size'?"),
    ("[Resize]", "Resize needs the argument 'size'", "args: {size: …}"),
    ("[{Resize: {size: many}}]", "Resize failed: ", ""),
    ("[{Resize: {size: 2, interpolation: cubicc}}]", "'cubicc'", ""),
    ("[{ToDtype: {dtype: flaot32}}]", "there is no dtype 'flaot32'", "did you mean 'float32'?"),
    ("[{ToDtype: {dtype: nn}}]", "there is no dtype 'nn'", ""),
    ("[RandomHorizontalFlip]", "RandomHorizontalFlip is random", "without augmentation"),
    ("[{RandomCrop: {size: 2}}]", "RandomCrop is random", "without augmentation"),
    ("[{CenterCrop: {size: 2}}]", "training example 0 is a Image, not a tensor", "ToDtype"),
    ("[ToImage]", "training example 0 is a tensor of torch.uint8, not of float32", "ToDtype"),
    ("[{Normalize: {mean: [0.5], std: [0.25]}}]", "the transform fails on training example 0: ", ""),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "message", "hint"), BAD_TRANSFORMS)
def test_a_mistake_in_a_transform_is_told(project: Path, steps: str, message: str, hint: str) -> None:
    error = refused(project, line=2, model_code=FLATTEN, model="./model.py:flat", **images(project, steps))
    assert message in error.message
    assert hint in error.hint


def test_a_mistake_in_a_step_of_a_transform_is_told_at_its_own_line(project: Path) -> None:
    load(project)
    steps = "\n  transform:\n  - ToImage\n  - ToDtpe\n"
    text = (project / "influence.yaml").read_text()
    text = text.replace("train: {dataset: ./data.py:tensors}", f"train:\n  dataset: ./data.py:tensors{steps}")
    (project / "influence.yaml").write_text(text)
    with pytest.raises(InfluenceError, match=r"influence\.yaml:6: .* has no 'ToDtpe'"):
        load_tasks(load_config(project / "influence.yaml"))


def test_a_transform_among_the_arguments_is_sent_to_its_own_key(folders: Path) -> None:
    parts = PICTURES | {"train_extra": ", args: {root: train, transform: ToImage}, transform: [ToImage]"}
    assert "give the transform under train.transform" in refused(folders, line=2, **parts).message


def test_the_test_set_may_have_no_transform_where_the_training_set_has_one(project: Path) -> None:
    task = load(
        project,
        model_code=FLATTEN,
        model="./model.py:flat",
        test="test: {dataset: ./data.py:tensors, transform: []}",
        **images(project, f"[{SCALED}]"),
    )
    assert task.train.transform is not None
    assert task.test_split().transform is None
    (batch,) = read_batches(task.test_split(), np.array([5]), 1)
    assert batch.inputs.tolist() == [[5.0] * 4]


# Devices


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool) -> None:
    """Make torch say that the machine has so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "expected"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 2, False, "cuda"),
        ("auto", 1, True, "cuda"),
        ("auto", 0, True, "mps"),
        ("cpu", 2, True, "cpu"),
        ("cuda", 1, False, "cuda"),
        ("cuda:0", 1, False, "cuda:0"),
        ("cuda:1", 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
    ],
)
def test_a_device_that_is_there_is_taken(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: int, mps: bool, expected: str
) -> None:
    machine(monkeypatch, cuda, mps)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "cuda", "mps"), [("cuda", 0, True), ("cuda:0", 0, False), ("cuda:2", 2, False), ("mps", 2, False)]
)
def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, name: str, cuda: int, mps: bool) -> None:
    machine(monkeypatch, cuda, mps)
    with pytest.raises(InfluenceError) as caught:
        choose_device(name, "influence.yaml:7")
    assert caught.value.message.startswith(f"influence.yaml:7: there is no {name} ")
    assert "device: auto" in caught.value.hint


def test_a_device_that_is_not_there_is_told_at_its_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0, False)
    assert "there is no cuda:3 here" in refused(project, line=4, extra="device: cuda:3").message


def test_a_loss_with_tensors_of_its_own_is_moved_with_the_model(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The device of tensors without data stands in for a GPU: what stays behind on the CPU is seen.
    (project / "losses.py").write_text(LOSSES)
    monkeypatch.setattr("influence_cli.model.task.choose_device", lambda *_: torch.device("meta"))
    task = load(project, extra="loss: {factory: ./losses.py:Weighted, args: {weights: [2.0, 1.0, 4.0]}}")
    assert next(task.model.parameters()).device.type == "meta"
    assert isinstance(task.loss, nn.Module)
    assert {buffer.device.type for buffer in task.loss.buffers()} == {"meta"}
