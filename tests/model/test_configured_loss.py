"""The losses that a config names, against what autograd gives for the loss that the model was trained with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_cli.curvature.explicit import curvature_matrix
from influence_cli.data.batches import read_batches
from influence_cli.model.configured_loss import own_loss
from influence_cli.model.network import track
from influence_cli.model.task import Task
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from tests.conftest import Command
from tests.support.loading import load, refused

N = 12
CODE = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def data():
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(12, 4, generator=g), torch.arange(12) % 3)


def halves():
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(12, 4, generator=g), torch.arange(12) % 2)


def logs():
    return nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))


def softmax():
    return nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))


def plain():
    return nn.Sequential(nn.Linear(4, 3))


def one():
    return nn.Sequential(nn.Linear(4, 1))


class Focal(nn.Module):
    def __init__(self, alpha: Tensor, gamma: float = 2.0, reduction: str = "mean"):
        super().__init__()
        self.register_buffer("alpha", alpha)
        self.gamma, self.reduction = gamma, reduction

    def forward(self, outputs, targets):
        logs = -F.cross_entropy(outputs, targets, reduction="none")
        losses = -self.alpha[targets] * (1 - logs.exp()) ** self.gamma * logs
        return losses if self.reduction == "none" else losses.mean()


def weighted(outputs, targets, weight: Tensor = None):
    return F.cross_entropy(outputs, targets, weight=weight, reduction="none")


def mean(outputs, targets):
    return F.cross_entropy(outputs, targets)


def column(outputs, targets):
    return weighted(outputs, targets)[:, None]


def pair(outputs, targets):
    return weighted(outputs, targets), 0


def fails(outputs, targets):
    raise ValueError("needs one-hot targets")


def detached(outputs, targets):
    return weighted(outputs, targets).detach()
"""
CONFIG = """
model: {factory: ./code.py:plain, checkpoint: model.pt}
train: {dataset: ./code.py:data}
"""
WEIGHT = torch.tensor([0.5, 1.33, 4.0])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    for name, outputs in (("model.pt", 3), ("one.pt", 1)):
        torch.save(nn.Sequential(nn.Linear(4, outputs)).state_dict(), tmp_path / name)
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "influence.yaml").write_text(CONFIG)
    return tmp_path


def one_logit(project: Path) -> tuple[str, ...]:
    return ("train.dataset=./code.py:halves", "model.factory=./code.py:one", f"model.checkpoint={project / 'one.pt'}")


def focal(outputs: Tensor, targets: Tensor, gamma: float) -> Tensor:
    soft = outputs.softmax(dim=1)[torch.arange(len(targets)), targets]
    return -WEIGHT[targets] * (1 - soft) ** gamma * soft.log()


def sigmoid_focal(f: Tensor, y: Tensor) -> Tensor:
    p = torch.where(y == 1, f.sigmoid(), 1 - f.sigmoid())
    return -torch.where(y == 1, 0.25, 0.75) * (1 - p) ** 2 * p.log()


