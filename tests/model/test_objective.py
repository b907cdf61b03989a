"""What was trained is what is explained: class weights and l2 by parameter, against a dense Hessian and a solve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError
from influence_cli.model.objective import Objective, example_shares
from tests.conftest import Command

N, TESTS, L2 = 60, 6, 0.01
PROJECT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

Y = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
W = torch.tensor({weights})


def points(seed, n):
    g = torch.Generator().manual_seed(seed)
    y = Y if n == 60 else torch.arange(n) % 3
    return torch.randn(n, 4, generator=g) + 1.5 * nn.functional.one_hot(y, 4).float(), y


def train():
    return TensorDataset(*points(0, 60))


def test():
    return TensorDataset(*points(1, 6))


def build():
    return nn.Linear(4, 3)


class Weighted(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(weight=W.clone(), reduction="none")


def weighted(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, weight=W, reduction="none")
"""
CONFIG = """
model: {factory: ./project.py:build, checkpoint: m.pt}
l2: 0.01
train: {dataset: ./project.py:train}
test: {dataset: ./project.py:test}
"""
NEAR_N, FAR = (0.5, 1.33, 4.0), (1 / 40, 1 / 15, 1 / 5)
EVEN = (1.0, 1.0, 1.0)
cross_entropy = nn.functional.cross_entropy


def points(seed: int, y: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(seed))
    return (noise + 1.5 * nn.functional.one_hot(y, 4).float()).double(), y


TRAIN = points(0, torch.tensor([0] * 40 + [1] * 15 + [2] * 5))
TEST = points(1, torch.arange(TESTS) % 3)


def outputs(v: Tensor, x: Tensor) -> Tensor:
    return x @ v[:12].view(3, 4).T + v[12:]


