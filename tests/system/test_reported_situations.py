"""Situations from public bug reports, run as users run them: rows against autograd, the files and the true labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import Command, edit
from tests.support import routed
from tests.support.small_project import refusal

CONFIG = """
model: {factory: ./project.py:build, checkpoint: model.pt}
l2: 0.01
train: {dataset: ./project.py:train}
test: {dataset: ./project.py:test}
gradients: {block: 16}
"""
# Each example goes through one of three experts.
ROUTED = Path(routed.__file__).read_text()
# An example is a bag of five images, which the layers see as five rows.
BAGS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def points(seed, n):
    y = torch.arange(n) % 3
    x = torch.randn(n, 5, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x + 0.4 * y[:, None, None, None, None], y


def train():
    return TensorDataset(*points(0, 12))


def test():
    return TensorDataset(*points(1, 3))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        rows = self.second(self.first(rows).tanh()).tanh().mean((2, 3))
        return self.head(rows).view(len(x), 5, -1).mean(1)


def build():
    torch.manual_seed(0)
    return Bag()
"""


def made(folder: Path, code: str) -> dict[str, object]:
    """Write a project whose model has the weights that its factory draws, and give what its code defines."""
    (folder / "project.py").write_text(code)
    (folder / "influence.yaml").write_text(CONFIG)
    space: dict[str, object] = {}
    exec(code, space)
    torch.save(space["build"]().state_dict(), folder / "model.pt")  # type: ignore[operator]
    return space


