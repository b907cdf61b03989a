"""Situations of public trackers (docs/situations.md): right numbers, or one line with the cause."""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Command, edit
from tests.support.small_project import refusal

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0d71028bf8b6accdc4ac5b52\nsize 19332096\n"
CLASSES = "dataset: torchvision.datasets.ImageFolder\n  args: {root: %s}"
CONFIG = """
model: {factory: ./project.py:build, args: {kind: KIND}, checkpoint: model.pt}
l2: 0.01
train: {dataset: ./project.py:train, args: {shape: SHAPE}}
test: {dataset: ./project.py:test, args: {shape: SHAPE}}
gradients: {block: 16}
curvature: {method: identity}
"""
PROJECT = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset


def points(seed, n, shape):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) * 3 // n
    return torch.randn(n, *shape, generator=generator) + 0.7 * labels.view(-1, *[1] * len(shape)), labels


def train(shape):
    return TensorDataset(*points(0, 24, shape))


def test(shape):
    return TensorDataset(*points(1, 6, shape))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.head = kind, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        if kind in ("tied", "checkpointed"):
            self.b.weight = self.a.weight
        if kind == "spectral_norm":
            nn.utils.spectral_norm(self.b)
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(self.b)
        if kind == "attention":
            self.b = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        if kind in ("GRU", "LSTM"):
            self.b = getattr(nn, kind)(8, 4, 2, batch_first=True, bidirectional=True, dropout=0.3)

    def block(self, x):
        if self.kind in ("GRU", "LSTM"):
            return self.b(x)[0]
        return torch.tanh(self.b(x))

    def forward(self, x):
        x = torch.tanh(self.a(x))
        if self.kind in ("checkpointed", "reentrant"):
            x = checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")
        elif self.kind == "detached":
            x = checkpoint(self.block, x.detach().requires_grad_(), use_reentrant=True)
        else:
            x = self.block(x)
        return self.head(x.mean(1))


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(F.relu(self.a(x), inplace=True)), inplace=True)
        y = self.b(x)
        y += x
        return self.head(F.relu_(y.mul_(0.5)).mean((2, 3)))


def convolutions(*layers):
    return nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def build(kind):
    torch.manual_seed(0)
    if kind == "inplace":
        return Inplace()
    if kind == "dilated":
        first = nn.Conv2d(2, 4, (4, 2), padding="same")
        return convolutions(first, nn.Tanh(), nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=2))
    if kind == "circular":
        return convolutions(nn.Conv2d(2, 4, 3, padding=(0, 1), padding_mode="circular"))
    if kind == "own_statistics":
        norm = nn.BatchNorm1d(6, track_running_stats=False)
        return nn.Sequential(nn.Flatten(), nn.Linear(40, 6), norm, nn.Linear(6, 3))
    return Net(kind)