def minimum(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Minimise an objective of the 15 parameters by Newton steps in float64."""
    v = torch.zeros(15, dtype=torch.float64)
    for _ in range(30):
        slope = torch.func.grad(objective)(v)
        v = v - torch.linalg.pinv(torch.func.hessian(objective)(v), rtol=1e-12, hermitian=True) @ slope
    return v


def write(folder: Path, objective: Callable[[Tensor], Tensor], weights: tuple[float, ...] = EVEN) -> Tensor:
    """Write the project, trained to the minimum of an objective; give the minimum."""
    v = minimum(objective)
    (folder / "project.py").write_text(PROJECT.format(weights=list(weights)))
    (folder / "influence.yaml").write_text(CONFIG)
    torch.save({"weight": v[:12].view(3, 4).float(), "bias": v[12:].float()}, folder / "m.pt")
    return v


def reference(v: Tensor, weights: tuple[float, ...], penalty: Tensor, counts: Tensor | None = None) -> np.ndarray:
    """Compute (1/D) J_testᵀ (H + diag(l2))⁻¹ J with the Hessian by autograd, D = Σ of what each example counts."""
    w, shares = torch.tensor(weights, dtype=torch.float64), torch.ones(N) if counts is None else counts

    def losses(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs(v, x), y, weight=w, reduction="none")

    train, test = (torch.func.jacrev(lambda v, data=data: losses(v, *data))(v) for data in (TRAIN, TEST))
    divisor = float((w[TRAIN[1]] * shares).sum())
    hessian = torch.func.hessian(lambda v: (losses(v, *TRAIN) * shares).sum() / divisor)(v) + torch.diag(penalty)
    inverse = torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True)
    return (test @ inverse @ (train * shares[:, None]).T / divisor).numpy()


def scores(influence: Command, folder: Path, *words: str) -> np.ndarray:
    given = [part for word in words for part in ("-s", word)]
    influence("rank", f"0:{TESTS}", "--matrix", "scores.h5", *given, cwd=folder)
    with h5py.File(folder / "scores.h5") as file:
        return np.asarray(file["influence"][:], dtype=np.float64)


def agree(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(got - want).max() <= tolerance * np.abs(want).max())


def torch_mean(weights: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    w = torch.tensor(weights, dtype=torch.float64)
    return lambda v: cross_entropy(outputs(v, TRAIN[0]), TRAIN[1], weight=w) + L2 / 2 * v.square().sum()


FORMS = {
    "list": "loss={{factory: torch.nn.CrossEntropyLoss, args: {{weight: {weights}, reduction: none}}}}",
    "class": "loss=./project.py:Weighted",
    "function": "loss=./project.py:weighted",
}


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("function", NEAR_N),
        ("function", FAR),
        ("class", FAR),
        ("list", FAR),
        pytest.param("list", NEAR_N, marks=pytest.mark.slow),
        pytest.param("class", NEAR_N, marks=pytest.mark.slow),
    ],
)
def test_every_form_of_class_weights_gives_the_answer_of_a_dense_solve(
    influence: Command, tmp_path: Path, form: str, weights: tuple[float, ...]
) -> None:
    """R09: torch's mean divides by the sum of the weights of the labels, here 60 and 3 for 60 examples."""
    v = write(tmp_path, torch_mean(weights), weights)
    got = scores(influence, tmp_path, FORMS[form].format(weights=list(weights)))
    want = reference(v, weights, torch.full((15,), L2, dtype=torch.float64))
    assert agree(got, want), float((got * want).sum() / (want**2).sum())


def test_the_divisor_is_said(influence: Command, tmp_path: Path) -> None:
    write(tmp_path, torch_mean(FAR), FAR)
    done = influence("check", "-s", FORMS["function"], cwd=tmp_path)
    assert "divides by their sum over the training examples, 3 (n = 60)" in done.err
    assert "nothing looks wrong" in done.err


def test_an_ignored_label_has_no_influence_and_does_not_count(influence: Command, tmp_path: Path) -> None:
    y = TRAIN[1]

    def objective(v: Tensor) -> Tensor:
        return cross_entropy(outputs(v, TRAIN[0]), y, ignore_index=1) + L2 / 2 * v.square().sum()

    v = write(tmp_path, objective)
    loss = "loss={factory: torch.nn.CrossEntropyLoss, args: {ignore_index: 1}}"
    got = scores(influence, tmp_path, loss)
    penalty = torch.full((15,), L2, dtype=torch.float64)
    assert agree(got, reference(v, (1.0, 0.0, 1.0), penalty))
    assert not got[:, y.numpy() == 1].any()
    done = influence("check", "-s", loss, cwd=tmp_path)
    assert "15 training examples have the ignored label 1: their influence is 0" in done.err


BARE = torch.tensor([L2] * 12 + [0.0] * 3, dtype=torch.float64)
UNEVEN = 'l2={"*bias": 0.002, "*": 0.01}'
MIXED = torch.tensor([L2] * 12 + [0.002] * 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "mapping", "penalty"),
    [
        ("explicit", 'l2={"*bias": 0, "*": 0.01}', BARE),
        ("explicit", UNEVEN, MIXED),
        ("cg", 'l2={"*bias": 0, "*": 0.01}', BARE),
        pytest.param("cg", UNEVEN, MIXED, marks=pytest.mark.slow),
        pytest.param("arnoldi", UNEVEN, MIXED, marks=pytest.mark.slow),
        pytest.param("nystrom", UNEVEN, MIXED, marks=pytest.mark.slow),
        pytest.param("neumann", UNEVEN, MIXED, marks=pytest.mark.slow),
        pytest.param("lissa", UNEVEN, MIXED, marks=pytest.mark.slow),
    ],
)
def test_l2_by_parameter_gives_the_answer_of_a_dense_solve(
    influence: Command, tmp_path: Path, method: str, mapping: str, penalty: Tensor
) -> None:
    v = write(tmp_path, lambda v: cross_entropy(outputs(v, TRAIN[0]), TRAIN[1]) + (penalty * v.square()).sum() / 2)
    got = scores(influence, tmp_path, mapping, f"curvature.method={method}")
    assert agree(got, reference(v, EVEN, penalty), 2e-3 if method in ("lissa", "neumann") else 1e-4)


def test_leaving_out_retrains_with_l2_by_parameter(influence: Command, tmp_path: Path) -> None:
    """The actual effect is that of minimising the objective without the example, with the same n and l2."""

    def objective(v: Tensor, kept: Tensor) -> Tensor:
        losses = cross_entropy(outputs(v, TRAIN[0]), TRAIN[1], reduction="none")
        return (losses * kept).sum() / N + (MIXED * v.square()).sum() / 2

    v = write(tmp_path, lambda v: objective(v, torch.ones(N)))
    done = influence("verify", 0, "--loo", 2, "-s", UNEVEN, cwd=tmp_path)
    for row in map(json.loads, done.out.splitlines()):
        kept = torch.ones(N)
        kept[row["index"]] = 0
        w = minimum(lambda v, kept=kept: objective(v, kept))  # type: ignore[misc]
        both = [cross_entropy(outputs(u, TEST[0][:1]), TEST[1][:1]) for u in (w, v)]
        assert row["actual"] == pytest.approx(float(both[0] - both[1]), rel=1e-4)


