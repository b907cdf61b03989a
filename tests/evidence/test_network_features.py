"""Features computed by another network: what is taken of it, what is kept, when it is computed again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from influence_cli.errors import InfluenceError
from influence_cli.evidence.network_features import WIDEST, penultimate
from tests.conftest import Command, edit

OTHER = """
import torch
from pathlib import Path
from torch import nn


class Other(nn.Module):
    def __init__(self, scale, width):
        super().__init__()
        self.body = nn.Linear(3 * 64, width)
        self.head = nn.Linear(width, 5)
        self.scale = scale

    def forward(self, x):
        with Path("calls.txt").open("a") as file:
            file.write(f"{len(x)}\\n")
        return self.head(self.scale * self.body(x.flatten(1)).tanh())


def build(scale=1.0, width=7):
    return Other(scale, width)
"""
TRANSFORM = "[{Resize: {size: [8, 8]}}, ToImage, {ToDtype: {dtype: float32, scale: true}}]"
KEYS = f"factory: ./other.py:build, checkpoint: other.pt, transform: {TRANSFORM}"


def with_network(project: Path, keys: str = KEYS) -> Path:
    """Name another network in a project's config, and save its weights."""
    (project / "other.py").write_text(OTHER)
    scope: dict[str, object] = {}
    exec(OTHER, scope)
    torch.manual_seed(3)
    torch.save(scope["build"]().state_dict(), project / "other.pt")  # type: ignore[operator]
    edit(project, "gradients:", f"evidence: {{features: {{{keys}}}}}\ngradients:")
    return project


@pytest.fixture
def other(project: Path) -> Path:
    return with_network(project)


