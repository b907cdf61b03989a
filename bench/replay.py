"""Measure how true a replay is: predicted against actual changes of test losses in trainings of the same run.

    .venv/bin/python bench/replay.py lds [--images 2000] [--epochs 10] [--subsets 50] [--tests 20] [--singles 50]
    .venv/bin/python bench/replay.py recipes [--images 1000] [--epochs 10] [--subsets 10] [--tests 6]
    .venv/bin/python bench/replay.py softmax [--images 5000] [--epochs 600] [--tests 10] [--singles 50]
    .venv/bin/python bench/replay.py cost [--tests 50]

Images of Fashion-MNIST, a tenth of their labels flipped, and the demo's CNN (GELU and average pooling where smooth),
one thread. Every training has the order and the start of the first; an image that is left out has weight 0 in its
batches. Tests: half of them misclassified, half the first of the test set.

- lds: random 1% left out: per test the rank correlation (Spearman), Pearson's and the slope of actual on predicted
  changes through 0, averaged over tests; 95% intervals by resampling subsets and tests. Then single images left out,
  those of the largest influence on the mean loss of the tests: correlation and slope over the images.
- recipes: the same for small runs of many recipes, with the Gauss–Newton matrix in the place of every batch's Hessian,
  and the verdict's r, which sees other subsets and tests.
- softmax: single digits of MNIST left out of a softmax regression that has converged.
- cost: processor seconds of a training step and of a step on the way back, for one test and in a block.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lds_retrain
import numpy as np
import torch
from make_demo_data import read_idx
from public_data import need
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call

from influence_cli.config.schema import RecipeConfig
from influence_cli.replay.recipe import Recipe
from influence_cli.replay.recipe_run import RecipeRun, train_run
from influence_cli.replay.verdict import TRAININGS, judge
from influence_cli.runtime.memory import reuse_freed
from influence_cli.steps.backward import replay
from influence_cli.steps.forward import follow_weights, run_again, take_step
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.run import State

SMOOTH: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "cosine"}
ADAM: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-2, "schedule": "cosine"}
OPTIMIZERS = {"SGD": SMOOTH, "AdamW": ADAM}
# The files of MNIST: images and labels, of training and test set.
NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
CPU = torch.device("cpu")
cross_entropy = partial(nn.functional.cross_entropy, reduction="none")


@dataclass
class Memory:
    """Training examples and a record that stay in memory; in the places of ``Examples`` and ``Record``."""

    inputs: Tensor
    labels: Tensor
    device: torch.device = CPU
    shown: str = "memory"
    states: dict[int, State] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.inputs[torch.from_numpy(rows)], self.labels[torch.from_numpy(rows)]

    @property
    def kept(self) -> list[int]:
        return sorted(self.states)

    def read(self, step: int, _device: torch.device) -> State:
        return self.states[step]

    def write(self, step: int, state: State) -> None:
        self.states[step] = state


class GaussNewton(TrainedNetwork):
    """A network whose batches have the Gauss–Newton matrix JᵀSJ in the place of the Hessian."""

    def _products(
        self, state: State, inputs: Tensor, targets: Tensor, vectors: Tensor, divisor: int
    ) -> tuple[Tensor, Tensor]:
        def outputs(parameters: Tensor) -> Tensor:
            values = {name: parameters[self.slot(name)].view(shapes[name]) for name in self.names}
            result: Tensor = functional_call(self.model, values, (inputs,))
            return result

        def slopes(logits: Tensor) -> Tensor:
            return torch.func.grad(lambda z: cross_entropy(z, targets).sum())(logits)

        def along(vector: Tensor) -> tuple[Tensor, Tensor]:
            logits, moved = torch.func.jvp(outputs, (state.parameters,), (vector,))
            _, pull = torch.func.vjp(outputs, state.parameters)
            curved = torch.func.jvp(slopes, (logits,), (moved,))[1]
            return pull(curved)[0] / divisor, (slopes(logits) * moved).sum(dim=1)

        shapes = {name: self.model.get_parameter(name).shape for name in self.names}
        curved, inner = torch.func.vmap(along)(vectors)
        return curved.detach(), inner.detach()


@dataclass(frozen=True)
class Trained:
    """A run with its end, and the images that it is judged by."""

    network: TrainedNetwork
    run: RecipeRun
    end: State
    tests: tuple[Tensor, Tensor]
    seconds: float

    def losses(self, state: State) -> np.ndarray:
        with torch.no_grad():
            outputs = self.network.measure(state.parameters, state.buffers, self.tests[0])
            values: np.ndarray = cross_entropy(outputs, self.tests[1]).double().numpy()
        return values

    def ends(self) -> State:
        """Give the derivatives of the tests' losses in the last state."""
        parameters = self.end.parameters.clone().requires_grad_()
        outputs = self.network.measure(parameters, self.end.buffers, self.tests[0])
        losses = cross_entropy(outputs, self.tests[1])
        rows = torch.stack([torch.autograd.grad(loss, parameters, retain_graph=True)[0] for loss in losses])
        slots = tuple(torch.zeros_like(rows) for _ in self.end.slots)
        return State(rows, slots, torch.zeros(len(rows), len(self.end.buffers)))

    def without(self, rows: np.ndarray) -> np.ndarray:
        """Train without some images: the changes of the tests' losses."""
        weights = np.ones(self.run.examples)
        weights[rows] = 0
        return self.losses(run_again(self.network, self.run, weights)) - self.losses(self.end)


