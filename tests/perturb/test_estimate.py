"""perturb: the slope in the pixels against derivatives by hand and retraining, and what its options read and write."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from influence_cli.errors import InfluenceError
from influence_cli.metrics import pearson, slope
from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from influence_cli.perturb.eight_bit import HIDDEN, PixelScale, ball, given_scale, pixel_scale, sixteen_bits
from influence_cli.perturb.estimate import input_slopes, perturb_image
from influence_cli.perturb.files import write_png16
from tests.conftest import Command, Ended, edit


def rows_of(done: Ended) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.out.splitlines()]


def number(row: dict[str, object], name: str) -> float:
    return float(str(row[name]))


# The derivative


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def test_the_slope_is_that_of_finite_differences_on_a_convolutional_network() -> None:
    """A change of each pixel by ±1e-5 changes vᵀ∇_θL by 2e-5 times the slope; tanh has no kinks in between."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    model.double().eval()
    x, y = torch.rand(2, 2, 6, 6, dtype=torch.float64), torch.tensor([2, 0])
    network = make_network(track(model, cross_entropy, ["*"], "here"), x)
    v = torch.randn(network.size, dtype=torch.float64)
    found = input_slopes(network, v, x, y)
    for example in range(2):
        moved = torch.cat([x[example] + sign * 1e-5 * torch.eye(72).double().view(72, 2, 6, 6) for sign in (1, -1)])
        gradients = example_gradients(network, moved, y[example].expand(144))[0]
        up, down = (gradients @ v).split(72)
        assert torch.allclose(found[example].flatten(), (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


def test_the_slope_of_softmax_regression_has_a_closed_form() -> None:
    """∇ₓ(vᵀ∇_θL) = Vᵀ(π − y) + Wᵀ(diag π − ππᵀ)(V x + v_b)."""
    torch.manual_seed(1)
    layer = nn.Linear(7, 4).double()
    model = nn.Sequential(layer)
    x, y = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 3, 1])
    network = make_network(track(model, cross_entropy, ["*"], "here"), x)
    v = torch.randn(32, dtype=torch.float64)
    found = input_slopes(network, v, x, y)
    w, big, small = layer.weight.detach(), v[:28].view(4, 7), v[28:]
    for example in range(3):
        pi = layer(x[example]).detach().softmax(dim=0)
        residual = pi - nn.functional.one_hot(y[example], 4)
        curved = (torch.diag(pi) - torch.outer(pi, pi)) @ (big @ x[example] + small)
        assert torch.allclose(found[example], big.T @ residual + w.T @ curved)


def test_a_model_that_changes_its_input_in_place_has_a_slope() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sub_(0.5))

    model, x = InPlace(), torch.rand(2, 3)
    network = track(model, cross_entropy, ["*"], "here")
    kept = x.clone()
    assert input_slopes(network, torch.ones(8), x, torch.tensor([0, 1])).shape == (2, 3)
    assert torch.equal(x, kept)


def test_a_gradient_without_a_derivative_is_an_error() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, slope: Tensor) -> Tensor:
            return 2 * slope

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Once.apply(self.first(x)))

    network = track(Model(), cross_entropy, ["*"], "here")
    with pytest.raises(InfluenceError, match="no derivative with respect to its input"):
        input_slopes(network, torch.ones(network.size), torch.rand(1, 3), torch.tensor([0]))


# Against retraining


@pytest.mark.slow
def test_estimates_are_the_changes_that_training_again_brings(project: Path) -> None:
    """Softmax regression on real images: many images, three kinds of change, one at a time, by Newton in float64."""
    from influence_cli import Terminal, load_config, load_tasks, prepare_all
    from influence_cli.influence.test_selection import Selected

    config, terminal = load_config(project / "influence.yaml"), Terminal(quiet=True)
    stores = prepare_all(config, load_tasks(config), terminal, on_the_fly=True)
    task = stores[0].task
    selected = [Selected(t, None, int(task.test_split().labels[t])) for t in range(0, 80, 10)]
    generator = torch.Generator().manual_seed(0)

    def noise(slope: Tensor) -> Tensor:
        return 0.02 * torch.randn(slope.shape, generator=generator).double()

    def brighter(slope: Tensor) -> Tensor:
        return torch.full_like(slope, 0.01)

    def steepest(slope: Tensor) -> Tensor:
        return 0.5 / 255 * slope.sign()

    perturb = partial(perturb_image, stores, retrain=True, terminal=terminal)
    found = [
        one
        for change in (noise, brighter, steepest)
        for index in (0, 45, 201, 319)
        for one in perturb(index, selected, change=change).effects
    ]
    estimated, replaced, actual = (
        np.array([getattr(one, name) for one in found], dtype=np.float64)
        for name in ("estimated", "replaced", "actual")
    )
    assert len(found) == 96
    r, b = pearson(estimated, actual), slope(estimated, actual)
    print(f"perturbation: r = {r:.6f}, slope {b:.4f}; replaced r = {pearson(replaced, actual):.6f}")
    assert r >= 0.99
    assert abs(b - 1) <= 0.05
    assert pearson(replaced, actual) >= 0.99


