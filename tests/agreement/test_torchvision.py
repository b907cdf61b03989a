"""Every classifier of torchvision: `check` passes, and example gradients are a for-loop of autograd's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models
from PIL import Image
from torch import Tensor, nn

from influence_cli.config.load import load_config
from influence_cli.data.batches import read_batches
from influence_cli.data.datasets import load_split
from influence_cli.demo.project import read_images
from influence_cli.model.network import track
from influence_cli.model.task import load_tasks
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from influence_cli.passes.probe import few_of, look
from tests.conftest import Command, shared

NAMES = torchvision.models.list_models(module=torchvision.models)
CLASSES = 4
# Up to 12 M parameters and a few seconds, of siblings the smallest; the rest is slow.
FAST = (
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "squeezenet1_1",
)
# The transformers of the list are all large: the same code with fewer and narrower layers is not.
SMALL = {
    "VisionTransformer": {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 32,
        "mlp_dim": 64,
    },
    "SwinTransformer": {
        "patch_size": [4, 4],
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [4, 4],
    },
    "MaxVit": {
        "input_size": [32, 32],
        "stem_channels": 8,
        "partition_size": 4,
        "block_channels": [16, 32],
        "block_layers": [1, 1],
        "head_dim": 8,
        "stochastic_depth_prob": 0.2,
    },
}
# Pixels, where 32 are too few for the architecture, or for more than one window or patch.
SIZES = {
    "alexnet": 64,
    "efficientnet_v2_": 64,
    "inception_v3": 75,
    "maxvit_t": 224,
    "swin_": 64,
    "vit_b_32": 64,
    "vit_h_14": 28,
    "vit_l_32": 64,
}
CONFIG = """
model:
  factory: torchvision.models.{name}
  args: {args}
  checkpoint: model.pt
train:
  dataset: torchvision.datasets.ImageFolder
  args: {{root: train}}
  transform: [ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}, {{Normalize: {{mean: [0.3], std: [0.3]}}}}]
test: {{dataset: torchvision.datasets.ImageFolder, args: {{root: test}}}}
"""
CIFAR10 = """
import numpy as np
from PIL import Image


class Cifar10:
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()

    def __init__(self, file, labels, count):
        tiles = np.asarray(Image.open(file)).reshape(100, 32, 100, 32, 3).swapaxes(1, 2)
        self.images = tiles.reshape(-1, 32, 32, 3)[:count].copy()
        self.targets = np.load(labels)[:count].astype(int).tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), self.targets[index]
"""
RESNET18 = """
model: {{factory: torchvision.models.resnet18, args: {{num_classes: 10}}, checkpoint: model.pt}}
train:
  dataset: ./data.py:Cifar10
  args: {{file: {folder}/data_batch_1.webp, labels: {folder}/train_labels.npy, count: {count}}}
  transform: [ToImage, {{ToDtype: {{dtype: float32, scale: true}}}}, {{Normalize: {{mean: [0.5], std: [0.25]}}}}]
test:
  dataset: ./data.py:Cifar10
  args: {{file: {folder}/test_batch.webp, labels: {folder}/test_labels.npy, count: 20}}
"""
# A process inherits the peak of the one that starts it: the one here is small, whatever the tests before took.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit, file=sys.stderr)
sys.exit(code)
"""
LARGE = (pytest.mark.slow, pytest.mark.timeout(1800))
CASES = [pytest.param(name, marks=() if name in FAST else LARGE) for name in NAMES]


def image_size(name: str) -> int:
    """Give the smallest image, or nearly, that the architecture takes."""
    return next((size for start, size in SIZES.items() if name.startswith(start)), 32)


def arguments(name: str) -> dict[str, object]:
    """Give the arguments of the factory; the auxiliary outputs of GoogLeNet and Inception stay, out of use."""
    size = image_size(name)
    if name in ("googlenet", "inception_v3"):
        return {"num_classes": CLASSES, "init_weights": False}
    if name.startswith("vit_"):
        return {"num_classes": CLASSES, "image_size": size}
    if name.startswith("maxvit_"):
        return {"num_classes": CLASSES, "input_size": [size, size]}
    return {"num_classes": CLASSES}


def unsettle(model: nn.Module, inputs: Tensor) -> None:
    """Move everything that starts at 0, 1 or nearly (biases, norms, scales, heads, running statistics) away from it.

    The running statistics become those of a few images, disturbed, and the outputs small numbers: a signal that dies
    on the way, or drowns the softmax, would test nothing.
    """
    modules = list(model.eval().modules())
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    last = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape) or not parameter.any():
                parameter.add_(torch.rand_like(parameter), alpha=0.2)
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        if norms:
            model(inputs)
        for norm in norms:
            norm.eval()
            variance = norm.running_var
            variance.clamp_(min=0.1 * float(variance.mean())).pow_(0.75).mul_(torch.rand_like(variance).add_(0.5))
            norm.running_mean.add_(torch.randn_like(variance) * variance.sqrt(), alpha=0.2)
        seen: list[Tensor] = []
        handle = last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
        model(inputs)
        handle.remove()
        scale = max(1.0, float(seen[0].std()))
        last.weight.div_(scale)
        # SqueezeNet has a ReLU behind its last layer: half of it must stay alive.
        if last.bias is not None:
            last.bias.copy_((last.bias - seen[0].transpose(0, 1).flatten(1).mean(dim=1)) / scale + 0.5)


