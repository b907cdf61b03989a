"""One logit as two classes, against the model that writes them out; the logits among what a model returns."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli import Terminal, find_mislabels, load_config, load_tasks, prepare_all, rank_training
from influence_cli.influence.example_facts import training_facts
from influence_cli.influence.test_selection import select_tests
from influence_cli.mislabels.find import Mislabels
from influence_cli.mislabels.signals import SignalChoice
from influence_cli.model.heads import Head, add_head, has_one_logit, head_of, take_head
from influence_cli.model.network import output_layer, track
from influence_cli.model.task import Task
from influence_cli.passes.coverage import make_network
from influence_cli.ranking.rank import RankOptions
from influence_cli.ranking.sinks import KeptInfluence
from influence_cli.retrain.newton import losses_under, make_problem, minimise, outputs_of, start_of, without_each
from influence_cli.retrain.training import Training, train
from tests.conftest import Command
from tests.support.loading import load, refused

N, TESTS, L2 = 24, 4, 0.02
CODE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def points(seed, n):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.randn(n, 4, generator=g) + y[:, None], y


def train():
    return TensorDataset(*points(0, 24))


def test():
    return TensorDataset(*points(1, 4))


def signs():
    x, y = points(0, 24)
    return TensorDataset(x, 2 * y - 1)


def layers():
    return nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)


def one():
    return nn.Sequential(*layers())


class Two(nn.Sequential):
    def forward(self, x):
        f = super().forward(x)
        return torch.cat([torch.zeros_like(f), f], 1)


def two():
    return Two(*layers())


class Returns(nn.Sequential):
    def __init__(self, form):
        super().__init__(*layers())
        self.form = form

    def forward(self, x):
        return self.form(super().forward(x))


def squeezed():
    return Returns(lambda f: f.squeeze())


def summed():
    return Returns(lambda f: f.sum())


def sigmoid():
    return Returns(torch.sigmoid)


def both():
    return Returns(lambda f: (torch.sigmoid(f), f))


def named():
    return Returns(lambda f: {"probs": torch.sigmoid(f), "head": f, "loss": None})


def pairs():
    return Returns(lambda f: (torch.cat([-f, f], 1).softmax(1), torch.cat([-f, f], 1)))


def second(returned):
    return returned[1]


def bce(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.float(), reduction="none")


def column(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets[:, None].float(), reduction="none")
"""
CONFIG = f"""
model: {{factory: ./code.py:one, checkpoint: model.pt}}
loss: binary_cross_entropy_with_logits
l2: {L2}
train: {{dataset: ./code.py:train}}
test: {{dataset: ./code.py:test}}
gradients: {{block: 8}}
"""
TWIN = ("model.factory=./code.py:two", "loss=cross_entropy")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "influence.yaml").write_text(CONFIG)
    return tmp_path


def ranked(project: Path, store: str, *values: str) -> tuple[np.ndarray, Mislabels]:
    """Give influence [t, i], and what mislabels gives with self-influence."""
    config = load_config(project / "influence.yaml", [f"gradients.store={project / store}", *values])
    tasks, terminal = load_tasks(config), Terminal(quiet=True)
    stores = prepare_all(config, tasks, terminal)
    chosen = select_tests([f"0:{TESTS}"], tasks[0].test, tasks[0].classes, lambda: np.empty(0, np.int64), [])
    kept = KeptInfluence(TESTS, N)
    facts = training_facts(stores)
    for _ in rank_training(stores, chosen, facts=facts, terminal=terminal, options=RankOptions(sinks=[kept])):
        pass
    wanted = () if config.curvature.method == "cg" else ("self-influence",)
    choice = SignalChoice("combined", ("combined", *wanted))
    return kept.values.astype(np.float64), find_mislabels(tasks, stores, choice=choice, terminal=terminal)


# One logit