def test_a_large_change_is_estimated_by_replacement(influence: Command, project: Path) -> None:
    """Another image in the place of one: what is linear in δ says little, influence of x minus that of x + δ does."""
    other = sorted((project / "train" / "Bag").iterdir())[3]
    words = ("perturb", 12, *(word for t in range(12) for word in ("--test", t)), "--delta", other, "--retrain")
    rows = rows_of(influence(*words, cwd=project))
    replaced, actual = (np.array([number(row, name) for row in rows]) for name in ("replaced", "actual"))
    assert pearson(replaced, actual) > 0.97
    assert 0.7 < slope(replaced, actual) < 1.4
    assert rows[0]["delta"] == str(other)


# The command


def test_rows(influence: Command, project: Path) -> None:
    done = influence("perturb", 12, "--test", 3, "--test", 5, cwd=project)
    rows = rows_of(done)
    assert list(rows[0]) == [
        "test", "test_path", "test_label", "test_predicted", "test_loss", "index", "path", "label", "influence",
        "delta", "estimated", "replaced", "actual", "channel", "row", "column", "slope",
    ]  # fmt: skip
    assert [row["test"] for row in rows] == [3, 5]
    assert all(row["index"] == 12 and row["actual"] is None and row["delta"] == "hidden" for row in rows)
    assert all(number(row, "estimated") > 0 for row in rows)
    assert "damping λ = 0" in done.err
    assert "without rows" in done.err
    for row in rows:
        said = next(
            line for line in done.err.splitlines() if f"changes the loss of test example {row['test']} " in line
        )
        assert said.startswith("the steepest change that rounding to 8 bits hides in training image 12 changes")
        assert f"by about {number(row, 'estimated'):+.3g}, from {number(row, 'test_loss'):.3g}" in said


def test_influence_is_that_of_rank(influence: Command, project: Path) -> None:
    import h5py

    influence("rank", 3, "--on-the-fly", "--matrix", "m.h5", "-q", cwd=project)
    with h5py.File(project / "m.h5") as file:
        expected = float(file["influence"][0, 12])
    (row,) = rows_of(influence("perturb", 12, "--test", 3, cwd=project))
    assert number(row, "influence") == pytest.approx(expected, rel=1e-4)


def test_estimated_is_the_map_times_the_change(influence: Command, project: Path) -> None:
    delta = np.random.default_rng(0).normal(0, 0.01, (1, 28, 28)).astype(np.float32)
    np.save(project / "delta.npy", delta)
    words = ("perturb", 12, "--test", 3, "--delta", "delta.npy", "--map", "map.npy")
    (row,) = rows_of(influence(*words, cwd=project))
    slopes = np.load(project / "map.npy")
    assert slopes.shape == (1, 28, 28)
    assert number(row, "estimated") == pytest.approx(float((slopes * delta).sum()), rel=1e-4)
    assert number(row, "replaced") == pytest.approx(number(row, "estimated"), rel=0.2)
    place = tuple(int(str(row[name])) for name in ("channel", "row", "column"))
    assert slopes[place] == pytest.approx(number(row, "slope"), rel=1e-5)
    assert abs(slopes[place]) == np.abs(slopes).max()