"""
IMAGES = ("inplace", "dilated", "circular")


def points_project(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> torch.nn.Module:
    """Write a project with one of the models, and give the model."""
    shape = [2, 7, 6] if kind in IMAGES else [5, 8]
    (folder / "project.py").write_text(PROJECT)
    (folder / "influence.yaml").write_text(CONFIG.replace("KIND", kind).replace("SHAPE", str(shape)))
    names: dict[str, object] = {"__name__": "project"}
    exec(PROJECT, names)
    model: torch.nn.Module = names["build"](kind)  # type: ignore[operator]
    data = {part: names[part](shape) for part in ("train", "test")}  # type: ignore[operator]
    with torch.no_grad():
        model(data["train"].tensors[0])  # statistics of the norms, in training mode
    torch.save(model.state_dict(), folder / "model.pt")
    monkeypatch.setattr(model, "data", data, raising=False)
    return model.eval()


def backward_gradients(model: torch.nn.Module, part: str) -> torch.Tensor:
    """Compute ∇ℓ of each example as training does: one example, ``backward``, the ``grad`` of each parameter."""
    rows = []
    for x, y in model.data[part]:  # type: ignore[index, union-attr]
        model.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]).double())
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "kind",
    [
        "tied",
        "attention",
        pytest.param("spectral_norm", marks=pytest.mark.quick),
        pytest.param("weight_norm", marks=pytest.mark.quick),
        pytest.param("GRU", marks=pytest.mark.quick),
        pytest.param("LSTM", marks=pytest.mark.quick),
        pytest.param("checkpointed", marks=pytest.mark.quick),
        pytest.param("inplace", marks=pytest.mark.quick),
        pytest.param("dilated", marks=pytest.mark.quick),
        pytest.param("circular", marks=pytest.mark.quick),
    ],
)
def test_layers_that_break_other_tools_get_the_gradients_of_training(
    influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = points_project(tmp_path, monkeypatch, kind)
    influence("rank", "0:6", "--matrix", "got.h5", "-q", cwd=tmp_path)
    want = backward_gradients(model, "test") @ backward_gradients(model, "train").T / 24
    with h5py.File(tmp_path / "got.h5") as file:
        got = torch.from_numpy(file["influence"][:]).double()
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch, where nothing needs a gradient
@pytest.mark.parametrize("kind", ["reentrant", "detached"])
def test_a_reentrant_checkpoint_has_no_example_gradients_and_is_refused(
    influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = points_project(tmp_path, monkeypatch, kind)
    model(model.data["train"][0][0][None]).sum().backward()  # type: ignore[index, union-attr]
    assert bool(model.b.weight.grad.any())  # type: ignore[union-attr]
    for command in (("check",), ("rank", 0)):
        said = refusal(influence, tmp_path, *command)
        assert "use_reentrant=True" in said
        assert "use_reentrant=False" in said


def test_batch_statistics_are_named_where_one_example_alone_fails(
    influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points_project(tmp_path, monkeypatch, "own_statistics")
    said = refusal(influence, tmp_path, "mislabels")
    assert "depends on the rest of its batch" in said
    assert "transform" not in said


@pytest.mark.parametrize(
    ("content", "suffix", "cause", "way"),
    [
        (POINTER.encode(), ".pt", "pointer of Git LFS", "git lfs pull"),
        (POINTER.encode(), ".safetensors", "pointer of Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html><title>Virus scan warning</title>", ".pt", "a web page", "download it again"),
        (None, ".pt", "cut short", "copy or download it again"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(
    influence: Command, tiny: Path, content: bytes | None, suffix: str, cause: str, way: str
) -> None:
    whole = (tiny / "model.pt").read_bytes()
    (tiny / f"other{suffix}").write_bytes(whole[: len(whole) // 2] if content is None else content)
    said = refusal(influence, tiny, "check", "-s", f"model.checkpoint=other{suffix}")
    assert cause in said
    assert way in said
    assert "torch.save" not in said


def test_a_pointer_among_the_images_is_called_a_pointer(influence: Command, tiny: Path) -> None:
    (tiny / "train" / "b" / "004.png").write_text(POINTER)
    said = refusal(influence, tiny, "check")
    assert "004.png" in said
    assert "git lfs pull" in said


def test_other_channels_are_not_another_size(influence: Command, tiny: Path) -> None:
    path = tiny / "train" / "b" / "004.png"
    with Image.open(path) as image:
        image.convert("CMYK").save(path.with_suffix(".tif"))
    path.unlink()
    (tiny / "data.py").write_text(
        "from PIL import Image\nfrom torchvision.datasets import ImageFolder\n\n\n"
        "def make(root):\n    return ImageFolder(root, loader=Image.open)\n"
    )
    text = (tiny / "influence.yaml").read_text().replace("torchvision.datasets.ImageFolder", "./data.py:make")
    (tiny / "influence.yaml").write_text(text.replace("{Grayscale: {num_output_channels: 1}}, ", ""))
    said = refusal(influence, tiny, "check")
    assert "004.tif" in said
    assert "add RGB as the first step" in said
    assert "Resize" not in said


TIED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.pool = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.pool(x))))))


def build(tie=True):
    return Net(tie)
"""


def tied(folder: Path, *, tie: bool) -> torch.nn.Module:
    (folder / "model.py").write_text(TIED)
    names: dict[str, object] = {"__name__": "tied"}
    exec(TIED, names)
    torch.manual_seed(0)
    model: torch.nn.Module = names["build"](tie)  # type: ignore[operator]
    return model


def test_tied_weights_need_one_name_in_a_file(influence: Command, tiny: Path) -> None:
    from safetensors.torch import save_model

    model = tied(tiny, tie=True)
    save_model(model, str(tiny / "tied.safetensors"))
    arguments = ("-s", "model.checkpoint=tied.safetensors", "--format", "json", "--all")
    rows = json.loads(influence("mislabels", *arguments, cwd=tiny).out)
    row = next(row for row in rows if row["path"].endswith("a/000.png"))
    with Image.open(tiny / "train" / "a" / "000.png") as image:
        pixels = torch.from_numpy(np.asarray(image).copy()).float()[None, None] / 255
    loss = torch.nn.functional.cross_entropy(model(pixels), torch.tensor([0]))
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # Code that does not tie them needs both.
    said = refusal(influence, tiny, "check", *arguments[:2], "-s", "model.args={tie: false}")
    assert "b.weight" in said


