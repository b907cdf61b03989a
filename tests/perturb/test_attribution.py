"""Pixels: each method against its definition, bounded batches, the picture, and the page that shows it."""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from influence_cli.errors import InfluenceError
from influence_cli.model.task import Task
from influence_cli.perturb.attribution import COPIES, NUMBERS, attribute, check_attribution, last_convolution, patch
from influence_cli.pictures import overlay, scaled
from tests.conftest import Command, edit


class Backwards(nn.Module):
    """Runs its convolutions in another order than it defines them, with a ReLU in place after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(6, 5, 3, stride=2)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.first(x)))
        return self.head(self.relu(self.second(x)).mean(dim=(2, 3)))


def task_of(model: nn.Module) -> Task:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    rest = {"n": 1, "checkpoint": Path("model.pt"), "device": torch.device("cpu"), "seed": 0}
    data = {"train": None, "test": None, "classes": tuple("abcd"), "convex_loss": True, "loss_name": "cross_entropy"}
    return Task(model=model.eval(), loss=loss, **rest, **data)  # type: ignore[arg-type]


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    model = Backwards()
    nn.init.normal_(model.norm.running_mean)
    with torch.no_grad():
        model.head.weight.mul_(8)
    return task_of(model)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(3, 18, 26, generator=torch.Generator().manual_seed(1))


def f(task: Task, inputs: torch.Tensor, target: int) -> torch.Tensor:
    return -task.loss(task.model(inputs), torch.full((len(inputs),), target))


def test_integrated_gradients_are_complete(task: Task, image: torch.Tensor) -> None:
    """Their sum is f(x) − f(x₀)."""
    for target in range(4):
        values = attribute(task, image, target, "integrated-gradients")
        assert values.shape == (18, 26)
        with torch.no_grad():
            difference = float(f(task, image[None], target) - f(task, torch.zeros_like(image)[None], target))
        assert abs(values.sum() - difference) < 0.01 * max(1, abs(difference))
        assert (values > 0).any()
        assert (values < 0).any()


def test_integrated_gradients_of_a_linear_function_are_weight_times_input(image: torch.Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), 4, bias=False))
    task = task_of(model)
    linear = Task(**{**vars(task), "loss": lambda outputs, targets: -outputs[range(len(targets)), targets]})
    expected = (model[1].weight[2].reshape(image.shape) * image).sum(dim=0).detach().numpy()
    np.testing.assert_allclose(attribute(linear, image, 2, "integrated-gradients"), expected, rtol=1e-4, atol=1e-6)


def test_occlusion_is_the_loop_over_patches(task: Task, image: torch.Tensor) -> None:
    height, width = patch(image)
    assert (height, width) == (2, 3)
    mean = image.mean(dim=(1, 2), keepdim=True).expand_as(image)
    total, covered = torch.zeros(18, 26, dtype=torch.float64), torch.zeros(18, 26)
    with torch.no_grad():
        whole = f(task, image[None], 1)[0]
        for top in range(0, 18 - height + 1, 1):
            for left in range(0, 26 - width + 1, 1):
                where = (slice(None), slice(top, top + height), slice(left, left + width))
                changed = image.clone()
                changed[where] = mean[where]
                total[where[1:]] += float(whole - f(task, changed[None], 1)[0])
                covered[where[1:]] += 1
    values = attribute(task, image, 1, "occlusion")
    np.testing.assert_allclose(values, (total / covered).numpy(), rtol=1e-3, atol=1e-5)


def test_grad_cam_is_its_formula(task: Task, image: torch.Tensor) -> None:
    model = task.model
    maps = model.second(model.relu(model.norm(model.first(image[None])))).detach().requires_grad_()
    outputs = model.head(torch.relu(maps).mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(-task.loss(outputs, torch.tensor([1])).sum(), maps)
    coarse = torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True))
    expected = nn.functional.interpolate(coarse, (18, 26), mode="bilinear")[0, 0].detach().numpy()
    assert expected.any()
    np.testing.assert_allclose(attribute(task, image, 1, "grad-cam"), expected, rtol=1e-4, atol=1e-6)


def test_the_last_convolution_is_the_last_that_runs(task: Task, image: torch.Tensor) -> None:
    assert last_convolution(task.model, image) is task.model.second
    with pytest.raises(InfluenceError, match="runs no two-dimensional convolution") as caught:
        last_convolution(nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), 4)), image)
    assert "integrated-gradients" in caught.value.hint


@pytest.mark.parametrize("method", ["integrated-gradients", "grad-cam", "occlusion"])
@pytest.mark.quick("gradient*", "saliency*")
def test_it_leaves_the_model_alone_and_bounds_its_batches(task: Task, method: str) -> None:
    sizes = []
    task.model.first.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    for side, most in ((16, COPIES), (512, NUMBERS // (3 * 512 * 512))):
        sizes.clear()
        if side == 16 or method != "occlusion":
            attribute(task, torch.randn(3, side, side), 0, method)
            assert max(sizes) <= most
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not task.model.training
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_inputs_that_are_no_images(task: Task) -> None:
    for x in (torch.zeros(5), torch.zeros(3, 8, 8, dtype=torch.int64)):
        with pytest.raises(InfluenceError, match="an input of the model is"):
            attribute(task, x, 0, "occlusion")


def test_scaled_and_overlay() -> None:
    assert not scaled(np.zeros((2, 2))).any()
    values = scaled(np.array([[4.0, 0.0], [-2.0, 0.0]]))
    assert values.tolist() == [[1, 0], [-0.5, 0]]
    for mode in ("L", "RGB", "RGBA", "1"):
        drawn = overlay(Image.new(mode, (2, 2)), values)
        assert (drawn.mode, drawn.size) == ("RGB", (2, 2))
        pixels = np.asarray(drawn).astype(int)
        assert pixels[0, 0, 0] > pixels[0, 0, 2] + 50, "red speaks for the class"
        assert pixels[1, 0, 2] > pixels[1, 0, 0] + 20, "blue against it"
        assert np.ptp(pixels[:, 1], axis=-1).max() == 0, "grey where nothing happens"
    assert overlay(Image.new("RGB", (30, 20)), values).size == (30, 20)


def test_what_is_refused_before_any_work(influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ("--report", "why.html")
    assert "on the page of --report" in influence("rank", 3, "--attribution", "occlusion", cwd=project, code=2).err
    done = influence("rank", 3, 4, "--aggregate", "--attribution", "occlusion", *report, cwd=project, code=2)
    assert "--aggregate shows no single test image" in done.err
    assert "there is no such method" in influence("rank", 3, "--attribution", "ig", *report, cwd=project, code=2).err
    done = influence("rank", 3, "--attribution", "grad-cam", *report, cwd=project, code=2)
    assert "runs no two-dimensional convolution" in done.err
    monkeypatch.setitem(sys.modules, "captum", None)
    done = influence("rank", 3, "--attribution", "occlusion", *report, cwd=project, code=2)
    assert "pip install 'influence-cli[attribution]'" in done.err
    check_attribution(None)
    assert not list(project.glob("*.h5"))


def test_the_page_shows_it_beside_each_test_image(influence: Command, stored: Path, tmp_path: Path) -> None:
    file = next((stored / "test").glob("*/*.png"))
    page = tmp_path / "why.html"
    influence("rank", 3, file, "--attribution", "integrated-gradients", "--report", page, "-q", cwd=stored)
    text = html.unescape(page.read_text())
    leads = [
        re.findall(r'data:image/png;base64,([^"]+)', part.partition('<div class="row">')[0])
        for part in text.split('<div class="lead">')[1:]
    ]
    assert [len(found) for found in leads] == [2, 2]
    for lead in leads:
        plain, coloured = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in lead)
        assert np.ptp(plain.astype(int), axis=-1).max() == 0
        assert np.ptp(coloured.astype(int), axis=-1).max() > 50
    assert text.count("integrated gradients") >= 2
    assert "an input of zeros" in text
    assert "checkpoints" not in text.partition("<pre>")[0]


@pytest.mark.slow
def test_of_several_checkpoints_the_first_is_explained(influence: Command, project: Path) -> None:
    (project / "other.pt").write_bytes((project / "model.pt").read_bytes())
    edit(project, "checkpoint: model.pt", "checkpoint: [model.pt, other.pt]")
    influence("rank", 3, "--attribution", "occlusion", "--report", "why.html", "-q", cwd=project)
    text = (project / "why.html").read_text()
    assert "model.pt, the first of 2 checkpoints" in text
    assert "4 × 4, set to the image" in text