@pytest.mark.slow
def test_every_method_has_a_slope_and_exact_ones_agree(influence: Command, project: Path) -> None:
    def slopes(method: str) -> np.ndarray:
        words = ("-s", f"curvature.method={method}", "-s", f"gradients.store={method}.h5", "--map", "map.npy")
        influence("perturb", 12, "--test", 3, *words, "-q", cwd=project)
        return np.asarray(np.load(project / "map.npy"))

    exact = slopes("explicit")
    for method in ("cg", "nystrom"):
        assert np.linalg.norm(slopes(method) - exact) <= 1e-3 * np.linalg.norm(exact), method
    for method in ("ekfac", "kfac", "arnoldi", "fisher"):
        found = slopes(method)
        assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.5, method
    assert slopes("identity").any()


@pytest.mark.slow
def test_several_checkpoints_are_averaged(influence: Command, project: Path) -> None:
    from tests.conftest import save_minimum

    (project / "one.pt").write_bytes((project / "model.pt").read_bytes())
    save_minimum(project, l2=0.1)
    (project / "two.pt").write_bytes((project / "model.pt").read_bytes())

    def estimated(checkpoint: str, store: str) -> float:
        words = ("-s", f"model.checkpoint={checkpoint}", "-s", f"gradients.store={store}")
        np.save(project / "delta.npy", np.full((1, 28, 28), 0.01))
        (row,) = rows_of(influence("perturb", 12, "--test", 3, "--delta", "delta.npy", *words, cwd=project))
        return number(row, "estimated")

    both = estimated("[one.pt, two.pt]", "both.h5")
    assert both == pytest.approx((estimated("one.pt", "a.h5") + estimated("two.pt", "b.h5")) / 2, rel=1e-4)


def test_map_and_report_show_the_pixels(influence: Command, project: Path) -> None:
    words = ("perturb", 12, "--test", 3, "--map", "map.png", "--report", "why.html", "--retrain")
    done = influence(*words, cwd=project)
    with Image.open(project / "map.png") as picture:
        assert picture.size == (224, 224)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (pixels[..., 0] - pixels[..., 2] > 60).any(), "no red"
    assert (pixels[..., 2] - pixels[..., 0] > 60).any(), "no blue"
    page = (project / "why.html").read_text()
    assert page.count("<img") == 3
    assert "estimated" in page
    assert "actual" in page
    assert "wrote map.png" in done.err


def test_a_small_network_of_all_layers_has_a_map(influence: Command, project: Path) -> None:
    model = (
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.Tanh(), "
        "nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))\n"
    )
    (project / "conv.py").write_text(model)
    edit(project, "./model.py:build", "./conv.py:build")
    network = nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    torch.manual_seed(0)
    torch.save(network.state_dict(), project / "model.pt")
    (row,) = rows_of(influence("perturb", 12, "--test", 3, "-s", "curvature.damping=0.1", cwd=project))
    assert number(row, "estimated") > 0
    assert number(row, "replaced") == pytest.approx(number(row, "estimated"), rel=0.3)
    done = influence("perturb", 12, "--test", 3, "--retrain", cwd=project, code=2)
    assert "--retrain needs an output layer" in done.err


# Pixels


def scale_of(project: Path, transform: str) -> PixelScale:
    from influence_cli import load_config
    from influence_cli.data.datasets import load_splits

    config = load_config(project / "influence.yaml", [f"train.transform={transform}"])
    return pixel_scale(load_splits(config)[0])


FLOATS = "{ToDtype: {dtype: float32, scale: true}}"


@pytest.mark.parametrize(
    ("transform", "step", "black"),
    [
        (f"[ToImage, {FLOATS}]", [1 / 255], [0]),
        ("[ToImage, {ToDtype: {dtype: float32, scale: false}}]", [1], [0]),
        (
            f"[ToImage, {FLOATS}, {{Normalize: {{mean: [0.4, 0.5, 0.6], std: [0.2, 0.25, 0.5]}}}}]",
            [1 / 51, 4 / 255, 2 / 255],
            [-2, -2, -1.2],
        ),
        (f"[{{Resize: {{size: [40, 40]}}}}, ToImage, {FLOATS}, {{CenterCrop: {{size: 32}}}}]", [1 / 255], [0]),
    ],
)
def test_a_level_is_found_in_the_transform(
    project: Path, transform: str, step: list[float], black: list[float]
) -> None:
    found = scale_of(project, transform)
    assert found.step.tolist() == pytest.approx(step)
    assert found.black.tolist() == pytest.approx(black)


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (f"[ToImage, {FLOATS}, {{GaussianBlur: {{kernel_size: 3, sigma: 1.0}}}}]", "GaussianBlur"),
        (f"[ToImage, {FLOATS}, {{Normalize: {{mean: [0.4], std: [0.2]}}}}, Grayscale]", "Grayscale"),
        ("[ToImage]", "no step makes floats"),
    ],
)
def test_a_level_that_cannot_be_known_is_refused(project: Path, transform: str, named: str) -> None:
    with pytest.raises(InfluenceError, match=named) as raised:
        scale_of(project, transform)
    assert "--pixel-step" in raised.value.hint


