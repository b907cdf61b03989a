"""Every config under configs/ says how it is run and checks on the data that it names."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command, shared, unpack

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
# CIFAR-10 lies here as mosaics of 100 × 100 images; torchvision's class wants its original pickles.
MOSAICS = """
import numpy as np
from PIL import Image

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class Cifar10:
    classes = CLASSES

    def __init__(self, files, labels, count):
        tiles = [np.asarray(Image.open(file)).reshape(100, 32, 100, 32, 3).swapaxes(1, 2) for file in files]
        self.images = np.concatenate(tiles).reshape(-1, 32, 32, 3)[:count]
        self.targets = np.load(labels)[:count].astype(int).tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), self.targets[index]
"""


def untrained(folder: Path, factory: str, files: list[str], **args: int) -> None:
    """Save checkpoints of seeded, untrained models where a config expects trained ones."""
    from influence_cli.user_code import import_object

    (folder / "runs").mkdir(exist_ok=True)
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        torch.save(import_object(factory, folder, "test")(**args).state_dict(), folder / file)


def lay_out(name: str, folder: Path, mnist: Path) -> list[str]:
    """Put data and checkpoints where a config looks for them; give the overrides that it then needs."""
    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.h5", "data", "__pycache__"))
    if name == "mnist_softmax.yaml":
        (folder / "data").symlink_to(mnist)
        untrained(folder, "./models.py:softmax_regression", ["mnist_softmax.pt"])
    elif name == "mnist_svm.yaml":
        (folder / "data").symlink_to(mnist)
        untrained(folder, "./svm.py:linear_svm", ["mnist_svm.pt"])
    elif name == "ensemble.yaml":
        from torchvision.datasets import FashionMNIST

        (folder / "data").mkdir()
        unpack(folder / "data", shared("fashion-mnist") / "FashionMNIST", FashionMNIST)
        untrained(folder, "./models.py:softmax_regression", [f"runs/seed{seed}.pt" for seed in range(3)])
    elif name == "cifar10_resnet20.yaml":
        shutil.copyfile(shared("weights") / "resnet20-12fca82f.th", folder / "resnet20-12fca82f.th")
        (folder / "mosaics.py").write_text(MOSAICS)
        cifar = shared("cifar10")
        return [
            "train.dataset=./mosaics.py:Cifar10",
            f"train.args={{files: ['{cifar}/data_batch_1.webp'], labels: '{cifar}/train_labels.npy', count: 1000}}",
            "test.dataset=./mosaics.py:Cifar10",
            f"test.args={{files: ['{cifar}/test_batch.webp'], labels: '{cifar}/test_labels.npy', count: 1000}}",
        ]
    else:
        (folder / "data").symlink_to(shared("hymenoptera"))
        untrained(folder, "torchvision.models.resnet18", ["runs/best.pt"], num_classes=2)
    return []


def test_there_are_configs() -> None:
    assert len(NAMES) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_is_the_command_that_runs_it(name: str) -> None:
    first = (CONFIGS / name).read_text().splitlines()[0]
    assert first.startswith("# influence ")
    assert first.endswith(f" -c configs/{name}")


@pytest.mark.parametrize(
    "name",
    [
        # Forward and backward of 400 photos through all of a ResNet-18: minutes on one core.
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("imagefolder_all_layers.yaml", "gradient_similarity.yaml")
        else name
        for name in NAMES
    ],
)
def test_check_accepts_it(influence: Command, tmp_path: Path, mnist: Path, name: str) -> None:
    overrides = [word for text in lay_out(name, tmp_path, mnist) for word in ("-s", text)]
    done = influence("check", "-c", name, *overrides, cwd=tmp_path)
    found = {row["item"]: row["value"] for row in map(json.loads, done.out.splitlines())}
    assert found["parameters tracked"] > 0
    assert found["store size, at most"] > 0
    if name == "cifar10_resnet20.yaml":
        # The checkpoint's source states 91.73% on the whole test set; its training set it knows nearly by heart.
        assert found["training accuracy"] > 0.95
        assert found["test accuracy"] > 0.88


def test_the_training_that_a_config_names_reaches_a_minimum(
    influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 80 images: the whole of MNIST takes a minute."""
    import torchvision.datasets

    from influence_cli.demo.project import read_images

    images, labels = read_images()

    class Few:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            self.data, self.targets = torch.from_numpy(images[:80].copy()), torch.from_numpy(labels[:80])

    monkeypatch.setattr(torchvision.datasets, "MNIST", Few)
    monkeypatch.syspath_prepend(str(CONFIGS))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    from models import train_softmax_regression

    model = train_softmax_regression("nowhere").double()
    x, y = torch.from_numpy(images[:80] / 255.0), torch.from_numpy(labels[:80])
    loss = torch.nn.functional.cross_entropy(model(x), y) + 0.005 * sum(p.square().sum() for p in model.parameters())
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert float(torch.cat([slope.flatten() for slope in slopes]).norm()) < 1e-5