def test_weights_that_differ_are_not_tied(influence: Command, tiny: Path) -> None:
    torch.save(tied(tiny, tie=False).state_dict(), tiny / "model.pt")
    said = refusal(influence, tiny, "check")
    assert "a.weight and b.weight differ" in said
    assert "do not tie them" in said


def test_names_that_only_look_alike_are_said_to_be_written_differently(influence: Command, tiny: Path) -> None:
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (tiny / part / "b").rename(tiny / part / unicodedata.normalize(form, "bé"))
    assert "Unicode" in refusal(influence, tiny, "check")


def losses(influence: Command, project: Path, *words: str) -> dict[tuple[str, str], float]:
    """Rank all training images for the first test image; give the influence by file name and label."""
    done = influence("rank", 0, "--all", "--format", "csv", *words, cwd=project)
    return {
        (Path(row["path"]).name, row["label"]): float(row["influence"]) for row in csv.DictReader(done.out.splitlines())
    }


@pytest.mark.parametrize(
    "situation",
    [
        "links",
        pytest.param("test lacks a class", marks=pytest.mark.quick),
        pytest.param("compiled inside", marks=pytest.mark.quick),
    ],
)
def test_what_changes_nothing_changes_no_number(influence: Command, tiny: Path, situation: str) -> None:
    right = losses(influence, tiny)
    (tiny / "influence.h5").unlink()
    if situation == "links":  # the class is the folder of the link, not of the file that it leads to
        for part in ("train", "test"):
            edit(tiny, CLASSES % part, f"folder: {part}")
            (tiny / "all" / part).mkdir(parents=True)
            for path in sorted((tiny / part).rglob("*.png")):
                path.symlink_to(path.rename(tiny / "all" / part / path.name))
    elif situation == "test lacks a class":  # c is number 1 in the test set, and 2 in the training set
        for path in (tiny / "test" / "b").iterdir():
            path.unlink()
        (tiny / "test" / "b").rmdir()
    else:  # torch.compile of a layer inside a LightningModule
        state = torch.load(tiny / "model.pt", weights_only=True)
        named = {f"model._orig_mod.2._orig_mod.{name.partition('.')[2]}": value for name, value in state.items()}
        torch.save({"state_dict": named}, tiny / "model.pt")
    assert losses(influence, tiny) == pytest.approx(right, rel=1e-4)
    if situation == "test lacks a class":
        done = influence("rank", 2, "--top", 1, "--format", "csv", cwd=tiny)
        assert [row["test_label"] for row in csv.DictReader(done.out.splitlines())] == ["c", "c"]


def test_sixteen_bits_are_not_clipped_to_white(influence: Command, tiny: Path) -> None:
    path = tiny / "train" / "b" / "004.png"
    with Image.open(path) as image:
        Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(path)
    assert "do not fit in 8 bits" in refusal(influence, tiny, "check")


@pytest.mark.parametrize(("label", "runs"), [("np.array([y])", True), ("np.eye(3, dtype=np.int64)[y]", False)])
def test_labels_in_a_vector(influence: Command, tiny: Path, label: str, runs: bool) -> None:
    right = sorted(losses(influence, tiny).values())
    (tiny / "influence.h5").unlink()
    (tiny / "data.py").write_text(
        "from pathlib import Path\n\nimport numpy as np\nfrom PIL import Image\n\n\nclass Photos:\n"
        "    def __init__(self, root):\n"
        "        self.files = sorted(Path(root).rglob('*.png'))\n"
        "        self.labels = np.stack([self.label(i) for i in range(len(self.files))])\n\n"
        "    def label(self, i):\n"
        "        y = 'abc'.index(self.files[i].parent.name)\n"
        f"        return {label}\n\n"
        "    def __len__(self):\n        return len(self.files)\n\n"
        "    def __getitem__(self, i):\n        return Image.open(self.files[i]).convert('L'), self.label(i)\n"
    )
    text = (tiny / "influence.yaml").read_text().replace("torchvision.datasets.ImageFolder", "./data.py:Photos")
    (tiny / "influence.yaml").write_text(text)
    if runs:
        done = influence("rank", 0, "--all", "--format", "csv", cwd=tiny)
        got = sorted(float(row["influence"]) for row in csv.DictReader(done.out.splitlines()))
        assert got == pytest.approx(right, rel=1e-4)
    else:
        assert "3 labels at once" in refusal(influence, tiny, "check")
