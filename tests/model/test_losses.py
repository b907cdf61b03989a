"""The losses by name: their values and derivatives by formula, by finite differences, and far out in float32."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature.choice import Choice
from influence_cli.curvature.explicit import curvature_matrix
from influence_cli.curvature.fisher_draws import ROOT, draws
from influence_cli.data.batches import Batch
from influence_cli.model.losses import hinge, negative_margin, smooth_hinge
from influence_cli.model.network import Network, loss_slopes, track
from influence_cli.model.outputs import output_curvature
from influence_cli.precompute.fitted import curvature_fingerprint
from tests.conftest import Command


def near_the_margin(classes: int, count: int = 60, width: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw scores whose margins lie around 1, the closer the smaller ``width``: float64 [count, classes], labels."""
    generator = torch.Generator().manual_seed(classes)
    targets = torch.randint(0, classes, (count,), generator=generator)
    outputs = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    others = outputs.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    wanted = 1 + width * torch.randn(count, generator=generator, dtype=torch.float64)
    return outputs.scatter(1, targets[:, None], (others + wanted)[:, None]), targets


def a_network(loss: object, classes: int, layers: int = 1) -> Network:
    torch.manual_seed(0)
    sizes = [5, 4][: layers - 1] if layers > 1 else []
    parts: list[nn.Module] = []
    for before, after in zip([6, *sizes], [*sizes, classes], strict=True):
        parts += [nn.Linear(before, after), nn.Tanh()]
    return track(nn.Sequential(*parts[:-1]).double(), loss, ["*"], "here")  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.1, 3.0])