def test_whatever_is_in_the_ball_rounds_to_the_same_image() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = PixelScale(torch.tensor([0.02, 0.015, 0.017]).double(), torch.tensor([-2.1, -2.0, -1.8]).double())
    levels = torch.randint(0, 256, (3, 9, 9), generator=generator).double()
    x = scale.inputs(levels)
    room = ball(scale, x, "it")
    moved = x
    for _ in range(7):
        moved = room.stepped(moved, torch.randn(x.shape, generator=generator), 0.2)
    assert float((scale.levels(moved) - levels).abs().max()) > 0.3
    for other in (moved, room.corner(x, torch.randn(x.shape, generator=generator)), room.clamp(x + 5)):
        assert torch.equal(scale.levels(other).round(), levels)
        sixteen = sixteen_bits(scale, other)
        assert np.array_equal(np.round(sixteen / 257.0), np.moveaxis(levels.numpy(), 0, -1))


def test_the_gain_is_that_of_the_corner() -> None:
    scale = given_scale("1/255", None)
    x = torch.tensor([[[0.0, 1.0, 100 / 255, 7 / 255]]])
    slope = torch.tensor([[[-3.0, 2.0, 1.0, -1.0]]])
    room = ball(scale, x, "it")
    gained = float(((room.corner(x, slope) - x) * slope).sum())
    assert room.gain(x, slope) == pytest.approx(gained, rel=1e-4)
    assert gained == pytest.approx(2 * HIDDEN / 255, rel=1e-4)  # black gets no darker, white no lighter


def test_a_png_of_16_bits_reads_back_as_it_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = generator.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
        with (tmp_path / "x.png").open("wb") as file:
            write_png16(file, pixels)
        with Image.open(tmp_path / "x.png") as read:
            if channels == 1:
                assert np.array_equal(np.asarray(read), pixels[..., 0])
            else:  # Pillow keeps the upper byte of a colour
                assert np.array_equal(np.asarray(read), pixels >> 8)


# Bad input


INTEGERS = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 2))


def data():
    torch.manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randint(0, 8, (20, 3)), torch.arange(20) % 2)
"""
DETACHED = """
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(49, 10)

    def forward(self, x):
        return self.layer(nn.functional.avg_pool2d(x.detach(), 4).flatten(1))


def build():
    return Model()