CE = "torch.nn.CrossEntropyLoss"
NLL = "torch.nn.NLLLoss"
W = "weight: [0.5, 1.33, 4.0]"
CLASSES = [
    ("plain", CE, lambda o, y: functional.cross_entropy(o, y, reduction="none")),
    ("plain", f"{{factory: {CE}, args: {{reduction: mean}}}}",
     lambda o, y: functional.cross_entropy(o, y, reduction="none")),
    ("plain", f"{{factory: {CE}, args: {{{W}}}}}",
     lambda o, y: functional.cross_entropy(o, y, WEIGHT, reduction="none")),
    ("plain", f"{{factory: torch.nn.functional.cross_entropy, args: {{{W}}}}}",
     lambda o, y: functional.cross_entropy(o, y, WEIGHT, reduction="none")),
    ("plain", f"{{factory: {CE}, args: {{label_smoothing: 0.1, {W}}}}}",
     lambda o, y: functional.cross_entropy(o, y, WEIGHT, label_smoothing=0.1, reduction="none")),
    ("plain", f"{{factory: ./code.py:weighted, args: {{{W}}}}}",
     lambda o, y: functional.cross_entropy(o, y, WEIGHT, reduction="none")),
    ("plain", "{factory: ./code.py:Focal, args: {alpha: [0.5, 1.33, 4.0], gamma: 1.5}}",
     lambda o, y: focal(o, y, 1.5)),
    ("plain", "torch.nn.MultiMarginLoss", lambda o, y: functional.multi_margin_loss(o, y, reduction="none")),
    ("logs", f"{{factory: {NLL}}}", lambda o, y: functional.nll_loss(o, y, reduction="none")),
    ("logs", "torch.nn.functional.nll_loss", lambda o, y: functional.nll_loss(o, y, reduction="none")),
    ("logs", f"{{factory: {NLL}, args: {{{W}}}}}", lambda o, y: functional.nll_loss(o, y, WEIGHT, reduction="none")),
]  # fmt: skip
BCE, BCE_FUNCTION = "torch.nn.BCEWithLogitsLoss", "torch.nn.functional.binary_cross_entropy_with_logits"
bce = functional.binary_cross_entropy_with_logits
LOGIT = [
    ("cross_entropy", lambda f, y: bce(f, y, reduction="none")),
    ("binary_cross_entropy_with_logits", lambda f, y: bce(f, y, reduction="none")),
    (BCE, lambda f, y: bce(f, y, reduction="none")),
    (BCE_FUNCTION, lambda f, y: bce(f, y, reduction="none")),
    (f"{{factory: {BCE}, args: {{pos_weight: [3.0]}}}}",
     lambda f, y: bce(f, y, pos_weight=torch.tensor(3.0), reduction="none")),
    (f"{{factory: {BCE_FUNCTION}, args: {{pos_weight: 3, weight: [0.5], reduction: none}}}}",
     lambda f, y: bce(f, y, torch.tensor(0.5), pos_weight=torch.tensor(3.0), reduction="none")),
    ("{factory: binary_cross_entropy_with_logits, args: {pos_weight: 3}}",
     lambda f, y: bce(f, y, pos_weight=torch.tensor(3.0), reduction="none")),
    ("torchvision.ops.sigmoid_focal_loss", sigmoid_focal),
    ("torch.nn.SoftMarginLoss", None),
]  # fmt: skip


def check_against_autograd(task: Task, raw: nn.Module, reference) -> None:  # type: ignore[no-untyped-def]
    """Compare losses and gradients of each example with the model that was trained and its loss."""
    batch = next(read_batches(task.train, task.train.indices, N))
    network = make_network(track(task.model, task.loss, ["*"], "here"), batch.inputs)
    gradients, losses, _ = example_gradients(network, batch.inputs, batch.targets)
    raw.load_state_dict(task.model.state_dict())
    for i in range(N):
        raw.zero_grad()
        expected = reference(raw(batch.inputs[i : i + 1]), batch.targets[i : i + 1]).sum()
        expected.backward()
        torch.testing.assert_close(losses[i], expected.detach(), rtol=1e-5, atol=1e-6)
        slopes = torch.cat([parameter.grad.flatten() for parameter in raw.parameters() if parameter.grad is not None])
        torch.testing.assert_close(gradients[i], slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("factory", "loss", "reference"), CLASSES)
def test_a_loss_of_classes_is_what_autograd_says(project: Path, factory: str, loss: str, reference) -> None:  # type: ignore[no-untyped-def]
    task = load(project, f"model.factory=./code.py:{factory}", f"loss={loss}")
    layers = [nn.Linear(4, 3), *([nn.LogSoftmax(1)] if factory == "logs" else [])]
    check_against_autograd(task, nn.Sequential(*layers), reference)


@pytest.mark.parametrize(("loss", "reference"), [(loss, reference) for loss, reference in LOGIT if reference])
def test_a_loss_of_one_logit_is_what_autograd_says(project: Path, loss: str, reference) -> None:  # type: ignore[no-untyped-def]
    task = load(project, *one_logit(project), f"loss={loss}")
    check_against_autograd(task, nn.Sequential(nn.Linear(4, 1)), lambda o, y: reference(o[:, 0], y.float()))