def computed(project: Path) -> int:
    """Count the examples that the network has seen since the last time."""
    path = project / "calls.txt"
    count = sum(int(line) for line in path.read_text().split()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def expected(project: Path) -> np.ndarray:
    """Compute the features by hand, an image at a time."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    state = torch.load(project / "other.pt")
    rows = []
    for image, _ in ImageFolder(project / "train"):
        x = v2.functional.to_image(v2.functional.resize(image, [8, 8])).float() / 255
        rows.append((state["body.weight"] @ x.flatten() + state["body.bias"]).tanh())
    return torch.stack(rows).numpy()


def test_features_are_computed_once_and_kept_beside_the_store(influence: Command, other: Path) -> None:
    done = influence("mislabels", "--signals", "--format", "json", "--all", cwd=other)
    assert computed(other) == 320
    assert "features build: 320 images, 7 numbers each, computed, kept in influence.build.train.npy" in done.err
    assert np.load(other / "influence.build.train.npy") == pytest.approx(expected(other), abs=1e-5)
    assert not list(other.glob("*.lock"))
    again = influence("mislabels", "--signals", "--format", "json", "--all", cwd=other)
    assert computed(other) == 0
    assert "features build: 320 images, 7 numbers each, from influence.build.train.npy" in again.err
    assert again.out == done.out
    row = json.loads(done.out)[0]
    assert {"signal_readout:build", "signal_neighbours:build"} <= set(row)
    # The same numbers in a file are the same opinions.
    np.save(other / "build.npy", np.load(other / "influence.build.train.npy"))
    edit(other, "evidence: ", "# ")
    of_file = influence("mislabels", "--signals", "--format", "json", "--all", "--features", "build.npy", cwd=other)
    assert of_file.out == done.out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda p: torch.save({k: 2 * v for k, v in torch.load(p / "other.pt").items()}, p / "other.pt"),
            "its weights",
        ),
        (
            lambda p: edit(p, "checkpoint: other.pt", "checkpoint: other.pt, args: {scale: 2}"),
            "its factory, args or code",
        ),
        (lambda p: (p / "other.py").write_text(OTHER.replace(".tanh()", ".sin()")), "its factory, args or code"),
        (lambda p: edit(p, "size: [8, 8]}}, ToImage", "size: [8, 8]}}, RGB, ToImage"), "its transform"),
        (lambda p: Image.new("RGB", (28, 28)).save(next((p / "train").glob("*/*"))), "the images"),
    ],
)
def test_features_of_something_else_are_computed_again(
    influence: Command, other: Path, change: object, what: str
) -> None:
    influence("mislabels", cwd=other)
    computed(other)
    change(other)  # type: ignore[operator]
    done = influence("mislabels", cwd=other)
    assert f"features build: what has changed since they were computed: {what}" in done.err
    assert computed(other) == 320


def test_other_labels_and_exclusions_keep_the_features(influence: Command, other: Path) -> None:
    (other / "exclude.csv").write_text("index\n" + "".join(f"{index}\n" for index in range(20)))
    influence("mislabels", "-s", "train.exclude=exclude.csv", cwd=other)
    assert computed(other) == 300
    np.save(other / "labels.npy", np.roll(np.repeat(np.arange(10), 32), 1))
    influence("mislabels", "-s", "train.labels=labels.npy", cwd=other)
    assert computed(other) == 20  # those that were excluded


def test_a_pass_that_was_cut_off_goes_on(influence: Command, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_cli.evidence import network_features

    monkeypatch.setattr(network_features, "NOTED", 64)
    write = network_features._write
    blocks = []

    def stopping(*words: object) -> None:
        if len(blocks) == 3:
            raise KeyboardInterrupt
        blocks.append(words)
        write(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(network_features, "_write", stopping)
    influence("mislabels", cwd=other, code=130)
    assert computed(other) == 4 * 64
    monkeypatch.setattr(network_features, "_write", write)
    influence("mislabels", cwd=other)
    assert computed(other) == 320 - 3 * 64
    assert np.load(other / "influence.build.train.npy") == pytest.approx(expected(other), abs=1e-5)


@pytest.mark.parametrize("which", ["influence.build.train.npy", "influence.build.train.json"])
def test_a_damaged_file_of_features_is_made_again(influence: Command, other: Path, which: str) -> None:
    influence("mislabels", cwd=other)
    computed(other)
    (other / which).write_bytes(b"\0" * 40)
    done = influence("mislabels", cwd=other)
    assert "influence.build.train.npy cannot be read; they are computed again" in done.err
    assert computed(other) == 320


def test_test_images_have_features_of_their_own(influence: Command, other: Path) -> None:
    influence("mislabels", "--on", "test", cwd=other)
    assert computed(other) == 80
    assert np.load(other / "influence.build.test.npy").shape == (80, 7)
    assert not (other / "influence.build.train.npy").exists()


def test_images_that_cannot_be_read_are_left_out(influence: Command, other: Path) -> None:
    broken = sorted((other / "train").glob("*/*"))[5]
    broken.write_bytes(b"no image")
    assert str(broken.name) in influence("mislabels", cwd=other, code=2).err
    influence("mislabels", "--skip-unreadable", cwd=other)
    kept = np.load(other / "influence.build.train.npy")
    assert np.flatnonzero(np.isnan(kept).any(axis=1)).tolist() == [5]


def test_numbers_that_are_none_are_refused(influence: Command, other: Path) -> None:
    (other / "other.py").write_text(OTHER.replace(".tanh()", ".log()"))
    done = influence("mislabels", "-o", "rows.csv", cwd=other, code=2)
    assert "features build: row 0 (training example 0" in done.err
    assert "and so do 319 more rows" in done.err
    assert not (other / "rows.csv").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("factory: ./other.py:build, checkpoint: other.pt", "./other.py:build has no transform"),
        (f"factory: ./other.py:none, checkpoint: other.pt, transform: {TRANSFORM}", "none"),
        (f"factory: ./other.py:build, checkpoint: none.pt, transform: {TRANSFORM}", "none.pt does not exist"),
        (
            f"factory: ./other.py:build, transform: {TRANSFORM}",
            "evidence.features.factory makes other weights at every",
        ),
        (f"factory: ./other.py:build, checkpoint: model.pt, transform: {TRANSFORM}", "body.weight"),
        (f"factory: ./other.py:build, args: {{size: 3}}, checkpoint: other.pt, transform: {TRANSFORM}", "size"),
        ("factory: ./other.py:build, checkpoint: other.pt, transform: [RandomHorizontalFlip]", "RandomHorizontalFlip"),
        ("factory: ./other.py:build, file: f.npy", "these features have factory and file"),
        ("name: other", "these features have no source"),
        ("file: none.npy", "there is no file"),
        ("file: none.npy, transform: []", "transform has no meaning with file"),
        ("name: 'a b', file: f.npy", "name"),
        ("fil: f.npy", "unknown key 'fil'"),
        ("probabilities: none.npy", "there is no file"),
        (
            f"factory: torch.nn.Flatten, transform: {TRANSFORM}, args: {{start_dim: 0}}",
            "a row of numbers for each image",
        ),
    ],
)
def test_a_network_that_cannot_be_had_is_refused(influence: Command, project: Path, keys: str, message: str) -> None:
    with_network(project, keys)
    before = {path.name for path in project.iterdir()}
    done = influence("mislabels", "-o", "rows.csv", cwd=project, code=2)
    assert message in done.err
    assert "influence.yaml:" in done.err
    assert {path.name for path in project.iterdir()} - before <= {"__pycache__", "calls.txt"}


def test_several_need_names_of_their_own(influence: Command, project: Path) -> None:
    with_network(project)
    edit(project, f"{{{KEYS}}}", f"[{{{KEYS}}}, {{{KEYS}}}]")
    assert "two features have the name build" in influence("mislabels", cwd=project, code=2).err
    edit(project, f"[{{{KEYS}}}, {{{KEYS}}}]", f"[{{{KEYS}}}, {{name: twice, {KEYS}}}]")
    np.save(project / "twice.npy", np.ones((320, 2)) * np.arange(320)[:, None])
    done = influence("mislabels", "--features", "twice.npy", cwd=project, code=2)
    assert "--features: two features have the name twice" in done.err
    row = influence("mislabels", "--signals", "--format", "csv", cwd=project).out.splitlines()[0]
    assert "signal_readout:build,signal_neighbours:build,signal_readout:twice,signal_neighbours:twice" in row


class Returns(nn.Module):
    """A layer and what is made of its output."""

    def __init__(self, layer: nn.Module, then: object = lambda x: x) -> None:
        super().__init__()
        self.layer, self.then = layer, then

    def forward(self, x: Tensor) -> object:
        return self.then(self.layer(x))  # type: ignore[operator]


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
POOLED = X.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("model", "features"),
    [
        (nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(108, 5)), X.flatten(1).tanh()),  # the input of the last layer
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1), nn.Flatten()), POOLED),  # a convolution as the head
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.ReLU()), None),  # not the output of a layer: the output
        (Returns(nn.Identity()), POOLED),  # a map of features
        (Returns(nn.Identity(), lambda x: x.flatten(2).transpose(1, 2)), POOLED),  # tokens
        (Returns(nn.Identity(), lambda x: (x.flatten(1), 1)), X.flatten(1)),
        (Returns(nn.Identity(), lambda x: {"last_hidden_state": x, "pooler_output": x.flatten(1)}), X.flatten(1)),
        (Returns(nn.Identity(), lambda x: SimpleNamespace(image_embeds=x.flatten(1))), X.flatten(1)),
    ],
)
def test_the_features_are_what_comes_before_the_classes(model: nn.Module, features: Tensor | None) -> None:
    wanted = model(X) if features is None else features
    assert penultimate(model.eval(), X, "here").numpy() == pytest.approx(wanted.detach().numpy(), abs=1e-6)


def test_wide_features_are_pooled() -> None:
    wide = penultimate(Returns(nn.Identity(), lambda x: x.flatten(1).repeat(1, 50)), X, "here")
    assert wide.shape[0] == 4
    assert wide.shape[1] <= WIDEST < 50 * 108


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda x: x.sum(), "gives [] for 4 images"),
        (lambda x: x[:2], "for 4 images"),
        (lambda x: x.flatten(1)[:, :1], "too few for features"),
        (lambda x: "features", "returns a str without a tensor of features"),
    ],
)
def test_what_are_no_features_is_refused(then: object, message: str) -> None:
    with pytest.raises(InfluenceError) as error:
        penultimate(Returns(nn.Identity(), then), X, "here")
    assert error.value.message.startswith("here: ")
    assert message in error.value.message