def test_verify_names_the_part_of_the_objective_that_is_another_one(influence: Command, tmp_path: Path) -> None:
    """The checkpoint is that of a summed loss. Newton steps go to the minimum of the config, and agree with it."""
    write(
        tmp_path, lambda v: cross_entropy(outputs(v, TRAIN[0]), TRAIN[1], reduction="sum") + L2 / 2 * v.square().sum()
    )
    line = "the gradient is zero if the mean loss is multiplied by c = 60: a summed loss; write l2: 0.00016666"
    done = influence("verify", 0, "--loo", 6, cwd=tmp_path)
    assert line in " ".join(done.err.split())
    assert line in " ".join(influence("check", cwd=tmp_path).err.split())
    done = influence("check", "-s", f"l2={L2 / N}", cwd=tmp_path)
    assert "nothing looks wrong" in done.err


def test_a_parameter_without_a_pattern_is_named(influence: Command, tmp_path: Path) -> None:
    write(tmp_path, torch_mean(EVEN))
    done = influence("rank", 0, "-s", 'l2={"*bias": 0}', cwd=tmp_path, code=2)
    assert "no pattern of l2 matches the parameter weight" in done.err
    done = influence("rank", 0, "-s", 'l2={"*bias": -1, "*": 0}', cwd=tmp_path, code=2)
    assert "l2.*bias is -1: expected a number ≥ 0" in done.err


def test_fisher_has_one_l2(influence: Command, tmp_path: Path) -> None:
    write(tmp_path, torch_mean(EVEN))
    done = influence("rank", 0, "-s", UNEVEN, "-s", "curvature.method=fisher", cwd=tmp_path, code=2)
    assert "curvature fisher takes one l2 for all tracked parameters" in done.err


def test_the_first_matching_pattern_counts_and_a_mapping_of_one_value_is_a_number() -> None:
    objective = Objective((("*bias", 0.0), ("head.*", 0.5), ("*", 0.1)), where="influence.yaml:2")
    assert [objective.l2_of(name) for name in ("head.bias", "head.weight", "body.weight")] == [0.0, 0.5, 0.1]
    assert Objective((("*", 0.3),)).trainer_l2(2.0) == 0.6
    assert objective.trainer_l2(2.0) == {"*bias": 0.0, "head.*": 1.0, "*": 0.2}
    with pytest.raises(InfluenceError, match=r"influence.yaml:2: no pattern of l2 matches the parameter weight"):
        Objective((("*bias", 0.0),), where="influence.yaml:2").l2_of("weight")


def test_shares_are_the_weights_of_the_labels() -> None:
    labels = np.array([0, 2, 1, 2])
    assert example_shares(labels, None, None) is None
    shares = example_shares(labels, torch.tensor([1.0, 2.0, 4.0]), 1)
    assert shares is not None
    assert shares.tolist() == [1.0, 4.0, 0.0, 4.0]
    objective = Objective((("*", 1.0),), shares)
    assert objective.factor == 9 / 4
    assert objective.without(np.array([1]), 4) == 9 / 5
    assert Objective().without(np.array([1, 2]), 4) == 2


COUNTS = torch.tensor([1.0, 0.0, 2.0, 0.25, 3.5] * 12, dtype=torch.float64)