def write_project(folder: Path, name: str, args: dict[str, object], model: nn.Module, size: int) -> None:
    """Write 8 + 4 images of the demo, a config and a checkpoint of random weights."""
    images, _ = read_images()
    for position in range(12):
        path = folder / ("train" if position < 8 else "test") / f"class{position % CLASSES}" / f"{position}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[position]).convert("RGB").resize((size, size)).save(path)
    (folder / "influence.yaml").write_text(CONFIG.format(name=name, args=json.dumps(args)))
    shown = torch.from_numpy(images[:8]).float()[:, None].expand(-1, 3, -1, -1) / 255
    unsettle(model, (nn.functional.interpolate(shown, size=(size, size)) - 0.3) / 0.3)
    torch.save(model.state_dict(), folder / "model.pt")


def test_every_model_is_here() -> None:
    marked = {name for case in CASES for name in case.values if case.marks}
    assert len(NAMES) > 60
    assert marked | set(FAST) == set(NAMES)
    assert not marked & set(FAST)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick("mobilenet_v3_small")
def test_check_passes_and_gradients_equal_autograd(influence: Command, tmp_path: Path, name: str) -> None:
    args, size = arguments(name), image_size(name)
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **args)
    checked(influence, tmp_path, name, args, model, size)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_small_transformers_equal_autograd(influence: Command, tmp_path: Path, name: str) -> None:
    args = {"num_classes": CLASSES, **SMALL[name]}
    torch.manual_seed(0)
    checked(influence, tmp_path, name, args, getattr(torchvision.models, name)(**args), 32)


def checked(influence: Command, folder: Path, name: str, args: dict[str, object], model: nn.Module, size: int) -> None:
    """Write a project, run check on it, and hold two of its example gradients against autograd."""
    write_project(folder, name, args, model, size)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    del model
    done = influence("check", cwd=folder)
    found = {row["item"]: row["value"] for row in map(json.loads, done.out.splitlines())}
    assert found["training examples"] == 8
    assert found["parameters tracked"] == numbers
    assert found["parameters left out"] == 0
    assert str(found["example gradients"]).startswith("layer pass")
    assert 0 < found["mean training loss"] < 10

    task = load_tasks(load_config(folder / "influence.yaml"))[0]
    batch = few_of(look(task))
    network = make_network(track(task.model, task.loss, ["*"], "test"), batch.inputs)
    assert not network.obstacle
    inputs, targets = batch.inputs[:2], batch.targets[:2]
    grads, losses, _ = example_gradients(network, inputs, targets)
    alone = torch.cat([task.loss(task.model(x[None]), y[None]) for x, y in zip(inputs, targets, strict=True)])
    torch.testing.assert_close(losses, alone.detach(), rtol=1e-4, atol=1e-5)
    # Autograd example by example, of one forward: in another, rounding may put a ReLU on the other side of its kink.
    truths = task.loss(task.model(inputs), targets)
    parameters = list(network.parameters().values())
    for row, truth in zip(grads, truths, strict=True):
        parts = torch.autograd.grad(truth, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        norms = [float(part.norm()) for part in parts]
        errors = [
            float((row[network.slots[key]] - part.reshape(-1)).norm())
            for key, part in zip(network.names, parts, strict=True)
        ]
        whole = math.hypot(*norms)
        assert whole > 1e-3
        assert math.hypot(*errors) <= 1e-5 * whole
        for key, error, norm in zip(network.names, errors, norms, strict=True):
            assert error <= 1e-5 * max(norm, 1e-4 * whole), key


@pytest.mark.parametrize(
    ("count", "steps", "overrides", "most"),
    [
        # Wide layers take minutes for their eigenvectors, however few the images.
        pytest.param(
            64,
            4,
            {"gradients.layers": ["conv1", "bn1", "layer1", "fc"]},
            3e9,
            id="first-layers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            64,
            4,
            {"curvature.method": "identity", "gradients.store_dtype": "int8", "gradients.block": 8},
            3e9,
            id="raw-gradients",
            marks=pytest.mark.slow,
        ),
        pytest.param(2000, 60, {}, 8e9, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(4 * 3600)]),
    ],
)
def test_resnet18_runs_within_its_memory(
    tmp_path: Path, count: int, steps: int, overrides: dict[str, object], most: float
) -> None:
    """On CIFAR-10: the store, a ranking and the likely mislabels, each a process of its own."""
    write_resnet18(tmp_path, count, steps)
    words = [word for key, value in overrides.items() for word in ("-s", f"{key}={json.dumps(value)}")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    by_store = ("mislabels", "--all", "--signal", "self-influence")
    for command in (("gradients",), ("rank", "0", "--all"), by_store):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, sys.executable, "-m", "influence_cli", *command, *words],
            cwd=tmp_path,
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stderr.split()[-1]) <= most
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert command == ("gradients",) or sorted(row["index"] for row in rows) == list(range(count))


def write_resnet18(folder: Path, count: int, steps: int) -> None:
    """Write a project of CIFAR-10's first images and a ResNet-18 that was trained on them for a few steps of Adam."""
    source = shared("cifar10")
    (folder / "data.py").write_text(CIFAR10)
    (folder / "influence.yaml").write_text(RESNET18.format(folder=source, count=count))
    config = load_config(folder / "influence.yaml")
    train = load_split(config, "train", config.train)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = next(read_batches(train, np.arange(64 * step, 64 * step + 64) % count, 64))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