def test_smooth_hinge_of_two_classes_is_that_of_koh_and_liang(temperature: float) -> None:
    outputs, targets = near_the_margin(2, width=10 * temperature)
    margin = (outputs * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[targets]).sum(dim=1)
    x = (1 - margin) / temperature
    losses = smooth_hinge(outputs, targets, temperature)
    torch.testing.assert_close(losses, temperature * torch.log1p(x.exp()), rtol=1e-12, atol=1e-15)
    sigma = torch.sigmoid(x)
    network = a_network(partial(smooth_hinge, temperature=temperature), 2)
    direction = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)[targets]
    slopes = loss_slopes(network, outputs, targets)[1]
    torch.testing.assert_close(slopes, -sigma[:, None] * direction, rtol=1e-9, atol=1e-12)
    bend = sigma * (1 - sigma) / temperature
    expected = bend[:, None, None] * direction[:, :, None] * direction[:, None, :]
    found = output_curvature(network.loss, outputs, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 / temperature)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_hinge_is_the_limit_and_the_lower_bound(classes: int) -> None:
    outputs, targets = near_the_margin(classes)
    others = outputs.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    own = outputs.gather(1, targets[:, None])[:, 0]
    exact = hinge(outputs, targets)
    torch.testing.assert_close(exact, (1 - own + others).clamp_min(0))
    for temperature in (1e-6, 1e-3, 0.1):
        excess = smooth_hinge(outputs, targets, temperature) - exact
        assert float(excess.min()) >= -1e-14
        assert float(excess.max()) <= temperature * np.log(classes) + 1e-14
    slopes = loss_slopes(a_network(hinge, classes), outputs, targets)[1]
    assert set(slopes.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert not output_curvature(hinge, outputs, targets).any()


@pytest.mark.parametrize("temperature", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_derivatives_equal_finite_differences_and_the_curvature_is_positive(classes: int, temperature: float) -> None:
    outputs, targets = near_the_margin(classes, width=temperature)
    loss = partial(smooth_hinge, temperature=temperature)
    step = 1e-4 * temperature
    found, curvature = (
        loss_slopes(a_network(loss, classes), outputs, targets)[1],
        output_curvature(loss, outputs, targets),
    )
    for c in range(classes):
        e = step * torch.eye(classes, dtype=torch.float64)[c]
        slope = (loss(outputs + e, targets) - loss(outputs - e, targets)) / (2 * step)
        torch.testing.assert_close(found[:, c], slope, rtol=1e-5, atol=1e-7)
        up, down = (loss_slopes(a_network(loss, classes), outputs + s * e, targets)[1] for s in (1, -1))
        row = (up - down) / (2 * step)
        torch.testing.assert_close(curvature[:, c], row, rtol=1e-5, atol=1e-6 / temperature)
    assert torch.equal(curvature, curvature.mT) or float((curvature - curvature.mT).abs().max()) < 1e-12 / temperature
    values = torch.linalg.eigvalsh(curvature)
    assert float(values.min()) > -1e-12 / temperature
    assert float(curvature.sum(dim=2).abs().max()) < 1e-10 / temperature, "a constant added to all scores is no change"


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_nothing_overflows_in_float32(classes: int, temperature: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = scale * torch.randn(64, classes, generator=generator)
    targets = torch.randint(0, classes, (64,), generator=generator)
    loss = partial(smooth_hinge, temperature=temperature)
    network = a_network(loss, classes)
    losses, slopes = loss_slopes(network, outputs, targets)
    curvature = output_curvature(loss, outputs, targets)
    assert bool(losses.isfinite().all() and slopes.isfinite().all() and curvature.isfinite().all())
    exact = hinge(outputs.double(), targets)
    assert float((losses - exact).abs().max()) <= temperature * np.log(classes) + 1e-6 * float(exact.max())
    for draw in draws(network, outputs, targets, ROOT, 0, np.arange(len(outputs))):
        assert bool(draw.isfinite().all())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_curvature_equals_a_dense_hessian_by_autograd(classes: int, matrix: str, layers: int) -> None:
    temperature = 0.1
    network = a_network(partial(smooth_hinge, temperature=temperature), classes, layers)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (20,), generator=generator)
    batch = Batch(x, y, np.arange(20))
    found = curvature_matrix(network, [batch], matrix)
    shapes = {name: p.shape for name, p in network.parameters().items()}
    theta = torch.cat([p.detach().flatten() for p in network.parameters().values()])

    def outputs_of(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        own = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(network.model, own, (x,))  # type: ignore[no-any-return]

    if matrix == "hessian":
        expected = torch.func.hessian(lambda flat: network.loss(outputs_of(flat), y).mean())(theta)
    else:
        # The part of the Hessian that is left when the outputs are replaced by their tangent.
        base, jacobian = outputs_of(theta).detach(), torch.func.jacrev(outputs_of)(theta)
        expected = torch.func.hessian(lambda move: network.loss(base + jacobian @ move, y).mean())(
            torch.zeros_like(theta)
        )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    if layers == 1:
        output = network.model[0]
        assert isinstance(output, nn.Linear)
        torch.testing.assert_close(curvature_matrix(network, [batch], matrix, output), expected, rtol=1e-8, atol=1e-10)


def test_a_draw_of_two_classes_is_the_root_itself() -> None:
    outputs, targets = near_the_margin(2, width=0.003)
    loss = partial(smooth_hinge, temperature=0.001)
    (u,) = draws(a_network(loss, 2), outputs, targets, ROOT, 4, np.arange(len(outputs)))
    exact = output_curvature(loss, outputs.float(), targets)
    assert float(exact.max()) > 200
    torch.testing.assert_close(u[:, :, None] * u[:, None, :], exact, rtol=1e-5, atol=1e-3)


def test_draws_of_more_classes_have_the_curvature_as_their_mean() -> None:
    outputs, targets = near_the_margin(4, width=0.003)
    loss = partial(smooth_hinge, temperature=0.001)
    exact = output_curvature(loss, outputs.float(), targets)
    total = torch.zeros_like(exact)
    for seed in range(200):
        for u in draws(a_network(loss, 4), outputs, targets, ROOT, seed, np.arange(len(outputs))):
            total += u[:, :, None] * u[:, None, :]
    assert float((total / 200 - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("classes", [2, 3])
def test_a_batch_far_from_the_margin_is_drawn_without_an_error(classes: int) -> None:
    outputs = torch.zeros(6, classes)
    outputs[:, 2:] = -0.02
    outputs[:, 0] = torch.tensor([0.0, 2.5, 3.0, -3.0, 5.0, -8.0])
    (u,) = draws(
        a_network(smooth_hinge, classes), outputs, torch.zeros(6, dtype=torch.int64), ROOT, 0, np.arange(len(outputs))
    )
    assert float(u.abs().max()) < 1e-2


def dense(folder: Path, temperature: float, test: int) -> np.ndarray:
    """Compute the influence of all 320 images of the project in float64, from the formulas."""
    from PIL import Image
    from torchvision.datasets import ImageFolder

    def read(part: str) -> tuple[Tensor, Tensor]:
        data = ImageFolder(folder / part)
        pixels = [np.array(Image.open(path).convert("L")) for path, _ in data.samples]
        x = nn.functional.avg_pool2d(torch.tensor(np.stack(pixels)).double()[:, None] / 255, 4).flatten(1)
        return torch.cat([x, torch.ones(len(x), 1)], dim=1), torch.tensor(data.targets)

    state = torch.load(folder / "model.pt", weights_only=True)
    w = torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).double()
    loss = partial(smooth_hinge, temperature=temperature)
    x, y = read("train")
    curvature = torch.einsum("bcd,bi,bj->cidj", output_curvature(loss, x @ w.T, y), x, x).reshape(500, 500) / len(x)
    network = a_network(loss, 10)
    rows = (loss_slopes(network, x @ w.T, y)[1][:, :, None] * x[:, None, :]).flatten(1)
    x, y = (values[test : test + 1] for values in read("test"))
    right = (loss_slopes(network, x @ w.T, y)[1][:, :, None] * x[:, None, :]).flatten()
    solved = torch.linalg.solve(curvature + 0.01 * torch.eye(500, dtype=torch.float64), right)
    return (rows @ solved / len(rows)).numpy()


@pytest.mark.parametrize("method", ["explicit", "cg"])
def test_directions_without_curvature_count(influence: Command, project: Path, method: str) -> None:
    loss = "loss={factory: smooth_hinge, args: {temperature: 0.05}}"
    done = influence("rank", 3, "--all", "-s", loss, "-s", f"curvature.method={method}", cwd=project)
    found = np.zeros(320)
    for row in map(json.loads, done.out.splitlines()):
        found[row["index"]] = row["influence"]
    expected = dense(project, 0.05, 3)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4
    assert "auto: the objective is convex and l2 > 0" in " ".join(done.err.split())


SPIKE = "{factory: smooth_hinge, args: {temperature: 1e-6}}"


@pytest.mark.quick("hinge-ekfac", "*e-6*-explicit")
@pytest.mark.parametrize(
    ("loss", "method"),
    [("hinge", "explicit"), ("hinge", "ekfac"), ("hinge", "fisher"), (SPIKE, "explicit"), (SPIKE, "ekfac")],
)
def test_hardly_any_curvature_gives_finite_numbers(influence: Command, project: Path, loss: str, method: str) -> None:
    done = influence("rank", "0:3", "--all", "-s", f"loss={loss}", "-s", f"curvature.method={method}", cwd=project)
    values = [json.loads(row)["influence"] for row in done.out.splitlines()]
    assert values
    assert np.isfinite(values).all()
    assert max(map(abs, values)) > 0


def test_a_curvature_that_depends_on_the_labels_does_not_outlive_them() -> None:
    choice = Choice("ekfac", "ggn", a_network(smooth_hinge, 2), None)
    wanted = {"weights": "1", "labels": "2"}
    assert "labels" in curvature_fingerprint(wanted | {"loss": "smooth_hinge"}, choice)
    assert "labels" not in curvature_fingerprint(wanted | {"loss": "cross_entropy"}, choice)


def test_without_curvature_and_without_l2_there_is_no_inverse(influence: Command, project: Path) -> None:
    done = influence("rank", 0, "-s", "loss=hinge", "-s", "l2=0.0", cwd=project, code=2)
    assert "the curvature is singular" in done.err


def test_a_single_output_has_no_margin() -> None:
    with pytest.raises(ValueError, match="two or more classes"):
        hinge(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


def test_the_margin_is_that_of_a_softmax_and_has_no_ceiling() -> None:
    outputs, targets = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    p = outputs.softmax(dim=1).gather(1, targets[:, None])[:, 0]
    values = negative_margin(outputs, targets)
    torch.testing.assert_close(values, -(p / (1 - p)).log())
    (slopes,) = torch.autograd.grad(values.sum(), outputs)
    (of_loss,) = torch.autograd.grad(-p.log().sum(), outputs)
    torch.testing.assert_close(slopes, of_loss / (1 - p.detach())[:, None])
    # Where 1 − p is 0 in float32, the margin is still right.
    sure = torch.tensor([[200.0, 0.0, -1e4]])
    assert float(negative_margin(sure, torch.tensor([0]))) == pytest.approx(-200)
    assert float(negative_margin(sure, torch.tensor([2]))) == pytest.approx(10_200)