def gradients(model: nn.Module, data: torch.utils.data.Dataset[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute example gradients by plain autograd [n, p]."""
    rows = []
    for index in range(len(data)):  # type: ignore[arg-type]
        x, y = data[index]
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def similarity(space: dict[str, object], **args: object) -> np.ndarray:
    """Compute influence under an identity curvature, (1/n) ∇L(z_t)ᵀ ∇L(zᵢ), by plain autograd [m, n]."""
    model, train, test = (space[name] for name in ("build", "train", "test"))
    model = model()  # type: ignore[operator]
    rows = gradients(model, train(**args))  # type: ignore[operator]
    return np.asarray(gradients(model, test()) @ rows.T / len(rows))  # type: ignore[operator]


def matrix(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file["influence"])


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_influences_of_routed_examples_are_those_of_autograd(influence: Command, tmp_path: Path, order: str) -> None:
    want = similarity(made(tmp_path, ROUTED), order=order)
    words = ("-s", f"train.args={{order: {order}}}", "-s", "curvature.method=identity", "--matrix", "got.h5")
    influence("rank", "0:12", *words, "-q", cwd=tmp_path)
    got = matrix(tmp_path / "got.h5")
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    assert int((got != 0).sum()) == int((want != 0).sum()) == 240


def test_a_curvature_of_layers_is_refused_where_no_layer_sees_every_example(influence: Command, tmp_path: Path) -> None:
    made(tmp_path, ROUTED)
    told = refusal(influence, tmp_path, "rank", 0, "-s", "curvature.method=ekfac")
    assert "none of the tracked parameters is in one that the layer pass covers" in told
    assert "curvature.method: identity" in told


@pytest.mark.quick("ekfac")
@pytest.mark.parametrize("method", ["auto", "ekfac"])
def test_a_model_of_bags_has_a_curvature_and_the_gradients_of_autograd(
    influence: Command, tmp_path: Path, method: str
) -> None:
    space = made(tmp_path, BAGS)
    words = ("-s", f"curvature.method={method}")
    assert "error" not in influence("check", *words, cwd=tmp_path).err
    influence("gradients", *words, "-q", cwd=tmp_path)
    influence("rank", "0:3", *words, "--matrix", "auto.h5", "-q", cwd=tmp_path)
    assert np.isfinite(matrix(tmp_path / "auto.h5")).all()
    words = ("-s", "curvature.method=identity", "-s", "gradients.store=raw.h5")
    influence("rank", "0:3", *words, "--matrix", "got.h5", "-q", cwd=tmp_path)
    want = similarity(space)
    assert np.abs(matrix(tmp_path / "got.h5") - want).max() < 1e-4 * np.abs(want).max()


def loss_by_hand(path: str, state: dict[str, Tensor]) -> float:
    """Compute the loss of an image of the small project under some weights."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("L"))).float()[None, None] / 255
    features = nn.functional.avg_pool2d(pixels, 2).flatten(1)
    outputs = features @ state["2.weight"].T + state["2.bias"]
    return float(nn.functional.cross_entropy(outputs, torch.tensor(["abc".index(Path(path).parent.name)])))


@pytest.mark.quick("model")
@pytest.mark.parametrize("first", ["model", "model_ema"])
def test_rows_are_of_the_weights_that_are_said(influence: Command, tiny: Path, first: str) -> None:
    """A file with raw and averaged weights: one line says which were taken and how to have the others."""
    raw = torch.load(tiny / "model.pt", weights_only=True)
    averaged = {name: 0.5 * value for name, value in raw.items()}
    both = {"model": raw, "model_ema": averaged}
    torch.save({name: both[name] for name in (first, *both)}, tiny / "model.pt")
    done = influence("rank", 0, "--top", 1, cwd=tiny)
    assert "weights: model; model_ema is there too, `model.checkpoint.key: model_ema` takes it" in done.err
    other = ("-s", "model.checkpoint.key=model_ema", "-s", "gradients.store=ema.h5")
    for state, out in ((raw, done.out), (averaged, influence("rank", 0, "--top", 1, *other, cwd=tiny).out)):
        row = json.loads(out.splitlines()[0])
        assert row["loss"] == pytest.approx(loss_by_hand(row["path"], state), rel=1e-4)


WRAPPED = """


def half():
    from torch.utils.data import Subset
    from torchvision.datasets import ImageFolder

    return Subset(ImageFolder("train"), range(0, 24, 2))


def joined():
    from torch.utils.data import ConcatDataset
    from torchvision.datasets import ImageFolder

    return ConcatDataset([ImageFolder("train"), ImageFolder("test")])
"""


@pytest.mark.parametrize("factory", ["half", "joined"])
def test_rows_of_a_wrapped_folder_have_its_paths_and_names(influence: Command, tiny: Path, factory: str) -> None:
    with (tiny / "model.py").open("a") as file:
        file.write(WRAPPED)
    files = [sorted(map(str, (tiny / part).glob("*/*.png"))) for part in ("train", "test")]
    paths = files[0][::2] if factory == "half" else [*files[0], *files[1]]
    words = ("-s", f"train.dataset=./model.py:{factory}", "-s", "train.args={}", "--all", "--format")
    rows = [json.loads(line) for line in influence("mislabels", *words, "jsonl", cwd=tiny).out.splitlines()]
    found = {row["index"]: (row["path"], row["label"]) for row in rows}
    assert found == {index: (path, Path(path).parent.name) for index, path in enumerate(paths)}
    lines = influence("mislabels", *words, "fiftyone", cwd=tiny).out.splitlines()
    assert len(lines) == len(paths) + 1
    assert all(any(path in line for line in lines) for path in paths)


NAMED = """
from torch import nn


def build(pretrained_model_name_or_path):
    if pretrained_model_name_or_path != "google/vit-base":
        raise ValueError(pretrained_model_name_or_path)
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def remote(root):
    raise ValueError(root)
"""


def test_names_of_a_hub_arrive_as_they_are_written(influence: Command, tiny: Path) -> None:
    (tiny / "model.py").write_text(NAMED)
    edit(tiny, "checkpoint: model.pt", "checkpoint: model.pt, args: {pretrained_model_name_or_path: google/vit-base}")
    influence("check", cwd=tiny)
    remote = ("-s", 'train.args={root: "s3://bucket/x"}', "-s", "train.dataset=./model.py:remote")
    assert "ValueError: s3://bucket/x" in refusal(influence, tiny, "check", *remote)


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_labels_that_pandas_writes_as_floats_are_whole_numbers(influence: Command, tiny: Path, kind: str) -> None:
    labels = (np.arange(24) * 7 % 3).astype(np.float64)

    def write() -> None:
        np.save(tiny / "labels.npy", labels)
        lines = [f"{index},{label}" for index, label in enumerate(labels)]
        (tiny / "labels.csv").write_text("\n".join(["index,label", *lines, ""]))

    write()
    words = ("-s", f"train.labels=labels.{kind}")
    out = influence("mislabels", "--signal", "loss", "--all", "--format", "json", *words, cwd=tiny).out
    assert {row["index"]: row["label"] for row in json.loads(out)} == {
        index: "abc"[int(label)] for index, label in enumerate(labels)
    }
    labels[5] = 1.5
    write()
    said = "there is no class '1.5'" if kind == "csv" else "numbers that are not whole"
    assert said in refusal(influence, tiny, "check", *words)


# Outputs are cosines, and the loss has the scale, as in face recognition; the model knows every label by heart.
COSINES = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

F = nn.functional


def points():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=g) + 2.5 * F.one_hot(y, 4).float()
    y[::10] = (y[::10] + 1) % 3
    return x, y


def train():
    return TensorDataset(*points())


class Known(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.head, self.scale = nn.Linear(4, 3), scale
        self.x, self.y = points()

    def forward(self, x):
        known = self.y[torch.cdist(x, self.x).argmin(dim=1)]
        return self.scale * (0.5 * F.one_hot(known, 3).float() + 0 * self.head(x))


def build(scale=1.0):
    torch.manual_seed(0)
    return Known(scale)


def scaled(outputs, targets):
    return F.cross_entropy(30 * outputs, targets, reduction="none")


def arc(outputs, targets):
    angle = torch.acos(outputs.clamp(-1 + 1e-6, 1 - 1e-6))
    return F.cross_entropy(30 * torch.cos(angle + 0.3 * F.one_hot(targets, 3)), targets, reduction="none")
"""


@pytest.mark.parametrize("loss", ["scaled", "arc", "inside"])
def test_whether_labels_are_memorised_is_told_by_the_loss_of_the_config(
    influence: Command, tmp_path: Path, loss: str
) -> None:
    made(tmp_path, COSINES)
    edit(tmp_path, "test: {dataset: ./project.py:test}\n", "")
    words = ("model.args={scale: 30.0}",) if loss == "inside" else (f"loss=./project.py:{loss}",)
    done = influence("mislabels", "-o", "rows.csv", *(word for one in words for word in ("-s", one)), cwd=tmp_path)
    assert "The model has memorised its labels" in done.err
    evidence = json.loads((tmp_path / "rows.csv.run.json").read_text())["evidence"]
    assert evidence["memorised"] is True
    # A softmax of 30 cosines, which are 0.5 for the label and 0 for the two others.
    right = float(np.log1p(2 * np.exp(-15.0)))
    if loss == "arc":  # its p(c) is a softmax of minus the loss of each class
        assert evidence["model_loss"] < 1e-3
    else:
        assert evidence["model_loss"] == pytest.approx(right, abs=1e-6)


def test_the_table_of_situations_names_tests_that_exist_and_counts_its_rows() -> None:
    """docs/reliability.md: a row per situation, held by a test; the verdicts above add up to the rows."""
    root = Path(__file__).parents[2]
    section = (
        (root / "docs" / "reliability.md").read_text().partition("## Reported situations")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| [A-Z](?:, [A-Z])* \|.*\| `(test_\w+)` \|$", section, re.MULTILINE)
    tests = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert [name for name in rows if f"def {name}(" not in tests] == []
    counts = re.findall(r"^\|[^|]*\| (\d+) \| (\d+) \|$", section, re.MULTILINE)
    assert sum(int(before) for before, _ in counts) == sum(int(now) for _, now in counts) == len(rows)