@pytest.mark.parametrize("weight", ["", f", args: {{{W}}}"])
def test_log_softmax_with_nll_has_the_curvature_of_the_logits(project: Path, weight: str) -> None:
    logs = load(project, "model.factory=./code.py:logs", f"loss={{factory: {NLL}{weight}}}")
    plain = load(project, f"loss={{factory: {CE}{weight}}}")
    batch = next(read_batches(plain.train, plain.train.indices, N))
    of = [
        curvature_matrix(make_network(track(task.model, task.loss, ["*"], "here"), batch.inputs), [batch], "ggn")
        for task in (logs, plain)
    ]
    assert float(of[1].norm()) > 0
    torch.testing.assert_close(of[0], of[1], rtol=1e-4, atol=1e-6)
    assert logs.convex_loss
    assert (logs.loss_name == "cross_entropy") is not bool(weight)


def test_the_three_ways_to_weight_classes_are_the_same_loss(project: Path) -> None:
    outputs, targets = torch.randn(6, 3), torch.arange(6) % 3
    ways = (f"{{factory: {CE}, args: {{{W}}}}}", f"{{factory: torch.nn.functional.cross_entropy, args: {{{W}}}}}")
    tasks = [load(project, f"loss={way}") for way in ways]
    assert all(task.convex_loss for task in tasks)
    torch.testing.assert_close(tasks[0].loss(outputs, targets), tasks[1].loss(outputs, targets), rtol=0, atol=0)


def test_tensors_of_a_bound_function_follow_the_precision(project: Path) -> None:
    task = load(project, f"loss={{factory: ./code.py:weighted, args: {{{W}}}}}")
    assert isinstance(task.loss, nn.Module)
    assert task.loss.double()(torch.randn(2, 3).double(), torch.tensor([0, 2])).dtype == torch.float64
    assert getattr(own_loss(task.loss), "__name__", "") == "weighted"


BAD = [
    ("loss=./code.py:mean", "returns one number for a batch of 2", "reduction"),
    ("loss=./code.py:column", "returns [2, 1] for a batch of 2", "one loss per example"),
    ("loss=./code.py:pair", "returns a tuple for a batch of 2", "one loss per example"),
    ("loss=./code.py:fails", "ValueError: needs one-hot targets", "a loss takes"),
    ("loss=./code.py:detached", "has no gradient in the outputs", "detach"),
    (f"loss={{factory: {CE}, args: {{reduction: sum}}}}", "reduction is 'sum'", "leave it out"),
    (f"loss={{factory: {CE}, args: {{weight: [1.0, x]}}}}", "weight is [1.0, 'x']: expected a list of", "such as"),
    (f"loss={{factory: {CE}, args: {{weight: [1.0, 2.0]}}}}", "fails on outputs [2, 3]", ""),
    (f"loss={NLL}", "NLLLoss takes log-probabilities, but the model's outputs are none", "cross_entropy"),
    (f"loss={BCE}", "takes one logit per example, but the model returns 3", "loss: cross_entropy"),
    ("loss=binary_cross_entropy_with_logits", "takes one logit per example, but the model returns 3", "cross_entropy"),
    (f"loss={{factory: {BCE}, args: {{pos_weight: [1, 2, 3]}}}}", "pos_weight is [1.0, 2.0, 3.0]: expected", "one"),
    ("loss={factory: binary_cross_entropy_with_logits, args: {pos_wieght: 2}}", "no argument 'pos_wieght'", "weight"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message", "hint"), BAD)
def test_a_loss_that_does_not_fit_is_told(project: Path, value: str, message: str, hint: str) -> None:
    error = refused(project, value)
    assert message in error.message
    assert hint in error.hint


def test_a_loss_of_log_probabilities_does_not_take_one_logit(project: Path) -> None:
    error = refused(project, *one_logit(project), f"loss={NLL}")
    assert "takes log-probabilities of classes, but the model returns one logit" in error.message
    error = refused(project, *one_logit(project), "loss=./code.py:fails")
    assert "the loss of a single logit gets (logit [batch, 1]" in error.hint


def test_every_command_refuses_a_mean_alike(project: Path, influence: Command) -> None:
    said = {
        influence(*words, "-s", "loss=./code.py:mean", cwd=project, code=2).err.splitlines()[-2]
        for words in (["check"], ["gradients"], ["mislabels"], ["select"])
    }
    assert len(said) == 1
    assert "returns one number for a batch of 2" in said.pop()
    assert not (project / "influence.h5").exists()