"""


def two_lines(done: Ended) -> None:
    lines = [line for line in done.err.splitlines() if not line.startswith(("gradient norm", "damping", "wrote the"))]
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert len(lines) <= 3, done.err


def spoil(project: Path) -> None:
    np.save(project / "flat.npy", np.zeros(784))
    np.save(project / "text.npy", np.array(["a"]))
    np.save(project / "infinite.npy", np.full((1, 28, 28), np.inf))
    np.save(project / "out.npy", np.array([5]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("perturb", 12), "needs a test image"),
        (("perturb", "--test", 3), "needs a training image"),
        (("perturb", -1, "--test", 3), "such option"),
        (("perturb", 320, "--test", 3), "there is no training example 320; valid indices are 0 to 319"),
        (("perturb", 5, "--test", 3, "-s", "train.exclude=out.npy"), "is excluded (train.exclude)"),
        (("perturb", 12, "--test", 80), "there is no test example 80"),
        (("perturb", 12, "--test", 3, "--delta", "none.npy"), "--delta none.npy cannot be read"),
        (("perturb", 12, "--test", 3, "--delta", "none.png"), "there is no such file"),
        (
            ("perturb", 12, "--test", 3, "--delta", "flat.npy"),
            "has the shape [784], but the input of training example 12",
        ),
        (("perturb", 12, "--test", 3, "--delta", "text.npy"), "not real numbers"),
        (("perturb", 12, "--test", 3, "--delta", "infinite.npy"), "NaN or infinite"),
        (("perturb", 12, "--test", 3, "--map", "map.jpg"), "a map must be .png or .npy"),
        (("perturb", 12, "--test", 3, "--report", "map.png"), "a page must be .html"),
        (("perturb", 12, "--test", 3, "--pixel-step", "small"), "'small' is not a number"),
        (("perturb", 12, "--test", 3, "--pixel-step", "0"), "larger than 0"),
        (("perturb", 12, "--test", 3, "--pixel-step", "0.1,0.2"), "has 2 numbers"),
        (("perturb", 12, "--test", 3, "--pixel-step", "0.1,0.2", "--black", "1,2,3"), "--black has 3 numbers"),
        (("perturb", 12, "--test", 3, "--pixel-step", "1/1000"), "in 8-bit levels, not within 0 to 255"),
        (("perturb", 12, "--test", 3, "--black", "0"), "add --pixel-step"),
        (("perturb", 12, "--test", 3, "--target", "Bg"), "did you mean 'Bag'"),
    ],
)
def test_a_mistake_is_told_in_one_line(influence: Command, project: Path, words: tuple[object, ...], said: str) -> None:
    spoil(project)
    done = influence(*words, cwd=project, code=2)
    assert said in done.err
    assert done.out == ""
    two_lines(done)


def test_a_model_that_detaches_its_input_is_refused(influence: Command, project: Path) -> None:
    (project / "detached.py").write_text(DETACHED)
    edit(project, "./model.py:build", "./detached.py:build")
    state = torch.load(project / "model.pt")
    torch.save({"layer.weight": state["2.weight"], "layer.bias": state["2.bias"]}, project / "model.pt")
    done = influence("perturb", 12, "--test", 3, cwd=project, code=2)
    assert "is not differentiable with respect to its input" in done.err
    two_lines(done)


def test_a_model_that_rounds_its_input_has_no_slope(influence: Command, project: Path) -> None:
    (project / "detached.py").write_text(DETACHED.replace("x.detach()", "(8 * x).round() / 8"))
    edit(project, "./model.py:build", "./detached.py:build")
    state = torch.load(project / "model.pt")
    torch.save({"layer.weight": state["2.weight"], "layer.bias": state["2.bias"]}, project / "model.pt")
    done = influence("perturb", 12, "--test", 3, cwd=project)
    assert "no pixel moves the loss" in done.err
    assert number(rows_of(done)[0], "estimated") == 0


@pytest.fixture
def integers(tmp_path: Path) -> Path:
    (tmp_path / "tokens.py").write_text(INTEGERS)
    (tmp_path / "influence.yaml").write_text(
        "model: {factory: ./tokens.py:build, checkpoint: model.pt}\n"
        "train: {dataset: ./tokens.py:data}\ntest: {dataset: ./tokens.py:data}\n"
    )
    torch.save(nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 2)).state_dict(), tmp_path / "model.pt")
    return tmp_path


def test_whole_numbers_have_no_derivative(influence: Command, integers: Path) -> None:
    done = influence("perturb", 1, "--test", 0, cwd=integers, code=2)
    assert "whole numbers have no derivative" in done.err
    two_lines(done)


def test_inputs_of_unknown_scale_have_a_slope_but_no_hidden_change(influence: Command, project: Path) -> None:
    blur = f"train.transform=[Grayscale, ToImage, {FLOATS}, {{GaussianBlur: {{kernel_size: 3, sigma: 0.5}}}}]"
    done = influence("perturb", 12, "--test", 3, "-s", blur, cwd=project)
    (row,) = rows_of(done)
    assert row["delta"] is None
    assert row["estimated"] is None
    assert number(row, "slope") != 0
    assert "the size of an 8-bit level is not known" in done.err
    assert "for test example 3" in done.err
    assert "training image 12 is h" in done.err
    done = influence("perturb", 12, "--test", 3, "-s", blur, "--retrain", cwd=project, code=2)
    assert "--retrain needs a change" in done.err
    (row,) = rows_of(influence("perturb", 12, "--test", 3, "-s", blur, "--pixel-step", "1/255", cwd=project))
    assert number(row, "estimated") > 0


def test_retrain_takes_one_checkpoint(influence: Command, project: Path) -> None:
    words = ("-s", "model.checkpoint=[model.pt, model.pt]")
    done = influence("perturb", 12, "--test", 3, "--retrain", *words, cwd=project, code=2)
    assert "--retrain retrains one checkpoint" in done.err