def counted(v: Tensor, kept: Tensor = COUNTS) -> Tensor:
    losses = cross_entropy(outputs(v, TRAIN[0]), TRAIN[1], reduction="none")
    return (losses * kept).sum() / COUNTS.sum() + L2 / 2 * v.square().sum()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("counts.npy", ()),
        ("counts.txt", ("curvature.method=cg",)),
        pytest.param("counts.csv", ("curvature.matrix=hessian",), marks=pytest.mark.slow),
    ],
)
def test_an_example_counts_as_often_as_its_weight_says(
    influence: Command, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    v = write(tmp_path, counted)
    texts = [f"{count:g}" for count in COUNTS.tolist()]
    np.save(tmp_path / "counts.npy", COUNTS.numpy())
    (tmp_path / "counts.txt").write_text("\n".join(texts))
    (tmp_path / "counts.csv").write_text("\n".join(["weight", *texts]))
    got = scores(influence, tmp_path, f"train.weights={name}", *words)
    assert agree(got, reference(v, EVEN, torch.full((15,), L2, dtype=torch.float64), COUNTS))
    assert not got[:, COUNTS.numpy() == 0].any()


def test_weights_are_in_the_losses_of_no_row_and_in_every_retraining(influence: Command, tmp_path: Path) -> None:
    v = write(tmp_path, counted)
    np.save(tmp_path / "counts.npy", COUNTS.numpy())
    given = ("-s", "train.weights=counts.npy")
    done = influence("check", *given, cwd=tmp_path)
    assert (
        f"divides by their sum, {float(COUNTS.sum()):.6g} (n = 60); 12 training examples have the weight 0" in done.err
    )
    assert "nothing looks wrong" in done.err
    losses = cross_entropy(outputs(v, TRAIN[0]), TRAIN[1], reduction="none")
    (mean,) = [row["value"] for row in map(json.loads, done.out.splitlines()) if row["item"] == "mean training loss"]
    assert mean == pytest.approx(float(losses.mean()), rel=1e-5)
    for row in map(json.loads, influence("verify", 0, "--loo", 4, *given, cwd=tmp_path).out.splitlines()):
        kept = COUNTS.clone()
        kept[row["index"]] = 0
        w = minimum(lambda v, kept=kept: counted(v, kept))  # type: ignore[misc]
        both = [cross_entropy(outputs(u, TEST[0][:1]), TEST[1][:1]) for u in (w, v)]
        assert row["actual"] == pytest.approx(float(both[0] - both[1]), rel=1e-4)
        assert row["loss"] == pytest.approx(float(losses[row["index"]]), rel=1e-4)


def test_self_influence_is_on_the_loss_without_the_weight(influence: Command, tmp_path: Path) -> None:
    """Removing example i takes wᵢ gᵢ out of the objective; its own loss has the gradient gᵢ."""
    v = write(tmp_path, counted)
    np.save(tmp_path / "counts.npy", COUNTS.numpy())
    words = ("--signal", "self-influence", "--all", "-s", "train.weights=counts.npy")
    rows = [json.loads(line) for line in influence("mislabels", *words, cwd=tmp_path).out.splitlines()]
    train = torch.func.jacrev(lambda v: cross_entropy(outputs(v, TRAIN[0]), TRAIN[1], reduction="none"))(v)
    inverse = torch.linalg.inv(torch.func.hessian(counted)(v))
    want = COUNTS * ((train @ inverse) * train).sum(dim=1) / COUNTS.sum()
    got = torch.tensor([row["self_influence"] for row in sorted(rows, key=lambda row: row["index"])])
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n" * 59 + "-1", "the weight of training example 59 is '-1' in counts.txt"),
        ("nan\n" * 60, "the weight of training example 0 is 'nan' in counts.txt"),
        ("1\n" * 59 + "many", "the weight of training example 59 is 'many' in counts.txt"),
        ("1\n" * 59, "counts.txt has 59 weights, but the data set has 60 examples"),
        ("0\n" * 60, "the weights of the training examples add up to 0"),
    ],
)
def test_weights_that_are_none_are_refused(influence: Command, tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, counted)
    (tmp_path / "counts.txt").write_text(text)
    done = influence("rank", 0, "-s", "train.weights=counts.txt", cwd=tmp_path, code=2)
    assert message in " ".join(done.err.split())


def test_other_weights_are_another_store(influence: Command, tmp_path: Path) -> None:
    write(tmp_path, counted)
    np.save(tmp_path / "counts.npy", COUNTS.numpy())
    influence("gradients", cwd=tmp_path)
    done = influence("rank", 0, "-s", "train.weights=counts.npy", cwd=tmp_path, code=2)
    assert "train.weights; the loss (cross_entropy in the store" in " ".join(done.err.split())
    done = influence("rank", 0, "-s", "train.weights=none.npy", cwd=tmp_path, code=2)
    assert "there is no such file" in done.err


def test_weights_may_be_a_column_of_the_list(influence: Command, tiny: Path) -> None:
    """As if they were a file of one number per example, in the order of the list."""
    files = sorted((tiny / "train").rglob("*.png"))
    lines = [f"{path.relative_to(tiny)},{path.parent.name},{1 + number % 3}" for number, path in enumerate(files)]
    (tiny / "list.csv").write_text("\n".join(["path,label,often", *lines]))
    np.save(tiny / "often.npy", 1 + np.arange(len(files)) % 3)
    transform = "[{Grayscale: {num_output_channels: 1}}, ToImage, {ToDtype: {dtype: float32, scale: true}}]"
    found = []
    for weights in ("often", "often.npy"):
        words = [
            f"train={{csv: list.csv, weights: {weights}, transform: {transform}}}",
            f"gradients.store={weights}.h5",
        ]
        given = [part for word in words for part in ("-s", word)]
        influence("rank", 0, "--matrix", "scores.h5", *given, cwd=tiny)
        with h5py.File(tiny / "scores.h5") as file:
            found.append(np.asarray(file["influence"][:]))
    assert np.array_equal(*found)
    bad = [f"train={{csv: list.csv, weights: path, transform: {transform}}}", "gradients.store=bad.h5"]
    done = influence("rank", 0, *[part for word in bad for part in ("-s", word)], cwd=tiny, code=2)
    assert "the weight of training example 0 is 'train/a/000.png' in column 'path' of" in " ".join(done.err.split())