def images(count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw training images, a tenth of their labels flipped, and give them with the test images."""
    data = need("fashion-mnist")
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(60_000, generator=draw)[:count]
    labels = torch.tensor(lds_retrain.read(data, "train", "labels")[rows.numpy()]).long()
    flipped = torch.randperm(count, generator=draw)[: count // 10]
    labels[flipped] = (labels[flipped] + torch.randint(1, 10, (len(flipped),), generator=draw)) % 10
    train = lds_retrain.read_inputs(data, "train", rows.numpy())
    test = lds_retrain.read_inputs(data, "t10k", slice(0, 2_000))
    truth = torch.tensor(lds_retrain.read(data, "t10k", "labels")[:2_000]).long()
    return (train, labels), (test, truth)


def build(smooth: bool) -> nn.Module:
    """Make the demo's CNN."""
    torch.manual_seed(0)
    activation, pool = (nn.GELU, nn.AvgPool2d) if smooth else (nn.ReLU, nn.MaxPool2d)
    first = [nn.Conv2d(1, 16, 3, padding=1), activation(), pool(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), activation(), pool(2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(1568, 32), activation(), nn.Linear(32, 10))


def trained(settings: dict[str, Any], given: argparse.Namespace, *, smooth: bool, tests: int) -> Trained:
    """Train a recipe, and choose the tests: half of them misclassified."""
    (train, labels), (test, truth) = images(given.images)
    recipe = Recipe(RecipeConfig(**{"epochs": given.epochs, **settings}), given.images)
    memory = Memory(train, labels)
    network = TrainedNetwork(build(smooth).train(), cross_entropy)
    run = RecipeRun(recipe, memory, memory)  # type: ignore[arg-type]
    started = time.process_time()
    end = train_run(network, run)
    seconds = time.process_time() - started
    with torch.no_grad():
        outputs = network.measure(end.parameters, end.buffers, test)
    wrong = torch.nonzero(outputs.argmax(dim=1) != truth).flatten()
    chosen = torch.cat([wrong[: tests // 2], torch.arange(tests - tests // 2)])
    return Trained(network, run, end, (test[chosen], truth[chosen]), seconds)


def agreement(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Give Spearman's and Pearson's correlation and the slope of each test: [3, m] from [subsets, m]."""

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        return np.asarray((a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0)))

    ranks = correlation(rankdata(predicted, axis=0), rankdata(actual, axis=0))
    slope = (predicted * actual).sum(axis=0) / (predicted**2).sum(axis=0)
    return np.stack([ranks, correlation(predicted, actual), slope])


def in_words(predicted: np.ndarray, actual: np.ndarray) -> str:
    """Say the three with intervals."""
    draw, count, tests = np.random.default_rng(0), *predicted.shape
    means = agreement(predicted, actual).mean(axis=1)
    samples = []
    for _ in range(500):
        rows, columns = draw.integers(0, count, count), draw.integers(0, tests, tests)
        samples.append(np.nanmean(agreement(predicted[np.ix_(rows, columns)], actual[np.ix_(rows, columns)]), axis=1))
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    names = ("Spearman", "Pearson", "slope")
    parts = zip(names, means, low, high, strict=True)
    return ", ".join(f"{name} {mean:.3f} ({a:.3f} to {b:.3f})" for name, mean, a, b in parts)


def left_out(given: argparse.Namespace, seed: int) -> list[np.ndarray]:
    """Draw random 1% of the images, once per subset."""
    draw = np.random.default_rng(seed)
    return [draw.choice(given.images, max(1, given.images // 100), replace=False) for _ in range(given.subsets)]


def measured(run: Trained, subsets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Replay, and train without each subset: influence [m, n], predicted and actual [subsets, m], replay seconds."""
    started = time.process_time()
    influence = -replay(run.network, run.run, run.ends())
    seconds = time.process_time() - started
    predicted = np.stack([influence[:, rows].sum(axis=1) for rows in subsets])
    actual = np.stack([run.without(rows) for rows in subsets])
    return influence, predicted, actual, seconds


def verdict_of(run: Trained, given: argparse.Namespace) -> float:
    """Measure the verdict's r as the product does, on other subsets and on 500 test images."""
    _, (test, truth) = images(given.images)
    judged = Trained(run.network, run.run, run.end, (test[1000:1500], truth[1000:1500]), run.seconds)
    weights = np.zeros((TRAININGS, given.images))
    draw = np.random.default_rng(99)
    for row in weights:
        row[draw.choice(given.images, max(1, given.images // 100), replace=False)] = -1
    end, moved = follow_weights(run.network, run.run, weights)

    def losses(parameters: Tensor) -> Tensor:
        return cross_entropy(run.network.measure(parameters, end.buffers, judged.tests[0]), judged.tests[1])

    changes = [torch.func.jvp(losses, (end.parameters,), (each,))[1].detach() for each in moved.parameters]
    actual = np.stack([judged.without(np.flatnonzero(row)) for row in weights])
    return judge(torch.stack(changes).double().numpy(), actual, 0).agreement


def print_lds(given: argparse.Namespace) -> None:
    """Measure the smooth recipe at length."""
    run = trained({**SMOOTH, "batch": 250}, given, smooth=True, tests=given.tests)
    print(f"{given.images:,} images, {run.run.steps} steps of 250, SGD, GELU, average pooling: {run.seconds:.0f} s")
    influence, predicted, actual, seconds = measured(run, left_out(given, 1))
    each = seconds / run.seconds / given.tests
    print(f"replay of {given.tests} tests: {seconds / run.seconds:.1f} trainings, {each:.2f} per test", flush=True)
    print(f"{given.subsets} subsets without 1%: {in_words(predicted, actual)}", flush=True)
    mean = influence.mean(axis=0)
    strongest = np.argsort(-np.abs(mean))[: given.singles]
    truth = np.array([run.without(np.array([row])).mean() for row in strongest])
    slope = (mean[strongest] @ truth) / (mean[strongest] @ mean[strongest])
    r = np.corrcoef(mean[strongest], truth)[0, 1]
    print(f"{given.singles} strongest single images, mean loss of the tests: r {r:.4f}, slope {slope:.3f}")


def print_recipes(given: argparse.Namespace) -> None:
    """Measure many recipes briefly."""
    print(
        "| recipe | batch | Spearman, Pearson, slope (95%) | Spearman, GGN | verdict r | seconds |\n"
        "|---|--:|---|--:|--:|--:|"
    )
    for name in given.optimizers:
        settings = OPTIMIZERS[name]
        for smooth in (True, False):
            for batch in given.batches:
                run = trained({**settings, "batch": batch}, given, smooth=smooth, tests=given.tests)
                subsets = left_out(given, 1)
                _, predicted, actual, _ = measured(run, subsets)
                gauss = GaussNewton(run.network.model, run.network.loss)
                influence = -replay(gauss, run.run, run.ends())
                by_ggn = agreement(np.stack([influence[:, rows].sum(axis=1) for rows in subsets]), actual)[0].mean()
                kind = "GELU, average pooling" if smooth else "ReLU, max-pooling"
                r = verdict_of(run, given)
                words = in_words(predicted, actual)
                print(
                    f"| {name}, {kind} | {batch} | {words} | {by_ggn:.3f} | {r:.2f} | {run.seconds:.1f} |", flush=True
                )


def print_softmax(given: argparse.Namespace) -> None:
    """Leave single digits out of a softmax regression on MNIST that has converged."""
    draw = np.random.default_rng(0)
    data = need("mnist") / "MNIST" / "raw"
    arrays = [read_idx(data / f"{name}-ubyte.gz") for name in NAMES]
    rows = draw.choice(len(arrays[0]), given.images, replace=False)
    train, test = (torch.tensor(each).double().flatten(1) / 255 for each in (arrays[0][rows], arrays[2][: given.tests]))
    labels, truth = torch.tensor(arrays[1][rows]).long(), torch.tensor(arrays[3][: given.tests]).long()
    torch.manual_seed(0)
    network = TrainedNetwork(nn.Sequential(nn.Linear(784, 10)).double().train(), cross_entropy)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "precision": "float64"}
    recipe = Recipe(RecipeConfig(**settings, batch=given.images, epochs=given.epochs), given.images)
    memory = Memory(train, labels)
    run = RecipeRun(recipe, memory, memory)  # type: ignore[arg-type]
    end = train_run(network, run)
    done = Trained(network, run, end, (test, truth), 0.0)
    gradient = network.gradient(end, train, labels)[0] + settings["weight_decay"] * end.parameters
    influence = -replay(network, run, done.ends())
    strongest = np.argsort(-np.abs(influence).max(axis=0))[: given.singles]
    predicted = influence[:, strongest].T
    actual = np.stack([done.without(np.array([row])) for row in strongest])
    slope = (predicted * actual).sum() / (predicted**2).sum()
    r = np.corrcoef(predicted.ravel(), actual.ravel())[0, 1]
    apart = np.abs(predicted - actual).max() / np.abs(actual).max()
    print(f"{given.images:,} digits, {given.epochs} steps of all of them, gradient norm {gradient.norm():.1e}")
    print(
        f"{given.singles} strongest digits left out, {given.tests} tests: r {r:.5f}, slope {slope:.4f}, "
        f"largest difference {apart:.2%} of the largest change"
    )


def print_cost(given: argparse.Namespace) -> None:
    """Time single steps."""
    (train, labels), _ = images(250)
    memory = Memory(train, labels)
    network = TrainedNetwork(build(smooth=True).train(), cross_entropy)
    run = RecipeRun(Recipe(RecipeConfig(**{**SMOOTH, "batch": 250, "epochs": 1}), 250), memory, memory)  # type: ignore[arg-type]
    state, taken = network.first_state(1), run.taken(0)

    def seconds(work: Any, often: int) -> float:
        work()
        before = time.process_time()
        for _ in range(often):
            work()
        return (time.process_time() - before) / often

    step = min(seconds(lambda: take_step(network, state, taken), 10) for _ in range(3))
    for tests in (1, given.tests):
        vectors = torch.randn(tests, network.size)
        back = min(seconds(lambda vectors=vectors: network.products(state, taken, vectors), 2) for _ in range(3))
        total = (step + back) / step
        print(f"{tests} tests: {total:.1f} trainings, {total / tests:.2f} per test (a step takes {1e3 * step:.0f} ms)")


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lds", "recipes", "softmax", "cost"))
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--subsets", type=int)
    parser.add_argument("--tests", type=int)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--singles", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 250])
    given = parser.parse_args()
    torch.set_num_threads(1)
    reuse_freed()
    images_, subsets, tests = {
        "lds": (2000, 50, 20),
        "recipes": (1000, 10, 6),
        "softmax": (5000, 1, 10),
        "cost": (250, 1, 50),
    }[given.what]
    given.images, given.subsets = given.images or images_, given.subsets or subsets
    given.tests = given.tests or tests
    given.epochs = given.epochs or (600 if given.what == "softmax" else 10)
    print(f"torch {torch.__version__}, one thread")
    {"lds": print_lds, "recipes": print_recipes, "softmax": print_softmax, "cost": print_cost}[given.what](given)


if __name__ == "__main__":
    main()