@pytest.mark.parametrize(
    "values",
    [
        ("curvature.method=explicit",),
        ("curvature.method=explicit", "gradients.layers=['2']"),
        ("curvature.method=explicit", "curvature.matrix=hessian", "curvature.damping=1"),
        ("curvature.method=ekfac",),
        ("curvature.method=ekfac", "gradients.layers=['2']"),
        ("curvature.method=identity",),
        ("curvature.method=cg", "curvature.tolerance=1e-8"),
    ],
)
@pytest.mark.quick("values0", "values2", "values6")
def test_all_numbers_are_those_of_the_twin_with_two_outputs(project: Path, values: tuple[str, ...]) -> None:
    influence, labels = ranked(project, "one.h5", *values)
    expected, of_twin = ranked(project, "two.h5", *TWIN, *values)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(influence, expected, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(labels.order, of_twin.order)
    np.testing.assert_array_equal(labels.suggested, of_twin.suggested)
    np.testing.assert_allclose(labels.score, of_twin.score, atol=1e-6)
    np.testing.assert_allclose(labels.facts.losses, of_twin.facts.losses, rtol=1e-6)
    assert labels.signals.keys() == of_twin.signals.keys()
    for name, signal in labels.signals.items():
        np.testing.assert_allclose(
            signal, of_twin.signals[name], atol=1e-6 * np.abs(signal).max(), rtol=0, err_msg=name
        )


def test_the_influence_of_an_output_layer_is_that_of_logistic_regression(project: Path) -> None:
    task = load(project)
    x, y = task.train.source.tensors
    with torch.no_grad():
        hidden = torch.cat([task.model[:2](x), torch.ones(N, 1)], dim=1).double()  # type: ignore[index]
        held = torch.cat([task.model[:2](task.test_split().source.tensors[0]), torch.ones(TESTS, 1)], dim=1).double()  # type: ignore[index]
    w = torch.cat([task.model[2].weight[0], task.model[2].bias]).detach().double()  # type: ignore[index]
    p = (hidden @ w).sigmoid()
    h = (hidden.T * (p * (1 - p))) @ hidden / N + L2 * torch.eye(6).double()
    g = (p - y)[:, None] * hidden
    of_test = ((held @ w).sigmoid() - task.test_split().source.tensors[1])[:, None] * held
    expected = of_test @ torch.linalg.solve(h, g.T) / N
    influence, _ = ranked(project, "one.h5", "gradients.layers=['2']")
    np.testing.assert_allclose(influence, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_retraining_the_output_layer_by_newton_steps_is_logistic_regression(project: Path) -> None:
    task = load(project)
    x, y = task.train.source.tensors
    network = track(task.model, task.loss, ["2"], "here")
    layer = output_layer(network, x)
    assert layer is task.model.get_submodule("2")
    batch = next(iter_batches(task))
    problem = make_problem(network, layer, [batch], L2)
    w, before, after = minimise(problem, start_of(network, layer, problem.examples.a))
    assert after < 1e-9 < before
    a = problem.examples.a
    p = (a @ w[0]).sigmoid()
    assert float(((p - y) @ a / N + L2 * w[0]).norm()) < 1e-9
    without = without_each(problem, w, torch.tensor([3]))
    kept = torch.arange(N) != 3
    p = (a[kept] @ without[0, 0]).sigmoid()
    assert float(((p - y[kept]) @ a[kept] / N + L2 * without[0, 0]).norm()) < 1e-7
    tests = outputs_of(network, layer, [batch])
    assert tests.logits(w).shape == (N, 2)
    expected = nn.functional.binary_cross_entropy_with_logits(a @ w[0], y.double(), reduction="none")
    torch.testing.assert_close(losses_under(problem, w[None], tests)[0], expected)


def iter_batches(task: Task):  # type: ignore[no-untyped-def]
    from influence_cli.data.batches import read_batches

    return read_batches(task.train, task.train.indices, N)


def test_a_model_that_is_one_linear_layer_goes_through_the_layer_pass(project: Path) -> None:
    torch.save(nn.Linear(4, 1).state_dict(), project / "model.pt")
    task = load(project, "model={factory: torch.nn.Linear, args: {in_features: 4, out_features: 1}, "
                f"checkpoint: {project / 'model.pt'}}}")  # fmt: skip
    x, _ = task.train.source.tensors
    network = make_network(track(task.model, task.loss, ["*"], "here"), x)
    assert [layer.name for layer in network.layers] == [""]
    assert not network.rest
    assert output_layer(network, x) is task.model


@pytest.mark.parametrize("loss", ["./code.py:bce", "./code.py:column"])
def test_the_users_own_loss_gets_the_logit_itself(project: Path, loss: str) -> None:
    task, twin = load(project, f"loss={loss}"), load(project, *TWIN)
    outputs, targets = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.testing.assert_close(task.loss(outputs, targets), twin.loss(outputs, targets))
    assert task.loss_name == loss


def test_a_logit_without_its_axis_is_the_same(project: Path) -> None:
    task, squeezed = load(project), load(project, "model.factory=./code.py:squeezed")
    x, _ = task.train.source.tensors
    torch.testing.assert_close(squeezed.model(x), task.model(x), rtol=0, atol=0)
    torch.testing.assert_close(squeezed.model(x[:1]), task.model(x[:1]), rtol=0, atol=0)
    assert task.classes == ("0", "1")
    error = refused(project, "model.factory=./code.py:summed")
    assert "the model returns [] for two examples" in error.message


def test_a_copy_keeps_its_head_and_training_goes_without(project: Path) -> None:
    task = load(project)
    x, _ = task.train.source.tensors
    other = copy.deepcopy(task.model)
    assert has_one_logit(other)
    assert other(x).shape == (N, 2)
    widths: list[torch.Size] = []

    def function(model: nn.Module, data: object, **_: object) -> nn.Module:
        widths.append(model(x).shape)
        return model

    training = Training(function, "function", "here", project, "")
    trained = train(training, other, [], l2=0.0, seed=0, what="all")
    assert widths == [torch.Size([N, 1])]
    assert trained(x).shape == (N, 2)
    head = take_head(trained)
    assert head is not None
    assert trained(x).shape == (N, 1)
    assert take_head(trained) is None
    add_head(trained, head)
    add_head(trained, head)
    assert head_of(trained) is head
    assert sum(isinstance(hook, Head) for hook in trained._forward_hooks.values()) == 1


# Which output


@pytest.mark.parametrize(
    ("factory", "output"),
    [("both", "1"), ("both", "-1"), ("both", "./code.py:second"), ("named", "head"), ("sigmoid", "torch.logit")],
)
def test_the_output_that_is_named_holds_the_logits(project: Path, factory: str, output: str) -> None:
    task = load(project)
    x, _ = task.train.source.tensors
    picked = load(project, f"model.factory=./code.py:{factory}", f"model.output={output}")
    torch.testing.assert_close(picked.model(x), task.model(x), rtol=1e-4, atol=1e-5)
    assert picked.output


def test_another_output_is_another_store(project: Path, influence: Command) -> None:
    values = ("-s", "model.factory=./code.py:both", "-s")
    influence("gradients", "-q", *values, "model.output=1", cwd=project)
    err = influence("gradients", *values, "model.output=./code.py:second", cwd=project, code=2).err
    assert "which of the model's outputs the logits are (model.output)" in err


def test_softmax_and_logits_as_a_tuple(project: Path) -> None:
    task = load(project, "model.factory=./code.py:pairs", "model.output=1", "loss=cross_entropy")
    x, _ = task.train.source.tensors
    f: Tensor = task.model(x)
    assert f.shape == (N, 2)
    torch.testing.assert_close(f[:, 0], -f[:, 1])
    error = refused(project, "model.factory=./code.py:pairs", "loss=cross_entropy")
    assert "the outputs are probabilities" in error.message
    assert "the model returns a tuple of 2: model.output names another one" in error.hint
    assert "torch.log" in error.hint


BAD = [
    (("model.factory=./code.py:sigmoid",), "the single output is a probability", "model.output: torch.logit"),
    (("model.factory=./code.py:both",), "the single output is a probability", "model.output names another one"),
    (("model.factory=./code.py:both", "model.output=2"), "no output 2: the model returns a tuple of 2", "0 is"),
    (("model.factory=./code.py:both", "model.output=head"), "no output 'head': the model returns a tuple", "number"),
    (("model.factory=./code.py:named", "model.output=haed"), "there is no output 'haed'", "did you mean 'head'?"),
    (("model.factory=./code.py:named", "model.output=0"), "output 0 is asked for, but the model returns a dict", "key"),
    (("model.output=0",), "output 0 is asked for, but the model returns a tensor", "leave model.output out"),
    (("model.output=./code.py:second",), "./code.py:second fails on what", ""),
    (("model.output=./code.py:secnd",), "has no 'secnd'", "did you mean 'second'?"),
    (("model.output=./code.py:F.pi",), "has no 'F.pi'", ""),
    (("model.factory=./code.py:both", "model.output=./code.py:points"), "./code.py:points fails on", ""),
    (("train.dataset=./code.py:signs",), "label -1, but the model has one logit", "train.classes: {-1: 0, 1: 1}"),
    (("model.output=true",), "model.output is True", ""),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message", "hint"), BAD)
def test_an_output_that_does_not_fit_is_told(project: Path, values: tuple[str, ...], message: str, hint: str) -> None:
    error = refused(project, *values)
    assert message in error.message
    assert hint in error.hint


def test_labels_of_minus_one_and_one_are_mapped(project: Path) -> None:
    values = ("train.dataset=./code.py:signs", "train.classes={-1: 0, 1: 1}")
    task = load(project, *values, "test=null")
    np.testing.assert_array_equal(task.train.labels, np.arange(N) % 2)
    error = refused(project, *values)  # the labels of the test examples are 0 and 1
    assert "label 0 of the test data set has no output" in error.message
