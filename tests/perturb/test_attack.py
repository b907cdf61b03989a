"""perturb --attack and --attackable: in the ball, at the minimum, undone by 8 bits, counted, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from influence_cli import Terminal, load_config, load_tasks
from influence_cli.data.batches import read_batches
from influence_cli.metrics import binomial_interval
from influence_cli.passes.gradients import example_gradients
from influence_cli.perturb.attack import attack_prediction, margins, rank_attackable, right_row
from influence_cli.perturb.eight_bit import PixelScale, pixel_scale
from influence_cli.perturb.estimate import input_slopes
from influence_cli.retrain.newton import losses_under, minimise
from influence_cli.retrain.top_layer import (
    TopLayer,
    changed,
    feature_slopes,
    loss_slope,
    pixel_slopes,
    top_layer,
    with_graph,
)
from tests.conftest import Command, Ended, edit

# A body that a small change of its input moves far, as deep networks are: what a pixel does is 30 times as much.
SHARP = """
import torch
from torch import nn


class Sharp(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 5, stride=4)
        self.layer = nn.Linear(144, 10)

    def forward(self, x):
        return self.layer(torch.tanh(30 * self.body(x)).flatten(1))


def build():
    return Sharp()
"""


def rows_of(done: Ended) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.out.splitlines()]


def number(row: dict[str, object], name: str) -> float:
    return float(str(row[name]))


@pytest.fixture(scope="module")
def sharp(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project with a sharp, random body; do not change it."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("sharp") / "project"))
    (folder / "sharp.py").write_text(SHARP)
    edit(folder, "./model.py:build", "./sharp.py:build")
    edit(folder, "l2: 0.01", "l2: 0.001")
    torch.manual_seed(0)
    body, layer = nn.Conv2d(1, 4, 5, stride=4), nn.Linear(144, 10)
    parts = {"body": body, "layer": layer}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    torch.save(state, folder / "model.pt")
    # At its minimum, so that the commands below have little left to train.
    (task,) = load_tasks(load_config(folder / "influence.yaml"))
    w = top_layer(task, Terminal(quiet=True)).w.float()
    torch.save(state | {"layer.weight": w[:, :144], "layer.bias": w[:, 144]}, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def top(sharp: Path) -> TopLayer:
    (task,) = load_tasks(load_config(sharp / "influence.yaml"))
    return top_layer(task, Terminal(quiet=True))


@pytest.fixture(scope="module")
def scale(top: TopLayer) -> PixelScale:
    return pixel_scale(top.task.train)


def right_rows(top: TopLayer) -> list[int]:
    right = top.outputs(top.w).argmax(dim=1) == top.tests.targets
    found: list[int] = torch.nonzero(right).flatten().tolist()
    return found


# The mathematics


@pytest.mark.slow
def test_the_top_layer_is_at_its_minimum(top: TopLayer) -> None:
    _, before, _ = minimise(top.problem, top.w)
    assert before < 1e-10
    assert top.w.shape == (10, 145)


def test_the_slope_through_the_top_layer_is_that_of_two_passes_of_autograd(top: TopLayer) -> None:
    s = torch.randn(10, 145, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = next(read_batches(top.task.train, np.array([3, 77, 200]), 3))
    with torch.no_grad():
        top.layer.weight.copy_(top.w[:, :144])
        top.layer.bias.copy_(top.w[:, 144])
    x, a = with_graph(top, batch.inputs)
    v = feature_slopes(top.problem, top.w, s, torch.tensor([3, 77, 200]), top.width)
    found = pixel_slopes(x, a, v)
    flat = torch.cat([s[:, :144].reshape(-1), s[:, 144]]).float()
    expected = input_slopes(top.network, flat, batch.inputs, batch.targets)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_s_test_of_the_top_layer_is_a_dense_solve(top: TopLayer) -> None:
    g = loss_slope(top.problem, top.w, top.tests, 4)
    batch = next(read_batches(top.task.test_split(), top.test_indices[4:5], 1))
    with torch.no_grad():
        top.layer.weight.copy_(top.w[:, :144])
        top.layer.bias.copy_(top.w[:, 144])
    by_autograd = example_gradients(top.network, batch.inputs, batch.targets)[0][0]
    assert torch.allclose(torch.cat([g[:, :144].reshape(-1), g[:, 144]]).float(), by_autograd, rtol=1e-3, atol=1e-6)
    s = top.s_test(g[None])[0]
    a, outputs = top.problem.examples.a, top.problem.examples.a @ top.w.T
    pi = outputs.softmax(dim=1)
    change = a @ s.T
    curved = pi * change - pi * (pi * change).sum(dim=1, keepdim=True)
    assert torch.allclose(curved.T @ a / len(a) + 0.001 * s, g, atol=1e-8)


def test_margins_are_between_the_label_and_the_next(top: TopLayer) -> None:
    outputs = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 4.0]])
    assert margins(outputs, torch.tensor([1, 1])).tolist() == [1.0, -4.0]


def test_the_binomial_interval_is_wilsons() -> None:
    low, high = binomial_interval(57, 100)
    assert (low, high) == (pytest.approx(0.4722, abs=1e-4), pytest.approx(0.6627, abs=1e-4))
    assert binomial_interval(0, 10)[0] == 0
    assert binomial_interval(10, 10)[1] == pytest.approx(1)


# The attack


@pytest.mark.slow
def test_an_attack_raises_the_loss_inside_the_ball_with_the_layer_at_its_minimum(
    top: TopLayer, scale: PixelScale
) -> None:
    row = right_rows(top)[0]
    found = attack_prediction(top, row, scale, images=2, rounds=12)
    assert found.loss[1] > found.loss[0]
    assert found.margin[1] < found.margin[0]
    assert found.moved <= 0.5
    assert len(found.images) == len(found.inputs) == 2
    original = next(read_batches(top.task.train, np.array(found.images), 2)).inputs
    for new, old in zip(found.inputs, original, strict=True):
        assert not torch.equal(new, old)
        assert torch.equal((new * 255).round(), (old * 255).round())
        assert float(new.min()) >= 0
        assert float(new.max()) <= 1
    # The same layer trained from the start on the changed images: the loss that the attack reports.
    _, a = with_graph(top, torch.stack(found.inputs))
    bias = torch.ones(2, 1, dtype=torch.float64)
    rows = torch.from_numpy(np.searchsorted(top.task.train.indices, np.array(found.images)))
    problem = changed(top.problem, rows, torch.cat([a.detach().double(), bias], dim=1))
    w, _, _ = minimise(problem, torch.zeros_like(top.w))
    assert float(losses_under(problem, w[None], top.tests)[0, row]) == pytest.approx(found.loss[1], rel=1e-5)
    assert found.after == int(top.outputs(w)[row].argmax())


@pytest.mark.slow
def test_ten_images_flip_what_one_does_not(top: TopLayer, scale: PixelScale) -> None:
    outputs = margins(top.outputs(top.w), top.tests.targets)
    rows = sorted(right_rows(top), key=lambda row: float(outputs[row]))[2:5]
    flipped = {count: [attack_prediction(top, row, scale, images=count).flipped for row in rows] for count in (1, 10)}
    assert sum(flipped[10]) > sum(flipped[1])
    assert sum(flipped[10]) >= 2


def test_images_are_chosen_by_what_their_pixels_can_do(top: TopLayer, scale: PixelScale) -> None:
    """The first of all training images, by the gain of every one of them."""
    from influence_cli.perturb.attack import choose_images, gains_of

    row = right_rows(top)[2]
    s = top.s_test(loss_slope(top.problem, top.w, top.tests, row)[None])[0]
    chosen, gains = choose_images(top, s, scale, 3)
    every = np.array(gains_of(top, s, torch.arange(320), scale))
    assert chosen.tolist() == np.argsort(-every)[:3].tolist()
    assert gains == pytest.approx(np.sort(every)[::-1][:3])


@pytest.mark.slow
def test_few_images_are_ordered_by_what_each_does_alone(top: TopLayer, scale: PixelScale) -> None:
    from influence_cli.perturb.attack import TRIAL, TRIED, attack_order, choose_images

    row = right_rows(top)[2]
    s = top.s_test(loss_slope(top.problem, top.w, top.tests, row)[None])[0]
    first, _ = choose_images(top, s, scale, TRIED)
    order = attack_order(top, row, scale, 1)
    assert sorted(order) == sorted(top.task.train.indices[first.numpy()].tolist())
    alone = [attack_prediction(top, row, scale, images=[one], rounds=TRIAL).loss[1] for one in order]
    assert alone == sorted(alone, reverse=True)
    assert attack_prediction(top, row, scale, rounds=1).images == tuple(order[:1])
    # As many as are tried, or more: the largest gain first.
    many, _ = choose_images(top, s, scale, 8)
    assert attack_order(top, row, scale, 8) == top.task.train.indices[many.numpy()].tolist()


def test_the_gain_is_what_one_step_to_the_corner_brings(top: TopLayer, scale: PixelScale) -> None:
    """A hundredth of the way, where the first order is all there is."""
    from influence_cli.influence.scores import perturbation
    from influence_cli.perturb.attack import choose_images
    from influence_cli.perturb.eight_bit import ball

    row = right_rows(top)[1]
    s = top.s_test(loss_slope(top.problem, top.w, top.tests, row)[None])[0]
    chosen, (gain,) = choose_images(top, s, scale, 1)
    image = next(read_batches(top.task.train, top.task.train.indices[chosen.numpy()], 1)).inputs
    x, a = with_graph(top, image)
    v = feature_slopes(top.problem, top.w, s, chosen, top.width)
    slope = perturbation(pixel_slopes(x, a, v), top.problem.n)
    corner = ball(scale, image[0], "it").corner(image[0], slope[0])
    moved = image + 0.01 * (corner - image)
    _, b = with_graph(top, moved)
    problem = changed(top.problem, chosen, torch.cat([b.detach().double(), torch.ones(1, 1).double()], dim=1))
    # From the same image by the same route: rounding of the body in float32 is larger than a hundredth of some steps.
    still = changed(top.problem, chosen, torch.cat([a.detach().double(), torch.ones(1, 1).double()], dim=1))
    losses = [float(losses_under(one, minimise(one, top.w)[0][None], top.tests)[0, row]) for one in (problem, still)]
    assert losses[0] - losses[1] == pytest.approx(0.01 * gain, rel=0.1)


def test_attackable_ranks_by_gain_over_margin(top: TopLayer, scale: PixelScale) -> None:
    found = rank_attackable(top, range(80), scale, Terminal(quiet=True))
    assert sorted(one.test for one in found) == sorted(int(top.test_indices[row]) for row in right_rows(top))
    ratios = [one.ratio for one in found]
    assert ratios == sorted(ratios, reverse=True)
    assert all(one.margin > 0 and one.gain > 0 and one.other != one.label for one in found)
    # The first are those that attacks flip, the last those that they do not.
    tried = [
        attack_prediction(top, right_row(top, one.test), scale, images=[one.image], rounds=20)
        for one in (*found[:2], *found[-2:])
    ]
    falls = [one.margin[0] - one.margin[1] for one in tried]
    assert sum(one.flipped for one in tried[:2]) >= sum(one.flipped for one in tried[2:])
    assert falls[0] > 0


# The command


def test_the_command_writes_rows_and_images_that_8_bits_undo(
    influence: Command, sharp: Path, top: TopLayer, tmp_path: Path
) -> None:
    outputs = margins(top.outputs(top.w), top.tests.targets)
    test = int(top.test_indices[min(right_rows(top), key=lambda row: float(outputs[row]))])
    folder = tmp_path / "changed" / "here"
    words = ("perturb", "--attack", "--test", test, "--images", 10, "--to", folder, "-o", tmp_path / "out.csv")
    done = influence(*words, cwd=sharp)
    assert "the prediction flipped after" in done.err
    assert "an 8-bit copy undoes the attack" in done.err
    run = json.loads((tmp_path / "out.csv.run.json").read_text())
    assert run["attack"]["flipped"] == 1
    (row,) = rows_of(influence(*words[:8], cwd=sharp))
    assert list(row) == [
        "test", "test_path", "test_label", "predicted_before", "predicted_after", "flipped", "images", "rounds",
        "loss_before", "loss_after", "margin_before", "margin_after", "estimated", "flips", "moved",
    ]  # fmt: skip
    assert row["flipped"] is True
    assert row["predicted_after"] != row["test_label"] == row["predicted_before"]
    assert number(row, "flips") >= 1
    images = [int(index) for index in str(row["images"]).split()]
    assert len(set(images)) == 10
    assert len(list(folder.iterdir())) == 20
    for index in images:
        name = f"test{test:05d}_train{index:07d}"
        values = np.load(folder / f"{name}.npy")
        original = next(read_batches(top.task.train, np.array([index]), 1)).inputs[0].numpy()
        assert values.dtype == np.float32
        assert values.shape == (1, 28, 28)
        assert not np.array_equal(values, original)
        assert np.array_equal(np.round(values * 255), np.round(original * 255))
        with Image.open(folder / f"{name}.png") as picture:
            sixteen = np.asarray(picture)
        assert sixteen.max() > 255
        assert np.array_equal(np.round(sixteen / 257.0), np.round(original[0] * 255))
        assert np.abs(sixteen / 65535 - values[0]).max() <= 0.5 / 65535 + 1e-7


def test_many_test_predictions_are_counted(influence: Command, sharp: Path, top: TopLayer, tmp_path: Path) -> None:
    # As many images as are tried alone otherwise: then none is.
    words = ("perturb", "--attack", "--test", "0:4", "--images", 5, "--rounds", 2, "--to", tmp_path / "a")
    done = influence(*words, "--format", "csv", cwd=sharp)
    right = [row for row in right_rows(top) if row < 4]
    assert len(done.out.splitlines()) == 1 + len(right)
    assert f"of {len(right)} test predictions flipped" in done.err
    if len(right) < 4:
        assert "that the model already gets wrong" in done.err


def test_a_training_image_can_be_named(influence: Command, sharp: Path, top: TopLayer, tmp_path: Path) -> None:
    test = int(top.test_indices[right_rows(top)[0]])
    words = ("perturb", 17, "--attack", "--test", test, "--rounds", 2, "--to", tmp_path)
    (row,) = rows_of(influence(*words, cwd=sharp))
    assert row["images"] == "17"
    assert row["rounds"] == 2
    # A step of a tenth of a level and one of half of that, the last of two.
    assert number(row, "moved") == pytest.approx(0.15, abs=0.01)


@pytest.mark.slow
def test_attackable_rows(influence: Command, sharp: Path) -> None:
    done = influence("perturb", "--attackable", "--top", 3, cwd=sharp)
    rows = rows_of(done)
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert list(rows[0]) == [
        "rank", "test", "test_path", "test_label", "other", "margin", "index", "path", "gain", "ratio",
    ]  # fmt: skip
    assert number(rows[0], "ratio") == pytest.approx(number(rows[0], "gain") / number(rows[0], "margin"))
    assert "one training image could flip" in done.err
    assert f"next: influence perturb --attack --test {rows[0]['test']}" in done.err
    few = rows_of(influence("perturb", "--attackable", "--test", "0:10", "--all", cwd=sharp))
    assert 0 < len(few) <= 10


# Bad input


def test_an_example_that_is_wrong_already_is_refused(
    influence: Command, sharp: Path, top: TopLayer, tmp_path: Path
) -> None:
    wrong = int(top.test_indices[next(row for row in range(80) if row not in right_rows(top))])
    for words in ((wrong,), ("misclassified",)):
        done = influence("perturb", "--attack", "--test", *words, "--to", tmp_path, cwd=sharp, code=2)
        assert "is already misclassified" in done.err
        assert "nothing to flip" in done.err
        assert done.out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attack",), "needs a test image"),
        (("--attack", "--attackable"), "are two commands"),
        (("--attack", "--test", 3, "--retrain"), "--attack cannot be combined with"),
        (("--attackable", "--map", "x.png"), "--attackable cannot be combined with"),
        (("--attack", "--test", 80), "there is no test example 80"),
        (("--attack", "--test", 3, "--images", 0), "invalid value for '--images'"),
        (("--attack", "--test", 3, "--images", 400), "there are only 320 training examples"),
        ((400, "--attack", "--test", 3), "there is no training example 400"),
        (("--attack", "--test", 3, "-s", "model.checkpoint=[model.pt, model.pt]"), "one checkpoint, but"),
        (("--attack", "--test", 3, "-s", "loss=hinge"), "not known to be convex and smooth"),
        (("--attack", "--test", 3, "--to", "influence.yaml/x"), "cannot be written"),
        (("--attack", "--test", 3, "-s", "train.n=1000"), "retraining needs all"),
        (
            ("--attack", "--test", 3, "-s", "train.transform=[Grayscale, ToImage, {ToDtype: {dtype: float32, "
             "scale: true}}, {GaussianBlur: {kernel_size: 3, sigma: 0.5}}]"),
            "the step GaussianBlur of the transform may change it",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(influence: Command, project: Path, words: tuple[object, ...], said: str) -> None:
    done = influence("perturb", *words, cwd=project, code=2)
    assert said in done.err
    assert done.out == ""
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1


def test_a_file_has_no_position_to_attack(influence: Command, project: Path) -> None:
    picture = next((project / "test" / "Bag").iterdir())
    done = influence("perturb", "--attack", "--test", picture, cwd=project, code=2)
    assert "an attack needs the label" in done.err


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(influence: Command, project: Path) -> None:
    (project / "other.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10), nn.Tanh())\n"
    )
    edit(project, "./model.py:build", "./other.py:build")
    done = influence("perturb", "--attack", "--test", 3, cwd=project, code=2)
    assert "is not that of a trained linear layer" in done.err


def test_a_body_that_detaches_its_input_is_refused(influence: Command, sharp: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharp, tmp_path / "project"))
    (folder / "blind.py").write_text(SHARP.replace("self.body(x)", "self.body(x.detach())"))
    edit(folder, "./sharp.py:build", "./blind.py:build")
    done = influence("perturb", "--attackable", cwd=folder, code=2)
    assert "is not differentiable with respect to its input" in done.err


def test_pixels_of_an_unknown_scale_take_a_step(influence: Command, sharp: Path, tmp_path: Path) -> None:
    blur = (
        "train.transform=[Grayscale, ToImage, {ToDtype: {dtype: float32, scale: true}}, "
        "{GaussianBlur: {kernel_size: 3, sigma: 0.1}}]"
    )
    words = ("perturb", "--attackable", "--test", "0:5", "-s", blur)
    assert "--pixel-step" in influence(*words, cwd=sharp, code=2).err
    assert rows_of(influence(*words, "--pixel-step", "1/255", cwd=sharp))
